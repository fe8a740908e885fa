"""Tiny models of every family, and what the tests do with them."""

from __future__ import annotations

import collections
import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from liger_ops.transformers import patch, sites

BATCH, LENGTH = 2, 12

TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLLAMA_TEXT = TEXT | dict(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=ROPE)
MLLAMA_VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_global_layers=1,
    attention_heads=2,
    num_channels=3,
    image_size=28,
    patch_size=14,
    max_num_tiles=2,
    intermediate_layers_indices=[0, 1],
    vision_output_dim=48,
    supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    # Two of its norms have torch's default instead.
    norm_eps=1e-3,
)
QWEN2_VL_VISION = dict(
    depth=2,
    embed_dim=32,
    num_heads=2,
    hidden_size=32,
    mlp_ratio=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
QWEN2_VL_IMAGE, QWEN2_VL_VIDEO, QWEN2_VL_START, QWEN2_VL_END = 120, 121, 122, 123


def mllama(**changes: Any) -> PreTrainedModel:
    config = MllamaConfig(
        vision_config=MLLAMA_VISION, text_config=MLLAMA_TEXT | changes, image_token_index=127
    )
    return MllamaForConditionalGeneration(config)


def qwen2_vl(**changes: Any) -> PreTrainedModel:
    text = TEXT | dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}) | changes
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=QWEN2_VL_VISION,
            image_token_id=QWEN2_VL_IMAGE,
            video_token_id=QWEN2_VL_VIDEO,
            vision_start_token_id=QWEN2_VL_START,
            vision_end_token_id=QWEN2_VL_END,
            tie_word_embeddings=changes.get("tie_word_embeddings", False),
        )
    )


# Scores and logits this small only bend when the caps are small as well.
CAPS = dict(final_logit_softcapping=0.3, attn_logit_softcapping=0.5)
GEMMA2 = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, attn_implementation="eager") | CAPS
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, sliding_window=None)
PHI3 = dict(rope_parameters=ROPE | {"partial_rotary_factor": 0.5})

MODELS = {
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**TEXT | changes)),
    "mistral": lambda **changes: MistralForCausalLM(
        MistralConfig(**TEXT | {"sliding_window": None} | changes)
    ),
    "mixtral": lambda **changes: MixtralForCausalLM(MixtralConfig(**TEXT | MIXTRAL | changes)),
    "gemma": lambda **changes: GemmaForCausalLM(GemmaConfig(**TEXT | {"head_dim": 8} | changes)),
    "gemma2": lambda **changes: Gemma2ForCausalLM(Gemma2Config(**TEXT | GEMMA2 | changes)),
    "qwen2": lambda **changes: Qwen2ForCausalLM(Qwen2Config(**TEXT | changes)),
    "phi3": lambda **changes: Phi3ForCausalLM(Phi3Config(**TEXT | PHI3 | changes)),
    "mllama_text": lambda **changes: MllamaForCausalLM(MllamaTextConfig(**MLLAMA_TEXT | changes)),
    "mllama": mllama,
    "qwen2_vl": qwen2_vl,
}

# Calls of each operator in one training step of a tiny model, forward; each is called as often in backward.
CALLS = {
    name: dict(rms_norm=5, rope=2, swiglu=2) | changes
    for name, changes in {
        "llama": {},
        "mistral": {},
        "mixtral": dict(swiglu=0, swiglu_packed=2),
        "gemma": dict(swiglu=0, geglu=2),
        "gemma2": dict(rms_norm=9, swiglu=0, geglu=2),
        "qwen2": {},
        "phi3": dict(swiglu=0, swiglu_packed=2),
        # The cross-attention layer has two norms more and no rotary embedding.
        "mllama_text": dict(rms_norm=9, rope=2, swiglu=3),
        "mllama": dict(rms_norm=9, rope=2, swiglu=3, layer_norm=8),
        "qwen2_vl": dict(rope=4, layer_norm=5),
    }.items()
}


def tiny(
    family: str = "llama",
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    lm_head_bias: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A model with the same random weights each time. ``changes`` go to its (text) configuration."""
    torch.manual_seed(0)
    model = MODELS[family](**changes)
    if lm_head_bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.get_text_config().vocab_size))
    for name, parameter in model.named_parameters():
        # Norm weights are ones and biases zeros in a new model, which would hide that one is left out. Gates
        # of zero hide whole layers.
        if "norm" in name or "ln_q" in name or name.endswith("bias") or name.endswith("gate"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        # Near zero all activations are alike.
        if "gate_proj" in name or "gate_up_proj" in name:
            parameter.data.mul_(20)
    return model.to(device=device, dtype=dtype)


def batch(
    device: Any = "cpu", seed: int = 1, length: int = LENGTH, family: str = "llama"
) -> dict[str, torch.Tensor]:
    """Token ids, mask, labels, the first three labels ignored, and the images of models that see."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (BATCH, length), generator=generator)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if family == "mllama":
        inputs |= dict(
            pixel_values=torch.randn(BATCH, 1, 2, 3, 28, 28, generator=generator),
            aspect_ratio_ids=torch.ones(BATCH, 1, dtype=torch.long),
            aspect_ratio_mask=torch.ones(BATCH, 1, 2, dtype=torch.long),
            cross_attention_mask=torch.ones(BATCH, length, 1, 2, dtype=torch.long),
        )
    if family == "mllama_text":
        inputs["cross_attention_states"] = torch.randn(BATCH, 6, TEXT["hidden_size"], generator=generator)
    if family == "qwen2_vl":
        # One image of 1 x 4 x 4 patches, which the merger makes 4 tokens of, in each sample.
        ids[:, 1], ids[:, 2:6], ids[:, 6] = QWEN2_VL_START, QWEN2_VL_IMAGE, QWEN2_VL_END
        inputs |= dict(
            pixel_values=torch.randn(BATCH * 16, 96, generator=generator),
            image_grid_thw=torch.tensor([[1, 4, 4]] * BATCH),
            mm_token_type_ids=(ids == QWEN2_VL_IMAGE).long(),
        )
    labels = ids.clone()
    labels[:, :3] = -100
    inputs["labels"] = labels
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def in_dtype_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with images as the model takes them."""
    names = ("pixel_values", "cross_attention_states")
    return inputs | {name: inputs[name].to(model.dtype) for name in names if name in inputs}


def step(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one forward, and the gradient of every parameter that got one."""
    model.zero_grad(set_to_none=True)
    loss = model(**in_dtype_of(model, inputs)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def train(
    model: PreTrainedModel,
    steps: int,
    forward: Any = None,
    device: Any = "cpu",
    family: str = "llama",
    **inputs: Any,
) -> list[float]:
    """Losses of AdamW steps over as many batches. ``forward`` is called instead of the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for seed in range(steps):
        images = in_dtype_of(model, batch(device, seed, family=family))
        loss = (model if forward is None else forward)(**images, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def text_model(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder of a model with a head, beside which there may be a vision tower."""
    return getattr(model.model, "language_model", model.model)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """An unpatched model with the same weights."""
    return copy.deepcopy(model)


def pair(family, device, **changes):
    """A patched model and an unpatched one with the same weights."""
    stock = tiny(family, device, **changes)
    model = twin(stock)
    patch(model, strict=True)
    return model, stock


def forget_patches() -> None:
    """Stock classes again: a model that is gone is not undone by that."""
    for site in list(sites._sites.values()):
        site.users.clear()
        site.release(None)


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 1e-4
) -> None:
    """Same parameters, and each difference at most ``share`` of the expected gradient's norm.

    And 1e-7, float32's precision, of all gradients' norm: a single number's gradient sums what may cancel.
    """
    assert actual.keys() == expected.keys()
    total = sum(gradient.double().square().sum().item() for gradient in expected.values()) ** 0.5
    for name, gradient in expected.items():
        difference = (actual[name].double() - gradient.double()).norm().item()
        budget = share * gradient.double().norm().item() + 1e-7 * total
        assert difference <= budget, f"{name}: difference {difference:.3g}, allowed are {budget:.3g}"


class Operators(TorchDispatchMode):
    """Counts the calls of liger operators, by public name, inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "liger":
            # A forward that keeps statistics for its backward may be an operator of its own.
            name = func._schema.name.removeprefix("liger::").removesuffix("_forward")
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
