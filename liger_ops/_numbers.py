"""Numbers that operators take as tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def one_number(
    value: Tensor | float | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor | None:
    """The value as a 0-d tensor on the device, which the host does not wait for; None stays.

    A tensor of one element keeps its dtype and a number becomes float32, unless `dtype` says otherwise.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(device, dtype, non_blocking=True).reshape(())
    # A fill on the device: copying a number there would wait for it.
    return torch.full((), value, device=device, dtype=dtype or torch.float32)
