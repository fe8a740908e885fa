"""How each operator runs on DTensors: which placements of arguments give which placements of results.

Tokens (batch and sequence) may be sharded everywhere, heads in the rotary embedding, any dimension in the
gated units. What is summed over tokens (the weights' gradients, summed losses) comes out as partial sums.
Other placements are redistributed to the nearest of these, as PyTorch's own operators do. Only logits are
never gathered behind the caller's back: classes in shards are an error that names the operator for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# Placements of the results in order, and of the arguments that are not replicated, by name.
Strategy = tuple[list[Placement], dict[str, Placement]]


def _register(name: str, rule: Callable[[SimpleNamespace], Iterator[Strategy]]) -> None:
    overload = getattr(torch.ops.liger, name).default
    parameters = overload._schema.arguments
    results = len(overload._schema.returns)

    def strategies(*args: Any, **kwargs: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        # Trailing arguments that have their default value may be left out.
        values = {p.name: p.default_value if p.has_default_value() else None for p in parameters}
        values |= dict(zip(values, args, strict=False)) | kwargs
        tensors = [p.name for p in parameters if hasattr(values[p.name], "placements")]

        def inputs(sharded: dict[str, Placement]) -> list[Placement | None]:
            return [sharded.get(p.name, Replicate()) if p.name in tensors else None for p in parameters]

        found = [([Replicate()] * results, inputs({}))]
        return found + [(out, inputs(of)) for out, of in rule(SimpleNamespace(**values))]

    register_sharding(overload)(strategies)
    # What the sharding was found for is remembered by the arguments from this one on, beside all DTensors.
    # By default that leaves out which optional tensors are there and which gradients are wanted, on which the
    # results' shapes depend.
    optional = [p.name for p in parameters if not isinstance(p.type, torch.TensorType)]
    first = [p.name for p in parameters].index(optional[0]) if optional else len(parameters)
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload].static_argnum = first


def _wanted(*gradients: tuple[bool, Placement]) -> list[Placement]:
    """Placements of gradients; the empty tensor in place of one that is not wanted is the same everywhere."""
    return [placement if wanted else Replicate() for wanted, placement in gradients]


def _rows(tensor: Any) -> range:
    return range(len(tensor.shape) - 1)


def _rms_norm(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.x):
        yield [Shard(d), Shard(d)], dict(x=Shard(d))


def _rms_norm_backward(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.x):
        out = _wanted((a.need_dx, Shard(d)), (a.need_dweight, Partial()))
        yield out, dict(dy=Shard(d), x=Shard(d), rstd=Shard(d))


def _add_rms_norm(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.x):
        yield [Shard(d)] * 3, dict(x=Shard(d), residual=Shard(d))


def _add_rms_norm_backward(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.sum):
        out = _wanted((a.need_dx, Shard(d)), (a.need_dweight, Partial()))
        yield out, dict(dy=Shard(d), dsum=Shard(d), sum=Shard(d), rstd=Shard(d))


def _layer_norm(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.x):
        yield [Shard(d)] * 3, dict(x=Shard(d))


def _layer_norm_backward(a: SimpleNamespace) -> Iterator[Strategy]:
    for d in _rows(a.x):
        out = _wanted((a.need_dx, Shard(d)), (a.need_dweight, Partial()), (a.need_dbias, Partial()))
        yield out, dict(dy=Shard(d), x=Shard(d), mean=Shard(d), rstd=Shard(d))


def _rotated(q: str, k: str) -> Callable[[SimpleNamespace], Iterator[Strategy]]:
    def rule(a: SimpleNamespace) -> Iterator[Strategy]:
        # [(3,) (1 or batch,) positions, columns]
        planes = hasattr(a, "mrope_section")
        has_batch = len(a.cos.shape) == 3 + planes
        angles: dict[int, Placement] = {1: Replicate(), 2: Shard(len(a.cos.shape) - 2)}
        angles[0] = Shard(int(planes)) if has_batch and a.cos.shape[planes] != 1 else Replicate()
        for d, placement in angles.items():
            yield [Shard(d), Shard(d)], {q: Shard(d), k: Shard(d), "cos": placement, "sin": placement}

    return rule


def _elementwise(*names: str, results: int = 1) -> Callable[[SimpleNamespace], Iterator[Strategy]]:
    def rule(a: SimpleNamespace) -> Iterator[Strategy]:
        for d in range(len(getattr(a, names[0]).shape)):
            yield [Shard(d)] * results, {name: Shard(d) for name in names}

    return rule


def _packed(*names: str, results: int = 1) -> Callable[[SimpleNamespace], Iterator[Strategy]]:
    def rule(a: SimpleNamespace) -> Iterator[Strategy]:
        for d in _rows(a.gate_up):
            yield [Shard(d)] * results, {name: Shard(d) for name in names}

    return rule


def _refuse_class_shards(op: str, name: str, spec: Any, dim: int, instead: str) -> None:
    if spec is not None and any(placement.is_shard(dim) for placement in spec.placements):
        raise ValueError(
            f"liger::{op}: {name} has its classes in shards ({spec.placements}). Pass the local shards to "
            f"liger_ops.distributed.{instead}, which exchanges two numbers a token, or redistribute {name} "
            "first to have them gathered"
        )


def _per_row(a: SimpleNamespace) -> bool | None:
    """Whether losses come per row; None where their reduction is no sum over shards."""
    if a.reduction == "none":
        return True
    divided = a.reduction == "mean" and getattr(a, "num_items", None) is None
    return None if divided or a.return_token_accuracy else False


def _loss_results(a: SimpleNamespace, per_row: bool) -> list[Placement]:
    loss = Shard(0) if per_row else Partial()
    accuracy = Shard(0) if a.return_token_accuracy else Replicate()
    predicted = Shard(0) if a.return_predicted_tokens else Replicate()
    return [loss, loss, Shard(0), accuracy, predicted]


def _cross_entropy(a: SimpleNamespace) -> Iterator[Strategy]:
    _refuse_class_shards("cross_entropy", "logits", a.logits, 1, "vocab_parallel_cross_entropy")
    per_row = _per_row(a)
    if per_row is not None:
        yield _loss_results(a, per_row), dict(logits=Shard(0), target=Shard(0))


def _cross_entropy_forward(a: SimpleNamespace) -> Iterator[Strategy]:
    for results, arguments in _cross_entropy(a):
        yield [*results, Shard(0), Replicate(), *_wanted((a.need_dlogits, Shard(0)))], arguments


def _cross_entropy_backward(a: SimpleNamespace) -> Iterator[Strategy]:
    rows = {name: Shard(0) for name in ("logits", "target", "lse", "lse_low")}
    yield [Shard(0)], rows | ({"dloss": Shard(0)} if a.reduction == "none" else {})


def _fused_linear(op: str, forward: bool) -> Callable[[SimpleNamespace], Iterator[Strategy]]:
    def rule(a: SimpleNamespace) -> Iterator[Strategy]:
        _refuse_class_shards(op, "weight", a.weight, 0, "vocab_parallel_fused_linear_cross_entropy")
        per_row = _per_row(a)
        if per_row is None:
            return
        out = _loss_results(a, per_row)
        if forward:
            dtype = a.compute_dtype or a.input.tensor_meta.dtype
            # In float16 the gradients carry powers of two that depend on a shard's number of tokens.
            if dtype == torch.float16 and (a.need_dweight or a.need_dbias):
                return
            out += _wanted((a.need_dinput, Shard(0)), (a.need_dweight, Partial()), (a.need_dbias, Partial()))
            out.append(Replicate())
        yield out, dict(input=Shard(0), target=Shard(0))

    return rule


def _fused_linear_backward(a: SimpleNamespace) -> Iterator[Strategy]:
    out = _wanted((a.need_dinput, Shard(0)), (a.need_dweight, Partial()), (a.need_dbias, Partial()))
    yield out, dict(dloss=Shard(0), input=Shard(0), target=Shard(0))


def _scaled(results: int) -> Callable[[SimpleNamespace], Iterator[Strategy]]:
    def rule(a: SimpleNamespace) -> Iterator[Strategy]:
        for placement in (*map(Shard, range(len(a.grad.shape))), Partial()):
            yield [placement] * results, dict(grad=placement)

    return rule


RULES: dict[str, Callable[[SimpleNamespace], Iterator[Strategy]]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "add_rms_norm": _add_rms_norm,
    "add_rms_norm_backward": _add_rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "rope": _rotated("q", "k"),
    "rope_backward": _rotated("dq", "dk"),
    "mrope": _rotated("q", "k"),
    "mrope_backward": _rotated("dq", "dk"),
    "swiglu": _elementwise("gate", "up"),
    "swiglu_backward": _elementwise("dout", "gate", "up", results=2),
    "swiglu_backward_": _elementwise("dout", "gate", "up", results=0),
    "geglu": _elementwise("gate", "up"),
    "geglu_backward": _elementwise("dout", "gate", "up", results=2),
    "geglu_backward_": _elementwise("dout", "gate", "up", results=0),
    "swiglu_packed": _packed("gate_up"),
    "swiglu_packed_backward": _packed("dout", "gate_up"),
    "swiglu_packed_backward_": _packed("dout", "gate_up", results=0),
    "geglu_packed": _packed("gate_up"),
    "geglu_packed_backward": _packed("dout", "gate_up"),
    "geglu_packed_backward_": _packed("dout", "gate_up", results=0),
    "cross_entropy": _cross_entropy,
    "cross_entropy_forward": _cross_entropy_forward,
    "cross_entropy_backward": _cross_entropy_backward,
    "cross_entropy_scale": _scaled(1),
    "cross_entropy_scale_": _scaled(0),
    "fused_linear_cross_entropy": _fused_linear("fused_linear_cross_entropy", forward=False),
    "fused_linear_cross_entropy_forward": _fused_linear("fused_linear_cross_entropy", forward=True),
    "fused_linear_cross_entropy_backward": _fused_linear_backward,
}


def register() -> None:
    """Tells DTensor how every operator may be sharded."""
    for name, rule in RULES.items():
        _register(name, rule)
