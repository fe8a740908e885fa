"""The model families that can be patched, one record each.

Adding a family is adding a record here and a tiny configuration to ``tests/models/tiny.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from liger_ops.transformers.parts import CausalLMHead, Part, RMSNorm, Rotary, SwiGLU, TokenLoss


@dataclass(frozen=True)
class Family:
    """Models built from one modeling module of transformers.

    Attributes:
        name: of the family; ``apply_liger_kernel_to_<name>`` patches it.
        model_types: values of ``config.model_type`` that belong to it.
        modeling: full name of the modeling module.
        parts: what is replaced there.
        off: options that are off unless asked for.
    """

    name: str
    model_types: tuple[str, ...]
    modeling: str
    parts: tuple[Part, ...]
    off: tuple[str, ...] = ("cross_entropy",)

    @property
    def defaults(self) -> dict[str, bool]:
        """Every option of the family and whether it is on by default."""
        return {part.option: part.option not in self.off for part in self.parts}


FAMILIES = (
    # LLaMA 2, 3, 3.1 and the text models of 3.2.
    Family(
        name="llama",
        model_types=("llama",),
        modeling="transformers.models.llama.modeling_llama",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("LlamaForCausalLM"),
            CausalLMHead("LlamaForCausalLM"),
            RMSNorm("LlamaRMSNorm"),
            SwiGLU("LlamaMLP"),
        ),
    ),
)


def supported_model_types() -> list[str]:
    """Every ``config.model_type`` that can be patched, sorted."""
    return sorted(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(model_type: str | None) -> Family | None:
    """The family of a ``config.model_type``, or None when it is not supported."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
