"""The modules against PyTorch's own, and their errors."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_ops.functional import CrossEntropyOutput
from liger_ops.nn import (
    LigerCrossEntropyLoss,
    LigerFusedAddRMSNorm,
    LigerFusedLinearCrossEntropyLoss,
    LigerLayerNorm,
    LigerRMSNorm,
    LigerRMSNormForGemma,
    LigerRMSNormForGemma2,
    LigerSwiGLUMLP,
)

ROWS, HIDDEN, VOCAB = 10, 24, 50


def random(*shape, device, requires_grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device).requires_grad_(requires_grad)


def targets(device):
    target = torch.arange(ROWS, device=device) * 7 % VOCAB
    target[3] = -100
    return target


def compare(actual, expected, inputs):
    """Equal values, and equal gradients of the inputs."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(0.5, 1.5, actual.numel(), device=actual.device).view_as(actual)
    gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, reference in zip(gradients, wanted, strict=True):
        # Elements that cancel are as precise as the terms of their sums.
        atol = 1e-5 * reference.abs().max().item()
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=atol)


def test_rms_norm(device):
    module = LigerRMSNorm(HIDDEN, eps=1e-5).to(device)
    reference = nn.RMSNorm(HIDDEN, eps=1e-5).to(device)
    module.weight.data.normal_()
    reference.weight = module.weight
    x = random(2, ROWS, HIDDEN, device=device)
    compare(module(x), reference(x), [x, module.weight])
    assert "eps=1e-05" in repr(module)


def test_rms_norm_of_gemma(device):
    module = LigerRMSNorm(HIDDEN, offset=1.0, casting_mode="gemma", init_fn="zeros").to(device)
    assert not module.weight.any()
    module.weight.data.normal_()
    x = random(ROWS, HIDDEN, device=device)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + module.weight)
    compare(module(x), expected, [x, module.weight])


@pytest.mark.parametrize("preset", [LigerRMSNormForGemma, LigerRMSNormForGemma2])
def test_rms_norm_presets_of_gemma(device, preset):
    module = preset(HIDDEN).to(device)
    plain = LigerRMSNorm(HIDDEN, offset=1.0, casting_mode="gemma", init_fn="zeros").to(device)
    assert module.in_place == (preset is LigerRMSNormForGemma) and module.state_dict().keys() == {"weight"}
    plain.weight.data.normal_()
    module.load_state_dict(plain.state_dict())
    x = random(ROWS, HIDDEN, device=device).bfloat16()
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("options", [{}, dict(offset=1.0, casting_mode="gemma", init_fn="zeros")])
def test_fused_add_rms_norm(device, options):
    module = LigerFusedAddRMSNorm(HIDDEN, eps=1e-5, **options).to(device)
    norm = LigerRMSNorm(HIDDEN, eps=1e-5, **options).to(device)
    assert torch.equal(module.weight, norm.weight)
    module.weight.data.normal_()
    norm.weight = module.weight
    x, residual = (random(2, ROWS + i, HIDDEN, device=device)[:, :ROWS] for i in range(2))
    y, total = module(x, residual)
    inputs = [x, residual, module.weight]
    compare(torch.stack((y, total)), torch.stack((norm(x + residual), x + residual)), inputs)
    with pytest.raises(ValueError, match="init_fn must be one of ones, zeros, got 'randn'"):
        LigerFusedAddRMSNorm(HIDDEN, init_fn="randn")


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(device, bias):
    module = LigerLayerNorm(HIDDEN, bias=bias).to(device)
    assert module.state_dict().keys() == {"weight", "bias"}
    assert (module.weight == 1).all() and not module.bias.any()
    assert not LigerLayerNorm(HIDDEN, init_fn="zeros").weight.any()
    reference = nn.LayerNorm(HIDDEN, eps=1e-6).to(device)
    reference.load_state_dict({name: torch.randn(HIDDEN) for name in ("weight", "bias")})
    module.load_state_dict(reference.state_dict())
    reference.weight, reference.bias = module.weight, module.bias
    x = random(2, ROWS, HIDDEN, device=device)
    compare(module(x), reference(x), [x, *module.parameters()])
    assert "eps=1e-06" in repr(module)
    with pytest.raises(ValueError, match="init_fn must be one of ones, zeros, got 'randn'"):
        LigerLayerNorm(HIDDEN, init_fn="randn")


def test_rms_norm_without_weight(device):
    module = LigerRMSNorm(HIDDEN, elementwise_affine=False)
    assert not list(module.parameters()) and not module.state_dict()
    x = random(ROWS, HIDDEN, device=device)
    compare(module(x), F.rms_norm(x, (HIDDEN,), eps=1e-6), [x])


def test_rms_norm_leaves_its_input_alone(device):
    x = random(ROWS, HIDDEN, device=device, requires_grad=False)
    before = x.clone()
    LigerRMSNorm(HIDDEN, in_place=True).to(device)(x.requires_grad_()).sum().backward()
    assert torch.equal(x, before)


def test_rms_norm_errors():
    with pytest.raises(ValueError, match="casting_mode must be one of llama, gemma, none, got 'olmo'"):
        LigerRMSNorm(HIDDEN, casting_mode="olmo")
    with pytest.raises(ValueError, match="init_fn must be one of ones, zeros, got 'randn'"):
        LigerRMSNorm(HIDDEN, init_fn="randn")


@pytest.mark.parametrize("bias", [False, True, None])
def test_swiglu_mlp(device, bias):
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=32, hidden_act="silu", mlp_bias=bias)
    if bias is None:
        del config.mlp_bias
    module = LigerSwiGLUMLP(config).to(device)
    assert (module.gate_proj.bias is not None) == bool(bias)
    x = random(2, ROWS, HIDDEN, device=device)
    expected = module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))
    compare(module(x), expected, [x, *module.parameters()])


def test_swiglu_mlp_size_and_activation():
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=32, hidden_act="swish")
    assert LigerSwiGLUMLP(config, intermediate_size=8).up_proj.out_features == 8
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="config.hidden_act is 'gelu'"):
        LigerSwiGLUMLP(config)


LOSS_OPTIONS = [
    dict(),
    dict(reduction="sum"),
    dict(reduction="none"),
    dict(label_smoothing=0.1),
    dict(ignore_index=7),
    dict(lse_square_scale=0.01),
    dict(softcap=3.0),
]


def reference_loss(
    logits,
    target,
    reduction="mean",
    label_smoothing=0.0,
    ignore_index=-100,
    lse_square_scale=0.0,
    softcap=None,
):
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = target != ignore_index
    # Targets outside the vocabulary are only allowed when ignored.
    target = torch.where(kept, target, 0)
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    loss = torch.where(kept, loss + lse_square_scale * logits.logsumexp(-1) ** 2, 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


def loss_targets(device, options):
    target = targets(device)
    return target.masked_fill(target == -100, options.get("ignore_index", -100))


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_cross_entropy(device, options):
    logits = random(ROWS, VOCAB, device=device)
    target = loss_targets(device, options)
    compare(
        LigerCrossEntropyLoss(**options)(logits, target), reference_loss(logits, target, **options), [logits]
    )


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_linear_cross_entropy(device, options, with_bias):
    x, weight = random(ROWS, HIDDEN, device=device), random(VOCAB, HIDDEN, device=device)
    bias = random(VOCAB, device=device) if with_bias else None
    target = loss_targets(device, options)
    loss = LigerFusedLinearCrossEntropyLoss(**options)(weight, x, target, bias)
    inputs = [x, weight, bias] if with_bias else [x, weight]
    compare(loss, reference_loss(F.linear(x, weight, bias), target, **options), inputs)


def test_class_weights(device):
    x, weight = random(ROWS, HIDDEN, device=device), random(VOCAB, HIDDEN, device=device)
    classes = torch.linspace(0.1, 2.0, VOCAB)
    expected = F.cross_entropy(F.linear(x, weight), targets(device), classes.to(device))
    loss = LigerCrossEntropyLoss(classes).to(device)
    compare(loss(F.linear(x, weight), targets(device)), expected, [x, weight])
    fused = LigerFusedLinearCrossEntropyLoss(classes).to(device)
    expected = F.cross_entropy(F.linear(x, weight), targets(device), classes.to(device))
    compare(fused(weight, x, targets(device)), expected, [x, weight])


def test_loss_dtypes(device):
    x = random(ROWS, HIDDEN, device=device).bfloat16()
    weight = random(VOCAB, HIDDEN, device=device).bfloat16()
    logits = F.linear(x, weight)
    assert LigerCrossEntropyLoss()(logits, targets(device)).dtype == torch.bfloat16
    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, x, targets(device))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("cls", [LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss])
def test_loss_errors(cls):
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'batchmean'"):
        cls(reduction="batchmean")
    with pytest.raises(ValueError, match="label_smoothing must be between 0.0 and 1.0, got 1.5"):
        cls(label_smoothing=1.5)
    with pytest.raises(ValueError, match="softcap must be positive or None, got -1.0"):
        cls(softcap=-1.0)
    with pytest.raises(TypeError, match="unknown"):
        cls(unknown=1)


FIELDS = ("z_loss", "token_accuracy", "predicted_tokens")


@pytest.mark.parametrize("flags", [FIELDS, *((name,) for name in FIELDS)], ids=str)
def test_fields_beside_the_loss(device, flags):
    x = random(ROWS, HIDDEN, device=device).bfloat16()
    weight = random(VOCAB, HIDDEN, device=device).bfloat16()
    logits, target = F.linear(x, weight), targets(device)
    options = {f"return_{name}": True for name in flags} | {"lse_square_scale": 0.1}
    outputs = (
        LigerCrossEntropyLoss(**options)(logits, target),
        LigerFusedLinearCrossEntropyLoss(**options)(weight, x, target),
    )
    kept = target != -100
    predicted = torch.where(kept, logits.argmax(1), -1)
    expected = {
        "z_loss": 0.1 * (logits.float().logsumexp(-1)[kept] ** 2).mean(),
        "token_accuracy": (predicted == target)[kept].float().mean(),
        "predicted_tokens": predicted,
    }
    for output, dtype in zip(outputs, (torch.bfloat16, torch.float32), strict=True):
        assert isinstance(output, CrossEntropyOutput) and output.loss.dtype == dtype
        for name in FIELDS:
            value = getattr(output, name)
            if name not in flags:
                assert value is None
            elif name == "z_loss":  # as the loss in the logits' dtype, where that has Liger's
                torch.testing.assert_close(value, expected[name].to(dtype))
            else:
                torch.testing.assert_close(value, expected[name])


def test_token_scaling(device):
    x, weight = random(ROWS, HIDDEN, device=device), random(VOCAB, HIDDEN, device=device)
    loss = LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)(weight, x, targets(device))
    each = F.cross_entropy(F.linear(x, weight), targets(device), reduction="none")
    expected = (each * torch.exp(-each).detach()).sum() / (targets(device) != -100).sum()
    compare(loss, expected, [x, weight])
