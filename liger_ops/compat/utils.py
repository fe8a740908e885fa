"""The helpers of ``liger_kernel.utils`` that scripts import."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["infer_comm_backend", "infer_device", "is_peft_available", "is_transformers_available"]


def infer_device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``: the devices that the operators have kernels for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def infer_comm_backend() -> str:
    """The ``torch.distributed`` backend for ``infer_device()``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def is_peft_available() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def is_transformers_available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None
