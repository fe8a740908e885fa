"""``python -m liger_ops bench``: times the operators beside their peers."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SUMMARY = (
    "time the operators beside eager PyTorch, torch.compile and Liger, and write a table and a JSON file"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _program().add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit status."""
    return _program().run(options)


def _program() -> ModuleType:
    """``benchmarks/run.py``: part of this package in a wheel, beside it in a checkout."""
    name = "liger_ops.benchmarks.run"
    if importlib.util.find_spec("liger_ops.benchmarks") is None:
        name, checkout = "benchmarks.run", str(Path(__file__).resolve().parents[2])
        # In front, since others have installed packages called benchmarks.
        if sys.path[0] != checkout:
            sys.path.insert(0, checkout)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        sys.exit("python -m liger_ops bench prints through rich: pip install rich transformers")
