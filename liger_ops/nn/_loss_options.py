"""The checks that the loss modules share."""

from __future__ import annotations

REDUCTIONS = ("mean", "sum", "none")


def check_loss_options(reduction: str, label_smoothing: float, softcap: float | None) -> None:
    """Raise ValueError for an option outside its range: when a module is built, not at its first step."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def refuse(**flags: bool) -> None:
    """Raise NotImplementedError for flags that are set: an error is better than an option ignored."""
    wanted = [name for name, value in flags.items() if value]
    if wanted:
        raise NotImplementedError(f"{', '.join(wanted)} not available in liger_ops")
