"""The gated feed-forward block of LLaMA-like models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import liger_ops.functional as LF


class LigerSwiGLUMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) · up_proj(x))``.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_act`` and, optionally,
            ``mlp_bias`` (a Hugging Face configuration, or any namespace with these attributes).
        intermediate_size: overrides ``config.intermediate_size``.

    Raises:
        ValueError: when ``config.hidden_act`` is not ``"silu"`` or ``"swish"``.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(
                f"LigerSwiGLUMLP computes silu(gate) * up, but config.hidden_act is {config.hidden_act!r}"
            )
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) to (…, hidden_size)."""
        return self.down_proj(LF.swiglu(self.gate_proj(x), self.up_proj(x)))
