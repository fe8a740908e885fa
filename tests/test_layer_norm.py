import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import layer_norm
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.layer_norm import layer_norm as reference


def normal(*shape, weight=True, bias=True, mean=0.0, **kwargs):
    def make(device, dtype):
        x = (torch.randn(shape, device=device) + mean).to(dtype)
        affine = (
            torch.randn(shape[-1], device=device, dtype=dtype) if wanted else None
            for wanted in (weight, bias)
        )
        return Inputs((x, affine[0] if weight else None, affine[1] if bias else None), kwargs)

    return make


def float32_affine(weight, bias):
    """Weight or bias in float32 beside a 16-bit x."""

    def make(device, dtype):
        wide = dtype if dtype == torch.float64 else torch.float32
        x = torch.randn(6, 64, device=device, dtype=dtype)
        dtypes = (wide if weight else dtype, wide if bias else dtype)
        return Inputs((x, *(torch.randn(64, device=device, dtype=d) for d in dtypes)))

    return make


def rows(make_x):
    def make(device, dtype):
        x = make_x(device, dtype)
        return Inputs((x, *(torch.randn(x.shape[-1], device=device, dtype=dtype) for _ in range(2))))

    return make


def sliced(device, dtype):
    return torch.randn(2, 5, 96, device=device, dtype=dtype)[..., 32:]


def misaligned(device, dtype):
    return torch.randn(6, 65, device=device, dtype=dtype)[:, 1:]


def transposed(device, dtype):
    return torch.randn(2, 3, 4, 16, device=device, dtype=dtype).transpose(1, 2)


def strided_affine(device, dtype):
    x = torch.randn(4, 16, device=device, dtype=dtype)
    return Inputs((x, *(torch.randn(32, device=device, dtype=dtype)[::2] for _ in range(2))))


class TestLayerNorm(OperatorContract):
    function = staticmethod(layer_norm)
    reference = staticmethod(reference)
    differentiable = (0, 1, 2)
    cases = [
        Case("affine", normal(3, 5, 64), terms=64),
        Case("eps", normal(3, 5, 64, eps=1e-2), terms=64),
        Case("weight alone", normal(3, 5, 64, bias=False), terms=64),
        Case("bias alone", normal(3, 5, 64, weight=False), terms=64),
        Case("no affine", normal(3, 5, 64, weight=False, bias=False), terms=64),
        Case("float32 weight and bias", float32_affine(True, True), terms=64),
        Case("float32 weight", float32_affine(True, False), terms=64),
        Case("float32 bias", float32_affine(False, True), terms=64),
        Case("odd width", normal(4, 37), terms=37),
        Case("one row", normal(48), terms=48),
        Case("no rows", normal(0, 16)),
        Case("sliced", rows(sliced), terms=64),
        Case("misaligned rows", rows(misaligned), terms=64),
        Case("transposed", rows(transposed), terms=24),
        Case("strided affine", strided_affine, terms=16),
        Case("shifted", normal(5, 100, mean=20.0), terms=100),
        Case("many rows", normal(1030, 128), terms=1030, roundings=4, small=False),
        # One for each register layout of the CUDA kernels, and beyond them.
        *(
            Case(f"width {n}", normal(7, n), terms=n, roundings=4, small=False)
            for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 32776)
        ),
    ]
    bad_calls = [
        BadCall(
            "weight size",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(3, device=d))),
            ValueError,
            r"liger::layer_norm: weight must be 1-D of size 4 \(last dimension of x\), got \[3\]",
        ),
        BadCall(
            "bias rank",
            lambda d: Inputs(
                (torch.ones(2, 4, device=d), torch.ones(4, device=d), torch.ones(1, 4, device=d))
            ),
            ValueError,
            r"liger::layer_norm: bias must be 1-D of size 4 \(last dimension of x\), got \[1, 4\]",
        ),
        BadCall(
            "weight dtype",
            lambda d: Inputs((torch.ones(4, device=d), torch.ones(4, device=d).half())),
            TypeError,
            r"liger::layer_norm: weight must have dtype float32 \(dtype of x\) or float32 beside a 16-bit x, "
            r"got float16",
        ),
        BadCall(
            "bias dtype",
            lambda d: Inputs((torch.ones(4, device=d).half(), None, torch.ones(4, device=d).bfloat16())),
            TypeError,
            r"liger::layer_norm: bias must have dtype float16 \(dtype of x\) or float32 beside a 16-bit x, "
            r"got bfloat16",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).int(),)),
            TypeError,
            r"liger::layer_norm: x must be float64, float32, bfloat16 or float16, got int32",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),)),
            ValueError,
            r"liger::layer_norm: x must have at least 1 dimension, got shape \[\]",
        ),
        BadCall(
            "eps",
            lambda d: Inputs((torch.ones(4, device=d),), {"eps": -1.0}),
            ValueError,
            r"liger::layer_norm: eps must not be negative, got -1",
        ),
    ]

    def make_large(self):
        count, cols = 2**19 + 5, 4096
        x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
        small = x[-3:].clone().requires_grad_()
        return Inputs((x.requires_grad_(), None, None)), Inputs((small, None, None)), lambda t: t[-3:]


def test_devices_must_match():
    with pytest.raises(ValueError, match=r"liger::layer_norm: bias must be on cpu \(device of x\), got meta"):
        layer_norm(torch.ones(4), None, torch.ones(4, device="meta"))


# A warp to a row, a block to a row, several vectors to a thread, no vectors, and more than registers hold.
WIDTHS = [61, 64, 1000, 4096, 8192, 20000]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mean", [1e4, -3e6])
def test_large_mean(device, width, mean):
    """Deviations of a few units in the last place of x: results and gradients as precise as around 0."""
    noise = torch.randn(6, width) * abs(mean) * 1e-4
    x = (mean + noise).to(device).requires_grad_()
    weight, bias = (torch.randn(width).to(device).requires_grad_() for _ in range(2))
    upstream = torch.randn(6, width).to(device)
    y = layer_norm(x, weight, bias)
    results = [y, *torch.autograd.grad(y, (x, weight, bias), upstream)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference(*exact)
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for result, reference_result in zip(results, wanted, strict=True):
        error = (result.double() - reference_result).abs().max() / reference_result.abs().max()
        assert error < 3e-6, f"relative error {error:.2e}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_constant_rows(device, width, value):
    """No deviations: the bias is all that is left, whatever rounding does to the mean."""
    x = torch.full((3, width), value, device=device)
    bias = torch.randn(width, device=device)
    torch.testing.assert_close(layer_norm(x, None, bias), bias.expand(3, -1), rtol=0, atol=1e-5)


def test_outliers(device):
    """One channel a thousand times the others, as in trained models."""
    x = torch.randn(4, 4096, device=device)
    x[:, 0] = 1000
    expected = F.layer_norm(x.double(), (4096,))
    torch.testing.assert_close(layer_norm(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays(device, value):
    x = torch.randn(3, 70, device=device)
    x[1, 5] = value
    finite = layer_norm(x).isfinite()
    assert not finite[1].any() and finite[0].all() and finite[2].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_of_torch(device, dtype):
    x = (3 * torch.randn(64, 1024, device=device) + 1).to(dtype)
    weight, bias = (torch.randn(1024, device=device, dtype=dtype) for _ in range(2))
    exact = reference(x.double(), weight.double(), bias.double())
    ours = (layer_norm(x, weight, bias).double() - exact).abs().mean()
    theirs = (F.layer_norm(x, (1024,), weight, bias).double() - exact).abs().mean()
    assert ours <= 1.05 * theirs


def test_width_1(device):
    """One element is its own mean."""
    x = torch.tensor([[3.0], [-2.0]], device=device, requires_grad=True)
    y = layer_norm(x, None, torch.tensor([0.5], device=device))
    y.backward(torch.full_like(y, 5.0))
    assert torch.equal(y, torch.full_like(y, 0.5)) and torch.equal(x.grad, torch.zeros_like(x))


def test_statistics(device):
    x = (torch.randn(5, 96, device=device) + 7).bfloat16()
    _, mean, rstd = torch.ops.liger.layer_norm(x)
    assert mean.dtype == rstd.dtype == torch.float32
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=1e-6, atol=0)
    expected = (wide.var(-1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-6, atol=0)


def test_backward_makes_only_what_is_asked_for(device):
    x, weight = torch.randn(6, 40, device=device).half(), torch.randn(40, device=device)
    y, mean, rstd = torch.ops.liger.layer_norm(x, weight)
    for needed in [(True, False, False), (False, True, False), (False, False, True)]:
        results = torch.ops.liger.layer_norm_backward(
            torch.ones_like(y), x, weight, mean, rstd, torch.float32, *needed
        )
        assert [bool(r.numel()) for r in results] == list(needed)


def test_backward_checks_its_arguments(device):
    x, row = torch.ones(2, 4, device=device), torch.ones(2, device=device)
    backward = torch.ops.liger.layer_norm_backward
    with pytest.raises(ValueError, match=r"layer_norm_backward: mean must have shape \[2\]"):
        backward(x, x, None, row[:1], row, torch.float32, True, False, False)
    with pytest.raises(TypeError, match="layer_norm_backward: bias_dtype must be float32 .*, got float16"):
        backward(x, x, None, row, row, torch.float16, True, False, True)
    with pytest.raises(ValueError, match="layer_norm_backward: need_dweight requires a weight, got none"):
        backward(x, x, None, row, row, torch.float32, True, True, False)
