"""The losses of all heads, straight from the hidden states.

``loss_k = CE(head_k(h_t), label_{t+1+k})`` (Cai et al. 2024, eq. 1); ``k = 0`` is the base's own head. The
targets are shifted and padded with ``ignore_index``, so that every head reads the same hidden states, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import liger_ops.functional as LF
from liger_ops._numbers import one_number
from liger_ops.medusa.heads import HeadTensors, autocast_dtype, residual_block


class MedusaLoss(NamedTuple):
    """What ``medusa_loss`` returns.

    Attributes:
        loss: 0-d float32, weighed and summed, differentiable.
        losses: (heads,) float32 without gradient: each head's own loss, not weighed.
    """

    loss: Tensor
    losses: Tensor


def medusa_loss(
    hidden_states: Tensor,
    heads: Sequence[HeadTensors],
    targets: Tensor,
    coefficients: Tensor,
    *,
    shifts: Sequence[int] | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    accum_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> MedusaLoss:
    """``Σ_k coefficients_k · CE(head_k(hidden_states), targets shifted by k)`` without logits.

    Heads are taken one after the other through one workspace. Where a head's gradients are wanted they are
    computed along with its loss, the residual blocks' included, and the hidden states' are summed in float32
    before the next head begins: beyond the parameters' gradients, the memory taken does not depend on the
    number of heads. Two cases are left to autograd, which keeps two tensors of the hidden states' size per
    head until backward: float16, whose gradients would underflow before the upstream gradient (the scale of a
    ``GradScaler``) is known, and the forward that ``torch.compile`` traces.

    Args:
        hidden_states: (B, S, H) or (S, H).
        heads: parameters of each head, ``MedusaHeads.tensors()``. The base's own is one without blocks.
        targets: (B, S) or (S,) int64, shifted for the base's head; any device.
        coefficients: (heads,) float32 on the hidden states' device; no gradient flows to them.
        shifts: further positions by which each head looks ahead; None is ``1, 2, …``.
        ignore_index: targets of this value count for nothing; what is shifted in at the end has it. A
            sequence shorter than a head's shift gives it no target: loss 0 and zero gradients.
        num_items: divides every head's summed loss; None takes each head's mean over the targets that count.
            A number or a tensor of one element on any device; never read on the host.
        softcap, accum_dtype, workspace_bytes: as in ``liger_ops.functional.fused_linear_cross_entropy``.

    Raises:
        ValueError: for shapes or numbers of heads, coefficients and shifts that do not fit.
        NotImplementedError: for coefficients that require a gradient.
    """
    if hidden_states.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have shape {tuple(hidden_states.shape[:-1])} (hidden_states without the last "
            f"dimension), got {tuple(targets.shape)}"
        )
    if shifts is None:
        shifts = range(1, len(heads) + 1)
    if len(shifts) != len(heads) or coefficients.shape != (len(heads),):
        raise ValueError(
            f"{len(heads)} heads need as many coefficients and shifts, got coefficients of shape "
            f"{tuple(coefficients.shape)} and {len(shifts)} shifts"
        )
    if coefficients.requires_grad:
        raise NotImplementedError(
            "the gradient with respect to coefficients is not implemented; detach() them"
        )
    targets = targets.to(hidden_states.device)
    options = dict(
        ignore_index=ignore_index,
        num_items=one_number(num_items, hidden_states.device),  # once for all heads
        softcap=softcap,
        accum_dtype=accum_dtype,
        workspace_bytes=workspace_bytes,
    )

    def head_loss(index: int, x: Tensor, head: HeadTensors) -> Tensor:
        shifted = pad(targets, (0, shifts[index]), value=ignore_index)[..., shifts[index] :]
        # Heads may be kept in float32 beside a base in 16 bits; autocast sees to the dtypes by itself.
        if autocast_dtype(x) is None:
            x = x.to(head.weight.dtype)
        for weight, bias in head.blocks:
            x = residual_block(x, weight, bias)
        return LF.fused_linear_cross_entropy(
            x.reshape(-1, x.shape[-1]), head.weight, shifted.reshape(-1), head.bias, **options
        )

    if _accumulates(hidden_states, heads):
        flat = [tensor for head in heads for tensor in head.flat()]
        loss, losses = _AccumulatedHeads.apply(
            head_loss, [len(head.flat()) for head in heads], hidden_states, coefficients, *flat
        )
        return MedusaLoss(loss, losses)
    losses = torch.stack([head_loss(i, hidden_states, head) for i, head in enumerate(heads)])
    return MedusaLoss((losses * coefficients).sum(), losses.detach())


def _accumulates(hidden_states: Tensor, heads: Sequence[HeadTensors]) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or hidden_states.is_meta:
        return False
    cast = autocast_dtype(hidden_states)
    dtypes = {hidden_states.dtype, *(cast or head.weight.dtype for head in heads)}
    tensors = (hidden_states, *(tensor for head in heads for tensor in head.flat()))
    return torch.float16 not in dtypes and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


class _AccumulatedHeads(torch.autograd.Function):
    """Each head's backward right after its forward, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        head_loss: Callable[[int, Tensor, HeadTensors], Tensor],
        sizes: list[int],
        hidden_states: Tensor,
        coefficients: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[4:]
        needs_hidden = ctx.needs_input_grad[2]
        losses = []
        gradients: list[Tensor | None] = []
        total = None
        start = 0
        for index, size in enumerate(sizes):
            wanted = needs[start : start + size]
            # Leaves of a graph of this head alone: hooks and gradients of the parameters belong to the outer.
            with torch.enable_grad():
                x = hidden_states.detach().requires_grad_(needs_hidden)
                leaves = [
                    None if tensor is None else tensor.detach().requires_grad_(want)
                    for tensor, want in zip(flat[start : start + size], wanted, strict=True)
                ]
                loss = head_loss(index, x, HeadTensors.of_flat(leaves))
            start += size
            losses.append(loss.detach())
            inputs = [x] * needs_hidden + [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
            if not inputs:
                gradients += [None] * size
                continue
            with torch.autocast(hidden_states.device.type, enabled=False):
                results = list(torch.autograd.grad(loss, inputs, coefficients[index].to(loss.dtype)))
            del x, leaves, loss, inputs
            if needs_hidden:
                gradient = results.pop(0)
                if len(sizes) == 1:
                    total = gradient
                elif total is None:
                    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                else:
                    total += gradient
                del gradient
            gradients += [results.pop(0) if want else None for want in wanted]
        if total is not None:
            total = total.to(hidden_states.dtype)
        ctx.save_for_backward(total, *gradients)
        each = torch.stack(losses)
        ctx.mark_non_differentiable(each)
        ctx.set_materialize_grads(False)
        return (each * coefficients).sum(), each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        total, *gradients = ctx.saved_tensors
        if upstream is None:
            return (None,) * (4 + len(gradients))
        # The graph's last backward may have the saved gradients for its own, and a factor of 1 costs nothing.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            factor = upstream.to(torch.promote_types(gradient.dtype, torch.float32))
            if keep or not gradient.is_contiguous():
                return torch.ops.liger.cross_entropy_scale(gradient, factor)
            torch.ops.liger.cross_entropy_scale_(gradient, factor)
            return gradient

        return None, None, scaled(total), None, *map(scaled, gradients)
