"""Forward of a text-only ``…ForCausalLM``: where possible, the loss straight from the hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.loss.loss_utils import ForCausalLMLoss

from liger_ops.functional import CrossEntropyOutput
from liger_ops.transformers.forwards.lm_head import linear_head
from liger_ops.transformers.forwards.loss import (
    LOSS_ARGUMENTS,
    causal_lm_loss,
    fused_causal_lm_loss,
    logits_loss,
    next_token_targets,
)
from liger_ops.transformers.forwards.outputs import LigerCausalLMOutputWithPast

# Also keeps one row per sample for a 2-D `logits_to_keep`; newer versions of transformers have it.
_slice_logits_to_keep = getattr(modeling_utils, "slice_logits_to_keep", None)


def _kept_positions(x: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The rows (dimension 1) of (B, S, …) for which logits are wanted; 0 keeps all."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    if _slice_logits_to_keep is not None:
        return _slice_logits_to_keep(x, logits_to_keep)
    return x[:, logits_to_keep]


def uses_stock_loss(model: nn.Module) -> bool:
    """Whether the model's loss function is transformers' next-token cross entropy, or ours in its place."""
    loss_function = model.loss_function
    return loss_function is ForCausalLMLoss or loss_function is causal_lm_loss


def forward(
    self: nn.Module,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values: Any | None = None,
    inputs_embeds: torch.FloatTensor | None = None,
    labels: torch.LongTensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    *,
    skip_logits: bool | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> LigerCausalLMOutputWithPast | tuple:
    """The stock forward's arguments and results, with these additions.

    Args:
        labels: (B, S). In training mode the loss is computed without logits and ``output.logits`` is None.
        shift_labels: (B, S), targets that are shifted already. They win over ``labels``; given alone they
            produce a loss beside the logits.
        skip_logits: True computes the loss without logits in evaluation mode too, and is ignored when there
            is nothing to compute a loss from. False always returns logits. None skips them when training on
            labels.
        logits_to_keep: with labels, the loss is over the kept positions.
        num_items_in_batch: divides the summed loss: a number or a tensor of one element on any device.
        ignore_index, label_smoothing, lse_square_scale, accum_dtype, use_token_scaling: as in
            ``liger_fused_linear_cross_entropy``.
        return_token_accuracy, return_predicted_tokens, return_z_loss: fill the result's fields of those names
            where there is a loss.
        return_dict: False returns a tuple. It starts with (loss, None) when logits were skipped, so that what
            follows keeps its position.

    Logits are computed in any case when the head is more than a linear map (``lm_head.py`` says when), or
    when ``model.loss_function`` was set to a function of the user's, which is then called.
    """
    loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
    shift_labels = loss_arguments.get("shift_labels")

    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        return_dict=True,
        **kwargs,
    )
    hidden_states = _kept_positions(outputs.last_hidden_state, logits_to_keep)

    stock_loss = uses_stock_loss(self)
    targets = None
    if stock_loss and (labels is not None or shift_labels is not None):
        loss_arguments.pop("shift_labels", None)
        targets = shift_labels
        if shift_labels is None:
            targets = next_token_targets(labels, loss_arguments.get("ignore_index", -100))
        # Shifted labels may have been cut to the kept positions by the caller, as the stock loss requires.
        if shift_labels is None or shift_labels.shape[:2] != hidden_states.shape[:2]:
            targets = _kept_positions(targets.unsqueeze(-1), logits_to_keep).squeeze(-1)
    if skip_logits is None:
        skip_logits = self.training and labels is not None

    logits = None
    result = CrossEntropyOutput(None)
    head = linear_head(self.lm_head) if skip_logits and targets is not None else None
    if head is not None and head.obstacle is None:
        result = fused_causal_lm_loss(hidden_states, head.weight, head.bias, targets, **loss_arguments)
    else:
        logits = self.lm_head(hidden_states)
        if targets is not None:
            loss_arguments.pop("accum_dtype", None)
            result = logits_loss(logits, targets, **loss_arguments)
        elif labels is not None:
            result.loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments, **kwargs
            )

    output = LigerCausalLMOutputWithPast(
        loss=result.loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        token_accuracy=result.token_accuracy,
        predicted_tokens=result.predicted_tokens,
        z_loss=result.z_loss,
    )
    if return_dict is None:
        return_dict = self.config.return_dict
    if return_dict:
        return output
    values = output.to_tuple()
    return values if logits is not None else (result.loss, None, *values[1:])
