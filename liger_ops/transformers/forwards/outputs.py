"""Results of patched forwards: transformers' own, with fields for what the loss can return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


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
