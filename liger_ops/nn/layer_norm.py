"""Layer normalisation as a module."""

from __future__ import annotations

import torch
from torch import nn

import liger_ops.functional as LF
from liger_ops.nn.rms_norm import INITIALISERS


class LigerLayerNorm(nn.Module):
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` over the last dimension.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the variance. The default is Liger's; that of ``torch.nn.LayerNorm`` is 1e-5.
        bias: of Liger's signature. The module owns a bias either way, so that its state dict is Liger's, and
            it starts at zero either way: Liger draws it at random for True.
        init_fn: ``"ones"`` or ``"zeros"``, the initial weight.

    Raises:
        ValueError: for an unknown ``init_fn``.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, bias: bool = False, init_fn: str = "ones"
    ) -> None:
        super().__init__()
        if init_fn not in INITIALISERS:
            raise ValueError(f"init_fn must be one of {', '.join(INITIALISERS)}, got {init_fn!r}")
        self.hidden_size = hidden_size
        self.eps = eps
        self.variance_epsilon = eps
        self.weight = nn.Parameter(INITIALISERS[init_fn](hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) of any floating dtype to the same shape and dtype."""
        return LF.layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
