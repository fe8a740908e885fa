"""Operators on DTensors: results and gradients of the plain tensors, without communication on the way."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import liger_ops.functional as LF

B, S, H, WIDE, V = 4, 6, 8, 10, 20
R = Replicate()


def randn(*sizes):
    return torch.randn(*sizes)


def angles(*sizes):
    return torch.rand(*sizes)


def tokens():
    return torch.randint(V, (B * S,))


# The function, its arguments, and placements for which no argument has to move.
CASES = {
    "rms_norm": (
        lambda x, w: LF.rms_norm(x, w, 1e-5),
        lambda: (randn(B, S, H), randn(H)),
        [(Shard(0), R), (Shard(1), R), (R, R)],
    ),
    "rms_norm_without_weight": (lambda x: LF.rms_norm(x), lambda: (randn(B, S, H),), [(Shard(1),)]),
    "add_rms_norm": (
        LF.add_rms_norm,
        lambda: (randn(B, S, H), randn(B, S, H), randn(H)),
        [(Shard(0), Shard(0), R), (Shard(1), Shard(1), R)],
    ),
    "layer_norm": (
        LF.layer_norm,
        lambda: (randn(B, S, H), randn(H), randn(H)),
        [(Shard(0), R, R), (Shard(1), R, R)],
    ),
    "layer_norm_bias_alone": (
        lambda x, b: LF.layer_norm(x, None, b),
        lambda: (randn(B, S, H), randn(H)),
        [(Shard(1), R)],
    ),
    "layer_norm_weight_alone": (
        lambda x, w: LF.layer_norm(x, w),
        lambda: (randn(B, S, H), randn(H)),
        [(Shard(1), R)],
    ),
    "swiglu": (
        LF.swiglu,
        lambda: (randn(B, S, WIDE), randn(B, S, WIDE)),
        [(Shard(d), Shard(d)) for d in range(3)],
    ),
    "geglu": (
        lambda gate, up: LF.geglu(gate, up, "none"),
        lambda: (randn(B, S, WIDE), randn(B, S, WIDE)),
        [(Shard(d), Shard(d)) for d in range(3)],
    ),
    "swiglu_packed": (LF.swiglu_packed, lambda: (randn(B, S, 2 * WIDE),), [(Shard(0),), (Shard(1),)]),
    "geglu_packed": (LF.geglu_packed, lambda: (randn(B, S, 2 * WIDE),), [(Shard(0),), (Shard(1),)]),
    "rope": (
        LF.rope,
        lambda: (randn(B, 8, S, H), randn(B, 4, S, H), angles(1, S, H), angles(1, S, H)),
        [(Shard(0), Shard(0), R, R), (Shard(1), Shard(1), R, R), (Shard(2), Shard(2), Shard(1), Shard(1))],
    ),
    "rope_of_each_sample": (
        LF.rope,
        lambda: (randn(B, 8, S, H), randn(B, 4, S, H), angles(B, S, H), angles(B, S, H)),
        [(Shard(0),) * 4, (Shard(1), Shard(1), R, R), (Shard(2), Shard(2), Shard(1), Shard(1))],
    ),
    "rope_of_images": (
        LF.rope,
        lambda: (randn(B, 8, S, H), randn(B, 4, S, H), angles(S, H), angles(S, H)),
        [(Shard(0), Shard(0), R, R), (Shard(2), Shard(2), Shard(0), Shard(0))],
    ),
    "mrope": (
        lambda q, k, cos, sin: LF.mrope(q, k, cos, sin, [1, 1, 2]),
        lambda: (randn(B, 8, S, H), randn(B, 4, S, H), angles(3, B, S, H), angles(3, B, S, H)),
        [
            (Shard(0), Shard(0), Shard(1), Shard(1)),
            (Shard(1), Shard(1), R, R),
            (Shard(2), Shard(2), Shard(2), Shard(2)),
        ],
    ),
    "cross_entropy": (
        lambda x, t: LF.cross_entropy(x, t, reduction="sum"),
        lambda: (randn(B * S, V), tokens()),
        [(Shard(0), Shard(0))],
    ),
    "cross_entropy_none": (
        lambda x, t, w: LF.cross_entropy(
            x, t, w, reduction="none", label_smoothing=0.1, use_token_scaling=True
        ),
        lambda: (randn(B * S, V), tokens(), torch.rand(V)),
        [(Shard(0), Shard(0), R)],
    ),
    "fused_linear_cross_entropy": (
        lambda x, w, t, b: LF.fused_linear_cross_entropy(x, w, t, b, num_items=7),
        lambda: (randn(B * S, H), randn(V, H), tokens(), randn(V)),
        [(Shard(0), R, Shard(0), R)],
    ),
    "fused_linear_cross_entropy_none": (
        lambda x, w, t: LF.fused_linear_cross_entropy(x, w, t, reduction="none"),
        lambda: (randn(B * S, H), randn(V, H), tokens()),
        [(Shard(0), R, Shard(0))],
    ),
}
# Placements that have to be changed first: the result is right all the same.
MOVED = {
    "rms_norm": [(Shard(2), R), (Shard(0), Shard(0)), (Partial(), R)],
    "add_rms_norm": [(Shard(0), Shard(1), R), (Shard(0), Partial(), R)],
    "swiglu": [(Shard(0), Shard(2)), (R, Shard(1))],
    "swiglu_packed": [(Shard(2),)],
    "rope": [(Shard(3), Shard(3), R, R), (Shard(1), R, R, R)],
    "fused_linear_cross_entropy": [(Shard(1), R, R, R)],
}
MEANS = {
    "mean": (LF.cross_entropy, lambda: (randn(B * S, V), tokens()), (Shard(0), Shard(0))),
    "linear_mean": (
        LF.fused_linear_cross_entropy,
        lambda: (randn(B * S, H), randn(V, H), tokens()),
        (Shard(0), R, Shard(0)),
    ),
    "accuracy": (
        lambda x, t: LF.cross_entropy(x, t, reduction="sum", return_token_accuracy=True).token_accuracy,
        lambda: (randn(B * S, V), tokens()),
        (Shard(0), Shard(0)),
    ),
}


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def differentiable(name, arguments):
    """Angles and targets and class weights get no gradient."""
    fixed = {"rope": 2, "mrope": 2, "cross_entropy": 1}
    first = next((n for prefix, n in fixed.items() if name.startswith(prefix)), len(arguments))
    return [i for i, t in enumerate(arguments) if i < first and t.is_floating_point()]


def compare(name, function, plain, placements, mesh, moves=0, frozen=()):
    wanted = [i for i in differentiable(name, plain) if i not in frozen]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(plain)]
    expected = as_tuple(function(*leaves))
    upstream = [torch.rand_like(t) for t in expected]
    torch.autograd.backward(expected, upstream)

    sharded = [
        distribute_tensor(t, mesh, [p] if not isinstance(p, tuple) else list(p))
        if not isinstance(p, Partial)
        else DTensor.from_local(t / mesh.size(), mesh, [p])
        for t, p in zip(plain, placements, strict=True)
    ]
    sharded = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(sharded)]
    with CommDebugMode() as traffic:
        actual = as_tuple(function(*sharded))
    assert moves is None or not traffic.get_total_counts(), (placements, traffic.get_comm_counts())
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), e.detach(), rtol=1e-5, atol=1e-5)
    with CommDebugMode() as traffic:
        gradients = [
            distribute_tensor(g, mesh, [R if isinstance(p, Partial) else p for p in a.placements])
            for g, a in zip(upstream, actual, strict=True)
        ]
        torch.autograd.backward(actual, gradients)
    for i in wanted:
        gradient = sharded[i].grad
        assert gradient.shape == plain[i].shape
        torch.testing.assert_close(gradient.full_tensor(), leaves[i].grad, rtol=1e-5, atol=1e-5)


def operator(name):
    mesh = init_device_mesh("cpu", (2,))
    function, arguments, natural = CASES[name]
    plain = arguments()
    for placements in natural:
        compare(name, function, plain, placements, mesh)
        # The same placements with other arguments frozen: nothing may be remembered from before.
        for frozen in differentiable(name, plain):
            if len(differentiable(name, plain)) > 1:
                compare(name, function, plain, placements, mesh, frozen=(frozen,))
    for placements in MOVED.get(name, ()):
        compare(name, function, plain, placements, mesh, moves=None)


@pytest.mark.parametrize("name", CASES)
def test_operator(name, workers):
    workers(operator, name)


def means():
    """Divided by a number that no shard knows: tokens are gathered first."""
    mesh = init_device_mesh("cpu", (2,))
    for name, (function, arguments, placements) in MEANS.items():
        plain = arguments()
        expected = function(*plain)
        sharded = [distribute_tensor(t, mesh, [p]) for t, p in zip(plain, placements, strict=True)]
        torch.testing.assert_close(function(*sharded).full_tensor(), expected, msg=name)


def test_means(workers):
    workers(means)


def half():
    mesh = init_device_mesh("cpu", (2,))
    plain = [randn(B * S, H).half(), randn(V, H).half(), tokens()]
    function = lambda x, w, t: LF.fused_linear_cross_entropy(x, w, t, num_items=9)  # noqa: E731
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in plain]
    function(*leaves).backward()
    placements = (Shard(0), R, Shard(0))
    sharded = [distribute_tensor(t, mesh, [p]) for t, p in zip(plain, placements, strict=True)]
    sharded = [t.requires_grad_(t.is_floating_point()) for t in sharded]
    function(*sharded).backward()
    for leaf, t in zip(leaves[:2], sharded, strict=False):
        torch.testing.assert_close(t.grad.full_tensor(), leaf.grad)


def test_half(workers):
    workers(half)


def uneven():
    """Five rows over two processes."""
    mesh = init_device_mesh("cpu", (2,))
    plain = [randn(5, H), randn(H)]
    compare("rms_norm", lambda x, w: LF.rms_norm(x, w), plain, (Shard(0), R), mesh)
    plain = [randn(5, H), randn(V, H), torch.randint(V, (5,))]
    function = lambda x, w, t: LF.fused_linear_cross_entropy(x, w, t, reduction="sum")  # noqa: E731
    compare("", function, plain, (Shard(0), R, Shard(0)), mesh)


def test_uneven_shards(workers):
    workers(uneven)


def two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plain = [randn(B, S, H), randn(H)]
    for x in itertools.product((Shard(0), Shard(1), R), repeat=2):
        compare("rms_norm", lambda x, w: LF.rms_norm(x, w), plain, (x, (R, R)), mesh)
    plain = [randn(B, S, WIDE), randn(B, S, WIDE)]
    compare("swiglu", LF.swiglu, plain, ((Shard(0), Shard(2)),) * 2, mesh)


def test_two_dimensions(four_workers):
    four_workers(two_dimensions)


def errors():
    mesh = init_device_mesh("cpu", (2,))
    logits = distribute_tensor(randn(B * S, V), mesh, [Shard(1)])
    target = distribute_tensor(tokens(), mesh, [R])
    with pytest.raises(
        RuntimeError, match="liger::cross_entropy: logits has its classes in shards.*parallel"
    ):
        LF.cross_entropy(logits.requires_grad_(), target)
    hidden = distribute_tensor(randn(B * S, H), mesh, [R])
    weight = distribute_tensor(randn(V, H), mesh, [Shard(0)])
    match = "liger::fused_linear_cross_entropy: weight has its classes in shards.*vocab_parallel_fused"
    with pytest.raises(RuntimeError, match=match):
        LF.fused_linear_cross_entropy(hidden, weight, target)
    # A plain tensor beside a DTensor: nobody can know how it is spread.
    with pytest.raises(RuntimeError, match="liger.rms_norm.default.*mixed torch.Tensor and DTensor"):
        LF.rms_norm(randn(B, S, H), distribute_tensor(randn(H), mesh, [R]))
    assert dist.get_world_size() == 2


def test_errors(workers):
    workers(errors)


def test_every_operator_has_a_rule():
    import liger_ops
    from liger_ops.distributed import sharding

    assert sorted(sharding.RULES) == liger_ops.operators()


@pytest.mark.parametrize("first", ["liger_ops", "torch.distributed.tensor"])
def test_registered_in_any_order(first):
    """And torch.distributed.tensor is not imported on our account."""
    second = {"liger_ops": "torch.distributed.tensor", "torch.distributed.tensor": "liger_ops"}[first]
    script = f"""
import sys, {first}
assert "{first}" != "liger_ops" or "torch.distributed.tensor" not in sys.modules
import {second}
from torch.distributed.tensor import DTensor
import torch
registered = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
assert all(getattr(torch.ops.liger, name).default in registered for name in liger_ops.operators())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
