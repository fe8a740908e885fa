"""Medusa: several decoding heads on a causal language model, trained without holding their logits.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", 2024. Head
``k`` predicts the token ``k`` places after the one that the base's own head predicts. ``docs/medusa.md`` is
the guide.

The heads and their loss need torch alone. ``MedusaModel``, what decodes with it and what trains it import
transformers when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from liger_ops._lazy import lazy_attributes
from liger_ops.medusa.config import MedusaConfig
from liger_ops.medusa.heads import MedusaHeads, ResBlock
from liger_ops.medusa.loss import MedusaLoss, medusa_loss

if TYPE_CHECKING:
    from liger_ops.medusa.generation import MedusaGeneration
    from liger_ops.medusa.model import MedusaModel, MedusaOutput, add_medusa_heads
    from liger_ops.medusa.training import MedusaCallback, parameter_groups

__all__ = [
    "MedusaCallback",
    "MedusaConfig",
    "MedusaGeneration",
    "MedusaHeads",
    "MedusaLoss",
    "MedusaModel",
    "MedusaOutput",
    "ResBlock",
    "add_medusa_heads",
    "medusa_loss",
    "parameter_groups",
]

_LAZY = {
    "MedusaCallback": "training",
    "MedusaGeneration": "generation",
    "MedusaModel": "model",
    "MedusaOutput": "model",
    "add_medusa_heads": "model",
    "parameter_groups": "training",
}

__getattr__, __dir__ = lazy_attributes(__name__, _LAZY)
