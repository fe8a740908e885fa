"""Liger's autograd Functions: their names and the argument orders of ``apply``, over the operators.

The operators differentiate themselves, so these classes are no ``torch.autograd.Function``s and have nothing
but ``apply``. Arguments that tune Liger's kernels, and ``in_place``, are accepted and change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import liger_ops.functional as LF
from liger_ops.nn.experts import mixture_of_experts
from liger_ops.transformers import functional

__all__ = [
    "LigerCrossEntropyFunction",
    "LigerFusedAddRMSNormFunction",
    "LigerFusedGateUpSiLUMulFunction",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedMoEFunction",
    "LigerGELUMulFunction",
    "LigerLayerNormFunction",
    "LigerQwen2VLMRopeFunction",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "LigerSiLUMulFunction",
    "fused_linear_cross_entropy_backward",
    "fused_linear_cross_entropy_forward",
]

LossValues = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

_CASTING_MODES = {-1: "none", 0: "llama", 1: "gemma"}


def loss_values(result: Any) -> LossValues:
    """A loss, or a loss with extras, as (loss, z-loss, token accuracy, predicted tokens)."""
    if isinstance(result, Tensor):
        return result, None, None, None
    return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens


class LigerCrossEntropyFunction:
    @staticmethod
    def apply(
        _input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> LossValues:
        """``liger_cross_entropy`` as (loss, z-loss, token accuracy, predicted tokens), the last three None
        where not asked for."""
        return loss_values(
            functional.liger_cross_entropy(
                _input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                lse_square_scale=lse_square_scale,
                softcap=softcap,
                return_z_loss=return_z_loss,
                return_token_accuracy=return_token_accuracy,
                return_predicted_tokens=return_predicted_tokens,
            )
        )


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: str | None = None,
        ce_mode: str | None = None,
        chunk_mem_const: int = 1,
    ) -> LossValues:
        """``liger_fused_linear_cross_entropy`` as (loss, z-loss, token accuracy, predicted tokens), the last
        three None where not asked for."""
        return loss_values(
            functional.liger_fused_linear_cross_entropy(
                _input,
                weight,
                target,
                bias,
                ce_weight,
                ignore_index=ignore_index,
                lse_square_scale=lse_square_scale,
                label_smoothing=label_smoothing,
                reduction=reduction,
                softcap=softcap,
                return_z_loss=return_z_loss,
                accum_dtype=accum_dtype,
                use_token_scaling=use_token_scaling,
                return_token_accuracy=return_token_accuracy,
                return_predicted_tokens=return_predicted_tokens,
            )
        )


def fused_linear_cross_entropy_forward(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> tuple[Tensor | None, ...]:
    """What ``LigerFusedLinearCrossEntropyFunction`` returns, and the gradients of input, weight and bias for
    an upstream gradient of one; None for those that require none."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
        for tensor in (_input, weight, bias)
    ]
    with torch.enable_grad():
        loss, *extras = LigerFusedLinearCrossEntropyFunction.apply(
            leaves[0],
            leaves[1],
            target,
            leaves[2],
            ce_weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            softcap,
            return_z_loss,
            accum_dtype,
            use_token_scaling,
            return_token_accuracy,
            return_predicted_tokens,
        )
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(loss.sum(), wanted) if wanted else ())
    return (
        loss.detach(),
        *extras,
        *(None if leaf is None or not leaf.requires_grad else next(gradients) for leaf in leaves),
    )


def fused_linear_cross_entropy_backward(
    grad_output: Tensor, grad_input: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of ``fused_linear_cross_entropy_forward`` times a 0-d upstream gradient."""
    return tuple(
        None if grad is None else grad * grad_output for grad in (grad_input, grad_weight, grad_bias)
    )


class LigerRMSNormFunction:
    @staticmethod
    def apply(
        X: Tensor,
        W: Tensor | None,
        eps: float,
        offset: float = 0.0,
        casting_mode: str | int = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        """``liger_rms_norm``; ``casting_mode`` may be Liger's number of it."""
        return functional.liger_rms_norm(X, W, eps, offset, _casting_mode(casting_mode))


class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(
        X: Tensor,
        R: Tensor,
        W: Tensor,
        eps: float,
        offset: float = 0.0,
        casting_mode: str | int = "llama",
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``liger_fused_add_rms_norm``: the norm of ``X + R``, and ``X + R``."""
        return functional.liger_fused_add_rms_norm(X, R, W, eps, offset, _casting_mode(casting_mode))


class LigerLayerNormFunction:
    @staticmethod
    def apply(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        """``liger_layer_norm``."""
        return functional.liger_layer_norm(X, W, B, eps)


class LigerRopeFunction:
    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None = None,
        unsqueeze_dim: int = 1,
        rotary_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``liger_rope``."""
        return functional.liger_rope(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


class LigerQwen2VLMRopeFunction:
    @staticmethod
    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int], unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """``liger_qwen2vl_mrope``."""
        return functional.liger_qwen2vl_mrope(q, k, cos, sin, mrope_section, unsqueeze_dim)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
        """``liger_swiglu`` of a scaled gate, the result scaled."""
        out = functional.liger_swiglu(a if gate_multiplier == 1.0 else a * gate_multiplier, b)
        return out if down_multiplier == 1.0 else out * down_multiplier


class LigerFusedGateUpSiLUMulFunction:
    @staticmethod
    def apply(y: Tensor, in_place: bool = False) -> Tensor:
        """``silu(gate) · up`` for a y that holds gate and up one after the other in its last dimension."""
        return LF.swiglu_packed(y)


class LigerGELUMulFunction:
    @staticmethod
    def apply(a: Tensor, b: Tensor) -> Tensor:
        """``liger_geglu``."""
        return functional.liger_geglu(a, b)


class LigerFusedMoEFunction:
    @staticmethod
    def apply(
        x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """SwiGLU experts: tokens (T, H), stacked weights (E, 2I, H) and (E, H, I), and for each token the
        indices and weights (T, K) of its experts."""
        return mixture_of_experts(x, top_k_index, top_k_weights, gate_up_proj, down_proj)


def _casting_mode(mode: str | int) -> str:
    return mode if isinstance(mode, str) else _CASTING_MODES[mode]
