import pytest
import torch

from liger_ops.functional import geglu, geglu_packed
from tests.contract import BadCall, Inputs, OperatorContract
from tests.glu_cases import (
    large_packed,
    large_pair,
    packed_bad_calls,
    packed_cases,
    pair_bad_calls,
    pair_cases,
)
from tests.reference import geglu as reference

APPROXIMATE = ["tanh", "none"]
LOW_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


def unknown_gelu(op, tensors):
    return BadCall(
        "approximate",
        lambda d: Inputs((torch.ones(4, device=d),) * tensors, {"approximate": "erf"}),
        ValueError,
        rf'liger::{op}: approximate must be "tanh" or "none", got "erf"',
    )


class TestGeglu(OperatorContract):
    function = staticmethod(geglu)
    reference = staticmethod(reference.geglu)
    differentiable = (0, 1)
    cases = pair_cases()
    bad_calls = [*pair_bad_calls("geglu"), unknown_gelu("geglu", 2)]
    make_large = staticmethod(large_pair)


class TestGegluExact(OperatorContract):
    function = staticmethod(geglu)
    reference = staticmethod(reference.geglu)
    differentiable = (0, 1)
    cases = pair_cases(approximate="none")[:2]
    make_large = staticmethod(lambda: large_pair(approximate="none"))


class TestGegluPacked(OperatorContract):
    function = staticmethod(geglu_packed)
    reference = staticmethod(reference.geglu_packed)
    cases = packed_cases()
    bad_calls = [*packed_bad_calls("geglu_packed"), unknown_gelu("geglu_packed", 1)]
    make_large = staticmethod(large_packed)


class TestGegluPackedExact(OperatorContract):
    function = staticmethod(geglu_packed)
    reference = staticmethod(reference.geglu_packed)
    cases = packed_cases(approximate="none")[:2]
    make_large = staticmethod(lambda: large_packed(approximate="none"))


def extremes(dtype):
    largest = torch.finfo(dtype).max
    return [s * v for s in (-1, 1) for v in (12.0, 90.0, 1e4, min(1e20, largest), largest)]


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", [*LOW_AND_FULL, torch.float64])
def test_saturated_gate(device, dtype, approximate):
    """Far from zero Phi is 0 or 1, up to the largest number there is."""
    gate = torch.tensor(extremes(dtype), dtype=torch.float64).to(device, dtype).requires_grad_()
    up = torch.full_like(gate, 0.5, requires_grad=True)
    out = geglu(gate, up, approximate)
    out.backward(torch.ones_like(out))
    positive = gate.detach() > 0
    # At -12 the exact GELU is about -1e-32.
    close = dict(rtol=1e-6, atol=1e-25)
    torch.testing.assert_close(out, torch.where(positive, gate.detach() / 2, 0), **close)
    torch.testing.assert_close(gate.grad, positive.to(dtype) / 2, **close)
    torch.testing.assert_close(up.grad, torch.where(positive, gate.detach(), 0), **close)


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_not_a_number_stays_one(device, approximate):
    gate = torch.tensor([float("nan"), 1.0], device=device, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    out = geglu(gate, up, approximate)
    out.sum().backward()
    for tensor in (out, gate.grad, up.grad):
        assert tensor.isnan().tolist() == [True, False]


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", LOW_AND_FULL)
def test_no_less_accurate_than_eager(device, dtype, approximate):
    """Over the whole range of the activation, in value and both gradients."""
    gate = torch.linspace(-8, 8, 40001, dtype=torch.float64).to(device, dtype)
    up, dout = (torch.randn(gate.shape, device=device, dtype=dtype) for _ in range(2))

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (gate, up)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def eager(g, u):
        return torch.nn.functional.gelu(g, approximate=approximate) * u

    exact = run(eager, torch.float64)
    ours, theirs = run(lambda g, u: geglu(g, u, approximate), dtype), run(eager, dtype)
    for a, b, reference_ in zip(ours, theirs, exact, strict=True):
        error, allowed = ((t.double() - reference_).abs() for t in (a, b))
        assert error.mean() <= 1.05 * allowed.mean()
        # The largest of float32's is a rounding of the largest value, which may fall either way.
        assert error.max() <= (1.05 if dtype != torch.float32 else 2) * allowed.max()


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", LOW_AND_FULL)
def test_left_tail_is_relatively_accurate(device, dtype, approximate):
    """1 + erf and 1 + tanh lose all digits here; the operators do not."""
    gate = torch.linspace(-6, -1, 1001, dtype=torch.float64).to(device, dtype)
    gate.requires_grad_()
    scale = 1024.0  # keeps the results normal in float16
    geglu(gate, torch.full_like(gate, scale), approximate).sum().backward()
    wide = gate.detach().double().requires_grad_()
    if approximate == "none":
        value = wide * torch.special.ndtr(wide) * scale
    else:
        value = wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide**3)) * scale
    value.sum().backward()
    out = geglu(gate.detach(), torch.full_like(gate, scale), approximate)
    normal = value.abs() > torch.finfo(dtype).smallest_normal * 1e3
    for result, expected in ((out, value.detach()), (gate.grad, wide.grad)):
        error = ((result.double() - expected) / expected).abs()[normal]
        assert error.max() <= 2 * torch.finfo(dtype).eps + 2e-5


def test_layouts_agree_bitwise(device):
    for approximate in APPROXIMATE:
        gate_up = torch.randn(9, 2 * 40, device=device, dtype=torch.bfloat16, requires_grad=True)
        gate, up = (half.clone().detach().requires_grad_() for half in gate_up.chunk(2, dim=-1))
        out, separate = geglu_packed(gate_up, approximate), geglu(gate, up, approximate)
        assert torch.equal(out, separate)
        out.backward(out.detach())
        separate.backward(out.detach())
        assert torch.equal(gate_up.grad, torch.cat([gate.grad, up.grad], dim=-1))


def test_tanh_is_the_default(device):
    gate, up = torch.randn(2, 64, device=device)
    assert torch.equal(geglu(gate, up), geglu(gate, up, "tanh"))
    assert not torch.equal(geglu(gate, up), geglu(gate, up, "none"))
