"""Finds and loads the one compiled library, and says what is wrong when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
# Where CMake finds `LigerOps`, beside `torch.utils.cmake_prefix_path`, where it finds `Torch`.
cmake_prefix_path = str(_PACKAGE / "share" / "cmake")

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps liger-ops"
_BUILD_INFO: dict[str, Any] = {}


def _minor(version: str) -> str:
    """`2.11` of `2.11.0+cu130`: the part of a torch version that its C++ ABI depends on."""
    return ".".join(version.split("+")[0].split(".")[:2])


def load() -> None:
    """Registers `torch.ops.liger`. Calling it again does nothing.

    Raises:
        ImportError: nothing was compiled, or it was compiled for another torch.
    """
    if _BUILD_INFO:
        return
    libraries = sorted(_PACKAGE.glob("_C*.so"))
    if len(libraries) != 1:
        found = [path.name for path in libraries] or "none"
        raise ImportError(
            f"liger_ops: expected one compiled library in {_PACKAGE}, found {found}. "
            f"From a checkout run `make build`; otherwise `{_REBUILD}`."
        )
    info = json.loads((_PACKAGE / "_build_info.json").read_text())
    if _minor(info["torch"]) != _minor(torch.__version__):
        raise ImportError(
            f"liger_ops was built for torch {_minor(info['torch'])}, but torch {torch.__version__} is "
            f"installed. Rebuild it: `{_REBUILD}`."
        )
    torch.ops.load_library(libraries[0])
    _BUILD_INFO.update(info, library=str(libraries[0]))


def build_info() -> dict[str, Any]:
    """How the loaded library was built.

    Returns:
        A dict with the keys `version`, `torch`, `cuda` (CUDA version, or None without CUDA kernels),
        `arch_list`, `cuda_reason` (why CUDA is or is not there) and `library` (path).
    """
    load()
    return dict(_BUILD_INFO)


def operators() -> list[str]:
    """The names in `torch.ops.liger`, sorted."""
    load()
    schemas = torch._C._jit_get_all_schemas()
    return sorted({s.name.removeprefix("liger::") for s in schemas if s.name.startswith("liger::")})
