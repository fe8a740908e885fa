"""The gated feed-forward block of Gemma models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import liger_ops.functional as LF

# Hugging Face's names of the activation, and the form of GELU that each stands for.
GELU_FORMS = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}


class LigerGEGLUMLP(nn.Module):
    """``down_proj(gelu(gate_proj(x)) · up_proj(x))``.

    The form of GELU is the one the configuration asks for: exact for ``"gelu"``, the tanh approximation for
    ``"gelu_pytorch_tanh"`` and ``"gelu_new"``. Liger's class of this name runs the approximation whatever the
    configuration says.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_activation`` or ``hidden_act``
            (the first that is there and not None) and, optionally, ``mlp_bias``.

    Raises:
        ValueError: for an activation that is not a GELU.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        if activation not in GELU_FORMS:
            raise ValueError(
                f"LigerGEGLUMLP computes gelu(gate) * up for {', '.join(GELU_FORMS)}, "
                f"but the configuration's activation is {activation!r}"
            )
        self.config = config
        self.approximate = GELU_FORMS[activation]
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) to (…, hidden_size)."""
        return self.down_proj(LF.geglu(self.gate_proj(x), self.up_proj(x), self.approximate))
