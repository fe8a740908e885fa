import pytest
import torch

from liger_ops.functional import add_rms_norm, rms_norm
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.add_rms_norm import add_rms_norm as reference


def normal(*shape, weight=True, **kwargs):
    def make(device, dtype):
        x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        scale = torch.randn(shape[-1], device=device, dtype=dtype) if weight else None
        return Inputs((x, residual, scale), kwargs)

    return make


def float32_weight(device, dtype):
    wide = dtype if dtype == torch.float64 else torch.float32
    x, residual = (torch.randn(6, 64, device=device, dtype=dtype) for _ in range(2))
    return Inputs((x, residual, torch.randn(64, device=device, dtype=wide)))


def different_strides(device, dtype):
    """x: a slice of a fused projection; residual: contiguous."""
    x = torch.randn(2, 5, 96, device=device, dtype=dtype)[..., 32:]
    residual, weight = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((2, 5, 64), (64,)))
    return Inputs((x, residual, weight))


def misaligned_residual(device, dtype):
    x, residual, weight = (torch.randn(*s, device=device, dtype=dtype) for s in ((6, 64), (6, 65), (64,)))
    return Inputs((x, residual[:, 1:], weight))


def transposed(device, dtype):
    x, residual = (torch.randn(2, 3, 4, 16, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    return Inputs((x, residual, torch.randn(16, device=device, dtype=dtype)))


# Roundings on the way to an element: the sum, the normalised sum and the result; one more for the spread.
ROUNDINGS = 4


def case(id, make, terms=1, **kwargs):
    return Case(id, make, terms, **{"roundings": ROUNDINGS, **kwargs})


class TestAddRmsNorm(OperatorContract):
    function = staticmethod(add_rms_norm)
    reference = staticmethod(reference)
    differentiable = (0, 1, 2)
    shared = (1,)
    cases = [
        case("llama", normal(3, 5, 64), 64),
        case("gemma", normal(3, 5, 64, offset=1.0, casting_mode="gemma"), 64),
        case("none", normal(3, 5, 64, casting_mode="none", eps=1e-3), 64),
        case("no weight", normal(3, 5, 64, weight=False), 64),
        case("float32 weight", float32_weight, 64),
        case("odd width", normal(4, 37), 37),
        case("one row", normal(48), 48),
        case("no rows", normal(0, 16)),
        case("different strides", different_strides, 64),
        case("misaligned residual", misaligned_residual, 64),
        case("transposed", transposed, 24),
        case("many rows", normal(1030, 128), 1030, roundings=6, small=False),
        # One for each register layout of the CUDA kernels, and beyond them.
        *(
            case(f"width {n}", normal(7, n), n, roundings=6, small=False)
            for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 32776)
        ),
    ]
    bad_calls = [
        BadCall(
            "residual broadcast",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(4, device=d))),
            ValueError,
            r"liger::add_rms_norm: residual must have shape \[2, 4\] \(shape of x\), got \[4\]",
        ),
        BadCall(
            "residual dtype",
            lambda d: Inputs((torch.ones(4, device=d).half(), torch.ones(4, device=d))),
            TypeError,
            r"liger::add_rms_norm: residual must have dtype float16 \(dtype of x\), got float32",
        ),
        BadCall(
            "weight size",
            lambda d: Inputs((torch.ones(4, device=d), torch.ones(4, device=d), torch.ones(3, device=d))),
            ValueError,
            r"liger::add_rms_norm: weight must be 1-D of size 4 \(last dimension of x\), got \[3\]",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).int(),) * 2),
            TypeError,
            r"liger::add_rms_norm: x must be float64, float32, bfloat16 or float16, got int32",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),) * 2),
            ValueError,
            r"liger::add_rms_norm: x must have at least 1 dimension, got shape \[\]",
        ),
        BadCall(
            "mode",
            lambda d: Inputs((torch.ones(4, device=d),) * 2, {"casting_mode": "t5"}),
            ValueError,
            r'liger::add_rms_norm: casting_mode must be "llama", "gemma" or "none", got "t5"',
        ),
        BadCall(
            "eps",
            lambda d: Inputs((torch.ones(4, device=d),) * 2, {"eps": -1.0}),
            ValueError,
            r"liger::add_rms_norm: eps must not be negative, got -1",
        ),
    ]

    def make_large(self):
        rows, cols = 2**19 + 5, 4096
        args = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        small = [a[-3:].clone().requires_grad_() for a in args]
        return (
            Inputs((*(a.requires_grad_() for a in args), None)),
            Inputs((*small, None)),
            lambda t: t[-3:],
        )


def test_devices_must_match():
    with pytest.raises(ValueError, match=r"liger::add_rms_norm: residual must be on cpu \(device of x\)"):
        add_rms_norm(torch.ones(4), torch.ones(4, device="meta"))


@pytest.fixture
def inputs(device):
    def leaf(*shape):
        return torch.randn(*shape).to(device).requires_grad_()

    return leaf(6, 40), leaf(6, 40), leaf(40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_addition_and_norm(device, dtype):
    """Bit for bit what the two operators give one after the other."""
    x, residual = (torch.randn(9, 264, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(264, device=device, dtype=dtype)
    y, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight))


def test_only_y_is_used(inputs):
    y, _ = add_rms_norm(*inputs)
    expected, _ = reference(*inputs)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_only_the_sum_is_used(inputs, frozen):
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    _, total = add_rms_norm(*inputs)
    upstream = torch.randn_like(total)
    total.backward(upstream)
    gradients = [x.grad for x in inputs[:2] if x.requires_grad]
    assert all(torch.equal(gradient, upstream) for gradient in gradients)
    assert len({upstream.data_ptr(), *(g.data_ptr() for g in gradients)}) == 1 + len(gradients)
    assert inputs[2].grad is None


def test_gradients_of_leaves_are_their_own(inputs):
    """Backward computes one tensor for both, as that of an addition does; what accumulates is separate."""
    y, total = add_rms_norm(*inputs)
    (y.sum() + total.sum()).backward()
    dx, dresidual = inputs[0].grad, inputs[1].grad
    assert torch.equal(dx, dresidual)
    before = dx.clone()
    dresidual.zero_()
    assert torch.equal(dx, before)


def test_one_tensor_twice(inputs):
    x, _, weight = inputs
    y, total = add_rms_norm(x, x, weight)
    expected = reference(x, x, weight)
    (gradient,) = torch.autograd.grad(y.square().sum() + total.sum(), x)
    (wanted,) = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_backward_makes_only_what_is_asked_for(inputs):
    x, residual, weight = (t.detach() for t in inputs)
    y, total, rstd = torch.ops.liger.add_rms_norm(x, residual, weight)
    for needed in [(True, False), (False, True), (True, True)]:
        for dtotal in (None, torch.ones_like(total)):
            results = torch.ops.liger.add_rms_norm_backward(
                torch.ones_like(y), dtotal, total, weight, rstd, 0.0, "llama", *needed
            )
            assert [bool(r.numel()) for r in results] == list(needed)


def test_backward_checks_its_arguments(device):
    total, rstd = torch.ones(2, 4, device=device), torch.ones(2, device=device)
    backward = torch.ops.liger.add_rms_norm_backward
    with pytest.raises(ValueError, match=r"dsum must have shape \[2, 4\] \(shape of sum\)"):
        backward(total, total[:1], total, None, rstd, 0.0, "llama", True, False)
    with pytest.raises(TypeError, match=r"add_rms_norm_backward: rstd must have dtype float32, got float64"):
        backward(total, None, total, None, rstd.double(), 0.0, "llama", True, False)
    with pytest.raises(ValueError, match=r"add_rms_norm_backward: need_dweight requires a weight, got none"):
        backward(total, None, total, None, rstd, 0.0, "llama", True, True)
