"""Forwards of the blocks inside a decoder layer: RMSNorm, gated MLP, rotary embedding.

Each function here builds a replacement for one stock forward, which it gets so as to call it for what the
operator does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import liger_ops.functional as LF

Forward = Callable[..., Any]

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def rms_norm(eps: str, offset: float, casting_mode: str) -> Callable[[Forward], Forward]:
    """Replacement for an RMSNorm whose module holds ``weight`` and, under the name ``eps``, its epsilon."""

    def build(original: Forward) -> Forward:
        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            weight = self.weight
            if weight.dtype != hidden_states.dtype and not (
                weight.dtype == torch.float32 and hidden_states.dtype in SIXTEEN_BIT
            ):
                return original(self, hidden_states)
            return LF.rms_norm(hidden_states, weight, getattr(self, eps), offset, casting_mode)

        return forward

    return build


def gated_mlp(
    act: str,
    computes: Callable[[nn.Module], bool],
    gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[Forward], Forward]:
    """Replacement for ``down_proj(act(gate_proj(x)) · up_proj(x))``.

    ``computes(activation module)`` tells whether ``gated(gate, up)`` is this module's function. It is asked
    at each call, because a class-wide patch meets modules with any activation.
    """

    def build(original: Forward) -> Forward:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if not computes(getattr(self, act)):
                return original(self, x)
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

        return forward

    return build


def rotary(original: Forward) -> Forward:
    """Replacement for ``apply_rotary_pos_emb`` of q (B, Hq, S, D), k (B, Hk, S, D), cos, sin (1|B, S, R)."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (
            unsqueeze_dim != 1
            or q.dim() != 4
            or cos.dim() != 3
            or (cos.dtype != q.dtype and cos.dtype != torch.float32)
        ):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return LF.rope(q, k, cos, sin)

    return apply_rotary_pos_emb
