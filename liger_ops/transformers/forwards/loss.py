"""The next-token losses that patched heads use: from logits, and straight from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

import liger_ops.functional as LF
from liger_ops.functional import CrossEntropyOutput

# Keyword arguments of a head's forward that belong to the loss and not to the backbone.
LOSS_ARGUMENTS = (
    "num_items_in_batch",
    "shift_labels",
    "ignore_index",
    "label_smoothing",
    "lse_square_scale",
    "accum_dtype",
    "use_token_scaling",
    "return_z_loss",
    "return_token_accuracy",
    "return_predicted_tokens",
)


def next_token_targets(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels (B, S) to targets (B, S): each position's is the next label, and the last one has none."""
    return pad(labels, (0, 1), value=ignore_index)[..., 1:]


def single_number(num_items: torch.Tensor | int | float | None) -> torch.Tensor | int | float | None:
    # nn.DataParallel needs a dimension to scatter, so the Trainer expands the number to (devices, 1).
    if isinstance(num_items, torch.Tensor) and num_items.dim() > 0:
        return num_items.flatten()[0]
    return num_items


def _on_tokens(result: torch.Tensor | CrossEntropyOutput, targets: torch.Tensor) -> CrossEntropyOutput:
    """What an operator returned for flattened targets, with one prediction for each of ``targets``."""
    if isinstance(result, torch.Tensor):
        return CrossEntropyOutput(result)
    if result.predicted_tokens is not None:
        result.predicted_tokens = result.predicted_tokens.view(targets.shape)
    return result


def logits_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> CrossEntropyOutput:
    """Cross entropy of logits (B, S, V), of any floating dtype; no fp32 copy of them is made.

    Args:
        targets: (B, S) int64, shifted already; any device.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.
        options: of ``liger_ops.functional.cross_entropy``.

    Returns:
        0-d fp32 loss and what else was asked for; predicted tokens are (B, S).
    """
    num_items = single_number(num_items_in_batch)
    result = _on_tokens(
        LF.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items is None else "sum",
            **options,
        ),
        targets,
    )
    if num_items is None:
        return result
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(logits.device, non_blocking=True)
    result.loss = result.loss / num_items
    if result.z_loss is not None:
        result.z_loss = result.z_loss / num_items
    return result


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    use_token_scaling: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Next-token cross entropy, a drop-in for transformers' ``ForCausalLMLoss``.

    Args:
        logits: (B, S, V).
        labels: (B, S) int64, shifted here. Not used when ``shift_labels`` is given.
        vocab_size: V, as transformers passes it; the logits' own width is used.
        shift_labels: (B, S) targets that are shifted already.
        num_items_in_batch, ignore_index, label_smoothing, lse_square_scale, use_token_scaling: as in
            ``logits_loss``.

    Returns:
        0-d fp32 loss. A stock forward has no place for more, so the ``return_*`` options have no effect.
    """
    targets = next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels
    return logits_loss(
        logits,
        targets,
        num_items_in_batch,
        ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        use_token_scaling=use_token_scaling,
    ).loss


def fused_causal_lm_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **options: Any,
) -> CrossEntropyOutput:
    """Cross entropy of ``hidden_states @ weightᵀ + bias`` without the logits.

    Args:
        hidden_states: (B, S, H).
        weight, bias: (V, H) and (V,) of the language-model head.
        targets: (B, S) int64, shifted already; any device.
        num_items_in_batch: divides the summed loss; without it the mean over targets that are not ignored is
            taken.
        options: of ``liger_ops.functional.fused_linear_cross_entropy``.

    Returns:
        0-d fp32 loss and what else was asked for; predicted tokens are (B, S).
    """
    result = LF.fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        targets.reshape(-1).to(hidden_states.device),
        bias,
        num_items=single_number(num_items_in_batch),
        **options,
    )
    return _on_tokens(result, targets)
