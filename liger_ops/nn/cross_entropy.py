"""Cross entropy over logits as a module."""

from __future__ import annotations

import torch
from torch import nn

import liger_ops.functional as LF
from liger_ops.nn._loss_options import check_loss_options, in_dtype


class LigerCrossEntropyLoss(nn.Module):
    """Cross entropy with optional class weights, label smoothing, z-loss and soft-capped logits.

    Args:
        weight: (V,) class weights, or None.
        ignore_index: targets with this value contribute neither loss nor gradient.
        lse_square_scale: factor of the z-loss ``logsumexp²``.
        label_smoothing: in [0, 1], as in ``torch.nn.CrossEntropyLoss``.
        reduction: ``"mean"`` over the targets that are not ignored (0 when all are), ``"sum"`` or ``"none"``.
        softcap: ``c`` in ``c·tanh(logits/c)``, or None.
        return_z_loss, return_token_accuracy, return_predicted_tokens: make forward return a
            ``liger_ops.functional.CrossEntropyOutput`` with the fields asked for.

    Raises:
        ValueError: for an option outside its range.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        check_loss_options(reduction, label_smoothing, softcap)
        # A buffer, as in torch.nn.CrossEntropyLoss, so that it moves with `.to()`.
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: torch.Tensor, target: torch.Tensor) -> torch.Tensor | LF.CrossEntropyOutput:
        """Logits (T, V) and int64 targets (T,) to the loss, a scalar or (T,), in the logits' dtype."""
        result = LF.cross_entropy(
            _input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
            return_predicted_tokens=self.return_predicted_tokens,
        )
        return in_dtype(result, _input.dtype)
