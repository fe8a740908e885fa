"""The next-token losses that patched heads use: from logits, and straight from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

import liger_ops.functional as LF

# Keyword arguments of a head's forward that belong to the loss and not to the backbone.
LOSS_ARGUMENTS = (
    "num_items_in_batch",
    "shift_labels",
    "ignore_index",
    "label_smoothing",
    "lse_square_scale",
    "accum_dtype",
)

# Liger accepts these too. Ignored, the output would lack what the caller reads, so they are refused.
UNAVAILABLE_ARGUMENTS = (
    "use_token_scaling",
    "return_token_accuracy",
    "return_predicted_tokens",
    "return_z_loss",
)


def next_token_targets(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels (B, S) to targets (B, S): each position's is the next label, and the last one has none."""
    return pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _single_number(num_items: torch.Tensor | int | float | None) -> torch.Tensor | int | float | None:
    # nn.DataParallel needs a dimension to scatter, so the Trainer expands the number to (devices, 1).
    if isinstance(num_items, torch.Tensor) and num_items.dim() > 0:
        return num_items.flatten()[0]
    return num_items


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Next-token cross entropy, a drop-in for transformers' ``ForCausalLMLoss``.

    Args:
        logits: (B, S, V), any floating dtype; no fp32 copy of them is made.
        labels: (B, S) int64, shifted here. Not used when ``shift_labels`` is given.
        vocab_size: V, as transformers passes it; the logits' own width is used.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.
        shift_labels: (B, S) targets that are shifted already.

    Returns:
        0-d fp32 loss.
    """
    targets = next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels
    num_items = _single_number(num_items_in_batch)
    loss = LF.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items is None else "sum",
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
    )
    if num_items is None:
        return loss
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(loss.device, non_blocking=True)
    return loss / num_items


def fused_causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    accum_dtype: torch.dtype | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Cross entropy of ``hidden_states @ weightᵀ + bias`` without the logits.

    Args:
        hidden_states: (B, S, H).
        weight, bias: (V, H) and (V,) of the language-model head.
        targets: (B, S) int64, shifted already; any device.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.

    Returns:
        0-d fp32 loss.
    """
    return LF.fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        targets.reshape(-1).to(hidden_states.device),
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        num_items=_single_number(num_items_in_batch),
        accum_dtype=accum_dtype,
    )
