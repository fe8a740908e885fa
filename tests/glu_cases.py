"""Inputs and bad calls of the gated linear units, by layout: two tensors, or the halves of one buffer."""

import functools

import torch

from tests.contract import BadCall, Case, Inputs


def random(shape, device, dtype, count):
    return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))


def pair(*shape, **options):
    return lambda device, dtype: Inputs(random(shape, device, dtype, 2), options)


def halves_of_one_buffer(device, dtype, **options):
    return Inputs(torch.randn(3, 4, 48, device=device, dtype=dtype).chunk(2, dim=-1), options)


def shifted(columns, shift, device, dtype, **options):
    """Rows that start `shift` elements behind a multiple of 16 bytes: narrower accesses fit, or none."""
    stride = 128
    tensors = random((6, stride), device, dtype, 2)
    return Inputs(tuple(t[:, shift : shift + columns] for t in tensors), options)


def transposed(device, dtype, **options):
    return Inputs(tuple(torch.randn(8, 6, device=device, dtype=dtype).t() for _ in range(2)), options)


def pair_cases(**options):
    """`options` go to the operator. The first two cases do for a second activation over the same layouts."""

    def of(make, *args):
        return functools.partial(make, *args, **options)

    return [
        Case("contiguous", pair(3, 5, 64, **options)),
        Case("odd width", pair(4, 37, **options)),
        Case("one element", pair(1, **options), small=False),
        Case("no rows", pair(0, 16, **options)),
        Case("no columns", pair(3, 0, **options), small=False),
        Case("halves of one buffer", of(halves_of_one_buffer)),
        Case("rows at odd elements", of(shifted, 64, 1), small=False),
        Case("rows at every second element", of(shifted, 34, 2), small=False),
        Case("rows at every fourth element", of(shifted, 36, 4), small=False),
        Case("transposed", of(transposed)),
        Case("many rows", pair(129, 1000, **options), small=False),
    ]


def packed(*shape, **options):
    return lambda device, dtype: Inputs(random(shape, device, dtype, 1), options)


def packed_rows_of_a_wider_buffer(device, dtype, **options):
    return Inputs((torch.randn(5, 80, device=device, dtype=dtype)[:, 3:67],), options)


def packed_transposed(device, dtype, **options):
    return Inputs((torch.randn(8, 6, device=device, dtype=dtype).t(),), options)


def packed_cases(**options):
    """As `pair_cases`."""
    return [
        Case("contiguous", packed(3, 5, 64, **options)),
        Case("halves of odd width", packed(7, 2 * 37, **options)),
        Case("halves of width 2 mod 4", packed(6, 2 * 34, **options), small=False),
        Case("halves of width 4 mod 8", packed(6, 2 * 36, **options), small=False),
        Case("one row", packed(2 * 24, **options)),
        Case("one element", packed(2, **options), small=False),
        Case("no rows", packed(0, 16, **options)),
        Case("no columns", packed(3, 0, **options), small=False),
        Case("rows of a wider buffer", lambda d, t: packed_rows_of_a_wider_buffer(d, t, **options)),
        Case("transposed", lambda d, t: packed_transposed(d, t, **options), small=False),
        Case("narrow rows", packed(1025, 2 * 24, **options), small=False),
        Case("many rows", packed(129, 2 * 1000, **options), small=False),
    ]


def pair_bad_calls(op):
    return [
        BadCall(
            "shape",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(2, 3, device=d))),
            ValueError,
            rf"liger::{op}: up must have shape \[2, 4\] \(shape of gate\), got \[2, 3\]",
        ),
        BadCall(
            "dtype",
            lambda d: Inputs((torch.ones(4, device=d), torch.ones(4, device=d).double())),
            TypeError,
            rf"liger::{op}: up must have dtype float32 \(dtype of gate\), got float64",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).long(),) * 2),
            TypeError,
            rf"liger::{op}: gate must be float64, float32, bfloat16 or float16, got int64",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),) * 2),
            ValueError,
            rf"liger::{op}: gate must have at least 1 dimension, got shape \[\]",
        ),
    ]


def packed_bad_calls(op):
    return [
        BadCall(
            "odd",
            lambda d: Inputs((torch.ones(2, 5, device=d),)),
            ValueError,
            rf"liger::{op}: gate_up must have an even last dimension \(gate, then up\), got shape \[2, 5\]",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).long(),)),
            TypeError,
            rf"liger::{op}: gate_up must be float64, float32, bfloat16 or float16, got int64",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d),)),
            ValueError,
            rf"liger::{op}: gate_up must have at least 1 dimension, got shape \[\]",
        ),
    ]


def large_pair(**options):
    """More than 2**31 elements in each tensor."""
    args = random((2**17 + 3, 2**14), "cuda", torch.bfloat16, 2)
    small = tuple(a[-3:].clone().requires_grad_() for a in args)
    return Inputs(tuple(a.requires_grad_() for a in args), options), Inputs(small, options), lambda t: t[-3:]


def large_packed(**options):
    """More than 2**31 elements, and halves that start at odd elements."""
    (gate_up,) = random((2**17 + 3, 2**14 + 2), "cuda", torch.bfloat16, 1)
    small = gate_up[-3:].clone().requires_grad_()
    return Inputs((gate_up.requires_grad_(),), options), Inputs((small,), options), lambda t: t[-3:]
