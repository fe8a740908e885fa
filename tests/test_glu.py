"""The gated linear units: swiglu, geglu, and both on one buffer."""

import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import geglu, geglu_packed, swiglu, swiglu_packed
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference import glu as reference


def pair(*shape, **kwargs):
    return lambda device, dtype: Inputs(
        tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)), kwargs
    )


def halves_of_one_buffer(device, dtype):
    return Inputs(torch.randn(3, 4, 48, device=device, dtype=dtype).chunk(2, dim=-1))


def misaligned(device, dtype):
    """Rows that start at odd elements: no 16-byte access fits."""
    return Inputs(tuple(torch.randn(6, 65, device=device, dtype=dtype)[:, 1:] for _ in range(2)))


def transposed(device, dtype):
    return Inputs(tuple(torch.randn(8, 6, device=device, dtype=dtype).t() for _ in range(2)))


def large_pair(rows=2**17 + 3, cols=2**14):
    args = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    small = [a[-3:].clone().requires_grad_() for a in args]
    return Inputs(tuple(a.requires_grad_() for a in args)), Inputs(tuple(small)), lambda t: t[-3:]


class TestSwiglu(OperatorContract):
    function = staticmethod(swiglu)
    reference = staticmethod(reference.swiglu)
    differentiable = (0, 1)
    cases = [
        Case("contiguous", pair(3, 5, 64)),
        Case("odd width", pair(4, 37)),
        Case("one element", pair(1)),
        Case("no rows", pair(0, 16)),
        Case("halves of one buffer", halves_of_one_buffer),
        Case("misaligned rows", misaligned),
        Case("transposed", transposed),
        Case("many rows", pair(129, 1000), small=False),
    ]
    bad_calls = [
        BadCall(
            "shape",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(2, 3, device=d))),
            ValueError,
            r"liger::swiglu: up must have shape \[2, 4\] \(shape of gate\), got \[2, 3\]",
        ),
        BadCall(
            "dtype",
            lambda d: Inputs((torch.ones(4, device=d), torch.ones(4, device=d).double())),
            TypeError,
            r"liger::swiglu: up must have dtype float32 \(dtype of gate\), got float64",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).long(),) * 2),
            TypeError,
            r"liger::swiglu: gate must be float64, float32, bfloat16 or float16, got int64",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),) * 2),
            ValueError,
            r"liger::swiglu: gate must have at least 1 dimension, got shape \[\]",
        ),
    ]

    def make_large(self):
        return large_pair()


class TestGeglu(OperatorContract):
    function = staticmethod(geglu)
    reference = staticmethod(reference.geglu)
    differentiable = (0, 1)
    cases = [
        Case("tanh", pair(3, 5, 64)),
        Case("exact", pair(3, 5, 64, approximate="none")),
        Case("odd width", pair(4, 37)),
        Case("odd width, exact", pair(4, 37, approximate="none")),
        Case("one element", pair(1)),
        Case("no rows", pair(0, 16)),
        Case("halves of one buffer", halves_of_one_buffer),
        Case("misaligned rows", misaligned),
        Case("many rows", pair(129, 1000), small=False),
        Case("many rows, exact", pair(129, 1000, approximate="none"), small=False),
    ]
    bad_calls = [
        BadCall(
            "shape",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(2, 3, device=d))),
            ValueError,
            r"liger::geglu: up must have shape \[2, 4\] \(shape of gate\), got \[2, 3\]",
        ),
        BadCall(
            "approximation",
            lambda d: Inputs((torch.ones(4, device=d),) * 2, {"approximate": "erf"}),
            ValueError,
            r'liger::geglu: approximate must be "tanh" or "none", got "erf"',
        ),
        BadCall(
            "the name of another activation",
            lambda d: Inputs((torch.ones(4, device=d),) * 2, {"approximate": "silu"}),
            ValueError,
            r'liger::geglu: approximate must be "tanh" or "none", got "silu"',
        ),
    ]

    def make_large(self):
        return large_pair()


def buffer(*shape, **kwargs):
    return lambda device, dtype: Inputs((torch.randn(shape, device=device, dtype=dtype),), kwargs)


def columns(device, dtype):
    """A buffer that is itself part of wider rows."""
    return Inputs((torch.randn(3, 4, 80, device=device, dtype=dtype)[..., 8:72],))


def transposed_buffer(device, dtype):
    return Inputs((torch.randn(8, 6, device=device, dtype=dtype).t(),))


def large_buffer():
    x = torch.randn(2**17 + 3, 2**15, device="cuda", dtype=torch.bfloat16)
    small = x[-3:].clone().requires_grad_()
    return Inputs((x.requires_grad_(),)), Inputs((small,)), lambda t: t[-3:]


def packed_cases(**kwargs):
    return [
        Case("contiguous", buffer(3, 5, 64, **kwargs)),
        Case("halves of odd width", buffer(4, 2 * 37, **kwargs)),
        Case("one pair", buffer(2, **kwargs)),
        Case("no rows", buffer(0, 16, **kwargs)),
        Case("no columns", buffer(3, 0, **kwargs)),
        Case("columns of wider rows", columns),
        Case("transposed", transposed_buffer),
        Case("many rows", buffer(129, 2000, **kwargs), small=False),
    ]


class TestSwigluPacked(OperatorContract):
    function = staticmethod(swiglu_packed)
    reference = staticmethod(reference.swiglu_packed)
    cases = packed_cases()
    bad_calls = [
        BadCall(
            "odd width",
            lambda d: Inputs((torch.ones(2, 5, device=d),)),
            ValueError,
            r"liger::swiglu_packed: the last dimension of gate_up must be even \(gate, then up\), got 5",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),)),
            ValueError,
            r"liger::swiglu_packed: gate_up must have at least 1 dimension, got shape \[\]",
        ),
    ]

    def make_large(self):
        return large_buffer()


class TestGegluPacked(OperatorContract):
    function = staticmethod(geglu_packed)
    reference = staticmethod(reference.geglu_packed)
    cases = [*packed_cases(), Case("exact", buffer(3, 5, 64, approximate="none"))]
    bad_calls = [
        BadCall(
            "odd width",
            lambda d: Inputs((torch.ones(2, 5, device=d),)),
            ValueError,
            r"liger::geglu_packed: the last dimension of gate_up must be even \(gate, then up\), got 5",
        ),
        BadCall(
            "approximation",
            lambda d: Inputs((torch.ones(4, device=d),), {"approximate": "erf"}),
            ValueError,
            r'liger::geglu_packed: approximate must be "tanh" or "none", got "erf"',
        ),
    ]

    def make_large(self):
        return large_buffer()


OPERATORS = {
    "swiglu": (swiglu, F.silu),
    "geglu": (geglu, lambda x: F.gelu(x, approximate="tanh")),
    "geglu, exact": (lambda gate, up: geglu(gate, up, "none"), F.gelu),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-6e4, -1e4, -90.0, -40.0, 40.0, 90.0, 1e4, 6e4])
@pytest.mark.parametrize("name", OPERATORS)
def test_saturated_gate(device, name, value, dtype):
    """Far from zero the activation is 0 or the identity, its slope 0 or 1, and nothing overflows."""
    function, _ = OPERATORS[name]
    gate = torch.full((32,), value, device=device, dtype=dtype, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    out = function(gate, up)
    out.sum().backward()
    expected = torch.relu(gate.detach())
    close = dict(rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(gate.grad, torch.full_like(gate, float(value > 0)), **close)
    torch.testing.assert_close(up.grad, expected, **close)


@pytest.mark.parametrize("value", [-1e30, -1e20, 1e20, 1e30])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_nan_where_powers_of_the_gate_overflow(device, name, value):
    function, _ = OPERATORS[name]
    gate = torch.full((8,), value, device=device, requires_grad=True)
    out = function(gate, torch.ones_like(gate))
    out.sum().backward()
    assert torch.equal(gate.grad, torch.full_like(gate, float(value > 0)))
    torch.testing.assert_close(out, torch.relu(gate.detach()))


@pytest.mark.parametrize("name", OPERATORS)
def test_small_values_keep_their_digits(device, name):
    """Where 1 + tanh or 1 + erf would cancel, the results stay accurate in relative terms."""
    function, activation = OPERATORS[name]
    gate = torch.linspace(-5, -3, 64, device=device)
    ones = torch.ones_like(gate)
    exact = activation(gate.double().cpu())
    error = ((function(gate, ones).double().cpu() - exact) / exact).abs().max()
    assert error < 4e-6
