"""Random shapes, memory layouts, dtypes and options, against the references.

`--hypothesis-profile=thorough` runs many more examples; the default is what CI has time for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import liger_ops.functional as LF
from tests.conftest import DEVICES
from tests.contract import Inputs, OperatorContract
from tests.reference import (
    add_rms_norm,
    cross_entropy,
    fused_linear_cross_entropy,
    geglu,
    layer_norm,
    rms_norm,
    rope,
    swiglu,
)
from tests.tolerances import assert_within

# ------------------------------------------------------------------------------------------------ layouts


def contiguous(x: Tensor) -> Tensor:
    return x


def at_odd_address(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def columns_of_wider_rows(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)[..., 3:-2].copy_(x)


def every_other_row(x: Tensor) -> Tensor:
    return torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2].copy_(x)


def every_other_column(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)


def last_dimensions_swapped(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def first_dimensions_swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def expanded(x: Tensor) -> Tensor:
    """One row (with stride 0) in place of all."""
    return x[:1].clone().expand(x.shape)


LAYOUTS = [
    contiguous,
    at_odd_address,
    columns_of_wider_rows,
    every_other_row,
    every_other_column,
    last_dimensions_swapped,
    first_dimensions_swapped,
    expanded,
]

# ------------------------------------------------------------------------------------------------ calls


@dataclass
class Call:
    """A drawn call. `shapes` has one shape for each tensor argument, None for an absent one."""

    shapes: list[tuple[int, ...] | None]
    kwargs: dict[str, Any] = field(default_factory=dict)
    terms: int = 1
    roundings: int = 2
    # Arguments that are not random numbers: position -> tensor.
    fixed: dict[int, Tensor] = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class Operator:
    function: Callable[..., Any]
    reference: Callable[..., Any]
    call: st.SearchStrategy[Call]
    differentiable: tuple[int, ...]
    # Sizes of the terms of outputs and gradients where they cancel (None: where they do not), from the
    # arguments, kwargs and upstream gradients in float64.
    term_sizes: Callable[[tuple, dict, list[Tensor]], tuple[float | None, float | None]] | None = None


def layer_norm_term_sizes(args, kwargs, upstream):
    """y is a difference from the mean, and dx one from two projections."""
    x, weight, _ = args
    rstd = torch.rsqrt(x.var(-1, correction=0) + kwargs["eps"]) if x.numel() else x
    factor = 1.0 if weight is None else size(weight)
    return factor * size(rstd) * size(x), size(upstream[0]) * max(
        factor * size(rstd), size(rstd) * size(x), 1.0
    )


def glu_term_sizes(args, kwargs, upstream):
    """Errors of the gate move the tail of its activation by much more in relative terms. The slope is a
    difference where it changes its sign.
    """
    gate, up = args if len(args) == 2 else args[0].chunk(2, dim=-1)
    return size(gate) * size(up), size(upstream[0]) * max(size(gate), 1.0) * max(size(up), 1.0)


def size(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def norm_term_sizes(args, kwargs, upstream):
    """dx is rstd * (dy * w - a projection of it on x), and the two are equal in rows of one element."""
    weight = args[-1]
    x = args[0] if len(args) == 2 else args[0] + args[1]
    rstd = torch.rsqrt(x.square().mean(-1) + kwargs["eps"])
    factor = 1.0 if weight is None else size(weight + kwargs["offset"])
    return None, size(upstream[0]) * max(factor * size(rstd), 1.0)


def loss_term_sizes(logits, target, weight, kwargs, upstream) -> tuple[float, float]:
    """Of the loss, a difference of log-sum-exp and logit, and of its gradient, one of probabilities."""
    counted = target[target != kwargs["ignore_index"]]
    if not counted.numel():
        return 0.0, 0.0
    class_weight = 1.0 if weight is None else size(weight)
    row = class_weight * size(upstream[0])
    if kwargs["reduction"] == "mean":
        total = float(counted.numel()) if weight is None else weight[counted].sum().item()
        row /= kwargs.get("num_items") or total
    return class_weight * size(logits), row


def cross_entropy_term_sizes(args, kwargs, upstream):
    return loss_term_sizes(*args, kwargs, upstream)


def fused_term_sizes(args, kwargs, upstream):
    x, weight, target, bias, ce_weight = args
    logits = torch.nn.functional.linear(x, weight, bias)
    loss, row = loss_term_sizes(logits, target, ce_weight, kwargs, upstream)
    return loss, row * max(size(x), size(weight), 1.0)


WIDTHS = st.one_of(st.integers(1, 80), st.sampled_from([96, 128, 255, 256, 257, 1024, 1030]))
LEADING = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def norm_calls(draw):
    width, leading = draw(WIDTHS), draw(LEADING)
    offset, mode = draw(st.sampled_from([(0.0, "llama"), (1.0, "gemma"), (0.5, "none"), (0.0, "none")]))
    weight = draw(st.sampled_from([(width,), None]))
    rows = torch.Size(leading).numel()
    return Call(
        [(*leading, width), weight],
        {"offset": offset, "casting_mode": mode, "eps": draw(st.sampled_from([1e-6, 1e-3]))},
        terms=max(width, rows),
        roundings=4,
        scale=draw(st.sampled_from([1.0, 30.0])),
    )


@st.composite
def add_norm_calls(draw):
    call = draw(norm_calls())
    call.shapes.insert(0, call.shapes[0])
    return call


@st.composite
def layer_norm_calls(draw):
    # One element is its own mean, and its gradient nothing but rounding errors.
    width, leading = draw(WIDTHS.filter(lambda n: n > 1)), draw(LEADING)
    weight, bias = draw(st.sampled_from([(width,), None])), draw(st.sampled_from([(width,), None]))
    return Call(
        [(*leading, width), weight, bias],
        {"eps": draw(st.sampled_from([1e-5, 1e-3]))},
        terms=max(width, torch.Size(leading).numel()),
        roundings=4,
        scale=draw(st.sampled_from([1.0, 30.0])),
    )


@st.composite
def rope_calls(draw):
    batch, positions = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    heads, key_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = draw(st.integers(1, 70))
    rotary_dim = 2 * draw(st.integers(0, head_dim // 2))
    angle = draw(
        st.sampled_from([(positions, rotary_dim), (1, positions, rotary_dim), (batch, positions, rotary_dim)])
    )
    return Call(
        [(batch, heads, positions, head_dim), (batch, key_heads, positions, head_dim), angle, angle],
        {"interleaved": draw(st.booleans())},
        terms=2,
    )


@st.composite
def mrope_calls(draw):
    section = draw(st.lists(st.integers(0, 12), min_size=3, max_size=3))
    batch, positions, pairs = draw(st.integers(0, 3)), draw(st.integers(0, 5)), sum(section)
    head_dim = 2 * pairs + draw(st.integers(1, 9))
    angle = (3, draw(st.sampled_from([1, batch])), positions, 2 * pairs)
    q, k = (batch, draw(st.integers(1, 4)), positions, head_dim), (batch, 1, positions, head_dim)
    return Call([q, k, angle, angle], {"mrope_section": section}, terms=2)


@st.composite
def glu_calls(draw):
    shape = (*draw(LEADING), draw(WIDTHS))
    return Call([shape, shape], scale=draw(st.sampled_from([1.0, 4.0])), roundings=6, terms=4)


@st.composite
def geglu_calls(draw):
    call = draw(glu_calls())
    call.kwargs["approximate"] = draw(st.sampled_from(["tanh", "none"]))
    return call


def packed(calls):
    """Both halves in one buffer."""

    def pack(call):
        call.shapes = [(*call.shapes[0][:-1], 2 * call.shapes[0][-1])]
        return call

    return calls.map(pack)


@st.composite
def loss_options(draw):
    return {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "lse_square_scale": draw(st.sampled_from([0.0, 1e-3])),
        "softcap": draw(st.sampled_from([None, 4.0])),
        "ignore_index": draw(st.sampled_from([-100, 0])),
    }


@st.composite
def targets(draw, tokens, classes, ignore_index):
    choices = st.one_of(st.integers(0, classes - 1), st.just(ignore_index))
    return torch.tensor(draw(st.lists(choices, min_size=tokens, max_size=tokens)), dtype=torch.int64)


@st.composite
def cross_entropy_calls(draw):
    tokens, classes = draw(st.integers(0, 9)), draw(st.one_of(st.integers(2, 80), st.integers(1000, 1100)))
    options = draw(loss_options())
    weight = draw(st.sampled_from([(classes,), None]))
    target = draw(targets(tokens, classes, options["ignore_index"]))
    return Call(
        [(tokens, classes), None, weight],
        options,
        terms=classes,
        roundings=4,
        fixed={1: target},
        scale=draw(st.sampled_from([1.0, 8.0])),
    )


@st.composite
def fused_calls(draw):
    tokens, hidden, classes = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(2, 80))
    options = draw(loss_options())
    target = draw(targets(tokens, classes, options["ignore_index"]))
    if options["reduction"] == "mean":
        options["num_items"] = draw(st.sampled_from([None, 7]))
    options["accum_dtype"] = draw(st.sampled_from([None, torch.float32]))
    # As little as one row at a time.
    options["workspace_bytes"] = draw(st.sampled_from([None, 1]))
    bias, ce_weight = draw(st.sampled_from([(classes,), None])), draw(st.sampled_from([(classes,), None]))
    return Call(
        [(tokens, hidden), (classes, hidden), None, bias, ce_weight],
        options,
        terms=hidden + classes + tokens,
        # Logits are rounded before they are exponentiated, and each chunk's share of a gradient when it is
        # added to the sum.
        roundings=24,
        fixed={2: target},
    )


OPERATORS = {
    "rms_norm": Operator(LF.rms_norm, rms_norm.rms_norm, norm_calls(), (0, 1), norm_term_sizes),
    "add_rms_norm": Operator(
        LF.add_rms_norm, add_rms_norm.add_rms_norm, add_norm_calls(), (0, 1, 2), norm_term_sizes
    ),
    "layer_norm": Operator(
        LF.layer_norm, layer_norm.layer_norm, layer_norm_calls(), (0, 1, 2), layer_norm_term_sizes
    ),
    "rope": Operator(LF.rope, rope.rope, rope_calls(), (0, 1)),
    "mrope": Operator(LF.mrope, rope.mrope, mrope_calls(), (0, 1)),
    "swiglu": Operator(LF.swiglu, swiglu.swiglu, glu_calls(), (0, 1), glu_term_sizes),
    "geglu": Operator(LF.geglu, geglu.geglu, geglu_calls(), (0, 1), glu_term_sizes),
    "swiglu_packed": Operator(
        LF.swiglu_packed, swiglu.swiglu_packed, packed(glu_calls()), (0,), glu_term_sizes
    ),
    "geglu_packed": Operator(
        LF.geglu_packed, geglu.geglu_packed, packed(geglu_calls()), (0,), glu_term_sizes
    ),
    "cross_entropy": Operator(
        LF.cross_entropy, cross_entropy.cross_entropy, cross_entropy_calls(), (0,), cross_entropy_term_sizes
    ),
    "fused_linear_cross_entropy": Operator(
        LF.fused_linear_cross_entropy,
        fused_linear_cross_entropy.fused_linear_cross_entropy,
        fused_calls(),
        (0, 1, 3),
        fused_term_sizes,
    ),
}
# Class weights divide the loss: they must not be negative.
POSITIVE = {("cross_entropy", 2), ("fused_linear_cross_entropy", 4)}


def arguments_of(name: str, call: Call, dtype: torch.dtype, data: st.DataObject) -> list[Tensor | None]:
    """The arguments on the CPU, each in a memory layout of its own."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def tensor(position: int, shape: tuple[int, ...] | None) -> Tensor | None:
        if position in call.fixed:
            return call.fixed[position]
        if shape is None:
            return None
        x = call.scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        if (name, position) in POSITIVE:
            x = x.abs() + 0.1
        layout = data.draw(st.sampled_from(LAYOUTS), label=f"layout of argument {position}")
        return layout(x.to(dtype))

    return [tensor(i, shape) for i, shape in enumerate(call.shapes)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
def test_operator(name, device, data):
    operator = OPERATORS[name]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    call = data.draw(operator.call)
    arguments = arguments_of(name, call, dtype, data)
    inputs = Inputs(tuple(a if a is None else to_device(a, device) for a in arguments), call.kwargs)

    class Contract(OperatorContract):
        function = staticmethod(operator.function)
        reference = staticmethod(operator.reference)
        differentiable = operator.differentiable

    for i in operator.differentiable:
        if i < len(inputs.args) and inputs.args[i] is not None:
            inputs.args[i].requires_grad_()
    outputs, gradients = Contract.run_with_gradients(inputs)
    expected_outputs, expected_gradients = Contract.expected(inputs, outputs)
    sizes = (None, None)
    if operator.term_sizes is not None:
        exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
        upstream = [g.double().cpu() for g in Contract.upstream(outputs)]
        sizes = operator.term_sizes(exact, call.kwargs, upstream)
    for kind, term_size, results, references in (
        ("output", sizes[0], outputs, expected_outputs),
        ("gradient", sizes[1], gradients, expected_gradients),
    ):
        for i, (result, expected) in enumerate(zip(results, references, strict=True)):
            assert_within(
                result,
                expected,
                dtype=dtype,
                terms=call.terms,
                roundings=call.roundings,
                term_size=term_size,
                name=f"{kind} {i}",
            )


def to_device(x: Tensor, device: str) -> Tensor:
    """`x.to(device)` with the memory layout of x."""
    if device == "cpu":
        return x
    size = (
        1 + sum(stride * (n - 1) for stride, n in zip(x.stride(), x.shape, strict=True)) if x.numel() else 0
    )
    storage = torch.as_strided(x, (size,), (1,), x.storage_offset()).to(device)
    # The same distance from an aligned address.
    buffer = torch.empty(x.storage_offset() + size, dtype=x.dtype, device=device)
    buffer[x.storage_offset() :] = storage
    return torch.as_strided(buffer, x.shape, x.stride(), x.storage_offset())
