"""Loading and patching in one call."""

import pytest
import torch
from tiny import CALLS, MODELS, Operators, batch, tiny
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from liger_ops.transformers import AutoLigerKernelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny().save_pretrained(path)
    return path


def operators_of(model):
    with Operators() as operators:
        model.train()(**batch(model.device))
    return set(operators.calls)


def test_from_pretrained(checkpoint, device):
    model = AutoLigerKernelForCausalLM.from_pretrained(checkpoint).to(device)
    assert type(model) is LlamaForCausalLM
    assert operators_of(model) == {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"}
    stock = tiny(device=device).eval()
    torch.testing.assert_close(model.eval()(**batch(device)).loss, stock(**batch(device)).loss)


def test_options_go_to_patch(checkpoint, device):
    model = AutoLigerKernelForCausalLM.from_pretrained(checkpoint, rope=False, swiglu=False).to(device)
    assert operators_of(model) == {"rms_norm", "fused_linear_cross_entropy"}
    config = LlamaConfig(**tiny().config.to_diff_dict() | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="the activation is ReLU"):
        AutoLigerKernelForCausalLM.from_config(config, strict=True)


def test_other_arguments_go_to_transformers(checkpoint):
    model, loading = AutoLigerKernelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not loading["missing_keys"]
    assert "rms_norm" in operators_of(model)


def test_from_config(device):
    model = AutoLigerKernelForCausalLM.from_config(tiny().config, dtype=torch.bfloat16).to(device)
    assert model.dtype == torch.bfloat16
    assert operators_of(model) == {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"}


def test_unknown_options_are_refused(checkpoint):
    with pytest.raises(TypeError, match="ropes"):
        AutoLigerKernelForCausalLM.from_pretrained(checkpoint, ropes=True)


def test_unsupported_type_loads_with_a_warning():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32)
    with pytest.warns(UserWarning, match="model type 'gpt2' is not supported"):
        model = AutoLigerKernelForCausalLM.from_config(config, recognize=False)
    assert type(model) is type(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", MODELS)
def test_every_family_that_transformers_loads(family, tmp_path, device):
    """The checkpoint of a model that sees may be loaded as its text part alone."""
    source = tiny(family)
    if family == "qwen2_vl":
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoLigerKernelForCausalLM.from_config(source.config)
        return
    source.save_pretrained(tmp_path)
    model = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, strict=True).to(device)
    with Operators() as operators:
        model.train()(**batch(device, family="mllama_text" if family == "mllama" else family))
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert operators.calls["rms_norm"] == CALLS[family]["rms_norm"]


def test_no_instances():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoLigerKernelForCausalLM()
