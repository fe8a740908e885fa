"""Loss and gradient that read the logits once, on CUDA: every way to hold a row on chip, and the fallback.

They are what fused linear cross entropy runs on its buffer. With an identity matrix as its input, the logits
are the weight, and the weight's gradient is that of the logits, both without a rounding.
"""

import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import fused_linear_cross_entropy
from tests.reference.cross_entropy import cross_entropy as reference

EVERYTHING = {
    "label_smoothing": 0.1,
    "lse_square_scale": 1e-3,
    "softcap": 6.0,
    "use_token_scaling": True,
    "return_predicted_tokens": True,
}
WIDTHS = [
    *(1, 7, 511, 4096, 8191, 8193, 16383, 16384, 16385, 32000, 65536),
    *(128256, 131080, 151936, 256000, 262144, 262145, 300000, 700001),
]
FORCE = "LIGER_OPS_CROSS_ENTROPY"


def make(device, dtype, rows, classes, scale=2.0):
    logits = (scale * torch.randn(rows, classes)).to(device, dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[::4] = -100
    target[1], target[2] = 0, classes - 1
    return logits, target


def loss_and_gradient(logits, target, weight=None, **options):
    """Loss, gradient of the logits, and the predicted tokens."""
    options = dict(return_predicted_tokens=True) | options
    identity = torch.eye(len(logits), device=logits.device, dtype=logits.dtype)
    head = logits.t().contiguous().requires_grad_()
    result = fused_linear_cross_entropy(identity, head, target, ce_weight=weight, **options)
    result.loss.backward()
    return result.loss.detach(), head.grad.t(), result.predicted_tokens


def check(logits, target, weight=None, **options):
    options = dict(return_predicted_tokens=True) | options
    loss, dlogits, predicted = loss_and_gradient(logits, target, weight, **options)
    x = logits.double().requires_grad_()
    expected = reference(x, target, None if weight is None else weight.double(), **options)
    expected.loss.backward()
    assert torch.equal(predicted, expected.predicted_tokens)
    torch.testing.assert_close(loss.double(), expected.loss.detach(), rtol=2e-6, atol=1e-7)
    # bfloat16 is rounded once. float16 also where the powers of two are put back that keep it in range, and
    # there to a multiple of its smallest number, times such a power.
    eps, smallest = torch.finfo(logits.dtype).eps, torch.finfo(logits.dtype).smallest_normal
    roundings = {torch.bfloat16: 0.55, torch.float16: 1.1, torch.float32: 40}[logits.dtype]
    error = (dlogits.double() - x.grad).abs()
    allowed = roundings * eps * x.grad.abs()
    # What cancels between the probability and the smoothing is lost in float32.
    lost = 1e-6 * x.grad.abs().mean(1, keepdim=True)
    assert (error <= allowed + lost + 16 * eps * smallest).all()
    assert (dlogits[target == -100] == 0).all()


@pytest.mark.parametrize("classes", [1, 7, 511, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_rows(device, dtype, classes):
    check(*make(device, dtype, 9, classes))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(dtype, classes):
    check(*make("cuda", dtype, 9, classes))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1000, 16000, 32003, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"label_smoothing": 0.1}, {"lse_square_scale": 1e-2}, EVERYTHING],
    ids=["plain", "softcap", "smoothing", "z-loss", "everything"],
)
def test_options(dtype, classes, options):
    logits, target = make("cuda", dtype, 9, classes, scale=1.0)
    check(logits, target, torch.rand(classes, device="cuda") + 0.1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [8000, 40000, 128256])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_more_and_fewer_rows_than_clusters(rows, classes):
    logits = 2 * torch.randn(rows, classes, device="cuda")
    target = torch.randint(classes, (rows,), device="cuda")
    target[1::7] = -100
    check(logits.bfloat16(), target)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 32000, 128256])
def test_all_rows_ignored(classes):
    logits = torch.randn(70, classes, device="cuda").bfloat16()
    loss, dlogits, predicted = loss_and_gradient(logits, torch.full((70,), -100, device="cuda"))
    assert loss == 0 and (dlogits == 0).all() and (predicted == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 32000, 128256])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_two_passes_agree(classes, options, monkeypatch):
    logits, target = make("cuda", torch.bfloat16, 70, classes, scale=1.0)
    one = loss_and_gradient(logits, target, **options)
    monkeypatch.setenv(FORCE, "two_pass")
    two = loss_and_gradient(logits, target, **options)
    assert torch.equal(one[2], two[2])
    torch.testing.assert_close(one[0], two[0], rtol=1e-6, atol=1e-7)
    # Both round to bfloat16, what differs by less than that.
    torch.testing.assert_close(one[1].float(), two[1].float(), rtol=2**-7, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 32000, 151936])
def test_bitwise_reproducible(classes):
    logits, target = make("cuda", torch.bfloat16, 150, classes)
    first = loss_and_gradient(logits, target)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, loss_and_gradient(logits, target), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 40000])
def test_certain_rows(classes):
    """The terms beside the 1 of the largest logit are the loss, in whichever block of the row they are."""
    logits = torch.zeros(6, classes, device="cuda")
    target = torch.randint(classes, (6,), device="cuda")
    logits.scatter_(1, target[:, None], torch.tensor([[20.0], [25], [30], [35], [40], [50]], device="cuda"))
    loss, dlogits, _ = loss_and_gradient(logits, target, reduction="sum")
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, target[:, None], False)
    torch.testing.assert_close(dlogits[others].double(), exact.grad[others], rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 40000])
def test_masked_classes(classes):
    """-inf in all of a block's part, and in parts of it."""
    for columns in (slice(0, classes // 2 + 3), slice(100, classes - 9), slice(5, None)):
        logits, target = make("cuda", torch.bfloat16, 12, classes)
        mask = torch.zeros(classes, device="cuda", dtype=torch.bool)
        mask[columns] = True
        target[target >= 0] = int((~mask).nonzero()[-1])
        # 0 * -inf would be NaN in the product.
        bias = torch.zeros(classes, device="cuda").masked_fill(mask, -torch.inf).bfloat16()
        identity = torch.eye(12, device="cuda").bfloat16()
        head = logits.t().contiguous().requires_grad_()
        loss = fused_linear_cross_entropy(identity, head, target, bias)
        loss.backward()
        exact = (logits + bias).double().requires_grad_()
        expected = F.cross_entropy(exact, target)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(head.grad.t().double(), exact.grad, rtol=2**-8, atol=1e-8)
        assert (head.grad[mask] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [4096, 40000, 128256])
def test_cuda_graph(classes):
    logits, target = make("cuda", torch.bfloat16, 100, classes)
    identity = torch.eye(100, device="cuda").bfloat16()

    def run(head):
        loss = fused_linear_cross_entropy(identity, head, target)
        return loss, *torch.autograd.grad(loss, head)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        head = logits.t().contiguous().requires_grad_()
        expected = run(head)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(head)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "forced", "kernel"),
    [
        (4096, "", "cross_entropy_registers_kernel"),
        (128256, "", "cross_entropy_staged_kernel"),
        (4096, "two_pass", "cross_entropy_forward_kernel"),
        (128256, "two_pass", "cross_entropy_forward_kernel"),
    ],
)
def test_kernel(classes, forced, kernel, monkeypatch):
    if "staged" in kernel and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters")
    monkeypatch.setenv(FORCE, forced)
    logits, target = make("cuda", torch.bfloat16, 16, classes)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        loss_and_gradient(logits, target, return_predicted_tokens=False, return_z_loss=True)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "cross_entropy" in event.name]
    assert any(kernel in name for name in names), names
