"""Patched models against unpatched ones: logits, loss, gradients, training, generation."""

import copy
import pickle

import pytest
import torch
from tiny import (
    CALLS,
    MODELS,
    Operators,
    assert_same_gradients,
    batch,
    pair,
    step,
    text_model,
    tiny,
    train,
    twin,
)

from liger_ops.transformers import patch

# With it transformers' own forward fails in decoding.
NO_ROUTER_LOSS = {"mixtral": dict(output_router_logits=False)}

pytestmark = pytest.mark.parametrize("family", MODELS)


def test_operators_run(family, device):
    """Each part of the record is exercised, forward and backward."""
    model, _ = pair(family, device)
    with Operators() as operators:
        step(model, **batch(device, family=family))
    expected = {name: calls for name, calls in CALLS[family].items() if calls}
    backward = {f"{name}_backward": calls for name, calls in expected.items()}
    # Its gradients are computed along with the loss; backward scales those of hidden states and weight.
    loss = {"fused_linear_cross_entropy": 1, "cross_entropy_scale": 2}
    assert operators.calls == expected | backward | loss


def test_training_steps(family, device):
    model, stock = pair(family, device)
    losses = train(model, 20, device=device, family=family)
    stock_losses = train(stock, 20, device=device, family=family)
    assert losses == pytest.approx(stock_losses, rel=1e-5)


# How one step's roundings fall is luck, which for a gate of one element may go far either way.
SEEDS = range(6)


def root_mean_square(values):
    return torch.stack(values).square().mean().sqrt()


def assert_no_worse(steps):
    """Against fp32, loss and each gradient of the patched model are as close as those of the stock one.

    `steps`: for each seed, loss and gradients of the patched model, of the stock one, and of fp32.
    """
    slack = 1.5
    losses = [torch.stack([loss.double() for loss, _ in step]) for step in steps]
    error, stock_error = (root_mean_square([loss[i] - loss[2] for loss in losses]) for i in (0, 1))
    assert error <= slack * stock_error + 2e-3 * losses[0][2].abs()
    total = torch.stack([gradient.norm() for gradient in steps[0][2][1].values()]).norm()
    for name in steps[0][2][1]:
        ours, stocks, exacts = zip(
            *([gradients[name] for _, gradients in step] for step in steps), strict=True
        )
        assert ours[0].dtype == stocks[0].dtype
        error, stock_error = (
            root_mean_square([(a.float() - b).norm() for a, b in zip(some, exacts, strict=True)])
            for some in (ours, stocks)
        )
        size = root_mean_square([exact.norm() for exact in exacts])
        assert error <= slack * stock_error + 2e-3 * size + 1e-5 * total, name


def test_bfloat16(family, device):
    model, stock = pair(family, device, dtype=torch.bfloat16)
    exact = twin(stock).float()
    steps = []
    for seed in SEEDS:
        inputs = batch(device, seed, family=family)
        steps.append([step(one, **inputs) for one in (model, stock, exact)])
    for results in steps:
        assert results[0][0].dtype == results[1][0].dtype == torch.float32
        assert all(gradient.dtype == torch.bfloat16 for gradient in results[0][1].values())
    assert_no_worse(steps)


def test_bfloat16_training(family, device):
    """The stock bf16 run strays from the fp32 run, by its roundings; the patched run strays no further.

    So the two are at most twice that apart, and three times allows for luck.
    """
    model, stock = pair(family, device, dtype=torch.bfloat16)
    exact = train(twin(stock).float(), 20, device=device, family=family)
    losses = train(model, 20, device=device, family=family)
    stock_losses = train(stock, 20, device=device, family=family)
    stray = max(abs(a / b - 1) for a, b in zip(stock_losses, exact, strict=True))
    assert losses == pytest.approx(stock_losses, rel=3 * stray + 1e-4)


def test_autocast(family, device):
    model, stock = pair(family, device)
    if family == "mixtral":
        # Autocast does not reach transformers' grouped products, which stay in fp32, as it does these.
        stock.set_experts_implementation("eager")
    steps = []
    for seed in SEEDS:
        inputs = batch(device, seed, family=family)
        with torch.autocast(device, torch.bfloat16):
            results = [step(one, **inputs) for one in (model, stock)]
        assert results[0][0].dtype == torch.float32
        steps.append([*results, step(stock, **inputs)])
    assert_no_worse(steps)


@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32])
def test_norm_weights_of_another_dtype(family, others, device):
    """Adapter training keeps norms in fp32 beside 16-bit weights; the reverse occurs with fp32 embeddings."""
    norms = torch.float32 if others == torch.bfloat16 else torch.bfloat16
    model, stock = pair(family, device, dtype=others)
    for one in (model, stock):
        for module in one.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.to(norms)
    with torch.autocast(device, torch.bfloat16):
        loss, gradients = step(model, **batch(device, family=family))
        stock_loss, stock_gradients = step(stock, **batch(device, family=family))
    torch.testing.assert_close(loss, stock_loss, rtol=5e-3, atol=0)
    assert_same_gradients(gradients, stock_gradients, share=5e-2)


@pytest.mark.parametrize("trainable", ["lm_head", "backbone", "norms"])
def test_frozen_parameters(family, trainable, device):
    model, stock = pair(family, device, tie_word_embeddings=False)
    wanted = {
        "lm_head": lambda name: name.startswith("lm_head"),
        "backbone": lambda name: not name.startswith("lm_head"),
        "norms": lambda name: "norm" in name,
    }[trainable]
    for one in (model, stock):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(wanted(name))
    _, gradients = step(model, **batch(device, family=family))
    _, stock_gradients = step(stock, **batch(device, family=family))
    assert gradients.keys() == {name for name, _ in model.named_parameters() if wanted(name)}
    assert_same_gradients(gradients, stock_gradients)


def test_padding_and_ignored_labels(family, device):
    model, stock = pair(family, device)
    inputs = batch(device, family=family)
    inputs["attention_mask"][0, -4:] = 0
    inputs["labels"][0, -4:] = -100
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant, device):
    model, stock = pair(family, device)
    # Router logits are recorded in the first of the two forwards, which the reentrant kind runs without
    # gradients: both models have to do it.
    for one in (model, stock):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            one.enable_input_require_grads()
    with Operators() as operators:
        loss, gradients = step(model, **batch(device, family=family))
    # One forward of each norm in the layers, and one more when the layer is recomputed.
    assert operators.calls["rms_norm"] == 2 * CALLS[family]["rms_norm"] - 1
    stock_loss, stock_gradients = step(stock, **batch(device, family=family))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize(
    "how", [{}, dict(num_beams=2), dict(use_cache=False)], ids=["greedy", "beams", "no_cache"]
)
def test_generate(family, how, device):
    model, stock = pair(family, device, **NO_ROUTER_LOSS.get(family, {}))
    prompt = batch(device, family=family)
    del prompt["labels"]
    arguments = dict(max_new_tokens=8, do_sample=False, pad_token_id=0) | how
    with Operators() as operators:
        tokens = model.eval().generate(**prompt, **arguments)
    assert operators.calls["rms_norm"] > 0
    assert torch.equal(tokens, stock.eval().generate(**prompt, **arguments))


def test_generate_computes_last_logits_only(family, device):
    """``generate`` decides from the forward's signature, which the patch has to keep."""
    model, _ = pair(family, device)
    widths = []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.eval().generate(
        batch(device, family=family)["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert set(widths) == {1}


def test_deepcopy_stays_patched(family, device):
    model, stock = pair(family, device)
    copied = copy.deepcopy(model)
    with Operators() as operators:
        loss, gradients = step(copied, **batch(device, family=family))
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    stock_loss, stock_gradients = step(stock, **batch(device, family=family))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_pickle_stays_patched(family, device):
    model, _ = pair(family, device)
    loaded = pickle.loads(pickle.dumps(model))
    with Operators() as operators:
        loss, _ = step(loaded, **batch(device, family=family))
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert loss.item() == step(model, **batch(device, family=family))[0].item()


def test_data_parallel_replica_uses_its_own_weights(family, device):
    model, _ = pair(family, device)
    norm = text_model(model).norm
    replica = norm._replicate_for_data_parallel()
    # What Gemma stores is 1 less than the factor.
    replica.weight = torch.full_like(norm.weight, -1.0 if "gemma" in family else 0.0)
    with Operators() as operators:
        out = replica(torch.ones(2, norm.weight.shape[0], device=device))
    assert operators.calls["rms_norm"] == 1
    assert not out.any()


def test_plain_cross_entropy(family, device):
    stock = tiny(family, device)
    model = twin(stock)
    patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    with Operators() as operators:
        loss, gradients = step(model, **batch(device, family=family))
    assert operators.calls["cross_entropy"] == 1
    assert operators.calls["fused_linear_cross_entropy"] == 0
    assert model(**batch(device, family=family)).logits is not None
    stock_loss, stock_gradients = step(stock, **batch(device, family=family))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)


def test_export(family, device):
    model, _ = pair(family, device)
    ids = batch(device, family=family)["input_ids"]
    exported = torch.export.export(model.eval(), (), dict(input_ids=ids, use_cache=False), strict=False)
    called = {str(node.target) for node in exported.graph.nodes if str(node.target).startswith("liger.")}
    # Without images the vision tower does not run.
    assert called == {f"liger.{name}.default" for name, calls in CALLS[family].items() if calls} - {
        "liger.layer_norm.default"
    }
    logits = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits)
