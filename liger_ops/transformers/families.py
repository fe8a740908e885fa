"""The model families that can be patched, one record each.

Adding a family is adding a record here, a function in ``apply.py`` and a tiny configuration to
``tests/models/tiny.py``. ``docs/models.md`` is made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from liger_ops.transformers.parts import (
    CausalLMHead,
    Experts,
    GatedMLP,
    LayerNorm,
    LeanActivations,
    PackedMLP,
    Part,
    RMSNorm,
    Rotary,
    TokenLoss,
    VisionRotary,
)


@dataclass(frozen=True)
class Family:
    """Models built from one modeling module of transformers.

    Attributes:
        name: of the family; ``apply_liger_kernel_to_<name>`` patches it.
        title: what its models are called.
        model_types: values of ``config.model_type`` that belong to it.
        modeling: full name of the modeling module.
        parts: what is replaced there. Their options come in the order of Liger's arguments.
        left: what stays as it is beside what stays in every family, and why.
        off: options that are off unless asked for.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    modeling: str
    parts: tuple[Part, ...]
    left: tuple[tuple[str, str], ...] = ()
    off: tuple[str, ...] = ("cross_entropy",)

    @property
    def defaults(self) -> dict[str, bool]:
        """Every option of the family and whether it is on by default."""
        options = {part.option: part.option not in self.off for part in self.parts}
        return options | {LeanActivations.option: False}


FAMILIES = (
    Family(
        name="llama",
        title="LLaMA 2, 3, 3.1 and the text models of 3.2",
        model_types=("llama",),
        modeling="transformers.models.llama.modeling_llama",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("LlamaForCausalLM"),
            CausalLMHead("LlamaForCausalLM"),
            RMSNorm("LlamaRMSNorm"),
            GatedMLP("LlamaMLP"),
        ),
    ),
    Family(
        name="mllama",
        title="LLaMA 3.2 Vision, and its text part alone",
        model_types=("mllama", "mllama_text_model"),
        modeling="transformers.models.mllama.modeling_mllama",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("MllamaForConditionalGeneration", model_types=("mllama",)),
            TokenLoss("MllamaForCausalLM", model_types=("mllama_text_model",)),
            CausalLMHead("MllamaForConditionalGeneration", model_types=("mllama",)),
            CausalLMHead("MllamaForCausalLM", model_types=("mllama_text_model",), float_logits=True),
            LayerNorm(model_types=("mllama",)),
            RMSNorm("MllamaTextRMSNorm"),
            GatedMLP("MllamaTextMLP"),
        ),
        left=(("`MllamaVisionMLP`", "not gated: two linear layers and a GELU"),),
    ),
    Family(
        name="mistral",
        title="Mistral",
        model_types=("mistral",),
        modeling="transformers.models.mistral.modeling_mistral",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("MistralForCausalLM"),
            CausalLMHead("MistralForCausalLM"),
            RMSNorm("MistralRMSNorm"),
            GatedMLP("MistralMLP"),
        ),
    ),
    Family(
        name="mixtral",
        title="Mixtral",
        model_types=("mixtral",),
        modeling="transformers.models.mixtral.modeling_mixtral",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("MixtralForCausalLM"),
            CausalLMHead("MixtralForCausalLM", router_loss="load_balancing_loss_func"),
            RMSNorm("MixtralRMSNorm"),
            Experts("MixtralExperts"),
        ),
        left=(("`MixtralTopKRouter`", "one small product and a top-k, whose outputs transformers records"),),
    ),
    Family(
        name="gemma",
        title="Gemma 1 and 1.1",
        model_types=("gemma",),
        modeling="transformers.models.gemma.modeling_gemma",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("GemmaForCausalLM"),
            CausalLMHead("GemmaForCausalLM"),
            RMSNorm("GemmaRMSNorm", eps="eps", offset=1.0, casting_mode="gemma"),
            GatedMLP("GemmaMLP", option="geglu", operator="liger::geglu"),
        ),
    ),
    Family(
        name="gemma2",
        title="Gemma 2",
        model_types=("gemma2",),
        modeling="transformers.models.gemma2.modeling_gemma2",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("Gemma2ForCausalLM"),
            CausalLMHead("Gemma2ForCausalLM", softcap="final_logit_softcapping"),
            RMSNorm("Gemma2RMSNorm", eps="eps", offset=1.0, casting_mode="gemma"),
            GatedMLP("Gemma2MLP", option="geglu", operator="liger::geglu"),
        ),
        left=(("soft-capping of attention scores", "inside the attention implementation"),),
    ),
    Family(
        name="qwen2",
        title="Qwen 2 and 2.5",
        model_types=("qwen2",),
        modeling="transformers.models.qwen2.modeling_qwen2",
        parts=(
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("Qwen2ForCausalLM"),
            CausalLMHead("Qwen2ForCausalLM"),
            RMSNorm("Qwen2RMSNorm"),
            GatedMLP("Qwen2MLP"),
        ),
    ),
    Family(
        name="qwen2_vl",
        title="Qwen2-VL, and its text part alone",
        model_types=("qwen2_vl", "qwen2_vl_text"),
        modeling="transformers.models.qwen2_vl.modeling_qwen2_vl",
        parts=(
            # Positions in time, height and width are merged into one cos and sin before attention.
            Rotary("apply_rotary_pos_emb"),
            VisionRotary("apply_rotary_pos_emb_vision", model_types=("qwen2_vl",)),
            TokenLoss("Qwen2VLForConditionalGeneration", model_types=("qwen2_vl",)),
            CausalLMHead("Qwen2VLForConditionalGeneration", model_types=("qwen2_vl",)),
            RMSNorm("Qwen2VLRMSNorm"),
            LayerNorm(model_types=("qwen2_vl",)),
            GatedMLP("Qwen2MLP"),
        ),
        left=(("`VisionMlp`", "not gated: two linear layers and a quick GELU"),),
    ),
    Family(
        name="phi3",
        title="Phi-3, Phi-3.5 and Phi-4-mini",
        model_types=("phi3",),
        modeling="transformers.models.phi3.modeling_phi3",
        parts=(
            # Also where only the first part of each head is rotated, as in Phi-4-mini.
            Rotary("apply_rotary_pos_emb"),
            TokenLoss("Phi3ForCausalLM"),
            CausalLMHead("Phi3ForCausalLM"),
            RMSNorm("Phi3RMSNorm"),
            PackedMLP("Phi3MLP", act="activation_fn"),
        ),
    ),
)


def supported_model_types() -> list[str]:
    """Every ``config.model_type`` that can be patched, sorted."""
    return sorted(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(model_type: str | None) -> Family | None:
    """The family of a ``config.model_type``, or None when it is not supported."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
