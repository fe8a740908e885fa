import pytest
import torch

from liger_ops.functional import swiglu
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.swiglu import swiglu as reference


def pair(*shape):
    return lambda device, dtype: Inputs(
        tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    )


def halves_of_one_buffer(device, dtype):
    return Inputs(torch.randn(3, 4, 48, device=device, dtype=dtype).chunk(2, dim=-1))


def misaligned(device, dtype):
    """Rows that start at odd elements: no 16-byte access fits."""
    return Inputs(tuple(torch.randn(6, 65, device=device, dtype=dtype)[:, 1:] for _ in range(2)))


def transposed(device, dtype):
    return Inputs(tuple(torch.randn(8, 6, device=device, dtype=dtype).t() for _ in range(2)))


class TestSwiglu(OperatorContract):
    function = staticmethod(swiglu)
    reference = staticmethod(reference)
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
        rows, cols = 2**17 + 3, 2**14
        args = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        small = [a[-3:].clone().requires_grad_() for a in args]
        return Inputs(tuple(a.requires_grad_() for a in args)), Inputs(tuple(small)), lambda t: t[-3:]


@pytest.mark.parametrize("value", [-1e4, -90.0, 90.0, 1e4])
def test_saturated_gate(device, value):
    """Far from zero the sigmoid is 0 or 1 and nothing overflows."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gate = torch.full((32,), value, device=device, dtype=dtype, requires_grad=True)
        up = torch.ones_like(gate, requires_grad=True)
        out = swiglu(gate, up)
        out.sum().backward()
        expected = max(value, 0.0)
        torch.testing.assert_close(out, torch.full_like(out, expected))
        torch.testing.assert_close(gate.grad, torch.full_like(gate, float(value > 0)))
        torch.testing.assert_close(up.grad, torch.full_like(gate, expected))
