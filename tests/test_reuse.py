"""Gated linear units write their gradients over what they have saved, where nobody else can see it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import liger_ops.functional as LF

ops = torch.ops.liger

# name: the operator, what it is called with, its backward and the one that overwrites, their arguments.
UNITS = {
    "swiglu": (LF.swiglu, 2, ops.swiglu_backward, ops.swiglu_backward_, ()),
    "geglu": (LF.geglu, 2, ops.geglu_backward, ops.geglu_backward_, ("tanh",)),
    "swiglu_packed": (LF.swiglu_packed, 1, ops.swiglu_packed_backward, ops.swiglu_packed_backward_, ()),
    "geglu_packed": (LF.geglu_packed, 1, ops.geglu_packed_backward, ops.geglu_packed_backward_, ("tanh",)),
}
units = pytest.mark.parametrize("unit", UNITS)


def gates_of(x, count):
    return [x * (i + 2) for i in range(count)]


class Pass:
    """One forward and backward, which `keep` may hold on to the gates for.

    Attributes:
        overwritten: for each gate, whether its gradient came in its memory.
        gradients: of the gates.
    """

    def __init__(self, unit, device, keep=lambda gates: None, dtype=torch.bfloat16, retain=False):
        operator, count = UNITS[unit][:2]
        torch.manual_seed(0)
        self.x = torch.randn(24, 64, device=device, dtype=dtype, requires_grad=True)
        gates = gates_of(self.x, count)
        self.addresses = [gate.data_ptr() for gate in gates]
        self.out = operator(*gates)
        self.dout = torch.randn_like(self.out)
        for i in range(count):
            gates[i].register_hook(lambda gradient, i=i: self._see(i, gradient))
        self.kept = keep(gates)
        gates.clear()
        self.backward(retain)

    def _see(self, i, gradient):
        self.overwritten[i] = gradient.data_ptr() == self.addresses[i]
        self.gradients[i] = gradient.clone()

    def backward(self, retain=False):
        self.overwritten, self.gradients = {}, {}
        self.out.backward(self.dout, retain_graph=retain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@units
def test_gradients_take_the_memory(unit, device, dtype):
    free = Pass(unit, device, dtype=dtype)
    held = Pass(unit, device, dtype=dtype, keep=list)
    assert all(free.overwritten.values())
    assert not any(held.overwritten.values())
    assert all(torch.equal(free.gradients[i], held.gradients[i]) for i in held.gradients)


KEEPERS = {
    "tensors": list,
    "views": lambda gates: [gate.view(-1) for gate in gates],
    "parts": lambda gates: [gate[1:] for gate in gates],
    "detached": lambda gates: [gate.detach() for gate in gates],
    "storages": lambda gates: [gate.untyped_storage() for gate in gates],
}


@pytest.mark.parametrize("keeper", KEEPERS)
@units
def test_what_somebody_keeps_is_not_written_to(unit, keeper, device):
    before = []

    def keep(gates):
        before.extend(KEEPERS[keeper]([gate.clone() for gate in gates]))
        return KEEPERS[keeper](gates)

    run = Pass(unit, device, keep=keep)
    assert not any(run.overwritten.values())
    for kept, value in zip(run.kept, before, strict=True):
        assert kept.tolist() == value.tolist()


@units
def test_what_another_node_has_saved_is_not_written_to(unit, device):
    def keep(gates):
        return [(torch.autograd.graph.get_gradient_edge(gate), gate * gate) for gate in gates]

    run = Pass(unit, device, keep=keep)
    assert not any(run.overwritten.values())
    for i, (edge, square) in enumerate(run.kept):
        (gradient,) = torch.autograd.grad(square.sum(), edge)
        assert torch.equal(gradient, 2 * (run.x * (i + 2)).detach())


@units
def test_only_the_last_pass_overwrites(unit, device):
    run = Pass(unit, device, retain=True)
    first = run.gradients
    assert not any(run.overwritten.values())
    run.backward(retain=True)
    assert not any(run.overwritten.values())
    run.backward()
    assert all(run.overwritten.values())
    assert all(torch.equal(run.gradients[i], first[i]) for i in first)


@units
def test_create_graph(unit, device):
    run = Pass(unit, device, retain=True)
    torch.autograd.grad(run.out, run.x, run.dout, create_graph=True, retain_graph=False)
    assert not any(run.overwritten.values())


@units
def test_hooks_that_keep_what_they_pack(unit, device):
    packed = []

    def pack(tensor):
        packed.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run = Pass(unit, device)
    assert not any(run.overwritten.values())
    assert packed and all(torch.equal(tensor, value) for tensor, value in packed)


@units
def test_hooks_that_give_a_copy(unit, device):
    expected = Pass(unit, device).gradients
    with torch.autograd.graph.save_on_cpu():
        run = Pass(unit, device)
    assert all(torch.equal(run.gradients[i], expected[i]) for i in expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@units
def test_checkpoints(unit, device, use_reentrant):
    """What a checkpoint computes again is nobody's but the node's."""
    operator, count = UNITS[unit][:2]
    addresses, gradients = {}, {}

    def block(x):
        gates = gates_of(x, count)
        for i, gate in enumerate(gates):
            addresses[i] = gate.data_ptr()
            if gate.requires_grad:
                gate.register_hook(lambda gradient, i=i: gradients.__setitem__(i, gradient.data_ptr()))
        del gate
        return operator(*gates).sin()

    torch.manual_seed(0)
    x = torch.randn(24, 64, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert gradients == addresses
    assert torch.equal(x.grad, expected)


def test_memory_of_numpy(device):
    if device != "cpu":
        pytest.skip("NumPy's memory is the host's")
    array = torch.randn(8, 16).numpy()
    before = array.copy()
    up = torch.randn(8, 16, requires_grad=True) * 2
    out = LF.swiglu(torch.from_numpy(array), up)
    del up
    out.sum().backward()
    assert (array == before).all()


@units
def test_strided_gates(unit, device):
    """Gradients are contiguous: they do not fit over gates that are not."""
    operator, count = UNITS[unit][:2]
    x = torch.randn(16, 24, device=device, requires_grad=True)
    gates = [(x * (i + 2)).t() for i in range(count)]
    gradients = torch.autograd.grad(operator(*gates).sum(), gates)
    contiguous = [gate.detach().contiguous().requires_grad_() for gate in gates]
    expected = torch.autograd.grad(operator(*contiguous).sum(), contiguous)
    out = operator(*[(x * (i + 2)).t() for i in range(count)])
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    torch.testing.assert_close(x.grad, sum((i + 2) * g.t() for i, g in enumerate(expected)))


@pytest.mark.parametrize("shape", [(3, 34), (5, 64), (7, 2), (0, 8), (2, 3, 48)])
@units
def test_the_operators(unit, shape, device):
    _, count, backward, backward_, options = UNITS[unit]
    torch.manual_seed(0)
    gates = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(count)]
    dout = torch.randn((*shape[:-1], shape[-1] * count // 2), device=device, dtype=torch.bfloat16)
    expected = backward(dout, *gates, *options)
    expected = [expected] if count == 1 else expected
    assert backward_(dout, *gates, *options) is None
    assert all(torch.equal(a, b) for a, b in zip(gates, expected, strict=True))
    torch.library.opcheck(backward_.default, (dout, *gates, *options))


@units
def test_bad_calls(unit, device):
    _, count, _, backward_, options = UNITS[unit]
    columns = 8 * count // 2
    dout = torch.randn(4, columns, device=device)
    transposed = [torch.randn(8, 4, device=device).t() for _ in range(count)]
    with pytest.raises(ValueError, match="which the gradient is written over, must be contiguous"):
        backward_(dout, *transposed, *options)
    buffer = torch.randn(8 * 8, device=device)
    gates = [buffer[i : i + 32].view(4, 8) for i in range(count)]
    if count == 2:
        with pytest.raises(RuntimeError, match="overlap|single memory location"):
            backward_(dout, *gates, *options)
    with pytest.raises(RuntimeError, match="overlap|single memory location"):
        backward_(buffer[: 4 * columns].view(4, columns), *gates, *options)


@pytest.mark.gpu
@units
def test_peak(unit):
    """Backward allocates no gradients of gates: that is the size of the gates less."""
    operator, count = UNITS[unit][:2]

    def peak(keep):
        x = torch.randn(1024, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gates = gates_of(x, count)
        out = operator(*gates)
        dout = torch.ones_like(out)
        kept = list(gates) if keep else None
        gates.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out.backward(dout)
        del kept
        return torch.cuda.max_memory_allocated() - before

    size = count * 1024 * 8192 * 2
    assert peak(keep=True) - peak(keep=False) >= size
