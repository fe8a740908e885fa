"""The experts of a mixture-of-experts layer (Mixtral, Jiang et al., arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import liger_ops.functional as LF

Gated = Callable[[torch.Tensor], torch.Tensor]


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gated: Gated = LF.swiglu_packed,
    transposed: bool = False,
) -> torch.Tensor:
    """For each token n, ``Σ_k weights[n, k] · down_e(gated(gate_up_e(x_n)))`` with e = ``top_k_index[n, k]``.

    Pairs of token and expert are sorted by expert, so that each projection is one grouped matrix product. All
    sums run in a fixed order, forward and backward. Nothing is read on the host where
    ``torch.nn.functional.grouped_mm`` is a kernel: in bfloat16 on CUDA, compute capability 8.0 on, with
    widths that are multiples of 8. Elsewhere the ends of the groups are. Under autocast the products run in
    the autocast dtype.

    Args:
        hidden_states: (N, H).
        top_k_index: (N, K) integers; E and above mean that the pair is somebody else's, and adds nothing.
        top_k_weights: (N, K), of any floating dtype.
        gate_up_proj: (E, 2I, H); with ``transposed`` (E, H, 2I).
        down_proj: (E, H, I); with ``transposed`` (E, I, H).
        gated: from (S, 2I) to (S, I).

    Returns:
        (N, H), of the dtype of ``hidden_states``.
    """
    dtype = gate_up_proj.dtype
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if not transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(-2, -1), down_proj.transpose(-2, -1)

    count = gate_up_proj.shape[0]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True).to(torch.int32)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    place, mine = place.view_as(top_k_index), top_k_index < count

    x = _Dispatch.apply(hidden_states.to(dtype), order, place, mine)
    gate_up = _grouped_mm(x, gate_up_proj.to(dtype), ends)
    y = _grouped_mm(gated(gate_up), down_proj.to(dtype), ends)
    return _Combine.apply(y, top_k_weights, order, place, mine).to(hidden_states.dtype)


class _Dispatch(torch.autograd.Function):
    """Tokens (N, H) to their pairs in the order of experts (S, H).

    ``order`` (S,) holds the pair at each place, ``place`` (N, K) the place of each pair, ``mine`` (N, K)
    whether it is computed here. Indexing's own backward adds rows in an order that it does not promise; this
    one gathers the K gradients of a token.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor, mine: torch.Tensor):
        ctx.save_for_backward(place, mine)
        return x[order // place.shape[1]]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        place, mine = ctx.saved_tensors
        # Places after the last group hold whatever was in memory.
        of_pairs = gradient[place].masked_fill(~mine.unsqueeze(-1), 0)
        return of_pairs.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of a token's pairs: y (S, H) and weights (N, K) to (N, H), in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        weights: torch.Tensor,
        order: torch.Tensor,
        place: torch.Tensor,
        mine: torch.Tensor,
    ):
        ctx.save_for_backward(y, weights, order, place, mine)
        weights = weights.to(torch.promote_types(torch.promote_types(y.dtype, weights.dtype), torch.float32))
        terms = [_Combine.pairs(y, place, mine, k) * weights[:, k, None] for k in range(place.shape[1])]
        return sum(terms[1:], terms[0])

    @staticmethod
    def pairs(y: torch.Tensor, place: torch.Tensor, mine: torch.Tensor, k: int) -> torch.Tensor:
        return y[place[:, k]].masked_fill(~mine[:, k, None], 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        y, weights, order, place, mine = ctx.saved_tensors
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            of_pair = (weights * mine).reshape(-1)[order]
            dy = (gradient[order // place.shape[1]] * of_pair[:, None]).to(y.dtype)
        if ctx.needs_input_grad[1]:
            columns = [(gradient * _Combine.pairs(y, place, mine, k)).sum(-1) for k in range(place.shape[1])]
            dweights = torch.stack(columns, dim=1).to(weights.dtype)
        return dy, dweights, None, None, None


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of x (S, A) up to ``ends[0]`` times ``weight[0]`` (A, B), and so on; undefined after the last."""
    if _has_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return grouped_mm_by_group(x, weight, ends)


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm") or x.shape[0] == 0:
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    if x.dtype == torch.float64:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    # Rows of every operand and result, and of their gradients, have to be multiples of 16 bytes.
    return all(width * x.element_size() % 16 == 0 for width in (x.shape[1], weight.shape[2]))


@torch.library.custom_op("liger_ops::grouped_mm_by_group", mutates_args=())
def grouped_mm_by_group(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One product for each group that is not empty; ``ends`` is read on the host."""
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for group, begin, end in _groups(ends):
        torch.mm(x[begin:end], weight[group], out=out[begin:end])
    return out


def _groups(ends: torch.Tensor) -> list[tuple[int, int, int]]:
    limits = [0, *ends.tolist()]
    return [(i, a, b) for i, (a, b) in enumerate(zip(limits, limits[1:], strict=False)) if a < b]


@grouped_mm_by_group.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("liger_ops::grouped_mm_by_group_backward", mutates_args=())
def _grouped_mm_by_group_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = torch.zeros_like(x), torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    for group, begin, end in _groups(ends):
        torch.mm(gradient[begin:end], weight[group].t(), out=dx[begin:end])
        torch.mm(x[begin:end].t(), gradient[begin:end], out=dweight[group])
    return dx, dweight


@_grouped_mm_by_group_backward.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor):
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor):
    return *_grouped_mm_by_group_backward(gradient, *ctx.saved_tensors), None


grouped_mm_by_group.register_autograd(_backward, setup_context=_save)


class LigerExperts(nn.Module):
    """All experts of a layer, in stacked parameters.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size`` (or ``moe_intermediate_size``, which
        wins),
            ``num_local_experts`` (or ``num_experts``) and ``hidden_act``.

    Raises:
        ValueError: when ``config.hidden_act`` is not ``"silu"`` or ``"swish"``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(
                f"LigerExperts computes silu(gate) * up, but config.hidden_act is {config.hidden_act!r}"
            )
        self.num_experts = getattr(config, "num_local_experts", None) or config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What ``nn.Linear`` does for each expert: uniform within ±1/√(width of the input)."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(N, hidden_size) tokens, (N, K) experts of each and their weights, to (N, hidden_size)."""
        return experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
