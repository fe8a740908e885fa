"""Forward of a model with a next-token loss: where possible, the loss straight from the hidden states."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import modeling_utils
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from liger_ops.functional import CrossEntropyOutput
from liger_ops.transformers.forwards.lm_head import linear_head, loss_in_call
from liger_ops.transformers.forwards.loss import (
    LOSS_ARGUMENTS,
    causal_lm_loss,
    fused_causal_lm_loss,
    logits_loss,
    next_token_targets,
)
from liger_ops.transformers.forwards.outputs import with_loss_details

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


def output_class(forward: Callable[..., Any]) -> type[ModelOutput]:
    """The output class in a forward's return annotation: it changes from model to model and with versions."""
    annotation = inspect.signature(forward).return_annotation
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, ModelOutput):
            return candidate
    return CausalLMOutputWithPast


def build(
    original: Callable[..., Any],
    softcap: str | None = None,
    router_loss: str | None = None,
    float_logits: bool = False,
) -> Callable[..., Any]:
    """Replacement for the forward of a class with a backbone ``model`` and a head ``lm_head``.

    ``original``, the stock forward, says how arguments are called and what class is returned; all arguments
    but those of the head go to the backbone. ``parts.CausalLMHead`` describes the others.
    """
    names = list(inspect.signature(original).parameters)[1:]
    output = with_loss_details(output_class(original))
    output_fields = [field.name for field in fields(output)]
    balance = router_loss and getattr(sys.modules[original.__module__], router_loss)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> ModelOutput | tuple:
        """The stock forward's arguments and results, with these additions.

        Args:
            labels: (B, S). In training mode the loss is computed without logits and ``output.logits`` is
                None.
            shift_labels: (B, S), targets that are shifted already. They win over ``labels``; given alone they
                produce a loss beside the logits.
            skip_logits: True computes the loss without logits in evaluation mode too, and is ignored when
                there is nothing to compute a loss from. False always returns logits. None skips them when
                training on labels.
            logits_to_keep: with labels, the loss is over the kept positions.
            num_items_in_batch: divides the summed loss: a number or a tensor of one element on any device.
            ignore_index, label_smoothing, lse_square_scale, accum_dtype, use_token_scaling: as in
                ``liger_fused_linear_cross_entropy``.
            return_token_accuracy, return_predicted_tokens, return_z_loss: fill the result's fields of those
                names where there is a loss.
            return_dict: False returns a tuple. Where logits were skipped it holds None, so that what follows
                keeps its position.

        Logits are computed in any case when the head is more than a linear map (``lm_head.py`` says when), or
        when ``model.loss_function`` was set to a function of the user's, which is then called.
        """
        arguments = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in kwargs for name in arguments):
            return original(self, *args, **kwargs)  # which raises the TypeError
        arguments |= kwargs
        loss_arguments = {name: arguments.pop(name) for name in LOSS_ARGUMENTS if name in arguments}
        labels = arguments.pop("labels", None)
        logits_to_keep = arguments.pop("logits_to_keep", 0)
        skip_logits = arguments.pop("skip_logits", None)
        return_dict = arguments.pop("return_dict", None)
        shift_labels = loss_arguments.get("shift_labels")
        if balance and arguments.get("output_router_logits") is None:
            arguments["output_router_logits"] = self.config.output_router_logits

        outputs = self.model(**arguments, return_dict=True)
        hidden_states = _kept_positions(outputs.last_hidden_state, logits_to_keep)

        stock_loss = uses_stock_loss(self)
        targets = None
        if stock_loss and (labels is not None or shift_labels is not None):
            loss_arguments.pop("shift_labels", None)
            targets = shift_labels
            if shift_labels is None:
                targets = next_token_targets(labels, loss_arguments.get("ignore_index", -100))
            # Shifted labels may have been cut to the kept positions already, as the stock loss requires.
            if shift_labels is None or shift_labels.shape[:2] != hidden_states.shape[:2]:
                targets = _kept_positions(targets.unsqueeze(-1), logits_to_keep).squeeze(-1)
        if skip_logits is None:
            skip_logits = self.training and labels is not None

        cap = None if softcap is None else getattr(self.config, softcap)
        logits = None
        result = CrossEntropyOutput(None)
        head = linear_head(self.lm_head) if skip_logits and targets is not None else None
        if head is not None and head.obstacle is None:

            def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> CrossEntropyOutput:
                return fused_causal_lm_loss(x, weight, bias, targets, softcap=cap, **loss_arguments)

            if head.sharded:
                result = loss_in_call(self.lm_head, head.linear, hidden_states, loss)
            else:
                result = loss(hidden_states, head.weight, head.bias)
        else:
            logits = self.lm_head(hidden_states)
            if targets is not None:
                loss_arguments.pop("accum_dtype", None)
                result = logits_loss(logits, targets, softcap=cap, **loss_arguments)
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if float_logits:
                logits = logits.float()
            if targets is None and labels is not None:
                extra = {name: value for name, value in arguments.items() if name not in names}
                vocab_size = self.config.get_text_config().vocab_size
                result.loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=vocab_size, **loss_arguments, **extra
                )

        results = {name: getattr(result, name, getattr(outputs, name, None)) for name in output_fields}
        results["logits"] = logits
        if balance:
            aux_loss = balance_loss(self, balance, arguments, outputs.router_logits)
            if result.loss is not None and aux_loss is not None:
                results["loss"] = result.loss + self.router_aux_loss_coef * aux_loss.to(result.loss.device)
            results["aux_loss"] = aux_loss

        if return_dict is None:
            return_dict = self.config.return_dict
        if return_dict:
            return output(**results)
        return tuple(value for name, value in results.items() if value is not None or name == "logits")

    return forward


def balance_loss(
    model: nn.Module,
    balance: Callable[..., torch.Tensor],
    arguments: dict[str, Any],
    router_logits: tuple[torch.Tensor, ...] | None,
) -> torch.Tensor | None:
    """The load-balancing loss over all layers' router logits (B·S, experts), or None without them.

    None too when the mask covers other positions than the routers saw, as it does in decoding with a cache.
    """
    if not arguments["output_router_logits"] or not router_logits:
        return None
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.numel() != router_logits[0].shape[0]):
        return None
    return balance(router_logits, model.num_experts, model.num_experts_per_tok, mask)
