"""What `torch.utils.flop_counter` counts for the operators that multiply matrices.

The counter sees the operators below autograd, so a training step of fused linear cross entropy is one call of
the operator that computes the loss and the gradients, with flags for the ones that somebody asked for.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

_liger = torch.ops.liger


def _products(input_shape: tuple[int, ...], weight_shape: tuple[int, ...], count: int) -> int:
    tokens, hidden = input_shape
    return count * 2 * tokens * hidden * weight_shape[0]


@register_flop_formula(_liger.fused_linear_cross_entropy)
def _loss(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _products(input_shape, weight_shape, 1)


@register_flop_formula(_liger.fused_linear_cross_entropy_forward)
def _loss_and_gradients(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    need_dinput, need_dweight, _ = args[-3:]
    return _products(input_shape, weight_shape, 1 + need_dinput + need_dweight)


@register_flop_formula(_liger.fused_linear_cross_entropy_backward)
def _gradients(dloss_shape, input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    need_dinput, need_dweight, _ = args[-3:]
    # The logits are computed again.
    return _products(input_shape, weight_shape, 1 + need_dinput + need_dweight)
