"""Root-mean-square layer normalisation as a module."""

from __future__ import annotations

import torch
from torch import nn

import liger_ops.functional as LF

CASTING_MODES = ("llama", "gemma", "none")
INITIALISERS = {"ones": torch.ones, "zeros": torch.zeros}


class LigerRMSNorm(nn.Module):
    """``y = x / sqrt(mean(x²) + eps) · (offset + weight)`` over the last dimension.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean of squares.
        offset: added to the weight; 1.0 for Gemma, whose weights are stored around zero.
        casting_mode: where a 16-bit input is rounded: ``"llama"`` before the weight and after it, ``"gemma"``
            and ``"none"`` once at the end.
        init_fn: ``"ones"`` or ``"zeros"``, the initial weight.
        in_place: accepted for Liger's signature. The operator never writes to its inputs, so both values mean
            the same.
        row_mode: accepted for Liger's signature. A tuning hint there, without effect here.
        elementwise_affine: False for a module without a weight.

    Raises:
        ValueError: for an unknown ``casting_mode`` or ``init_fn``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        if casting_mode not in CASTING_MODES:
            raise ValueError(f"casting_mode must be one of {', '.join(CASTING_MODES)}, got {casting_mode!r}")
        if init_fn not in INITIALISERS:
            raise ValueError(f"init_fn must be one of {', '.join(INITIALISERS)}, got {init_fn!r}")
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.weight = nn.Parameter(INITIALISERS[init_fn](hidden_size))
        else:
            self.register_parameter("weight", None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) of any floating dtype to the same shape and dtype."""
        return LF.rms_norm(hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode)

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return (
            f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, casting_mode={self.casting_mode!r}"
        )


class LigerRMSNormForGemma(LigerRMSNorm):
    """LigerRMSNorm with the defaults of Gemma: weights stored around zero, one rounding at the end.

    Args and errors: as LigerRMSNorm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 1.0,
        casting_mode: str = "gemma",
        init_fn: str = "zeros",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place, row_mode)


class LigerRMSNormForGemma2(LigerRMSNormForGemma):
    """LigerRMSNormForGemma; only the default of ``in_place``, which has no effect here, differs."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 1.0,
        casting_mode: str = "gemma",
        init_fn: str = "zeros",
        in_place: bool = False,
        row_mode: bool | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place, row_mode)
