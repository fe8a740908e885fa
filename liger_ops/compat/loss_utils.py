"""The loss function that Liger's patched heads call, for code that calls it or imports its name."""

from __future__ import annotations

from typing import Any

import torch

from liger_ops.compat.ops import loss_values
from liger_ops.functional import CrossEntropyOutput
from liger_ops.transformers.forwards.loss import fused_causal_lm_loss, next_token_targets

__all__ = ["LigerForCausalLMLoss", "unpack_cross_entropy_result"]

unpack_cross_entropy_result = loss_values

_OPTIONS = ("label_smoothing", "lse_square_scale", "accum_dtype", "use_token_scaling", "return_z_loss")


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
) -> torch.Tensor | CrossEntropyOutput:
    """Next-token cross entropy of ``hidden_states @ lm_head_weightᵀ``, without the logits.

    Args:
        hidden_states: (B, S, H), or (T, H) with labels (T,).
        lm_head_weight: (V, H).
        labels: (B, S) int64, shifted here. Not used when ``shift_labels`` is given.
        hidden_size: H, as Liger's callers pass it.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.
        **kwargs: options of ``liger_fused_linear_cross_entropy``; others are dropped, because callers pass on
            whatever the model was called with.

    Returns:
        0-d fp32 loss; a ``CrossEntropyOutput`` with one of the ``return_*`` flags.
    """
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    result = fused_causal_lm_loss(
        hidden_states,
        lm_head_weight,
        None,
        next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **options,
    )
    plain = not (return_token_accuracy or return_predicted_tokens or options.get("return_z_loss"))
    return result.loss if plain else result
