"""Fused kernels for training LLMs, as first-class PyTorch operators.

Importing this package loads the compiled library and registers `torch.ops.liger`.
`liger_ops.functional` has the documented functions, `liger_ops.nn` the modules, and
`liger_ops.transformers` patches Hugging Face models.
"""

from liger_ops._after_import import after_import as _after_import
from liger_ops._library import build_info, cmake_prefix_path, load, operators

load()

# Needs the operators.
from liger_ops import _flops as _flops  # noqa: E402


def _register_sharding() -> None:
    from liger_ops.distributed import sharding

    sharding.register()


# A third of a second that those who never use DTensor are spared.
_after_import("torch.distributed.tensor", _register_sharding)

__version__: str = build_info()["version"]

__all__ = ["__version__", "build_info", "cmake_prefix_path", "operators"]
