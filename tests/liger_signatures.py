"""Signatures of Liger Kernel 0.8.5 that liger_ops reproduces: facts that ``tests/test_compat.py`` checks.

Left out are the arguments that choose among Liger's own implementations and the sizes of its chunks
(``impl``, ``mode``, ``backend``, ``ce_impl``, ``ce_mode``, ``chunk_mem_const``).
"""

CE = "ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction='mean', softcap=None"
EXTRAS = "return_token_accuracy=False, return_predicted_tokens=False"
NORM = "eps=1e-06, offset={}, casting_mode='{}', init_fn='{}', in_place={}"
PATCH = "rope=True, cross_entropy=False, fused_linear_cross_entropy=True, {}, model=None"

FUNCTIONS = {
    "transformers.functional.liger_cross_entropy": (
        "input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction='mean', "
        f"label_smoothing=0.0, lse_square_scale=0.0, softcap=None, return_z_loss=False, {EXTRAS}"
    ),
    "transformers.functional.liger_fused_linear_cross_entropy": (
        f"input, weight, target, bias=None, ce_weight=None, {CE}, return_z_loss=False, accum_dtype=None, "
        f"use_token_scaling=False, {EXTRAS}"
    ),
    "transformers.functional.liger_rms_norm": "X, W, eps, offset=0.0, casting_mode='llama', in_place=True",
    "transformers.functional.liger_layer_norm": "X, W, B, eps",
    "transformers.functional.liger_fused_add_rms_norm": (
        "X, R, W, eps, offset=0.0, casting_mode='llama', in_place=True"
    ),
    "transformers.functional.liger_rope": (
        "q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None"
    ),
    "transformers.functional.liger_qwen2vl_mrope": "q, k, cos, sin, mrope_section, unsqueeze_dim=1",
    "transformers.functional.liger_swiglu": "a, b",
    "transformers.functional.liger_geglu": "a, b",
    "transformers.functional.CrossEntropyOutput": (
        "loss, z_loss=None, token_accuracy=None, predicted_tokens=None"
    ),
    "transformers.rope.liger_rotary_pos_emb": (
        "q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None"
    ),
    "transformers.rope.liger_rotary_pos_emb_vision": "q, k, cos, sin",
    "transformers.qwen2vl_mrope.liger_multimodal_rotary_pos_emb": (
        "q, k, cos, sin, mrope_section, unsqueeze_dim=1"
    ),
    "transformers.model.loss_utils.LigerForCausalLMLoss": (
        "hidden_states, lm_head_weight, labels, hidden_size, num_items_in_batch=None, ignore_index=-100, "
        f"shift_labels=None, final_logit_softcapping=None, {EXTRAS}, **kwargs"
    ),
    "transformers.monkey_patch._apply_liger_kernel": "model_type, **kwargs",
    "transformers.monkey_patch._apply_liger_kernel_to_instance": "model, **kwargs",
    **{
        f"transformers.monkey_patch.apply_liger_kernel_to_{family}": PATCH.format(
            "rms_norm=True, swiglu=True"
        )
        for family in ("llama", "mistral", "mixtral", "qwen2", "phi3")
    },
    **{
        f"transformers.monkey_patch.apply_liger_kernel_to_{family}": PATCH.format("rms_norm=True, geglu=True")
        for family in ("gemma", "gemma2")
    },
    "transformers.monkey_patch.apply_liger_kernel_to_mllama": PATCH.format(
        "layer_norm=True, rms_norm=True, swiglu=True"
    ),
    "transformers.monkey_patch.apply_liger_kernel_to_qwen2_vl": PATCH.format(
        "rms_norm=True, layer_norm=True, swiglu=True"
    ),
    "ops.fused_linear_cross_entropy.fused_linear_cross_entropy_forward": (
        f"_input, weight, target, ce_weight=None, bias=None, {CE}, return_z_loss=False, accum_dtype=None, "
        f"use_token_scaling=False, {EXTRAS}"
    ),
    "ops.fused_linear_cross_entropy.fused_linear_cross_entropy_backward": (
        "grad_output, grad_input, grad_weight, grad_bias"
    ),
    "utils.infer_device": "",
    "utils.infer_comm_backend": "",
    "utils.is_peft_available": "",
    "env_report.print_env_report": "",
}

# Of `apply`, without the context.
AUTOGRAD_FUNCTIONS = {
    "cross_entropy.LigerCrossEntropyFunction": f"_input, target, weight, {CE}, return_z_loss=False, {EXTRAS}",
    "fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction": (
        f"_input, weight, target, bias=None, ce_weight=None, {CE}, return_z_loss=False, accum_dtype=None, "
        f"use_token_scaling=False, {EXTRAS}"
    ),
    "rms_norm.LigerRMSNormFunction": (
        "X, W, eps, offset=0.0, casting_mode='llama', in_place=True, row_mode=None"
    ),
    "layer_norm.LigerLayerNormFunction": "X, W, B, eps",
    "fused_add_rms_norm.LigerFusedAddRMSNormFunction": (
        "X, R, W, eps, offset=0.0, casting_mode='llama', in_place=False"
    ),
    "rope.LigerRopeFunction": "q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None",
    "qwen2vl_mrope.LigerQwen2VLMRopeFunction": "q, k, cos, sin, mrope_section, unsqueeze_dim=1",
    "swiglu.LigerSiLUMulFunction": "a, b, gate_multiplier=1.0, down_multiplier=1.0",
    "swiglu.LigerFusedGateUpSiLUMulFunction": "y, in_place=False",
    "geglu.LigerGELUMulFunction": "a, b",
    "fused_moe.LigerFusedMoEFunction": "x, gate_up_proj, down_proj, top_k_index, top_k_weights",
}

# Of the constructor and of `forward`.
MODULES = {
    "rms_norm.LigerRMSNorm": (
        f"hidden_size, {NORM.format('0.0', 'llama', 'ones', True)}, row_mode=None, elementwise_affine=True",
        "hidden_states",
    ),
    "rms_norm.LigerRMSNormForGemma": (
        f"hidden_size, {NORM.format('1.0', 'gemma', 'zeros', True)}, row_mode=None",
        "hidden_states",
    ),
    "rms_norm.LigerRMSNormForGemma2": (
        f"hidden_size, {NORM.format('1.0', 'gemma', 'zeros', False)}, row_mode=None",
        "hidden_states",
    ),
    "fused_add_rms_norm.LigerFusedAddRMSNorm": (
        f"hidden_size, {NORM.format('0.0', 'llama', 'ones', False)}",
        "hidden_states, residual",
    ),
    "layer_norm.LigerLayerNorm": ("hidden_size, eps=1e-06, bias=False, init_fn='ones'", "hidden_states"),
    "swiglu.LigerSwiGLUMLP": ("config, intermediate_size=None", "x"),
    "swiglu.LigerBlockSparseTop2MLP": ("config", "x"),
    "swiglu.LigerPhi3SwiGLUMLP": ("config", "x"),
    "swiglu.LigerExperts": ("config", "hidden_states, top_k_index, top_k_weights"),
    "geglu.LigerGEGLUMLP": ("config", "x"),
    "cross_entropy.LigerCrossEntropyLoss": (
        f"weight=None, {CE}, return_z_loss=False, {EXTRAS}",
        "_input, target",
    ),
    "fused_linear_cross_entropy.LigerFusedLinearCrossEntropyLoss": (
        f"ce_weight=None, {CE}, return_z_loss=False, accum_dtype=None, use_token_scaling=False, {EXTRAS}",
        "lin_weight, _input, target, bias=None",
    ),
}

# Keys of MODEL_TYPE_TO_APPLY_LIGER_FN.
MODEL_TYPES = {
    "gemma",
    "gemma2",
    "llama",
    "mistral",
    "mixtral",
    "mllama",
    "mllama_text_model",
    "phi3",
    "qwen2",
    "qwen2_vl",
    "qwen2_vl_text",
}
