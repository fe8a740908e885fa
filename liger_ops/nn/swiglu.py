"""The gated feed-forward blocks of LLaMA-like models: separate, packed, and as an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import liger_ops.functional as LF


def check_silu(owner: str, config: Any) -> None:
    """ValueError when the configuration's activation is not SiLU."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{owner} computes silu(gate) * up, but config.hidden_act is {config.hidden_act!r}")


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
        check_silu("LigerSwiGLUMLP", config)
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


class LigerPhi3SwiGLUMLP(nn.Module):
    """``down_proj(silu(gate) · up)`` with gate and up from one projection, ``gate_up_proj(x)``.

    The halves of its output are read in place, and their gradient is written as one tensor.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_act`` and, optionally,
            ``mlp_bias``.

    Raises:
        ValueError: when ``config.hidden_act`` is not ``"silu"`` or ``"swish"``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_silu("LigerPhi3SwiGLUMLP", config)
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) to (…, hidden_size)."""
        return self.down_proj(LF.swiglu_packed(self.gate_up_proj(x)))


class LigerBlockSparseTop2MLP(nn.Module):
    """``w2(silu(w1(x)) · w3(x))``: one expert of Mixtral, under its names.

    Args:
        config: an object with ``hidden_size``, ``intermediate_size``, ``hidden_act`` and, optionally,
            ``mlp_bias``.

    Raises:
        ValueError: when ``config.hidden_act`` is not ``"silu"`` or ``"swish"``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        check_silu("LigerBlockSparseTop2MLP", config)
        self.ffn_dim = config.intermediate_size
        self.hidden_dim = config.hidden_size
        bias = getattr(config, "mlp_bias", False)
        self.w1 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=bias)
        self.w2 = nn.Linear(self.ffn_dim, self.hidden_dim, bias=bias)
        self.w3 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) to (…, hidden_size)."""
        return self.w2(LF.swiglu(self.w1(x), self.w3(x)))
