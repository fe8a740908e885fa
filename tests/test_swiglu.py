import pytest
import torch

from liger_ops.functional import swiglu, swiglu_packed
from tests.contract import OperatorContract
from tests.glu_cases import (
    large_packed,
    large_pair,
    packed_bad_calls,
    packed_cases,
    pair_bad_calls,
    pair_cases,
)
from tests.reference import swiglu as reference


class TestSwiglu(OperatorContract):
    function = staticmethod(swiglu)
    reference = staticmethod(reference.swiglu)
    differentiable = (0, 1)
    cases = pair_cases()
    bad_calls = pair_bad_calls("swiglu")
    make_large = staticmethod(large_pair)


class TestSwigluPacked(OperatorContract):
    function = staticmethod(swiglu_packed)
    reference = staticmethod(reference.swiglu_packed)
    cases = packed_cases()
    bad_calls = packed_bad_calls("swiglu_packed")
    make_large = staticmethod(large_packed)


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


def test_layouts_agree_bitwise(device):
    gate_up = torch.randn(9, 2 * 40, device=device, dtype=torch.bfloat16, requires_grad=True)
    gate, up = (half.clone().detach().requires_grad_() for half in gate_up.chunk(2, dim=-1))
    out, separate = swiglu_packed(gate_up), swiglu(gate, up)
    assert torch.equal(out, separate)
    out.backward(out.detach())
    separate.backward(out.detach())
    assert torch.equal(gate_up.grad, torch.cat([gate.grad, up.grad], dim=-1))


def test_backward_operator_checks_its_gradient(device):
    for backend in (device, "meta"):
        dout, gate_up = torch.ones(2, 4, device=backend), torch.ones(2, 6, device=backend)
        message = (
            r"liger::swiglu_packed_backward: dout must have shape \[2, 3\] "
            r"\(shape of one half of gate_up\), got \[2, 4\]"
        )
        with pytest.raises(ValueError, match=message):
            torch.ops.liger.swiglu_packed_backward(dout, gate_up)
