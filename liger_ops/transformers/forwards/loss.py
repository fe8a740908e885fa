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


def is_dtensor(tensor: torch.Tensor) -> bool:
    # By name: where nobody imported DTensor, nothing is one.
    return type(tensor).__name__ == "DTensor"


def _class_shard(tensor: torch.Tensor, dim: int) -> dict[str, Any]:
    """The process group, the first class here and the number of classes of a DTensor on a 1-D mesh."""
    mesh, classes = tensor.device_mesh, tensor.shape[dim]
    # As DTensor splits: as many whole chunks as there are.
    chunk = -(-classes // mesh.size())
    start = min(mesh.get_local_rank() * chunk, classes)
    return dict(group=mesh.get_group(), vocab_start=start, vocab_size=classes)


def _sharded_logits_loss(
    logits: Any,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | float | None,
    ignore_index: int,
    **options: Any,
) -> CrossEntropyOutput:
    """Cross entropy of a DTensor (B, S, V), without gathering classes that are in shards."""
    last = logits.dim() - 1
    if logits.device_mesh.ndim != 1 or not logits.placements[0].is_shard(last):
        return logits_loss(logits.full_tensor(), targets, num_items, ignore_index, **options)
    from liger_ops.distributed import vocab_parallel_cross_entropy

    local = logits.to_local()
    result = vocab_parallel_cross_entropy(
        local.reshape(-1, local.shape[-1]),
        targets.reshape(-1).to(local.device),
        **_class_shard(logits, last),
        ignore_index=ignore_index,
        num_items=num_items,
        **options,
    )
    return _on_tokens(result, targets)


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
    if is_dtensor(logits):
        return _sharded_logits_loss(logits, targets, num_items, ignore_index, **options)
    return _on_tokens(
        LF.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            num_items=num_items,
            **options,
        ),
        targets,
    )


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
    if is_dtensor(weight):
        return _vocab_parallel_loss(hidden_states, weight, bias, targets, num_items_in_batch, **options)
    result = LF.fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        targets.reshape(-1).to(hidden_states.device),
        bias,
        num_items=single_number(num_items_in_batch),
        **options,
    )
    return _on_tokens(result, targets)


def _vocab_parallel_loss(
    hidden_states: Any,
    weight: Any,
    bias: Any,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    **options: Any,
) -> CrossEntropyOutput:
    """``fused_causal_lm_loss`` with a weight (V, H) that is a DTensor, from this process's shard of it."""
    from torch.distributed.tensor import Partial, Replicate

    from liger_ops.distributed import vocab_parallel_fused_linear_cross_entropy
    from liger_ops.transformers.forwards.lm_head import serves

    if not serves(weight):
        raise NotImplementedError(
            f"liger_ops: no loss can be computed from a lm_head whose weight has placements "
            f"{weight.placements} on {weight.device_mesh}: shard its rows over one dimension "
            "(ColwiseParallel)"
        )
    replicated = weight.placements[0].is_replicate()
    reduce_input_gradient = True
    if is_dtensor(hidden_states):
        hidden_states = hidden_states.redistribute(placements=[Replicate()])
        gradient = Replicate() if replicated else Partial()
        hidden_states = hidden_states.to_local(grad_placements=[gradient])
        reduce_input_gradient = False
    local, local_bias = weight.to_local(), bias.to_local() if is_dtensor(bias) else bias
    if replicated:
        return fused_causal_lm_loss(hidden_states, local, local_bias, targets, num_items_in_batch, **options)
    result = vocab_parallel_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        local,
        targets.reshape(-1).to(hidden_states.device),
        bias=local_bias,
        **_class_shard(weight, 0),
        num_items=single_number(num_items_in_batch),
        reduce_input_gradient=reduce_input_gradient,
        **options,
    )
    return _on_tokens(result, targets)
