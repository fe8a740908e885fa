"""Linear projection and cross entropy in one module that never holds all logits."""

from __future__ import annotations

import torch
from torch import nn

import liger_ops.functional as LF
from liger_ops.nn._loss_options import check_loss_options


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy of ``input @ weightᵀ + bias``, computed chunk by chunk.

    Args:
        ce_weight: (V,) class weights, or None.
        ignore_index: targets with this value contribute neither loss nor gradient.
        lse_square_scale: factor of the z-loss ``logsumexp²``.
        label_smoothing: in [0, 1].
        reduction: ``"mean"`` over the targets that are not ignored (0 when all are), ``"sum"`` or ``"none"``.
        softcap: ``c`` in ``c·tanh(logits/c)``, or None.
        accum_dtype: dtype in which the weight's gradient is accumulated over chunks; None is the weight's
            own.
        use_token_scaling: multiplies each token's loss by the probability of its target, as a constant.
        return_z_loss, return_token_accuracy, return_predicted_tokens: make forward return a
            ``liger_ops.functional.CrossEntropyOutput`` with the fields asked for.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self,
        ce_weight: torch.Tensor | None = None,
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
    ) -> None:
        super().__init__()
        check_loss_options(reduction, label_smoothing, softcap)
        self.register_buffer("ce_weight", ce_weight)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self,
        lin_weight: torch.Tensor,
        _input: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | LF.CrossEntropyOutput:
        """Weight (V, H), input (T, H), int64 targets (T,), bias (V,) to the fp32 loss, 0-d or (T,)."""
        return LF.fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            accum_dtype=self.accum_dtype,
            use_token_scaling=self.use_token_scaling,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
            return_predicted_tokens=self.return_predicted_tokens,
        )
