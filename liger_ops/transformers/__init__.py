"""Hugging Face integration: patching models, the Trainer flag, and Liger's names over the operators.

Submodules that need transformers are imported when a name of theirs is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from liger_ops._lazy import lazy_attributes
from liger_ops.nn import (
    LigerBlockSparseTop2MLP,
    LigerCrossEntropyLoss,
    LigerExperts,
    LigerFusedAddRMSNorm,
    LigerFusedLinearCrossEntropyLoss,
    LigerGEGLUMLP,
    LigerLayerNorm,
    LigerPhi3SwiGLUMLP,
    LigerRMSNorm,
    LigerRMSNormForGemma,
    LigerRMSNormForGemma2,
    LigerSwiGLUMLP,
)
from liger_ops.transformers.functional import (
    CrossEntropyOutput,
    liger_cross_entropy,
    liger_fused_add_rms_norm,
    liger_fused_linear_cross_entropy,
    liger_geglu,
    liger_layer_norm,
    liger_multimodal_rotary_pos_emb,
    liger_qwen2vl_mrope,
    liger_rms_norm,
    liger_rope,
    liger_rotary_pos_emb,
    liger_rotary_pos_emb_vision,
    liger_swiglu,
)

if TYPE_CHECKING:
    from liger_ops.transformers.apply import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        apply_liger_kernel_to_gemma,
        apply_liger_kernel_to_gemma2,
        apply_liger_kernel_to_llama,
        apply_liger_kernel_to_mistral,
        apply_liger_kernel_to_mixtral,
        apply_liger_kernel_to_mllama,
        apply_liger_kernel_to_phi3,
        apply_liger_kernel_to_qwen2,
        apply_liger_kernel_to_qwen2_vl,
    )
    from liger_ops.transformers.auto_model import AutoLigerKernelForCausalLM
    from liger_ops.transformers.experts import register_experts
    from liger_ops.transformers.forwards.outputs import LigerCausalLMOutputWithPast
    from liger_ops.transformers.patching import patch, patched
    from liger_ops.transformers.report import PatchReport
    from liger_ops.transformers.trainer import install, uninstall

__all__ = [
    "MODEL_TYPE_TO_APPLY_LIGER_FN",
    "AutoLigerKernelForCausalLM",
    "CrossEntropyOutput",
    "LigerBlockSparseTop2MLP",
    "LigerCausalLMOutputWithPast",
    "LigerCrossEntropyLoss",
    "LigerExperts",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerPhi3SwiGLUMLP",
    "LigerRMSNorm",
    "LigerRMSNormForGemma",
    "LigerRMSNormForGemma2",
    "LigerSwiGLUMLP",
    "PatchReport",
    "apply_liger_kernel_to_gemma",
    "apply_liger_kernel_to_gemma2",
    "apply_liger_kernel_to_llama",
    "apply_liger_kernel_to_mistral",
    "apply_liger_kernel_to_mixtral",
    "apply_liger_kernel_to_mllama",
    "apply_liger_kernel_to_phi3",
    "apply_liger_kernel_to_qwen2",
    "apply_liger_kernel_to_qwen2_vl",
    "install",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_multimodal_rotary_pos_emb",
    "liger_qwen2vl_mrope",
    "liger_rms_norm",
    "liger_rope",
    "liger_rotary_pos_emb",
    "liger_rotary_pos_emb_vision",
    "liger_swiglu",
    "patch",
    "patched",
    "register_experts",
    "uninstall",
]

_LAZY = {
    "MODEL_TYPE_TO_APPLY_LIGER_FN": "apply",
    "_apply_liger_kernel": "apply",
    "_apply_liger_kernel_to_instance": "apply",
    "apply_liger_kernel_to_gemma": "apply",
    "apply_liger_kernel_to_gemma2": "apply",
    "apply_liger_kernel_to_llama": "apply",
    "apply_liger_kernel_to_mistral": "apply",
    "apply_liger_kernel_to_mixtral": "apply",
    "apply_liger_kernel_to_mllama": "apply",
    "apply_liger_kernel_to_phi3": "apply",
    "apply_liger_kernel_to_qwen2": "apply",
    "apply_liger_kernel_to_qwen2_vl": "apply",
    "AutoLigerKernelForCausalLM": "auto_model",
    "LigerCausalLMOutputWithPast": "forwards.outputs",
    "PatchReport": "report",
    "install": "trainer",
    "patch": "patching",
    "patched": "patching",
    "register_experts": "experts",
    "uninstall": "trainer",
}

__getattr__, __dir__ = lazy_attributes(__name__, _LAZY)
