"""Training adapters on patched models. What an adapter does to the head is in ``test_lm_head.py``."""

import pytest
import torch
from tiny import Operators, assert_same_gradients, batch, step, tiny, train

from liger_ops.transformers import patch

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LAYERS = {"rms_norm", "rope", "swiglu"}


def adapt(model, name="default", **config):
    """Adapters that are not zero, the same each time."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, **config), adapter_name=name
    )
    return adapted.train()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_attention_mlp_and_saved_modules(device):
    config = dict(target_modules=[*ATTENTION, *MLP], modules_to_save=["lm_head", "norm"])
    stock, model = (adapt(tiny(device=device), **config) for _ in range(2))
    patch(model, strict=True)
    with Operators() as operators:
        loss, gradients = step(model, **batch(device))
    assert set(operators.calls) >= LAYERS | {"fused_linear_cross_entropy"}
    assert gradients.keys() == trainable(model)
    assert any("lm_head.modules_to_save" in name for name in gradients)
    assert any("norm.modules_to_save" in name for name in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    expected, expected_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected_gradients)
    assert train(model, 5, device=device) == pytest.approx(train(stock, 5, device=device), rel=1e-4)
    # The frozen copies are what they were, beside trained ones.
    head, norm = model.base_model.model.lm_head, model.base_model.model.model.norm
    torch.testing.assert_close(
        head.original_module.weight, tiny(device=device).lm_head.weight, rtol=0, atol=0
    )
    assert not torch.equal(norm.modules_to_save["default"].weight, norm.original_module.weight)


def test_adapter_on_the_head_takes_part(device):
    """Read past its adapter, the head would lose these gradients and the loss would not see the adapter."""
    config = dict(target_modules=["q_proj", "lm_head"])
    stock, model = (adapt(tiny(device=device), **config) for _ in range(2))
    patch(model)
    loss, gradients = step(model, **batch(device))
    expected, expected_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected_gradients)
    on_head = [gradient for name, gradient in gradients.items() if "lm_head" in name]
    assert len(on_head) == 2 and all(gradient.abs().max() > 0 for gradient in on_head)
    with model.disable_adapter():
        assert model(**batch(device)).loss.item() != pytest.approx(loss.item(), rel=1e-3)
    assert train(model, 5, device=device) == pytest.approx(train(stock, 5, device=device), rel=1e-4)


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_frozen_16_bit_base_with_float32_adapters(norms, device):
    """QLoRA without the quantisation, under autocast: adapters in float32, and k-bit preparation makes the
    norms so too."""
    config = dict(target_modules=[*ATTENTION, *MLP])

    def make():
        base = tiny(device=device, dtype=torch.bfloat16)
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.to(norms)
        return adapt(base, **config)

    stock, model = make(), make()
    exact = make().double()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    patch(model, strict=True)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
    with Operators() as operators, autocast:
        loss, gradients = step(model, **batch(device))
    assert set(operators.calls) >= LAYERS | {"fused_linear_cross_entropy"}
    assert gradients.keys() == trainable(model)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    with autocast:
        stock_loss, stock_gradients = step(stock, **batch(device))
    exact_loss, exact_gradients = step(exact, **batch(device))
    assert abs(loss - exact_loss) <= max(abs(stock_loss - exact_loss), 2e-3 * exact_loss)
    # Roundings to 16 bit on the way differ; on average ours must not be further from the exact gradient.
    shares = [
        sum((g[name] - exact_gradients[name]).norm() / exact_gradients[name].norm() for name in gradients)
        for g in (gradients, stock_gradients)
    ]
    assert shares[0] <= 1.2 * shares[1]
    with autocast:
        assert train(model, 5, device=device) == pytest.approx(train(stock, 5, device=device), rel=1e-2)


@pytest.mark.parametrize("target", ["wrapper", "base"])
def test_unwrapping(target, device):
    model = adapt(tiny(device=device), target_modules=ATTENTION)
    report = patch(model if target == "wrapper" else model.get_base_model(), strict=True)
    assert report.model == "LlamaForCausalLM" and report.model_type == "llama"
    assert {row.option: row.count for row in report.patched}["rms_norm"] == 5
    with Operators() as operators:
        model(**batch(device)).loss.backward()
    assert operators.calls["fused_linear_cross_entropy"] == 1
    # What was patched remains so without the adapters.
    base = model.unload()
    with Operators() as operators:
        base.train()(**batch(device))
    assert operators.calls["fused_linear_cross_entropy"] == 1


def test_adapters_added_and_switched_after_patching(device):
    """Each step asks what the head is then. Beside a PEFT layer on the head the loss comes from logits."""
    configs = dict(
        attention=dict(target_modules=ATTENTION),
        mlp=dict(target_modules=MLP, modules_to_save=["norm"]),
        head=dict(target_modules=["q_proj", "lm_head"]),
    )

    def make(patched):
        base = tiny(device=device)
        if patched:
            patch(base, strict=True)
        return adapt(base, "attention", **configs["attention"])

    model, stock = make(True), make(False)

    def compare(name):
        for one in (model, stock):
            if name not in one.peft_config:
                torch.manual_seed(4)
                one.add_adapter(name, peft.LoraConfig(r=4, init_lora_weights=False, **configs[name]))
            one.set_adapter(name)
        with Operators() as operators:
            loss, gradients = step(model, **batch(device))
        expected, expected_gradients = step(stock, **batch(device))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert_same_gradients(gradients, expected_gradients)
        assert set(operators.calls) >= LAYERS
        return loss.item(), operators.calls["fused_linear_cross_entropy"]

    attention, fused = compare("attention")
    assert fused
    mlp, fused = compare("mlp")
    assert fused and mlp != pytest.approx(attention, rel=1e-4)
    head, fused = compare("head")
    assert not fused and head != pytest.approx(attention, rel=1e-4)
    assert compare("attention")[0] == pytest.approx(attention, rel=1e-5)


def test_merged_model_is_an_ordinary_one(device, tmp_path):
    model = adapt(tiny(device=device), target_modules=[*ATTENTION, *MLP, "lm_head"])
    patch(model)
    train(model, 2, device=device)
    expected = model(**batch(device)).loss.item()
    merged = model.merge_and_unload()
    assert merged(**batch(device)).loss.item() == pytest.approx(expected, rel=1e-4)
    merged.save_pretrained(tmp_path)
    assert merged.state_dict().keys() == tiny().state_dict().keys()
    loaded = type(merged).from_pretrained(tmp_path).to(device)
    assert loaded(**batch(device)).loss.item() == pytest.approx(expected, rel=1e-4)
