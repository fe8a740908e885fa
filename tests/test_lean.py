"""Lean activations in layers of one's own, made of the modules of ``liger_ops.nn``."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.allocations import Allocations
from liger_ops.nn import (
    LigerBlockSparseTop2MLP,
    LigerExperts,
    LigerFusedAddRMSNorm,
    LigerGEGLUMLP,
    LigerLayerNorm,
    LigerPhi3SwiGLUMLP,
    LigerRMSNorm,
    LigerSwiGLUMLP,
    lean_activations,
    lean_contexts,
)

TOKENS, HIDDEN, INTERMEDIATE = 6, 16, 40
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    hidden_act="silu",
    num_local_experts=3,
    num_experts_per_tok=2,
)


class Layer(nn.Module):
    """A product between norms, and an MLP after an addition and norm in one."""

    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp
        self.projection = nn.Linear(HIDDEN, HIDDEN)
        self.add_norm = LigerFusedAddRMSNorm(HIDDEN)

    def forward(self, x):
        y, total = self.add_norm(self.projection(self.norm(x)), x)
        return total + self.mlp(y)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, CONFIG.num_local_experts)
        self.experts = LigerExperts(CONFIG)

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, index = self.router(rows).softmax(-1).topk(2)
        return self.experts(rows, index, weights).view_as(x)


MLPS = {
    "swiglu": (lambda: LigerSwiGLUMLP(CONFIG), INTERMEDIATE),
    "packed": (lambda: LigerPhi3SwiGLUMLP(CONFIG), INTERMEDIATE),
    "expert": (lambda: LigerBlockSparseTop2MLP(CONFIG), INTERMEDIATE),
    "geglu": (
        lambda: LigerGEGLUMLP(SimpleNamespace(**vars(CONFIG) | {"hidden_act": "gelu_pytorch_tanh"})),
        INTERMEDIATE,
    ),
    "experts": (Routed, 2 * (HIDDEN + INTERMEDIATE)),
}


def run(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with Allocations(layer) as allocations:
        out = layer(x * 1)
    kept = allocations.kept_bytes()
    out.square().sum().backward()
    return kept, [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", [LigerRMSNorm, LigerLayerNorm])
@pytest.mark.parametrize("mlp", MLPS)
def test_same_bits_from_less_memory(mlp, norm, dtype, device):
    build, numbers = MLPS[mlp]
    layer = Layer(norm(HIDDEN), build()).to(device, dtype)
    x = torch.randn(2, TOKENS // 2, HIDDEN, device=device, dtype=dtype)
    kept, expected = run(layer, x)
    undo = lean_activations(layer)
    less, actual = run(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    # Both norms' results, and the MLP's in between.
    assert kept - less == (2 * HIDDEN + numbers) * TOKENS * dtype.itemsize
    assert run(copy.deepcopy(layer), x)[0] == less
    undo()
    assert run(layer, x)[0] == kept


def test_norm_of_a_norm(device):
    """A recipe whose argument has one itself: neither of them is kept."""
    layer = nn.Sequential(LigerRMSNorm(HIDDEN), LigerLayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    kept, expected = run(layer, x)
    lean_activations(layer)
    less, actual = run(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert kept - less == 2 * HIDDEN * TOKENS * 4


def test_where_a_gradient_stops_nothing_is_computed_again(device):
    """Inputs without a gradient are not kept for an operator: keeping its result is less."""
    layer = Layer(LigerRMSNorm(HIDDEN), LigerSwiGLUMLP(CONFIG)).to(device)
    for module in (layer.norm, layer.mlp.gate_proj, layer.mlp.up_proj, layer.add_norm, layer.projection):
        module.requires_grad_(False)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    kept = []
    for _ in range(2):
        with Allocations(layer) as allocations:
            out = layer(x)
        kept.append(allocations.kept_bytes())
        out.sum().backward()
        lean_activations(layer)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "packed"])
def test_compiled(mlp, device):
    """Hooks are no obstacle to a full graph, and do nothing there; a checkpoint's contexts do it."""
    from functorch.compile import min_cut_rematerialization_partition, nop
    from torch._dynamo.backends.common import aot_autograd

    saved = []

    def partition(*args, **kwargs):
        forward, backward = min_cut_rematerialization_partition(*args, **kwargs)
        given = {node.name for node in forward.graph.nodes if node.op == "placeholder"}
        (output,) = (node for node in forward.graph.nodes if node.op == "output")
        values = {node.name: node.meta["val"] for node in output.args[0][1:] if node.name not in given}
        saved.append(sum(v.numel() * v.element_size() for v in values.values()))
        return forward, backward

    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=partition)
    build, numbers = MLPS[mlp]
    layer = Layer(LigerRMSNorm(HIDDEN), build()).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])

    def checkpointed(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=lean_contexts)

    lean_activations(layer)
    for function in (layer, checkpointed):
        torch.compiler.reset()
        out = torch.compile(function, fullgraph=True, backend=backend)(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert saved[0] - saved[1] >= (HIDDEN + numbers) * TOKENS * 4
