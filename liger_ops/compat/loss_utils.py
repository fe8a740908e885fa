"""The loss function that Liger's patched heads call, for code that calls it or imports its name."""

from __future__ import annotations

from typing import Any

import torch

from liger_ops.compat.ops import loss_values
from liger_ops.transformers.forwards.loss import fused_causal_lm_loss, next_token_targets

__all__ = ["LigerForCausalLMLoss", "unpack_cross_entropy_result"]

unpack_cross_entropy_result = loss_values

_OPTIONS = ("label_smoothing", "lse_square_scale", "accum_dtype")


def LigerForCausalLMLoss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    hidden_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Next-token cross entropy of ``hidden_states @ lm_head_weightᵀ``, without the logits.

    Args:
        hidden_states: (B, S, H), or (T, H) with labels (T,).
        lm_head_weight: (V, H).
        labels: (B, S) int64, shifted here. Not used when ``shift_labels`` is given.
        hidden_size: H, as Liger's callers pass it.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.
        **kwargs: ``label_smoothing``, ``lse_square_scale``, ``accum_dtype`` as in
            ``liger_fused_linear_cross_entropy``; others are dropped, because callers pass on whatever the
            model was called with.
    """
    options = {
        name: kwargs[name]
        for name in ("label_smoothing", "lse_square_scale", "accum_dtype")
        if name in kwargs
    }
    return fused_causal_lm_loss(
        hidden_states,
        lm_head_weight,
        None,
        next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        **options,
    )
