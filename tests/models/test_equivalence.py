"""Patched models against unpatched ones: logits, loss, gradients, training, generation."""

import copy
import pickle

import pytest
import torch
from tiny import BATCH, LENGTH, MODELS, Operators, assert_same_gradients, batch, step, tiny, train, twin

from liger_ops.transformers import patch

pytestmark = pytest.mark.parametrize("family", MODELS)


def pair(family, device, **changes):
    """A patched model and an unpatched one with the same weights."""
    stock = tiny(family, device, **changes)
    model = twin(stock)
    patch(model, strict=True)
    return model, stock


VARIANTS = {
    "plain": {},
    "mlp_bias": dict(mlp_bias=True),
    "attention_bias": dict(attention_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "lm_head_bias": dict(lm_head_bias=True),
    "eager_attention": dict(attn_implementation="eager"),
    "multi_query": dict(num_key_value_heads=1),
    "no_grouping": dict(num_key_value_heads=4),
    "swish": dict(hidden_act="swish"),
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
    "odd_sizes": dict(vocab_size=131, hidden_size=40, intermediate_size=50),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients(family, variant, device):
    model, stock = pair(family, device, **VARIANTS[variant])
    inputs = batch(device)
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
    with torch.no_grad():
        logits, stock_logits = model.eval()(**inputs).logits, stock.eval()(**inputs).logits
    torch.testing.assert_close(logits, stock_logits, rtol=1e-4, atol=1e-5)


def test_operators_run(family, device):
    model, _ = pair(family, device)
    with Operators() as operators:
        step(model, **batch(device))
    layers = model.config.num_hidden_layers
    assert operators.calls == {
        "rms_norm": 2 * layers + 1,
        "rms_norm_backward": 2 * layers + 1,
        "rope": layers,
        "rope_backward": layers,
        "swiglu": layers,
        "swiglu_backward": layers,
        # Its gradients are computed along with the loss; backward scales those of hidden states and weight.
        "fused_linear_cross_entropy": 1,
        "fused_linear_cross_entropy_scale": 2,
    }


def test_training_steps(family, device):
    model, stock = pair(family, device)
    losses, stock_losses = train(model, 20, device=device), train(stock, 20, device=device)
    assert losses == pytest.approx(stock_losses, rel=1e-5)


def test_bfloat16(family, device):
    """Against fp32, the patched bf16 model is as close as the stock one, in loss and in each gradient."""
    model, stock = pair(family, device, dtype=torch.bfloat16)
    exact = twin(stock).float()
    inputs = batch(device)
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    exact_loss, exact_gradients = step(exact, **inputs)
    assert loss.dtype == stock_loss.dtype == torch.float32
    # Rounding errors of the two are independent, so at this size either may come out a little ahead.
    slack = 1.5
    assert abs(loss - exact_loss) <= slack * abs(stock_loss - exact_loss) + 2e-3 * abs(exact_loss)
    for name, exact_gradient in exact_gradients.items():
        assert gradients[name].dtype == torch.bfloat16
        error = (gradients[name].float() - exact_gradient).norm()
        stock_error = (stock_gradients[name].float() - exact_gradient).norm()
        assert error <= slack * stock_error + 2e-3 * exact_gradient.norm(), name


def test_bfloat16_training(family, device):
    model, stock = pair(family, device, dtype=torch.bfloat16)
    losses, stock_losses = train(model, 10, device=device), train(stock, 10, device=device)
    assert losses == pytest.approx(stock_losses, rel=1e-2)
    assert losses[-1] < losses[0]


def test_autocast(family, device):
    model, stock = pair(family, device)
    with torch.autocast(device, torch.bfloat16):
        loss, gradients = step(model, **batch(device))
        stock_loss, stock_gradients = step(stock, **batch(device))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, stock_loss, rtol=5e-3, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_same_gradients(gradients, stock_gradients, share=5e-2)


@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32])
def test_norm_weights_of_another_dtype(family, others, device):
    """Adapter training keeps norms in fp32 beside 16-bit weights; the reverse occurs with fp32 embeddings."""
    norms = torch.float32 if others == torch.bfloat16 else torch.bfloat16
    model, stock = pair(family, device, dtype=others)
    for one in (model, stock):
        for name, module in one.named_modules():
            if name.endswith("norm"):
                module.to(norms)
    with torch.autocast(device, torch.bfloat16):
        loss, gradients = step(model, **batch(device))
        stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=5e-3, atol=0)
    assert_same_gradients(gradients, stock_gradients, share=5e-2)


@pytest.mark.parametrize("trainable", ["lm_head", "backbone", "norms"])
def test_frozen_parameters(family, trainable, device):
    model, stock = pair(family, device)
    wanted = {
        "lm_head": lambda name: name.startswith("lm_head"),
        "backbone": lambda name: not name.startswith("lm_head"),
        "norms": lambda name: "norm" in name,
    }[trainable]
    for one in (model, stock):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(wanted(name))
    _, gradients = step(model, **batch(device))
    _, stock_gradients = step(stock, **batch(device))
    assert gradients.keys() == {name for name, _ in model.named_parameters() if wanted(name)}
    assert_same_gradients(gradients, stock_gradients)


def test_padding_and_ignored_labels(family, device):
    model, stock = pair(family, device)
    inputs = batch(device)
    inputs["attention_mask"][0, -4:] = 0
    inputs["labels"][0, -4:] = -100
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant, device):
    model, stock = pair(family, device)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with Operators() as operators:
        loss, gradients = step(model, **batch(device))
    # One forward of each norm in the layers, and one more when the layer is recomputed.
    assert operators.calls["rms_norm"] == 4 * model.config.num_hidden_layers + 1
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_generate(family, device):
    model, stock = pair(family, device)
    prompt = batch(device)["input_ids"]
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with Operators() as operators:
        tokens = model.eval().generate(prompt, **arguments)
    assert operators.calls["rms_norm"] > 0
    assert torch.equal(tokens, stock.eval().generate(prompt, **arguments))


def test_generate_computes_last_logits_only(family, device):
    """``generate`` decides from the forward's signature, which the patch has to keep."""
    model, _ = pair(family, device)
    widths = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.eval().generate(batch(device)["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert set(widths) == {1}


def test_deepcopy_stays_patched(family, device):
    model, stock = pair(family, device)
    copied = copy.deepcopy(model)
    with Operators() as operators:
        loss, gradients = step(copied, **batch(device))
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_pickle_stays_patched(family, device):
    model, _ = pair(family, device)
    loaded = pickle.loads(pickle.dumps(model))
    with Operators() as operators:
        loss, _ = step(loaded, **batch(device))
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert loss.item() == step(model, **batch(device))[0].item()


def test_data_parallel_replica_uses_its_own_weights(family, device):
    model, _ = pair(family, device)
    norm = model.model.norm
    replica = norm._replicate_for_data_parallel()
    replica.weight = torch.zeros_like(norm.weight)
    with Operators() as operators:
        out = replica(torch.ones(2, model.config.hidden_size, device=device))
    assert operators.calls["rms_norm"] == 1
    assert not out.any()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_trains_like_eager(family, backend, device):
    torch.compiler.reset()
    model, _ = pair(family, device)
    eager = twin(model)
    patch(eager)
    if backend == "aot_eager":
        model.gradient_checkpointing_enable()
        # transformers warns about the cache with checkpointing, and dynamo breaks on the warning.
        model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    losses = train(model, 4, forward=compiled, device=device)
    assert losses == pytest.approx(train(eager, 4, device=device), rel=1e-4)


def test_compile_with_num_items(family, device):
    torch.compiler.reset()
    model, _ = pair(family, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for items in (16, 7):
        count = torch.tensor(items, device=device)
        loss = compiled(**batch(device), num_items_in_batch=count).loss
        torch.testing.assert_close(loss, model(**batch(device), num_items_in_batch=count).loss)
        # What the Trainer does to the loss before backward.
        loss *= 2
        loss.backward()


def test_compile_in_evaluation_returns_logits(family, device):
    torch.compiler.reset()
    model, _ = pair(family, device)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, expected = compiled(**batch(device)), model(**batch(device))
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.logits.shape == (BATCH, LENGTH, model.config.vocab_size)


def test_plain_cross_entropy(family, device):
    stock = tiny(family, device)
    model = twin(stock)
    patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    with Operators() as operators:
        loss, gradients = step(model, **batch(device))
    assert operators.calls["cross_entropy"] == 1
    assert operators.calls["fused_linear_cross_entropy"] == 0
    assert model(**batch(device)).logits is not None
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_patch_and_undo_reach_a_compiled_model(family, device):
    torch.compiler.reset()
    model = tiny(family, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(**batch(device)).logits is not None
    report = patch(model)
    assert compiled(**batch(device)).logits is None
    report.undo()
    assert compiled(**batch(device)).logits is not None


def test_export(family, device):
    model, _ = pair(family, device)
    ids = batch(device)["input_ids"]
    exported = torch.export.export(model.eval(), (), dict(input_ids=ids, use_cache=False), strict=False)
    called = {str(node.target) for node in exported.graph.nodes if "liger" in str(node.target)}
    assert called == {"liger.rms_norm.default", "liger.rope.default", "liger.swiglu.default"}
    logits = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits)
