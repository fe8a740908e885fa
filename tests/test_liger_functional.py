"""The functions under Liger's names: argument order, result dtypes, and what else they return."""

import pytest
import torch
import torch.nn.functional as F

from liger_ops.transformers import functional as lf
from tests.reference.rope import mrope as reference_mrope

ROWS, HIDDEN, VOCAB = 6, 16, 40


@pytest.fixture
def x(device):
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def head(device):
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def target(device):
    return torch.tensor([1, 5, -100, 39, 0, 7], device=device)


def test_rms_norm(x):
    w = torch.linspace(0.5, 1.5, HIDDEN, device=x.device)
    expected = F.rms_norm(x, (HIDDEN,), w, 1e-5)
    torch.testing.assert_close(lf.liger_rms_norm(x, w, 1e-5), expected)
    torch.testing.assert_close(lf.liger_rms_norm(x, w - 1, 1e-5, 1.0, "gemma", False), expected)


def test_fused_add_rms_norm(x):
    residual, w = x.flip(0), torch.linspace(0.5, 1.5, HIDDEN, device=x.device)
    for arguments in (w, 1e-5), (w - 1, 1e-5, 1.0, "gemma", False):
        y, total = lf.liger_fused_add_rms_norm(x, residual, *arguments)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(y, F.rms_norm(x + residual, (HIDDEN,), w, 1e-5))


def test_layer_norm(x):
    w, b = torch.linspace(0.5, 1.5, HIDDEN, device=x.device), torch.linspace(-1, 1, HIDDEN, device=x.device)
    for arguments in (w, b), (w, None), (None, b):
        expected = F.layer_norm(x, (HIDDEN,), *arguments, 1e-3)
        torch.testing.assert_close(lf.liger_layer_norm(x, *arguments, 1e-3), expected)


def test_swiglu(x):
    torch.testing.assert_close(lf.liger_swiglu(x, 2 * x), F.silu(x) * 2 * x)


def test_geglu(x):
    torch.testing.assert_close(lf.liger_geglu(x, 2 * x), F.gelu(x, approximate="tanh") * 2 * x)


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def test_rope(device):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator).to(device) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=generator).to(device) for _ in range(2))
    expected = rotated(q, cos, sin), rotated(k, cos, sin)
    for rows in (cos, sin), (cos[0], sin[0]):
        for actual, wanted in zip(lf.liger_rope(q, k, *rows), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    positions = torch.arange(5, device=device)[None]
    heads_last = lf.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, positions, 2)
    for actual, wanted in zip(heads_last, expected, strict=True):
        torch.testing.assert_close(actual, wanted.transpose(1, 2))
    with pytest.raises(ValueError, match="unsqueeze_dim must be 1 or 2"):
        lf.liger_rope(q, k, cos, sin, unsqueeze_dim=3)
    assert lf.liger_rotary_pos_emb is lf.liger_rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_pos_emb_vision(device, dtype):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    # One projection of patches holds q, k and v.
    q, k, _ = torch.randn(10, 3, 4, 16, device=device, dtype=dtype).unbind(1)
    cos, sin = torch.randn(2, 10, 16, device=device)
    results = lf.liger_rotary_pos_emb_vision(q, k, cos, sin)
    for actual, wanted in zip(results, apply_rotary_pos_emb_vision(q, k, cos, sin), strict=True):
        assert actual.shape == wanted.shape and actual.dtype == dtype
        torch.testing.assert_close(actual, wanted)


def test_qwen2vl_mrope(device):
    q, k = torch.randn(2, 4, 6, 16, device=device), torch.randn(2, 2, 6, 16, device=device)
    cos, sin = torch.randn(2, 3, 2, 6, 16, device=device)
    section = [2, 3, 3]
    results = lf.liger_qwen2vl_mrope(q, k, cos, sin, section)
    for actual, wanted in zip(results, reference_mrope(q, k, cos, sin, section), strict=True):
        torch.testing.assert_close(actual, wanted)
    heads_last = lf.liger_multimodal_rotary_pos_emb(
        q.transpose(1, 2), k.transpose(1, 2), cos, sin, section, unsqueeze_dim=2
    )
    for actual, wanted in zip(heads_last, results, strict=True):
        torch.testing.assert_close(actual.transpose(1, 2), wanted)


def test_partial_rope_by_rotary_dim(device):
    q, k = (torch.randn(2, heads, 5, 8).to(device) for heads in (4, 2))
    angles = torch.randn(1, 5, 4).to(device)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    narrow = [torch.cat((f(angles[..., :2]), f(angles[..., :2])), -1) for f in (torch.cos, torch.sin)]
    for actual, x in zip(lf.liger_rope(q, k, cos, sin, rotary_dim=4), (q, k), strict=True):
        torch.testing.assert_close(actual[..., :4], rotated(x[..., :4], *narrow))
        torch.testing.assert_close(actual[..., 4:], x[..., 4:], rtol=0, atol=0)
    torch.testing.assert_close(lf.liger_rope(q, k, cos, sin, rotary_dim=8), lf.liger_rope(q, k, cos, sin))
    for bad in (3, 10, 0):
        with pytest.raises(ValueError, match="rotary_dim must be even and at most 8"):
            lf.liger_rope(q, k, cos, sin, rotary_dim=bad)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_cross_entropy(x, head, target):
    logits = x @ head.T
    torch.testing.assert_close(lf.liger_cross_entropy(logits, target), F.cross_entropy(logits, target))
    for arguments in (dict(reduction="sum"), dict(size_average=False), dict(reduce=False)):
        actual = lf.liger_cross_entropy(logits, target, **arguments)
        torch.testing.assert_close(actual, F.cross_entropy(logits, target, **arguments))
    assert lf.liger_cross_entropy(logits.bfloat16(), target).dtype == torch.bfloat16


def test_fused_linear_cross_entropy(x, head, target):
    bias = torch.linspace(-1, 1, VOCAB, device=x.device)
    loss = lf.liger_fused_linear_cross_entropy(x, head, target, bias)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, head, bias), target))
    loss = lf.liger_fused_linear_cross_entropy(x.bfloat16(), head.bfloat16(), target)
    assert loss.dtype == torch.float32


def test_cross_entropy_output(x, head, target):
    """The flags in Liger's positions; the loss and the z-loss in the logits' dtype."""
    logits = (x @ head.T).bfloat16()
    output = lf.liger_cross_entropy(
        logits, target, None, None, -100, None, "mean", 0.0, 0.1, None, True, True, True
    )
    assert isinstance(output, lf.CrossEntropyOutput)
    kept = target != -100
    right = logits.argmax(1) == target
    assert output.loss.dtype == output.z_loss.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.z_loss, (0.1 * (logits.float().logsumexp(1)[kept] ** 2).mean()).bfloat16()
    )
    torch.testing.assert_close(output.token_accuracy, right[kept].float().mean())
    assert torch.equal(output.predicted_tokens, torch.where(kept, logits.argmax(1), -1))
    output = lf.liger_cross_entropy(logits, target, return_predicted_tokens=True)
    assert output.z_loss is None and output.token_accuracy is None


def test_fused_linear_cross_entropy_output(x, head, target):
    arguments = (x, head, target, None, None, -100, 0.1, 0.0, "none", None, True, None, True, True, True)
    output = lf.liger_fused_linear_cross_entropy(*arguments)
    expected = lf.liger_cross_entropy(
        x @ head.T,
        target,
        reduction="none",
        lse_square_scale=0.1,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )
    probability = torch.softmax(x @ head.T, 1).gather(1, target.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(output.loss, probability * expected.loss)
    torch.testing.assert_close(output.z_loss, probability * expected.z_loss)
    torch.testing.assert_close(output.token_accuracy, expected.token_accuracy)
    assert torch.equal(output.predicted_tokens, expected.predicted_tokens)
