"""Configurations of every family, patched against unpatched; and records that are wrong, which must show."""

import dataclasses
import inspect

import pytest
import torch
from tiny import (
    MODELS,
    QWEN2_VL_IMAGE,
    QWEN2_VL_VIDEO,
    ROPE,
    assert_same_gradients,
    batch,
    forget_patches,
    in_dtype_of,
    pair,
    step,
    tiny,
)

import liger_ops.functional as LF
from liger_ops.transformers import families, patch, patching
from liger_ops.transformers.parts import CausalLMHead, GatedMLP, PackedMLP, RMSNorm

VARIANTS = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "lm_head_bias": dict(lm_head_bias=True),
    "eager_attention": dict(attn_implementation="eager"),
    "multi_query": dict(num_key_value_heads=1),
    "no_grouping": dict(num_key_value_heads=4),
    "odd_sizes": dict(vocab_size=131, hidden_size=40, intermediate_size=50),
}
# mllama has no tied heads; other sizes are bound to images or to rotary sections.
EXCEPT = {
    ("mixtral", "odd_sizes"),
    ("mllama_text", "odd_sizes"),
    ("mllama", "tied"),
    ("mllama_text", "tied"),
    ("qwen2_vl", "odd_sizes"),
    ("phi3", "odd_sizes"),
}
OWN_VARIANTS = {
    "llama": {
        "mlp_bias": dict(mlp_bias=True),
        "attention_bias": dict(attention_bias=True),
        "swish": dict(hidden_act="swish"),
        "gelu": dict(hidden_act="gelu_new"),
        "llama3_rope": dict(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        ),
    },
    "mixtral": {
        "no_router_loss": dict(output_router_logits=False),
        # transformers' grouped products refuse such sizes.
        "odd_experts": dict(hidden_size=40, intermediate_size=50, experts_implementation="eager"),
        "gelu": dict(hidden_act="gelu"),
    },
    "gemma": {"erf_gelu": dict(hidden_act="gelu")},
    "gemma2": {"erf_gelu": dict(hidden_activation="gelu"), "no_softcap": dict(final_logit_softcapping=None)},
    "phi3": {
        "whole_rotary": dict(rope_parameters=ROPE),
        "gelu": dict(hidden_act="gelu"),
        "longrope": dict(
            original_max_position_embeddings=32,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.5,
                short_factor=[1.5, 2.0],
                long_factor=[3.0, 4.0],
                original_max_position_embeddings=32,
            ),
        ),
    },
}


def combinations():
    for family in MODELS:
        for name, changes in (VARIANTS | OWN_VARIANTS.get(family, {})).items():
            if (family, name) not in EXCEPT:
                yield pytest.param(family, changes, id=f"{family}-{name}")


def compare(family, device, **changes):
    """Patched against unpatched: loss, every gradient, logits and the kind of output."""
    model, stock = pair(family, device, **changes)
    inputs = batch(device, family=family)
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
    with torch.no_grad():
        out, stock_out = model.eval()(**inputs), stock.eval()(**inputs)
    assert isinstance(out, type(stock_out))
    assert out.keys() == stock_out.keys()
    torch.testing.assert_close(out.logits, stock_out.logits, rtol=1e-4, atol=1e-5)


def compare_roundings(family, device):
    """Each norm and MLP in bfloat16, where it shows at which points a result is rounded.

    Sums in another order change the last bit of a few numbers; rounding elsewhere, that of many.
    """
    model, stock = pair(family, device, dtype=torch.bfloat16)
    # Away from 1, where a rounding too many is not visible.
    for one in (model, stock):
        torch.manual_seed(1)
        for module in one.modules():
            if "Norm" in type(module).__name__:
                module.weight.data.uniform_(-1, 1)
    for (name, module), other in zip(model.named_modules(), stock.modules(), strict=True):
        if name.endswith("mlp") and hasattr(module, "down_proj"):
            x = torch.randn(64, module.down_proj.out_features, device=device, dtype=torch.bfloat16)
        elif "Norm" in type(module).__name__:
            x = torch.randn(64, module.weight.shape[0], device=device, dtype=torch.bfloat16)
        else:
            continue
        share = (module(x) != other(x)).float().mean().item()
        assert share < 0.02, f"{name}: {share:.1%} of the results differ"


def logits_dtype(family, device):
    model, stock = pair(family, device, dtype=torch.bfloat16)
    inputs = in_dtype_of(stock, batch(device, family=family))
    assert model.eval()(**inputs).logits.dtype == stock.eval()(**inputs).logits.dtype


@pytest.mark.parametrize(("family", "changes"), combinations())
def test_logits_loss_and_gradients(family, changes, device):
    compare(family, device, **changes)


@pytest.mark.parametrize("family", MODELS)
def test_roundings(family, device):
    compare_roundings(family, device)
    logits_dtype(family, device)


# Family, kind of part, what is wrong about it, and the comparison that has to find out.
WRONG = [
    ("llama", RMSNorm, dict(offset=1.0), compare),
    ("llama", RMSNorm, dict(casting_mode="gemma"), compare_roundings),
    ("gemma", RMSNorm, dict(offset=0.0), compare),
    ("gemma2", RMSNorm, dict(casting_mode="llama"), compare_roundings),
    ("mistral", RMSNorm, dict(eps="wrong_eps"), compare),
    ("mixtral", RMSNorm, dict(eps="wrong_eps"), compare),
    ("qwen2", RMSNorm, dict(eps="wrong_eps"), compare),
    ("phi3", RMSNorm, dict(eps="wrong_eps"), compare),
    ("mllama", RMSNorm, dict(eps="wrong_eps"), compare),
    ("qwen2_vl", RMSNorm, dict(eps="wrong_eps"), compare),
    ("gemma2", CausalLMHead, dict(softcap=None), compare),
    ("mixtral", CausalLMHead, dict(router_loss=None), compare),
    ("mllama_text", CausalLMHead, dict(float_logits=False), logits_dtype),
    ("mllama", CausalLMHead, dict(float_logits=True), logits_dtype),
    ("llama", GatedMLP, dict(gate="up_proj", up="gate_proj"), compare),
    ("gemma", GatedMLP, dict(act="wrong_act"), compare),
    ("phi3", PackedMLP, dict(act="wrong_act"), compare),
]


@pytest.mark.parametrize(
    ("family", "kind", "wrong", "comparison"), WRONG, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_wrong_record_shows(family, kind, wrong, comparison, device, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "wrong_eps", 1e-4, raising=False)
    # Right for Phi-3 is SiLU, for Gemma the GELU by tanh.
    monkeypatch.setattr(torch.nn.Module, "wrong_act", torch.nn.GELU(), raising=False)
    right = families.family_of(tiny(family).config.model_type)
    comparison(family, device)
    parts = [dataclasses.replace(part, **wrong) if type(part) is kind else part for part in right.parts]
    assert parts != list(right.parts)
    monkeypatch.setattr(patching, "family_of", lambda _: dataclasses.replace(right, parts=tuple(parts)))
    forget_patches()
    with pytest.raises(AssertionError):
        comparison(family, device)


@pytest.mark.parametrize("family", ["mllama", "qwen2_vl"])
def test_an_epsilon_of_its_own_in_each_layer_norm_shows(family, device, monkeypatch):
    """Liger gives all of them 1e-6."""
    layer_norm = LF.layer_norm
    monkeypatch.setattr(LF, "layer_norm", lambda x, weight, bias, eps: layer_norm(x, weight, bias, 1e-2))
    with pytest.raises(AssertionError):
        compare(family, device)


@pytest.mark.parametrize("family", ["mllama", "mllama_text", "qwen2_vl"])
def test_without_images(family, device):
    model, stock = pair(family, device)
    loss, gradients = step(model, **batch(device))
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_videos(device):
    model, stock = pair("qwen2_vl", device)
    inputs = batch(device, family="qwen2_vl")
    is_image = inputs["input_ids"] == QWEN2_VL_IMAGE
    inputs["input_ids"][is_image] = inputs["labels"][is_image] = QWEN2_VL_VIDEO
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    inputs["mm_token_type_ids"] *= 2
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize("training", [True, False])
def test_router_loss_with_shifted_labels_alone(training, device):
    model, _ = pair("mixtral", device)
    model.train(training)
    inputs = batch(device)
    expected = model(**inputs)
    inputs["shift_labels"] = torch.nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[..., 1:]
    out = model(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.aux_loss > 0
    without = model(**inputs, output_router_logits=False)
    assert without.aux_loss is None
    torch.testing.assert_close(out.loss - without.loss, model.router_aux_loss_coef * out.aux_loss)


def test_router_loss_counts_the_mask(device):
    model, stock = pair("mixtral", device)
    inputs = batch(device)
    inputs["attention_mask"][0, -4:] = 0
    inputs["labels"][0, -4:] = -100
    torch.testing.assert_close(model(**inputs).loss, stock(**inputs).loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(**inputs).aux_loss, stock(**inputs).aux_loss)


def test_router_logits_in_decoding(device):
    """The mask covers the cache as well, the router saw the new tokens only; transformers' forward fails."""
    model, _ = pair("mixtral", device)
    ids = batch(device)["input_ids"]
    tokens = model.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.config.output_router_logits = False
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_router_jitter_changes_the_norms_result_in_place(device):
    changes = dict(router_jitter_noise=0.1, experts_implementation="eager")
    model, stock = pair("mixtral", device, **changes)
    torch.manual_seed(2)
    loss, gradients = step(model, **batch(device))
    torch.manual_seed(2)
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize("implementation", ["batched_mm", "liger_ops", "deepgemm"])
def test_experts_implementation(implementation, device):
    """What transformers chooses by itself is replaced; what a user chose is not."""
    model = tiny("mixtral", device)
    model.config._experts_implementation = implementation
    report = patch(model)
    reasons = [row.reason for row in report.skipped]
    if implementation != "deepgemm":
        assert not reasons
    else:
        assert reasons == ["the configuration asks for the experts implementation 'deepgemm'"]


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "mllama", "mllama_text", "qwen2_vl"])
@pytest.mark.parametrize("training", [True, False])
def test_heads(family, training, device):
    """What differs between the heads, with everything a forward can be asked for."""
    model, stock = pair(family, device)
    model.train(training), stock.train(training)
    inputs = batch(device, family=family)
    labels = inputs.pop("labels")
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
    logits = model(**inputs, logits_to_keep=3).logits
    torch.testing.assert_close(logits, stock(**inputs, logits_to_keep=3).logits, rtol=1e-4, atol=1e-5)
    expected = stock(**inputs, labels=labels, num_items_in_batch=7, output_hidden_states=True)
    for skip_logits in (None, True, False):
        out = model(
            **inputs, labels=labels, num_items_in_batch=7, skip_logits=skip_logits, output_hidden_states=True
        )
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
        assert (out.logits is None) == (training if skip_logits is None else skip_logits)
        assert out.keys() - {"logits"} == expected.keys() - {"logits"}
        assert len(out.hidden_states) == len(expected.hidden_states)
    names = list(inspect.signature(stock.forward).parameters)
    arguments = [(inputs | {"labels": labels}).get(name) for name in names[: names.index("labels") + 1]]
    rest = {name: value for name, value in inputs.items() if name not in names[: names.index("labels")]}
    torch.testing.assert_close(
        model(*arguments, **rest).loss, stock(*arguments, **rest).loss, rtol=1e-5, atol=0
    )
    with pytest.raises(TypeError):
        model(*arguments, input_ids=inputs["input_ids"])
    plain = stock(**inputs, labels=labels, return_dict=False)
    values = model(**inputs, labels=labels, return_dict=False)
    assert len(values) == len(plain)
    torch.testing.assert_close(values[0], plain[0], rtol=1e-5, atol=0)
    seen = {}

    def own_loss(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, vocab_size=vocab_size, dtype=logits.dtype)
        return logits.float().square().mean()

    model.loss_function = stock.loss_function = own_loss
    out = model(**inputs, labels=labels, num_items_in_batch=7)
    ours, seen = seen, {}
    torch.testing.assert_close(
        out.loss, stock(**inputs, labels=labels, num_items_in_batch=7).loss, rtol=1e-4, atol=0
    )
    assert ours == seen and ours["vocab_size"] == 128


@pytest.mark.parametrize("family", ["gemma2", "mllama", "qwen2_vl"])
def test_heads_with_hooks(family, device):
    """With anything around the head, logits and the loss from them, soft-capped where that belongs."""
    model, stock = pair(family, device)
    shapes = []
    for one in (model, stock):
        one.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    loss, gradients = step(model, **batch(device, family=family))
    stock_loss, stock_gradients = step(stock, **batch(device, family=family))
    assert len(shapes) == 2
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
