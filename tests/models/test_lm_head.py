"""Heads that are more than a linear map: fused where that is right, logits where it is not."""

import pytest
import torch
from tiny import Operators, assert_same_gradients, batch, step, tiny, twin
from torch import nn

from liger_ops.transformers import patch
from liger_ops.transformers.forwards.lm_head import linear_head

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]


def lora(model, **config):
    """A LoRA model whose adapters are not zero, so that leaving one out shows."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.1)
    return adapted


def compare(model, stock, device, fused):
    """Loss and gradients equal to the stock model's, on the path that is expected."""
    with Operators() as operators:
        loss, gradients = step(model, **batch(device))
    assert operators.calls["fused_linear_cross_entropy"] == int(fused)
    assert operators.calls["cross_entropy"] == int(not fused)
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
    return loss


# Configuration, and whether the loss can be fused.
CONFIGS = {
    "backbone": (dict(), True),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), True),
    "norm_to_save": (dict(modules_to_save=["norm", "input_layernorm"]), True),
    "lm_head": (dict(target_modules=[*TARGETS, "lm_head"]), False),
    "dora_lm_head": (dict(target_modules=[*TARGETS, "lm_head"], use_dora=True), False),
    "mlp": (dict(target_modules=["gate_proj", "up_proj", "down_proj"]), True),
    "embedding": (dict(target_modules=[*TARGETS, "embed_tokens"]), True),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
def test_lora(name, when, device):
    config, fused = CONFIGS[name]
    config = dict(target_modules=TARGETS) | config
    targets = config.pop("target_modules")

    def adapt(model):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **config))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.1)
        return adapted

    stock = adapt(tiny(device=device))
    if when == "before":
        base = tiny(device=device)
        patch(base)
        model = adapt(base)
        report = patch(model)
    else:
        model = adapt(tiny(device=device))
        report = patch(model)
    assert report.model == "LlamaForCausalLM"
    assert bool(report.skipped) == (not fused)
    if not fused:
        (row,) = report.skipped
        assert row.option == "fused_linear_cross_entropy" and "carries an adapter (peft." in row.reason
    compare(model, stock, device, fused)

    # Off and on again, and merged: each time what the head itself would compute.
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(
            model(**batch(device)).loss, stock(**batch(device)).loss, rtol=1e-5, atol=0
        )
    if name == "lm_head":
        model.merge_adapter(), stock.merge_adapter()
        with Operators() as operators:
            loss = model(**batch(device)).loss
        assert operators.calls["fused_linear_cross_entropy"] == 1
        torch.testing.assert_close(loss, stock(**batch(device)).loss, rtol=1e-5, atol=0)


def test_modules_to_save_follows_the_active_adapter(device):
    config = dict(target_modules=TARGETS, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny(device=device), peft.LoraConfig(**config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**config))
    for index, name in enumerate(("one", "two")):
        weight = model.base_model.model.lm_head.modules_to_save[name].weight
        weight.data.add_(index + 1.0, alpha=0.01).mul_(index + 1)
    patch(model)
    losses = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        out = model(**batch(device))
        assert out.logits is None
        losses[name] = out.loss.item()
        logits = model(**batch(device), skip_logits=False)
        assert losses[name] == pytest.approx(logits.loss.item(), rel=1e-5)
    assert losses["one"] != pytest.approx(losses["two"], rel=1e-3)


def test_trainable_tokens_on_tied_embeddings(device):
    def adapted():
        return lora(tiny(device=device, tie_word_embeddings=True), trainable_token_indices=[5, 17, 40])

    model, stock = adapted(), adapted()
    patch(model, strict=True)
    compare(model, stock, device, fused=True)
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(
            model(**batch(device)).loss, stock(**batch(device)).loss, rtol=1e-5, atol=0
        )


def test_forward_hook_sees_the_logits(device):
    stock = tiny(device=device)
    model = twin(stock)
    patch(model)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    compare(model, stock, device, fused=False)
    assert len(shapes) == 1
    assert patch(twin(model)).skipped[0].reason == "lm_head has hooks: logits, then liger::cross_entropy"
    handle.remove()
    compare(model, stock, device, fused=True)


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks(kind, device):
    stock = tiny(device=device)
    model = twin(stock)
    patch(model)
    calls = []
    getattr(model.lm_head, f"register_{kind}_hook")(lambda *args: calls.append(kind))
    compare(model, stock, device, fused=False)
    assert calls == [kind]


def test_instance_forward_is_called(device):
    stock = tiny(device=device)
    model = twin(stock)
    patch(model)
    for one in (model, stock):
        forward = one.lm_head.forward
        one.lm_head.forward = lambda x, forward=forward: 2 * forward(x)
    compare(model, stock, device, fused=False)


def test_other_kinds_of_heads(device):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    stock = tiny(device=device)
    head = Scaled(32, 128, bias=False, device=device)
    head.weight = stock.lm_head.weight
    stock.lm_head = head
    model = twin(stock)
    report = patch(model)
    assert "lm_head is a Scaled, not a torch.nn.Linear" in report.skipped[0].reason
    compare(model, stock, device, fused=False)


def test_parametrized_head(device):
    stock = tiny(device=device)
    nn.utils.parametrizations.weight_norm(stock.lm_head)
    model = twin(stock)
    patch(model)
    compare(model, stock, device, fused=False)


def test_weights_that_are_not_plain_tensors():
    class Packed(torch.Tensor):
        pass

    head = nn.Linear(4, 8)
    head.weight = nn.Parameter(torch.zeros(8, 4).as_subclass(Packed))
    assert linear_head(head).obstacle == "has a weight of type Packed"
    assert "meta" in linear_head(nn.Linear(4, 8, device="meta")).obstacle
    head = nn.Linear(4, 8)
    assert linear_head(head).weight is head.weight and linear_head(head).bias is head.bias


def test_peft_model_generates_and_saves(device, tmp_path):
    model = lora(tiny(device=device))
    stock = lora(tiny(device=device))
    patch(model, strict=True)
    arguments = dict(input_ids=batch(device)["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.eval().generate(**arguments), stock.eval().generate(**arguments))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(device=device), tmp_path)
    torch.testing.assert_close(
        loaded.eval()(**batch(device)).loss, model.eval()(**batch(device)).loss, rtol=1e-5, atol=0
    )


def test_prompt_tuning(device):
    """The prompt lengthens sequence and labels inside PEFT's own forward."""

    def adapted():
        torch.manual_seed(3)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(tiny(device=device), config)

    model, stock = adapted(), adapted()
    patch(model, strict=True)
    compare(model, stock, device, fused=True)
