"""What every operator must do, written once. A test class per operator inherits it and names its cases.

    class TestSwiglu(OperatorContract):
        function = staticmethod(liger_ops.functional.swiglu)
        reference = staticmethod(reference.swiglu)
        cases = [Case("contiguous", make_inputs, terms=...)]

The tests run on every device there is, through the `device` fixture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.tolerances import assert_within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Inputs:
    """One call: `function(*args, **kwargs)`; `args` are tensors or None."""

    args: tuple[Tensor | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Inputs for an operator, and how precise its results must be.

    Attributes:
        id: shown by pytest.
        make: `(device, dtype) -> Inputs`, the same values at every call after `torch.manual_seed`.
        terms: longest sum behind an element of any output or gradient.
        roundings: roundings to the dtype on the way to an element.
        small: fit for gradcheck, opcheck and compile, which are slow.
        total_derivative: whether the gradient is that of the output as a whole, as gradcheck takes it to be.
            Not where a part of the output is defined to be a constant.
    """

    id: str
    make: Callable[[str, torch.dtype], Inputs]
    terms: int = 1
    roundings: int = 2
    small: bool = True
    total_derivative: bool = True


@dataclass(frozen=True)
class BadCall:
    """A call that must fail with this exception and sentence on every backend.

    `make` gets a device; "meta" is one of them. The message is a regular expression.
    """

    id: str
    make: Callable[[str], Inputs]
    exception: type[Exception]
    message: str


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


class RecordLigerCalls(TorchDispatchMode):
    """Collects the liger operators that run below autograd, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger":
            self.calls.append((func, tree_map(detached, args), tree_map(detached, kwargs or {})))
        return func(*args, **(kwargs or {}))


def detached(value):
    return value.detach() if isinstance(value, Tensor) else value


def requiring_grad(value):
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def is_inplace(func) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


class OperatorContract:
    """See the module docstring. Subclasses set the attributes below."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    cases: list[Case] = []
    bad_calls: list[BadCall] = []
    # Positions of the arguments that gradients flow into.
    differentiable: tuple[int, ...] = (0,)
    # Of those, the ones whose gradient is that of another argument: the same tensor, as an addition has it.
    shared: tuple[int, ...] = ()
    dtypes: list[torch.dtype] = DTYPES
    # Under autocast: the dtype of each output, from the float32 inputs and the autocast dtype.
    autocast_dtype: Callable[[torch.dtype], torch.dtype] = staticmethod(lambda autocast: torch.float32)
    # An input large enough that element offsets pass 2**31, for the operators that have one; see test_large.
    make_large: Callable[[str], Inputs] | None = None

    # ------------------------------------------------------------------------------------------ helpers

    @classmethod
    def inputs(cls, case: Case, device: str, dtype: torch.dtype, grad: bool = True) -> Inputs:
        torch.manual_seed(0)
        inputs = case.make(device, dtype)
        if grad:
            for i in cls.differentiable:
                if i < len(inputs.args) and inputs.args[i] is not None:
                    inputs.args[i].requires_grad_()
        return inputs

    @classmethod
    def leaves(cls, inputs: Inputs) -> list[Tensor]:
        return [
            inputs.args[i]
            for i in cls.differentiable
            if i < len(inputs.args) and inputs.args[i] is not None and inputs.args[i].requires_grad
        ]

    @classmethod
    def run(cls, inputs: Inputs, function=None) -> tuple[Tensor, ...]:
        return as_tuple((function or cls.function)(*inputs.args, **inputs.kwargs))

    @classmethod
    def upstream(cls, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of the outputs, the same at every call and on every device."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]

    @classmethod
    def run_with_gradients(cls, inputs: Inputs, function=None) -> tuple[list[Tensor], list[Tensor]]:
        outputs = cls.run(inputs, function)
        gradients = torch.autograd.grad(outputs, cls.leaves(inputs), cls.upstream(outputs))
        return list(outputs), list(gradients)

    @classmethod
    def expected(cls, inputs: Inputs, outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients of the reference in float64 on the CPU, for the same upstream gradients."""

        def widen(value):
            if not isinstance(value, Tensor):
                return value
            wide = value.detach().cpu()
            return wide.double().requires_grad_(value.requires_grad) if wide.is_floating_point() else wide

        wide = Inputs(tuple(map(widen, inputs.args)), {k: widen(v) for k, v in inputs.kwargs.items()})
        results = cls.run(wide, cls.reference)
        upstream = [g.double().cpu() for g in cls.upstream(tuple(outputs))]
        return list(results), list(torch.autograd.grad(results, cls.leaves(wide), upstream))

    def pytest_small(self, case: Case) -> None:
        if not case.small:
            pytest.skip("large case")

    # ------------------------------------------------------------------------------------------ numerics

    def test_matches_reference(self, case, dtype, device):
        inputs = self.inputs(case, device, dtype)
        outputs, gradients = self.run_with_gradients(inputs)
        expected_outputs, expected_gradients = self.expected(inputs, outputs)
        for i, (result, reference) in enumerate(zip(outputs, expected_outputs, strict=True)):
            assert_within(
                result, reference, dtype=dtype, terms=case.terms, roundings=case.roundings, name=f"output {i}"
            )
        for i, (result, reference) in enumerate(zip(gradients, expected_gradients, strict=True)):
            assert result.dtype == self.leaves(inputs)[i].dtype
            assert_within(
                result,
                reference,
                dtype=dtype,
                terms=case.terms,
                roundings=case.roundings,
                name=f"gradient {i}",
            )

    def test_gradcheck(self, case, device):
        self.pytest_small(case)
        if not case.total_derivative:
            pytest.skip("the gradient leaves a part of the output out")
        inputs = self.inputs(case, device, torch.float64)
        if not any(leaf.numel() for leaf in self.leaves(inputs)):
            return
        leaves = self.leaves(inputs)

        def call(*values):
            by_id = dict(zip(map(id, leaves), values, strict=True))
            args = [by_id.get(id(a), a) for a in inputs.args]
            return self.function(*args, **inputs.kwargs)

        assert torch.autograd.gradcheck(call, leaves)

    def test_frozen_arguments(self, case, device):
        """Whatever part of the arguments is frozen, the others get the very gradients they get together."""
        everything = self.inputs(case, device, torch.float32)
        _, gradients = self.run_with_gradients(everything)
        present = [
            i for i in self.differentiable if i < len(everything.args) and everything.args[i] is not None
        ]
        by_position = dict(zip(present, gradients, strict=True))
        for count in range(1, len(present)):
            for chosen in itertools.combinations(present, count):
                inputs = self.inputs(case, device, torch.float32, grad=False)
                for i in chosen:
                    inputs.args[i].requires_grad_()
                _, partial = self.run_with_gradients(inputs)
                for i, gradient in zip(chosen, partial, strict=True):
                    assert torch.equal(gradient, by_position[i]), f"argument {i} alone of {chosen}"

    def test_no_grad_gives_the_same_result(self, case, device):
        inputs = self.inputs(case, device, torch.float32)
        recorded = self.run(inputs)
        with torch.no_grad():
            plain = self.run(inputs)
        with torch.inference_mode():
            inference = self.run(self.inputs(case, device, torch.float32, grad=False))
        for a, b, c in zip(recorded, plain, inference, strict=True):
            assert a.requires_grad and not b.requires_grad
            assert torch.equal(a, b) and torch.equal(a, c)

    # ------------------------------------------------------------------------------------------ contract

    def test_opcheck(self, case, device):
        """PyTorch's four operator checks, on every operator that a forward and backward pass calls."""
        self.pytest_small(case)
        with RecordLigerCalls() as record:
            inputs = self.inputs(case, device, torch.float32)
            _, _ = self.run_with_gradients(inputs)
        assert len(record.calls) >= 2, "expected a forward and a backward operator"
        for func, args, kwargs in record.calls:
            if is_inplace(func):
                torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
                continue
            torch.library.opcheck(
                func, args, kwargs, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            )
            torch.library.opcheck(
                func,
                tree_map(requiring_grad, args),
                tree_map(requiring_grad, kwargs),
                test_utils="test_autograd_registration",
            )
        self.opcheck_public(case, device)

    @classmethod
    def public_operator(cls):
        return getattr(torch.ops.liger, cls.function.__name__).default

    def opcheck_public(self, case, device):
        """The public operator with gradients: its Autograd kernel must trace."""
        with RecordPublicCall(self.public_operator()) as record:
            self.run(self.inputs(case, device, torch.float32))
        args, kwargs = record.call
        assert args, "the function does not call the operator of its name"
        torch.library.opcheck(self.public_operator(), args, kwargs)

    def test_compile(self, case, device):
        self.pytest_small(case)
        torch._dynamo.reset()
        inputs = self.inputs(case, device, torch.float32)
        eager_outputs, eager_gradients = self.run_with_gradients(inputs)
        compiled = torch.compile(self.function, fullgraph=True, dynamic=True)
        outputs, gradients = self.run_with_gradients(self.inputs(case, device, torch.float32), compiled)
        for a, b in zip(eager_outputs + eager_gradients, outputs + gradients, strict=True):
            torch.testing.assert_close(a, b)

    def test_autocast(self, case, device):
        self.pytest_small(case)
        for autocast in (torch.bfloat16, torch.float16):
            inputs = self.inputs(case, device, torch.float32)
            with torch.autocast(device, dtype=autocast):
                outputs = self.run(inputs)
                inside = torch.autograd.grad(
                    outputs, self.leaves(inputs), self.upstream(outputs), retain_graph=True
                )
            outside = torch.autograd.grad(outputs, self.leaves(inputs), self.upstream(outputs))
            for output in outputs:
                assert output.dtype == self.autocast_dtype(autocast)
            for leaf, a, b in zip(self.leaves(inputs), inside, outside, strict=True):
                assert a.dtype == leaf.dtype
                assert torch.equal(a, b)

    def test_inputs_are_left_alone(self, case, dtype, device):
        inputs = self.inputs(case, device, dtype)
        before = [a.detach().clone() if a is not None else None for a in inputs.args]
        outputs, gradients = self.run_with_gradients(inputs)
        for old, new in zip(before, inputs.args, strict=True):
            assert old is None or torch.equal(old, new)
        storages = [a.untyped_storage().data_ptr() for a in inputs.args if a is not None and a.numel()]
        apart = [id(inputs.args[i]) for i in self.shared]
        leaves = self.leaves(inputs)
        distinct = [g for leaf, g in zip(leaves, gradients, strict=True) if id(leaf) not in apart]
        results = [t.untyped_storage().data_ptr() for t in outputs + distinct if t.numel()]
        assert not set(storages) & set(results)
        assert len(results) == len(set(results)), "two results share memory"

    def test_expanded_gradient(self, case, device):
        """`out.sum().backward()` sends a gradient of stride 0."""
        inputs = self.inputs(case, device, torch.float32)
        outputs = self.run(inputs)
        leaves = self.leaves(inputs)
        expanded = torch.autograd.grad(sum(o.sum() for o in outputs), leaves, retain_graph=True)
        dense = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        for a, b in zip(expanded, dense, strict=True):
            assert torch.equal(a, b)

    def test_retained_graph(self, case, device):
        inputs = self.inputs(case, device, torch.float32)
        outputs = self.run(inputs)
        upstream = self.upstream(outputs)
        first = torch.autograd.grad(outputs, self.leaves(inputs), upstream, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(outputs, self.leaves(inputs), upstream, retain_graph=True)
        third = torch.autograd.grad(outputs, self.leaves(inputs), upstream)
        for a, b, c, d in zip(first, kept, second, third, strict=True):
            assert torch.equal(a, b), "a later backward changed an earlier gradient"
            assert torch.equal(a, c) and torch.equal(a, d)

    def test_second_derivative_raises(self, case, device):
        inputs = self.inputs(case, device, torch.float32)
        outputs = self.run(inputs)
        # A linear operator's gradient depends on the upstream gradient alone.
        upstream = [g.requires_grad_() for g in self.upstream(outputs)]
        gradients = torch.autograd.grad(outputs, self.leaves(inputs), upstream, create_graph=True)
        with pytest.raises(RuntimeError, match=r"liger::\w+ is not implemented"):
            sum(g.sum() for g in gradients).backward()

    def test_is_deterministic(self, case, dtype, device):
        runs = [self.run_with_gradients(self.inputs(case, device, dtype)) for _ in range(3)]
        for outputs, gradients in runs[1:]:
            for a, b in zip(runs[0][0] + runs[0][1], outputs + gradients, strict=True):
                assert torch.equal(a, b)

    def test_bad_call(self, bad_call, device):
        for backend in (device, "meta"):
            inputs = bad_call.make(backend)
            with pytest.raises(bad_call.exception, match=bad_call.message):
                self.run(inputs)

    # ------------------------------------------------------------------------------------------ CUDA only

    @pytest.mark.gpu
    def test_cpu_and_cuda_agree(self, case, dtype):
        results = {}
        for device in ("cpu", "cuda"):
            inputs = self.inputs(case, "cpu", dtype, grad=False)
            inputs.args = tuple(a.to(device) if a is not None else None for a in inputs.args)
            inputs.kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, inputs.kwargs)  # noqa: B023
            for i in self.differentiable:
                if i < len(inputs.args) and inputs.args[i] is not None:
                    inputs.args[i].requires_grad_()
            results[device] = self.run_with_gradients(inputs)
        for a, b in zip(sum(results["cuda"], []), sum(results["cpu"], []), strict=True):
            assert_within(a, b, dtype=dtype, terms=case.terms, roundings=2 * case.roundings)

    @pytest.mark.gpu
    def test_cuda_graph(self, case):
        stream = torch.cuda.Stream()
        # Everything on the capturing stream from the start: autograd returns a leaf's gradient on the stream
        # that the leaf was first used on.
        with torch.cuda.stream(stream):
            inputs = self.inputs(case, "cuda", torch.float32)
            expected_outputs, expected_gradients = self.run_with_gradients(inputs)
            upstream = self.upstream(tuple(expected_outputs))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = self.run(inputs)
            gradients = torch.autograd.grad(outputs, self.leaves(inputs), upstream)
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip([*outputs, *gradients], expected_outputs + expected_gradients, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.gpu
    def test_runs_on_the_current_stream(self, case):
        """On a side stream, behind a long wait: work that strayed to another stream would read too early."""
        inputs = self.inputs(case, "cuda", torch.float32)
        expected = sum(self.run_with_gradients(inputs), [])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            values = [a.clone() if a is not None else None for a in inputs.args]
            late = [torch.zeros_like(a) if a is not None else None for a in values]
            torch.cuda._sleep(20_000_000)
            for a, b in zip(late, values, strict=True):
                if a is not None:
                    a.copy_(b)
        with torch.cuda.stream(stream):
            for i in self.differentiable:
                if i < len(late) and late[i] is not None:
                    late[i].requires_grad_()
            results = sum(self.run_with_gradients(Inputs(tuple(late), inputs.kwargs)), [])
        stream.synchronize()
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self, case):
        expected = sum(self.run_with_gradients(self.inputs(case, "cuda:0", torch.float32)), [])
        results = sum(self.run_with_gradients(self.inputs(case, "cuda:1", torch.float32)), [])
        for a, b in zip(results, expected, strict=True):
            assert a.device.index == 1
            torch.testing.assert_close(a.cpu(), b.cpu())

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_large(self):
        """Element offsets beyond 2**31: the last rows must equal those of a small call on the same rows."""
        if self.make_large is None:
            pytest.skip("no large case")
        large, small, last = self.make_large()
        outputs = self.run(large)
        upstream = [torch.randn_like(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, self.leaves(large), upstream)
        small_outputs = self.run(small)
        small_gradients = torch.autograd.grad(
            small_outputs, self.leaves(small), [last(g).contiguous() for g in upstream]
        )
        for a, b in zip(outputs + gradients, small_outputs + small_gradients, strict=True):
            assert torch.equal(last(a), b)


class RecordPublicCall(torch.overrides.TorchFunctionMode):
    """Keeps the arguments of the last call of one operator, as the user's code passed them."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.call: tuple[tuple, dict] = ((), {})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            self.call = (args, kwargs or {})
        return func(*args, **(kwargs or {}))


def parametrize(metafunc) -> None:
    """`pytest_generate_tests` for contract classes: cases, dtypes and bad calls of the class."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, OperatorContract):
        return
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cls.cases, ids=lambda c: c.id)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", cls.dtypes, ids=lambda d: str(d).removeprefix("torch."))
    if "bad_call" in metafunc.fixturenames:
        metafunc.parametrize("bad_call", cls.bad_calls, ids=lambda c: c.id)
