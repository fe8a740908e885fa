"""``liger_kernel.env_report``."""

from __future__ import annotations

from liger_ops.cli.info import collect, render

__all__ = ["print_env_report"]


def print_env_report() -> None:
    """Print what ``python -m liger_ops info`` prints."""
    print(render(collect()))
