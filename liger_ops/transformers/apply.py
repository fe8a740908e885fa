"""Liger's patching functions, over the engine in ``patching.py``.

Each patches the given model, or, without one, every model of its family in the process, built before or
after. ``patch`` describes the options, the errors and the report. ``lean_activations`` needs a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from liger_ops.transformers.families import FAMILIES, family_of
from liger_ops.transformers.patching import patch, unwrap
from liger_ops.transformers.report import PatchReport


def _apply(model_type: str, model: nn.Module | None, **options: bool) -> PatchReport:
    return patch(model, model_type=model_type, **options)


def apply_liger_kernel_to_llama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """LLaMA 2, 3, 3.1 and the text models of 3.2."""
    return _apply("llama", **locals())


def apply_liger_kernel_to_mllama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    layer_norm: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """LLaMA 3.2 Vision, or its text part alone. ``layer_norm`` needs a model: the class is torch's."""
    return _apply("mllama", **locals())


def apply_liger_kernel_to_mistral(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Mistral."""
    return _apply("mistral", **locals())


def apply_liger_kernel_to_mixtral(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Mixtral. ``swiglu`` stands for its experts."""
    return _apply("mixtral", **locals())


def apply_liger_kernel_to_gemma(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    geglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Gemma 1 and 1.1, with the GELU that each model has: exact or by tanh."""
    return _apply("gemma", **locals())


def apply_liger_kernel_to_gemma2(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    geglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Gemma 2."""
    return _apply("gemma2", **locals())


def apply_liger_kernel_to_qwen2(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Qwen 2 and 2.5."""
    return _apply("qwen2", **locals())


def apply_liger_kernel_to_qwen2_vl(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    layer_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Qwen2-VL, or its text part alone. ``rope`` covers text and images."""
    return _apply("qwen2_vl", **locals())


def apply_liger_kernel_to_phi3(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
    lean_activations: bool = False,
) -> PatchReport:
    """Phi-3, Phi-3.5 and Phi-4-mini."""
    return _apply("phi3", **locals())


MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, Callable[..., PatchReport]] = {
    model_type: globals()[f"apply_liger_kernel_to_{family.name}"]
    for family in FAMILIES
    for model_type in family.model_types
}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> PatchReport:
    """The class-wide patch of a model type, under the name that training frameworks call in Liger."""
    return patch(None, model_type=model_type, **_of_family(model_type, kwargs))


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> PatchReport:
    """The patch of one model, under the name that the Trainer and training frameworks call in Liger.

    Model types without a record are left alone unless ``recognize=True`` comes along.
    """
    model_type = getattr(getattr(unwrap(model), "config", None), "model_type", None)
    return patch(model, **{"recognize": False} | _of_family(model_type, kwargs))


def _of_family(model_type: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options without those of other families alone: frameworks pass ``swiglu`` to any model."""
    family = family_of(model_type)
    if family is None:
        return options
    others = {option for other in FAMILIES for option in other.defaults} - set(family.defaults)
    return {option: on for option, on in options.items() if option not in others}
