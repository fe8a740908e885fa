"""The experts of Hugging Face models on grouped products and the packed gates.

``register_experts()`` offers them to transformers' experts interface under the name ``"liger_ops"``, for
``from_pretrained(..., experts_implementation="liger_ops")`` and
``model.set_experts_implementation("liger_ops")``. A patched model uses them without being asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations import moe

from liger_ops.nn.experts import experts
from liger_ops.transformers.forwards.blocks import gate_of

NAME = "liger_ops"


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of an experts module of transformers: (N, H) tokens, (N, K) indices and weights, to (N, H).

    Layouts that the packed gates do not cover (biases, interleaved gate and up, experts without a gate, a
    norm after the experts) run transformers' own grouped products.
    """
    if (
        getattr(module, "has_bias", False)
        or getattr(module, "has_post_expert_norm", False)
        or not getattr(module, "has_gate", True)
        or not getattr(module, "is_concatenated", True)
    ):
        return moe.grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj,
        module.down_proj,
        _gated(module),
        getattr(module, "is_transposed", False),
    )


def _gated(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gate of these experts: an operator where the activation has one, the module's own otherwise."""
    own = getattr(type(module), "_apply_gate", moe._default_apply_gate)
    gate = gate_of(module.act_fn)
    return module._apply_gate if own is not moe._default_apply_gate or gate is None else gate.packed


def register_experts() -> None:
    """Make ``"liger_ops"`` an experts implementation of transformers. Calling it again does nothing."""
    if NAME not in moe.ExpertsInterface._global_mapping:
        moe.ExpertsInterface.register(NAME, experts_forward)
