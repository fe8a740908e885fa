"""Loading a causal language model and patching it in one call."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from liger_ops.transformers.families import FAMILIES
from liger_ops.transformers.patching import patch


class AutoLigerKernelForCausalLM:
    """``AutoModelForCausalLM`` whose models run liger_ops' operators.

    Keyword arguments named like an option of ``patch``, ``strict`` and ``recognize`` go to ``patch``; all
    others to ``AutoModelForCausalLM``, which raises TypeError for those it does not know. The loaded model is
    patched by its own ``config.model_type``, which is not always the checkpoint's: a multimodal one may load
    its text part.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "AutoLigerKernelForCausalLM has no instances: "
            "call AutoLigerKernelForCausalLM.from_pretrained(path) "
            "or AutoLigerKernelForCausalLM.from_config(config)"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModel:
        """Load as ``AutoModelForCausalLM.from_pretrained`` does, then patch."""
        options = _take_options(kwargs)
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        _patch(model, options)
        return model

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        """Build as ``AutoModelForCausalLM.from_config`` does, with random weights, then patch."""
        options = _take_options(kwargs)
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        _patch(model, options)
        return model


def _take_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove what belongs to ``patch`` from the keyword arguments, and return it."""
    names = {"strict", "recognize"}.union(*(family.defaults for family in FAMILIES))
    return {name: kwargs.pop(name) for name in names & kwargs.keys()}


def _patch(model: Any, options: dict[str, Any]) -> None:
    # `from_pretrained(..., output_loading_info=True)` returns the model and a dict.
    patch(model[0] if isinstance(model, tuple) else model, **options)
