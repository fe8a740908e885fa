"""Results of patched forwards: transformers' own, with fields for what the loss can return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class LossDetails:
    """Fields for a result class. They stay None unless asked for: the Trainer gathers every other field.

    Attributes:
        token_accuracy: 0-d fp32, the share of targets that are the predicted token, among those not ignored.
        predicted_tokens: (B, S) int64, shaped as the shifted labels; -1 where they are ignored.
        z_loss: 0-d fp32, the part of the loss that ``lse_square_scale`` adds.
    """

    token_accuracy: torch.FloatTensor | None = None
    predicted_tokens: torch.LongTensor | None = None
    z_loss: torch.FloatTensor | None = None


@dataclass
class LigerCausalLMOutputWithPast(LossDetails, CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` and, after its fields, those of ``LossDetails``."""


@dataclass
class LigerMoeCausalLMOutputWithPast(LossDetails, MoeCausalLMOutputWithPast):
    """``MoeCausalLMOutputWithPast`` and, after its fields, those of ``LossDetails``."""


def with_loss_details(output: type[ModelOutput]) -> type[ModelOutput]:
    """The class here that extends ``output``, made when there is none: some models have their own output."""
    name = f"Liger{output.__name__}"
    if name not in globals():
        extended = type(name, (LossDetails, output), {"__module__": __name__, "__doc__": output.__doc__})
        globals()[name] = dataclass(extended)
    return globals()[name]
