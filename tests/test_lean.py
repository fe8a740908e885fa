"""Lean activations in layers of one's own, made of the modules of ``liger_ops.nn``."""

import copy
import threading
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


def gradients(layer, x):
    return torch.autograd.grad(layer(x * 1).square().sum(), [x, *layer.parameters()])


def equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class Written(nn.Module):
    """Writes to the result of its norm after a product has saved it."""

    def __init__(self):
        super().__init__()
        self.norm, self.projection = LigerRMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        y = self.norm(x)
        out = self.projection(y)
        with torch.no_grad():
            y.mul_(2)
        return out


def test_result_written_to_after_it_was_saved(device):
    """It is not dropped, so that autograd says what is wrong, as it does without."""
    layer = Written().to(device)
    lean_activations(layer)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(layer, x)


@pytest.mark.parametrize("write", [False, True])
def test_result_written_to_when_nobody_looks(write, device):
    """After the layer only the shape is left of it, and what backward computes is what the product took."""
    layer = nn.Sequential(LigerRMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    expected = gradients(layer, x)
    lean_activations(layer)
    results = []
    layer[0].register_forward_hook(lambda module, args, y: results.append(y.detach()))
    out = layer(x * 1)
    if write:
        results[0].zero_()
    assert equal(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]), expected)


def test_what_is_computed_again_is_nobody_elses_memory(device):
    layer = nn.Sequential(LigerRMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)).to(device)
    lean_activations(layer)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    expected = gradients(layer, x)
    results = []
    layer[0].register_forward_hook(lambda module, args, y: results.append(y))
    out = layer(x * 1)
    first, second = out.grad_fn._saved_mat1, out.grad_fn._saved_mat1
    assert torch.equal(first, results[0])
    assert len({tensor.data_ptr() for tensor in (first, second, results[0])}) == 3
    with torch.no_grad():
        first.zero_()
    assert equal(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]), expected)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Elementwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.norm, self.function = LigerRMSNorm(HIDDEN), function

    def forward(self, x):
        return self.function(self.norm(x))


USERS = {
    "function": Square.apply,
    "function of a copy": lambda y: Square.apply(y.view(-1).double()),
    "product": lambda y: y * y.tanh(),
    "batched product": lambda y: y[None] @ y[None].mT,
    "product with a vector": lambda y: y @ y[0],
    "attention": lambda y: nn.functional.scaled_dot_product_attention(*3 * (y.view(1, 1, TOKENS, HIDDEN),)),
    "convolution": lambda y: nn.functional.conv1d(
        y[None], torch.ones(1, TOKENS, 3, device=y.device, requires_grad=True)
    ),
    "checkpoint": lambda y: checkpoint(torch.tanh, y, use_reentrant=False),
    "reentrant checkpoint": lambda y: checkpoint(torch.tanh, y, use_reentrant=True),
}


@pytest.mark.parametrize("user", USERS)
def test_who_saves_a_result(user, device):
    layer = Elementwise(USERS[user]).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    kept, expected = run(layer, x)
    lean_activations(layer)
    less, actual = run(layer, x)
    assert equal(actual, expected)
    # This checkpoint keeps its input beside the graph.
    assert kept - less == (0 if user == "checkpoint" else HIDDEN * TOKENS * (8 if "copy" in user else 4))


def test_who_is_not_known_keeps_it(device):
    layer = Elementwise(torch.sin).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    kept, expected = run(layer, x)
    lean_activations(layer)
    less, actual = run(layer, x)
    assert equal(actual, expected)
    assert kept == less


def test_only_the_lean_layer(device):
    """What other layers have made before is theirs, also where it is part of the graph."""
    plain, lean = (Layer(LigerRMSNorm(HIDDEN), LigerSwiGLUMLP(CONFIG)).to(device) for _ in range(2))
    both = nn.Sequential(plain, lean)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    kept, expected = run(both, x)
    undo = lean_activations(lean)
    less, actual = run(both, x)
    assert equal(actual, expected)
    assert kept - less == (2 * HIDDEN + INTERMEDIATE) * TOKENS * 4
    lean_activations(both)
    undo()
    least, actual = run(both, x)
    assert equal(actual, expected)
    assert kept - least == 2 * (kept - less)
    # Lean layers in a lean layer.
    lean_activations(lean)
    lean_activations(plain)
    assert run(both, x)[0] == least


def test_backward_of_a_part_after_that_of_the_rest(device):
    """A product whose backward comes after that of the norm, without retain_graph."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = LigerRMSNorm(HIDDEN)
            self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            y = self.norm(x)
            return self.first(y), self.second(y)

    layer = Two().to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    results = []
    for _ in range(2):
        layer.zero_grad()
        first, second = layer(x)
        first.square().sum().backward()
        results.append(torch.autograd.grad(second.square().sum(), [layer.second.weight]))
        results[-1] += tuple(p.grad for p in (layer.norm.weight, layer.first.weight))
        lean_activations(layer)
    assert equal(*results)


def test_compiled_autograd(device):
    """It asks for all that was saved before its graph begins."""
    layer = Layer(LigerLayerNorm(HIDDEN), LigerSwiGLUMLP(CONFIG)).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    expected = gradients(layer, x)
    lean_activations(layer)
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        layer(x * 1).square().sum().backward()
    for gradient, wanted in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_threads(device):
    layer = Layer(LigerRMSNorm(HIDDEN), LigerSwiGLUMLP(CONFIG)).to(device)
    inputs = [torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True) for _ in range(4)]
    expected = [gradients(layer, x) for x in inputs]
    lean_activations(layer)
    results = {}

    def work(i):
        results[i] = [gradients(layer, inputs[i]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(inputs)
    assert all(equal(actual, expected[i]) for i, all_of in results.items() for actual in all_of)


@pytest.mark.gpu
def test_streams():
    """Each product's backward runs on the stream of its forward, and asks there for the norm's result."""

    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = LigerRMSNorm(1024)
            self.products = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(3))
            self.streams = [torch.cuda.Stream() for _ in self.products]

        def forward(self, x):
            y, current, results = self.norm(x), torch.cuda.current_stream(), []
            for stream, product in zip(self.streams, self.products, strict=True):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    results.append(product(y))
                current.wait_stream(stream)
            return sum(results)

    layer = Forked().cuda()
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    expected = gradients(layer, x)
    lean_activations(layer)
    for _ in range(5):
        assert equal(gradients(layer, x), expected)


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
