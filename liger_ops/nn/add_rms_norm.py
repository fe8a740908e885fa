"""A residual connection and the root-mean-square layer normalisation after it, as a module."""

from __future__ import annotations

import torch

import liger_ops.functional as LF
from liger_ops.nn.rms_norm import LigerRMSNorm


class LigerFusedAddRMSNorm(LigerRMSNorm):
    """``sum = hidden_states + residual`` and ``y = rms_norm(sum)``, in one pass.

    Args and errors: as LigerRMSNorm, without ``elementwise_affine``. ``in_place`` and ``row_mode`` have no
    effect.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = False,
        row_mode: bool | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place, row_mode)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors (…, hidden_size) of one floating dtype to y and sum, of the same shape and dtype."""
        return LF.add_rms_norm(
            hidden_states, residual, self.weight, self.variance_epsilon, self.offset, self.casting_mode
        )
