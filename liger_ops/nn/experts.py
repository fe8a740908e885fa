"""The experts of a mixture: every token through its own few feed-forward blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import liger_ops.functional as LF
from liger_ops.nn._grouped_linear import grouped_linear
from liger_ops.nn._lean import make_again
from liger_ops.nn.swiglu import check_silu


def _gather(x: Tensor, order: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)[order // used.shape[1]]


class _Dispatch(torch.autograd.Function):
    """Copies of the tokens, one per slot, in the order of the experts.

    The gradient of a token is the sum over its slots, gathered in a fixed order: indexing's own backward
    scatters, in no fixed order on CUDA. Slots without an expert add nothing, whatever their rows hold.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(place, used)
        ctx.dtype = x.dtype
        return _gather(x, order, used, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        place, used = ctx.saved_tensors
        slots = gradient[place].view(*used.shape[:2], gradient.shape[-1])
        slots = torch.where(used, slots, slots.new_zeros(()))
        return slots.sum(1, dtype=ctx.dtype), None, None, None, None


class _Permute(torch.autograd.Function):
    """``x[index]`` for a permutation, whose gradient is a gather by the inverse permutation."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that ``linear`` would compute in: autocast's, where that is on."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def mixture_of_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor] = LF.swiglu_packed,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    normalise: Callable[[Tensor], Tensor] | None = None,
    clear_unused: bool = False,
) -> Tensor:
    """``Σ_k w_k · down_{e_k}(activation(gate_up_{e_k}(x)))``, the sum over each token's K chosen experts e_k.

    Slots are sorted by expert (stably), so that each expert is one block of a grouped matrix product; see
    ``grouped_linear`` for where that is one kernel that never waits for the host. Weighting and sum run in
    float32 (float64 for float64) and are rounded once. Values and gradients are bitwise reproducible. Under
    autocast the products run in the autocast dtype, elsewhere in that of the projections.

    Args:
        hidden_states: (N, H).
        top_k_index: (N, K) integers, the experts of each token. A slot with an index of E or more (the
            sentinel of expert parallelism: another rank's expert) contributes nothing and gets no gradient.
        top_k_weights: (N, K).
        gate_up_proj: (E, 2I, H), the gate's rows first; or (E, I, H) for experts without a gate.
        down_proj: (E, H, I).
        activation: from (S, 2I) to (S, I), row by row.
        gate_up_bias, down_bias: (E, 2I) and (E, H), or None.
        transposed: the projections are (E, H, 2I) and (E, I, H).
        normalise: applied to (S, H), row by row, before the weights.
        clear_unused: whether ``activation`` or ``normalise`` has parameters. Rows of unused slots may hold
            anything, NaN included, which would enter the gradients of parameters shared by all rows.

    Returns:
        (N, H) of hidden_states' dtype.
    """
    experts = gate_up_proj.shape[0]
    flat = top_k_index.reshape(-1)
    sorted_experts, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0], device=flat.device))
    bounds = torch.arange(experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(sorted_experts, bounds, right=True, out_int32=True)
    used = (top_k_index < experts).unsqueeze(-1)

    dtype = _compute_dtype(gate_up_proj)
    clear_unused = clear_unused or gate_up_bias is not None or down_bias is not None

    def cleared(rows: Tensor) -> Tensor:
        if not clear_unused:
            return rows
        return torch.where((sorted_experts < experts).unsqueeze(-1), rows, rows.new_zeros(()))

    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(rows.to(dtype), weight.to(dtype), ends, transposed)

    def add_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            # A product with one-hot rows: the backward pass of bias[experts] adds in no fixed order on CUDA.
            chosen = (sorted_experts.unsqueeze(-1) == bounds).to(dtype)
            rows = rows + chosen @ bias.to(dtype)
        return cleared(rows)

    rows = multiply(_Dispatch.apply(hidden_states, order, place, used, dtype), gate_up_proj)
    make_again(rows, hidden_states, _gather, order, used, dtype)
    rows = cleared(activation(add_bias(rows, gate_up_bias)))
    rows = add_bias(multiply(rows, down_proj), down_bias)
    if normalise is not None:
        rows = normalise(rows)
    rows = _Permute.apply(rows, place, order).view(*top_k_index.shape, rows.shape[-1])
    # Not a product with 0: rows of unused slots may hold anything, and 0 · NaN is NaN.
    rows = torch.where(used, rows, rows.new_zeros(()))
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    return (rows * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


class LigerExperts(nn.Module):
    """The experts of Mixtral-like models in transformers 5, with all their weights in two parameters.

    Args:
        config: an object with ``num_local_experts`` or ``num_experts``, ``hidden_size``,
            ``moe_intermediate_size`` or ``intermediate_size``, and ``hidden_act``.

    Raises:
        ValueError: when ``config.hidden_act`` is not ``"silu"`` or ``"swish"``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_silu("LigerExperts", config)
        self.config = config
        self.num_experts = _first(config, "num_local_experts", "num_experts")
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = _first(config, "moe_intermediate_size", "intermediate_size")
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as ``torch.nn.Linear`` initialises itself."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H) tokens, (N, K) experts and (N, K) weights to (N, H)."""
        return mixture_of_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        )

    def extra_repr(self) -> str:
        return f"{self.num_experts}, hidden_size={self.hidden_dim}, intermediate_size={self.intermediate_dim}"


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(f"the configuration has none of {', '.join(names)}")
