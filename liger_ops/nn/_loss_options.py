"""What the loss modules and Liger's functions share: checks of options, and dtypes of results."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_ops.functional import CrossEntropyOutput

REDUCTIONS = ("mean", "sum", "none")


def check_loss_options(reduction: str, label_smoothing: float, softcap: float | None) -> None:
    """Raise ValueError for an option outside its range: when a module is built, not at its first step."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def in_dtype(result: Tensor | CrossEntropyOutput, dtype: torch.dtype) -> Tensor | CrossEntropyOutput:
    """The loss, and the z-loss where there is one, in ``dtype``."""
    if isinstance(result, Tensor):
        return result.to(dtype)
    return CrossEntropyOutput(
        result.loss.to(dtype),
        None if result.z_loss is None else result.z_loss.to(dtype),
        result.token_accuracy,
        result.predicted_tokens,
    )
