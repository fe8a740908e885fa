"""Liger's patching functions, over the engine in ``patching.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from liger_ops.transformers.patching import patch
from liger_ops.transformers.report import PatchReport


def apply_liger_kernel_to_llama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
) -> PatchReport:
    """Make LLaMA 2, 3, 3.1 and 3.2 text models run liger_ops' operators.

    With a model, that model; without, every LLaMA model of the process, built before or after. ``patch``
    describes the options, the errors and the report.
    """
    return patch(
        model,
        model_type="llama",
        rope=rope,
        cross_entropy=cross_entropy,
        fused_linear_cross_entropy=fused_linear_cross_entropy,
        rms_norm=rms_norm,
        swiglu=swiglu,
    )


MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, Callable[..., PatchReport]] = {
    "llama": apply_liger_kernel_to_llama,
}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> PatchReport:
    """The class-wide patch of a model type, under the name that training frameworks call in Liger."""
    return patch(None, model_type=model_type, **kwargs)


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> PatchReport:
    """The patch of one model, under the name that the Trainer and training frameworks call in Liger."""
    return patch(model, **kwargs)
