"""A linear map per group of rows, the matrix products of a mixture of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("liger_ops::grouped_mm", mutates_args=())
def _per_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group], out=out[start:end])
        start = end
    return out


@_per_group.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("liger_ops::grouped_mm_backward", mutates_args=())
def _per_group_backward(
    dout: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.zeros_like(x) if need_dx else x.new_empty(0)
    dweight = torch.zeros_like(weight) if need_dweight else x.new_empty(0)
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            rows = slice(start, end)
            if need_dx:
                torch.mm(dout[rows], weight[group].T, out=dx[rows])
            if need_dweight:
                torch.mm(x[rows].T, dout[rows], out=dweight[group])
        start = end
    return dx, dweight


@_per_group_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_dx: bool, need_dweight: bool):
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(weight) if need_dweight else x.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor):
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _per_group_backward(dout, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None


_per_group.register_autograd(_backward, setup_context=_save)


def _has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` runs these as one kernel that reads the sizes on the device.

    In torch 2.11 that is bfloat16 on compute capability 9.x and 10.x, with rows that start at multiples of
    16 bytes. For everything else it copies the sizes to the host and loops, refuses float64, and does not
    trace other dtypes than bfloat16.
    """
    if not (x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] > 0):
        return False
    if torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return False
    # The gradients run through the same kernel, so both sizes of the weight have to fit.
    return (
        weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        # Dynamo cannot ask for offsets; what a compiled graph computes itself starts at aligned addresses.
        and (torch.compiler.is_compiling() or (weight.storage_offset() % 8 == x.storage_offset() % 8 == 0))
    )


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """Rows ``ends[g-1]`` to ``ends[g]`` of x times the transpose of ``weight[g]``, for every group g.

    One kernel without host synchronisation for bfloat16 on Hopper and data-centre Blackwell GPUs, where rows
    are aligned to 16 bytes. Otherwise a matrix product per group, for which the sizes are read on the host:
    on CUDA that waits for the device once, forward and backward each, and cannot be captured in a graph.

    Args:
        x: (S, in), the rows of each group together.
        weight: (G, out, in), or (G, in, out) when ``transposed``.
        ends: (G,) int32, where each group ends; groups may be empty.

    Returns:
        (S, out). What stands in rows from ``ends[-1]`` on, there and in x's gradient, is not defined.
    """
    matrices = weight if transposed else weight.transpose(-2, -1)
    if _has_grouped_kernel(x, weight):
        return F.grouped_mm(x, matrices, offs=ends)
    return _per_group(x, matrices, ends)
