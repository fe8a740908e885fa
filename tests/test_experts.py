"""Stacked experts, against a loop over them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from liger_ops import nn as liger_nn
from liger_ops.nn.experts import experts
from tests.tolerances import assert_within

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP = 11, 16, 24, 5, 2


def one_by_one(x, index, weights, gate_up, down):
    out = torch.zeros_like(x)
    for k in range(index.shape[1]):
        for n in range(x.shape[0]):
            e = index[n, k]
            if e < gate_up.shape[0]:
                gate, up = (gate_up[e] @ x[n]).chunk(2)
                out = out.index_add(
                    0, torch.tensor([n]), weights[n, k] * (down[e] @ (F.silu(gate) * up))[None]
                )
    return out


def inputs(device, dtype, tokens=TOKENS, hidden=HIDDEN, seen=EXPERTS, weights_dtype=None):
    """`seen` experts of EXPERTS get tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    index = torch.stack([torch.randperm(seen, generator=generator)[:TOP] for _ in range(max(tokens, 1))])
    tensors = [
        normal(tokens, hidden),
        torch.rand(tokens, TOP, generator=generator, dtype=torch.float64),
        normal(EXPERTS, 2 * INTERMEDIATE, hidden, scale=hidden**-0.5),
        normal(EXPERTS, hidden, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    ]
    dtypes = [dtype, weights_dtype or dtype, dtype, dtype]
    x, weights, gate_up, down = (
        t.to(device, d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)
    )
    return x, index[:tokens].to(device), weights, gate_up, down


def results(function, arguments):
    out = function(*arguments)
    leaves = [a for a in arguments if a.requires_grad]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def expected(arguments):
    exact = [
        a.detach().cpu().double().requires_grad_() if a.is_floating_point() else a.cpu() for a in arguments
    ]
    return results(one_by_one, exact)


def assert_right(arguments, roundings=8):
    dtype = arguments[0].dtype
    for i, (a, b) in enumerate(zip(results(experts, arguments), expected(arguments), strict=True)):
        assert_within(a, b, dtype=dtype, terms=64, roundings=roundings, name=f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_a_loop(device, dtype):
    assert_right(inputs(device, dtype))


def test_float32_router_weights(device):
    assert_right(inputs(device, torch.bfloat16, weights_dtype=torch.float32))


def test_experts_without_tokens(device):
    arguments = inputs(device, torch.float32, seen=2)
    assert_right(arguments)
    _, _, _, dgate_up, _ = results(experts, arguments)
    assert dgate_up[2:].abs().sum() == 0


def test_widths_that_no_16_byte_row_fits(device):
    assert_right(inputs(device, torch.bfloat16, hidden=13))


def test_no_tokens(device):
    x, index, weights, gate_up, down = inputs(device, torch.float32, tokens=0)
    assert experts(x, index, weights, gate_up, down).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_other_ranks_add_nothing(device, dtype):
    """Expert parallelism marks them with indices from the number of experts on."""
    x, index, weights, gate_up, down = inputs(device, dtype)
    index = index.clone()
    index[::3, 0], index[4] = EXPERTS, EXPERTS
    assert_right((x, index, weights, gate_up, down))


def test_transposed(device):
    x, index, weights, gate_up, down = inputs(device, torch.float32)
    stored = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    torch.testing.assert_close(
        experts(x, index, weights, *stored, transposed=True), experts(x, index, weights, gate_up, down)
    )


def test_is_deterministic(device):
    arguments = inputs(device, torch.bfloat16, tokens=200)
    first, second = results(experts, arguments), results(experts, arguments)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(device, dtype):
    torch.compiler.reset()
    arguments = inputs(device, dtype)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, arguments), results(experts, arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(device):
    arguments = inputs(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = results(experts, arguments)
    for a, b in zip(actual, expected(arguments), strict=True):
        assert a.dtype == torch.float32
        assert_within(a, b, dtype=torch.bfloat16, terms=64, roundings=8)


@pytest.mark.gpu
def test_nothing_is_read_on_the_host():
    arguments = inputs("cuda", torch.bfloat16)
    results(experts, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(experts, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_module(device):
    config = SimpleNamespace(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, hidden_act="silu"
    )
    module = liger_nn.LigerExperts(config).to(device)
    x, index, weights, _, _ = inputs(device, torch.float32)
    torch.testing.assert_close(
        module(x, index, weights).cpu(),
        one_by_one(*(t.detach().cpu() for t in (x, index, weights, *module.parameters()))),
    )
    assert [tuple(p.shape) for p in module.parameters()] == [
        (EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        (EXPERTS, HIDDEN, INTERMEDIATE),
    ]
    config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        liger_nn.LigerExperts(config)


def mixtral_experts(device, dtype, activation="silu"):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, hidden_act=activation
    )
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.to(device, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_registered_with_transformers(device, activation):
    from liger_ops.transformers.experts import register_experts

    register_experts()
    register_experts()
    module = mixtral_experts(device, torch.float32, activation)
    x, index, weights, _, _ = inputs(device, torch.float32)

    def run(implementation):
        module.config._experts_implementation = implementation
        out = module(x, index, weights)
        return [out, *torch.autograd.grad(out.square().sum(), [x, weights, *module.parameters()])]

    for a, b in zip(run("liger_ops"), run("eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
