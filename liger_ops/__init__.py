"""Fused kernels for training LLMs, as first-class PyTorch operators.

Importing this package loads the compiled library and registers `torch.ops.liger`.
`liger_ops.functional` has the documented functions, `liger_ops.nn` the modules, and
`liger_ops.transformers` patches Hugging Face models.
"""

from liger_ops._library import build_info, cmake_prefix_path, load, operators

load()

# Needs the operators.
from liger_ops import _flops as _flops  # noqa: E402

__version__: str = build_info()["version"]

__all__ = ["__version__", "build_info", "cmake_prefix_path", "operators"]
