"""``python -m liger_ops info``: what is installed, what it was built for, and which operator runs where."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from liger_ops import _library
from liger_ops.cli.table import table

SUMMARY = "show versions, build, devices, and the kernels that each operator has"

# Column heading: the dispatch key as torch spells it.
KEYS = {
    "CPU": "CPU",
    "CUDA": "CUDA",
    "Meta": "Meta",
    "Autograd": "Autograd",
    "Autocast": "AutocastCUDA",
    "AutocastCPU": "AutocastCPU",
}

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def run(options: argparse.Namespace) -> int:
    """Print what ``collect`` finds."""
    found = collect()
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0


def collect() -> dict[str, Any]:
    """Versions, build, devices and kernels as plain dicts, lists and strings."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # The package's version leaves out the local part, which says what CUDA torch was built for.
    versions["torch"] = torch.__version__
    return {
        "build": _library.build_info(),
        "versions": versions,
        "devices": devices(),
        "operators": {name: kernels(name) for name in _library.operators()},
    }


def devices() -> list[str]:
    """One line for the CPU and for each CUDA device."""
    found = [
        f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB"
        )
    return found


def kernels(operator: str) -> dict[str, bool]:
    """For each column of the table, whether ``liger::operator`` has a kernel under that dispatch key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {column: has_kernel(f"liger::{operator}", key) for column, key in KEYS.items()}


def render(found: dict[str, Any]) -> str:
    """The text form of ``collect``'s result."""
    build = [(name, _text(value)) for name, value in found["build"].items()]
    versions = [(name, version or "not installed") for name, version in found["versions"].items()]
    operators = [("operator", *KEYS)]
    for name, has in found["operators"].items():
        operators.append((f"liger::{name}", *("yes" if has[column] else "-" for column in KEYS)))
    parts = [
        ("built with", table(build, "  ")),
        ("running with", table(versions, "  ")),
        ("devices", "\n".join(f"  {line}" for line in found["devices"])),
        ("kernels", table(operators, "  ")),
    ]
    return "\n\n".join(f"{title}\n{body}" for title, body in parts)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value) or "-"
    return str(value)
