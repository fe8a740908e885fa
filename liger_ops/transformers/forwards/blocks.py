"""Forwards of the blocks inside a layer: norms, gated MLPs, rotary embeddings.

Each function here builds a replacement for one stock forward, which it gets so as to call it for what the
operator does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

import liger_ops.functional as LF

Forward = Callable[..., Any]

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _scales(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the norm operators take a weight of this dtype beside x."""
    return weight.dtype == x.dtype or (weight.dtype == torch.float32 and x.dtype in SIXTEEN_BIT)


def rms_norm(eps: str, offset: float, casting_mode: str) -> Callable[[Forward], Forward]:
    """Replacement for an RMSNorm whose module holds ``weight`` and, under the name ``eps``, its epsilon."""

    def build(original: Forward) -> Forward:
        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            weight = self.weight
            if not _scales(weight, hidden_states):
                return original(self, hidden_states)
            return LF.rms_norm(hidden_states, weight, getattr(self, eps), offset, casting_mode)

        return forward

    return build


def layer_norm(original: Forward) -> Forward:
    """Replacement for the forward of ``torch.nn.LayerNorm``."""

    def forward(self: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if (
            len(self.normalized_shape) != 1
            or input.shape[-1] != self.normalized_shape[0]
            or (weight is not None and not _scales(weight, input))
            or (bias is not None and not _scales(bias, input))
        ):
            return original(self, input)
        return LF.layer_norm(input, weight, bias, self.eps)

    return forward


class PatchableLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` under a class of our own, so that a patch can tell a model's from all others.

    A patch gives this class to the instances of one model and puts its dispatcher here; the class in torch
    stays as it is. Without a patch it is a ``torch.nn.LayerNorm`` in all respects.
    """

    forward = nn.LayerNorm.forward

    def _get_name(self) -> str:
        return "LayerNorm"


class Gate(NamedTuple):
    """A gated activation: its operator, and that as a function of (gate, up) and of both in one buffer."""

    operator: str
    of_two: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    packed: Callable[[torch.Tensor], torch.Tensor]


def _geglu(approximate: str) -> Gate:
    def of_two(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return LF.geglu(gate, up, approximate)

    def packed(gate_up: torch.Tensor) -> torch.Tensor:
        return LF.geglu_packed(gate_up, approximate)

    return Gate("liger::geglu", of_two, packed)


_SWIGLU = Gate("liger::swiglu", LF.swiglu, LF.swiglu_packed)
_GEGLU_TANH = _geglu("tanh")
_GEGLU_ERF = _geglu("none")

_GATES = {
    nn.SiLU: _SWIGLU,
    SiLUActivation: _SWIGLU,
    GELUTanh: _GEGLU_TANH,
    NewGELUActivation: _GEGLU_TANH,
    GELUActivation: _GEGLU_ERF,
}


def gate_of(activation: Any) -> Gate | None:
    """The operator for ``activation(gate) · up``, or None. The module decides, not its configuration."""
    if type(activation) is nn.GELU:
        return _GEGLU_ERF if activation.approximate == "none" else _GEGLU_TANH
    return _GATES.get(type(activation))


def gated_mlp(gate: str, up: str, down: str, act: str) -> Callable[[Forward], Forward]:
    """Replacement for ``down(act(gate(x)) · up(x))``, with the names of the submodules.

    The activation is asked at each call, because a class-wide patch meets modules with any.
    """

    def build(original: Forward) -> Forward:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            gated = gate_of(getattr(self, act))
            if gated is None:
                return original(self, x)
            return getattr(self, down)(gated.of_two(getattr(self, gate)(x), getattr(self, up)(x)))

        return forward

    return build


def packed_mlp(gate_up: str, down: str, act: str) -> Callable[[Forward], Forward]:
    """Replacement for ``down(up · act(gate))`` where one projection yields gate and up side by side."""

    def build(original: Forward) -> Forward:
        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            gated = gate_of(getattr(self, act))
            if gated is None:
                return original(self, hidden_states)
            return getattr(self, down)(gated.packed(getattr(self, gate_up)(hidden_states)))

        return forward

    return build


# What transformers chooses by itself, and ours; any other implementation is somebody's wish.
_STOCK_EXPERTS = (None, "eager", "batched_mm", "grouped_mm", "liger_ops")


def experts_obstacle(module: nn.Module) -> str | None:
    """Why this module of transformers' experts interface keeps its own forward, if it does."""
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _STOCK_EXPERTS:
        return f"the configuration asks for the experts implementation {implementation!r}"
    if gate_of(module.act_fn) is None:
        return f"the activation is {type(module.act_fn).__name__}, not SiLU or GELU"
    return None


def experts(original: Forward) -> Forward:
    """Replacement for the experts of a layer: (N, H) tokens, (N, K) indices and weights of their experts."""
    from liger_ops.transformers.experts import experts_forward

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        if experts_obstacle(self) is not None:
            return original(self, hidden_states, top_k_index, top_k_weights)
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    return forward


def _rotates(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor) -> bool:
    return q.dtype == k.dtype and (cos.dtype == q.dtype or cos.dtype == torch.float32)


def rotary(original: Forward) -> Forward:
    """Replacement for ``apply_rotary_pos_emb`` of q (B, Hq, S, D), k (B, Hk, S, D), cos, sin (1|B, S, R)."""

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim != 1 or q.dim() != 4 or cos.dim() != 3 or not _rotates(q, k, cos):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return LF.rope(q, k, cos, sin)

    return apply_rotary_pos_emb


def vision_rotary(original: Forward) -> Forward:
    """Replacement for ``apply_rotary_pos_emb_vision`` of q and k (S, H, D), cos and sin (S, D)."""

    def apply_rotary_pos_emb_vision(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q.dim() != 3 or cos.dim() != 2 or not _rotates(q, k, cos):
            return original(q, k, cos, sin)
        q, k = LF.rope(q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos, sin)
        return q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1)

    return apply_rotary_pos_emb_vision
