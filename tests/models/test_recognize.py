"""Models without a record: what is recognised, and what only looks like it."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import TEXT, Operators, assert_same_gradients, batch, step, tiny, twin
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from liger_ops.transformers import AutoLigerKernelForCausalLM, patch

# Configuration class, changes to it, and how often which operator runs.
MODELS = {
    "Qwen3Config": (dict(head_dim=8), dict(rms_norm=9, swiglu=2, rope=2)),
    "Olmo2Config": (dict(), dict(rms_norm=9, swiglu=2, rope=2)),
    "GraniteConfig": (dict(logits_scaling=3.0), dict(rms_norm=5, swiglu=2, rope=2)),
    "StableLmConfig": (dict(), dict(layer_norm=5, swiglu=2, rope=2)),
    "Gemma3TextConfig": (dict(head_dim=8), dict(rms_norm=13, geglu=2, rope=2)),
    "Starcoder2Config": (dict(), dict(layer_norm=5, rope=2)),
    "GlmConfig": (dict(head_dim=8), dict(rms_norm=5, swiglu_packed=2)),
    "CohereConfig": (dict(), dict(swiglu=2)),
}
# Looks like an RMSNorm but subtracts the mean; rotates interleaved pairs.
LEFT = {
    "CohereConfig": {("rms_norm", "CohereLayerNorm"), ("rope", "apply_rotary_pos_emb")},
    "GlmConfig": {("rope", "apply_rotary_pos_emb")},
}


def build(name, device="cpu"):
    torch.manual_seed(0)
    changes, _ = MODELS[name]
    config = getattr(transformers, name)(**TEXT, **changes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.to(device)


@pytest.mark.parametrize("name", MODELS)
def test_recognised(name, device):
    stock = build(name, device)
    model = twin(stock)
    report = patch(model)
    assert {(row.option, row.target) for row in report.skipped} == LEFT.get(name, set())
    assert any("has no record" in note for note in report.notes)
    with Operators() as operators:
        loss, gradients = step(model, **batch(device))
    _, expected = MODELS[name]
    calls = {key: count for key, count in operators.calls.items() if not key.endswith("_backward")}
    assert calls == expected | {"cross_entropy": 1}
    report.undo()
    stock_loss, stock_gradients = step(stock, **batch(device))
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
    with Operators() as operators:
        step(model, **batch(device))
    assert not operators.calls


@pytest.mark.parametrize("name", ["Qwen3Config", "Olmo2Config", "Gemma3TextConfig"])
def test_rounding_points(name, device):
    """Found out in bfloat16, since float32 does not show them."""
    stock = build(name, device)
    model = twin(stock)
    patch(model, strict=True)
    for module, other in zip(model.bfloat16().modules(), stock.bfloat16().modules(), strict=True):
        if type(module).__name__.endswith("RMSNorm"):
            x = torch.randn(64, module.weight.shape[0], device=device, dtype=torch.bfloat16)
            assert (module(x) != other(x)).float().mean() < 0.02


def test_nothing_of_the_model_changes(device):
    model = build("Qwen3Config", device).train()
    model.model.layers[0].mlp.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    report = patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = patch(model)
    assert {(row.option, row.count) for row in again.patched} == {
        (row.option, row.count) for row in report.patched
    }
    assert all(row.already for row in again.patched)


def test_options_and_strictness():
    model = build("Qwen3Config")
    report = patch(model, rope=False, fused_linear_cross_entropy=False)
    assert {row.option for row in report.patched} == {"rms_norm", "swiglu"}
    report.undo()
    with pytest.raises(ValueError, match="CohereLayerNorm: it looks like one, but its results"):
        patch(build("CohereConfig"), strict=True)
    with pytest.warns(UserWarning, match="model type 'qwen3' is not supported"):
        report = patch(model, recognize=False)
    assert not report.patched
    model = AutoLigerKernelForCausalLM.from_config(build("Qwen3Config").config)
    with Operators() as operators:
        step(model, **batch())
    assert operators.calls["rms_norm"] == 9


def strange(exchange):
    model = tiny()
    model.config.model_type = "strange"
    for layer in model.model.layers:
        exchange(layer)
    return model


class ShiftedNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) + 0.01


class OtherEpsilon(ShiftedNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 10 * self.eps)


class DetachedNorm(ShiftedNorm):
    def forward(self, x):
        scale = x.pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt().detach()
        return x * scale * self.weight


class LimitedMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class DroppingMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class RaisingMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        raise RuntimeError("not on such input")


def with_mlp(cls):
    def exchange(layer):
        layer.mlp.__class__ = cls

    return exchange


def with_norm(cls):
    def exchange(layer):
        layer.input_layernorm = cls(layer.input_layernorm)

    return exchange


@pytest.mark.parametrize(
    ("exchange", "reason"),
    [
        (with_norm(ShiftedNorm), "its results on random input differ"),
        (with_norm(OtherEpsilon), "its results on random input differ"),
        (with_norm(DetachedNorm), "its gradients on random input differ"),
        (with_mlp(LimitedMLP), "its results on random input differ"),
        (with_mlp(DroppingMLP), "its results on random input differ"),
        (with_mlp(RaisingMLP), "it cannot be compared: RuntimeError: not on such input"),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()), "the activation is ReLU, not SiLU or GELU"),
        (
            lambda layer: layer.mlp.down_proj.weight.data.zero_(),
            "are zero or not finite, which proves nothing",
        ),
        (lambda layer: layer.mlp.to("meta"), "meta device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_looks_like_it(exchange, reason):
    report = patch(strange(exchange))
    assert [row.count for row in report.skipped] == [2]
    assert reason in report.skipped[0].reason
    assert {row.option for row in report.patched} >= {"rope", "cross_entropy"}


def test_classes_from_elsewhere_are_recognised():
    """A model's own code, as remote code is, not only that of transformers."""

    class Local(nn.Module):
        """Not found by its name in a module, so that it cannot be patched."""

        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    report = patch(strange(with_norm(OwnNorm)))
    assert ("OwnNorm", 2) in [(row.target, row.count) for row in report.patched]
    report.undo()
    report = patch(strange(with_norm(Local)))
    assert "Local" not in [row.target for row in report.patched]


class OwnNorm(ShiftedNorm):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def test_own_loss_function_stays():
    model = build("Qwen3Config")
    model.loss_function = lambda logits, labels, **kwargs: logits.float().mean()
    report = patch(model)
    assert "cross_entropy" not in {row.option for row in report.patched}
