"""The experts function against transformers' own, on MixtralExperts and on other classes' conventions."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from liger_ops.nn import LigerExperts
from liger_ops.nn._grouped_linear import _per_group, grouped_linear
from liger_ops.transformers.experts import experts_forward, register_experts
from liger_ops.transformers.forwards.blocks import gate_of
from tests.contract import RecordLigerCalls

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 5, 2, 16, 24
DTYPES = [torch.float32, torch.bfloat16]


def config(**changes):
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    return MixtralConfig(**sizes | changes, experts_implementation="eager")


def experts(device="cpu", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    module = MixtralExperts(config(**changes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(device, dtype)


def routing(tokens, device="cpu", dtype=torch.float32, allowed=EXPERTS):
    """Tokens, distinct experts below `allowed` for each, and weights that sum to 1."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores, index = torch.rand(tokens, allowed, generator=generator).topk(TOP_K)
    weights = scores / scores.sum(-1, keepdim=True)
    # As in a bf16 model, the router's weights stay float32.
    return x.to(device, dtype).requires_grad_(), index.to(device), weights.to(device).requires_grad_()


def run(function, module, x, index, weights):
    """The result, and the gradients of tokens, weights and parameters."""
    out = function(module, x, index, weights)
    leaves = [x, weights, *module.parameters()]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def eager(module, *args):
    return type(module).forward.__wrapped__(module, *args)


def in_double(module, x, index, weights):
    wide = copy.deepcopy(module).double()
    return run(
        eager, wide, x.detach().double().requires_grad_(), index, weights.detach().double().requires_grad_()
    )


def assert_as_accurate(actual, expected, exact):
    """No further from the exact result than transformers' eager code, but for the noise of few elements."""
    for a, b, e in zip(actual, expected, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, allowed = ((t.double() - e).pow(2).mean().sqrt() for t in (a, b))
        assert error <= 1.1 * allowed + 1e-6 * e.pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_against_eager(device, dtype, act):
    module = experts(device, dtype, hidden_act=act)
    args = routing(257, device, dtype)
    assert_as_accurate(
        run(experts_forward, module, *args), run(eager, module, *args), in_double(module, *args)
    )


def test_gate_is_fused(device):
    for act, operator in (("silu", "swiglu_packed"), ("gelu", "geglu_packed"), ("relu", None)):
        with RecordLigerCalls() as record:
            experts_forward(experts(device, hidden_act=act), *routing(7, device))
        assert {f._schema.name for f, *_ in record.calls} == ({f"liger::{operator}"} if operator else set())


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_without_tokens(device, dtype):
    module = experts(device, dtype)
    args = routing(9, device, dtype, allowed=2)
    actual = run(experts_forward, module, *args)
    assert_as_accurate(actual, run(eager, module, *args), in_double(module, *args))
    assert not actual[3][2:].any(), "an expert that no token chose has a gradient"


def test_no_tokens(device):
    module = experts(device)
    out, dx, dweights, *parameters = run(experts_forward, module, *routing(0, device))
    assert out.shape == dx.shape == (0, HIDDEN) and dweights.shape == (0, TOP_K)
    assert not any(p.any() for p in parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_sentinel_contributes_nothing(device, dtype, act, poison, monkeypatch):
    """A slot of another rank: as if its weight were 0, whatever the unwritten rows of a product hold."""
    if poison:
        monkeypatch.setattr("liger_ops.nn.experts.grouped_linear", poisoned_grouped_linear)
    module = experts(device, dtype, hidden_act=act)
    x, index, weights = routing(257, device, dtype)
    index[::3, 0] = EXPERTS
    index[4] = EXPERTS  # a token with no expert here
    present = index < EXPERTS
    expected_args = (x, index.clamp(max=EXPERTS - 1), (weights * present).detach().requires_grad_())
    expected = run(eager, module, *expected_args)
    exact = in_double(module, *expected_args)
    actual = run(experts_forward, module, x, index, weights)
    # A weight of 0 hides the slot everywhere but in the weight's own gradient.
    for results in (expected, exact):
        results[2] = results[2] * present
    assert_as_accurate(actual, expected, exact)
    assert not actual[0][4].any() and not actual[1][4].any() and not actual[2][4].any()


class Poison(torch.autograd.Function):
    """NaN in the rows that torch's grouped product leaves unwritten, forward and backward."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        return torch.where(torch.arange(rows.shape[0], device=rows.device)[:, None] < end, rows, torch.nan)

    @staticmethod
    def backward(ctx, gradient):
        return Poison.apply(gradient, ctx.end), None


def poisoned_grouped_linear(x, weight, ends, transposed=False):
    end = ends[-1].long()
    return Poison.apply(grouped_linear(Poison.apply(x, end).nan_to_num(), weight, ends, transposed), end)


def test_poison_reaches_unused_rows():
    x = torch.ones(4, 8, requires_grad=True)
    out = poisoned_grouped_linear(x, torch.ones(1, 8, 8), torch.tensor([3], dtype=torch.int32))
    assert out.isnan().any(-1).tolist() == [False, False, False, True]


def test_gpt_oss_conventions(device, monkeypatch):
    """Transposed weights, biases and a gate of its own, with unused rows too."""
    monkeypatch.setattr("liger_ops.nn.experts.grouped_linear", poisoned_grouped_linear)
    torch.manual_seed(0)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    module = GptOssExperts(GptOssConfig(**sizes)).to(device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, index, weights = routing(15, device)
    expected, actual = run(eager, module, x, index, weights), run(experts_forward, module, x, index, weights)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    index[3, 1] = EXPERTS
    assert not any(t.isnan().any() for t in run(experts_forward, module, x, index, weights))


def test_experts_without_gate(device):
    torch.manual_seed(0)
    module = nn.Module()
    module.has_gate, module.has_bias, module.is_transposed = False, False, False
    module.act_fn = ACT2FN["relu2"]
    module.up_proj = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN))
    module.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE))
    module.to(device)
    x, index, weights = routing(8, device)
    hidden = module.act_fn(torch.einsum("nh,nkih->nki", x, module.up_proj[index]))
    expected = torch.einsum("nki,nkhi,nk->nh", hidden, module.down_proj[index], weights)
    torch.testing.assert_close(experts_forward(module, x, index, weights), expected, rtol=1e-4, atol=1e-4)


def test_norm_after_the_experts(device, monkeypatch):
    monkeypatch.setattr("liger_ops.nn.experts.grouped_linear", poisoned_grouped_linear)
    module = experts(device)
    x, index, weights = routing(8, device)
    index[2, 0] = EXPERTS
    module.post_expert_norm = nn.LayerNorm(HIDDEN, device=device)
    module.has_post_expert_norm = True
    results = run(experts_forward, module, x, index, weights)
    assert not any(t.isnan().any() for t in results)
    x, index, weights = routing(8, device)
    gate, up = torch.einsum("nh,nkih->nki", x, module.gate_up_proj[index]).chunk(2, -1)
    down = torch.einsum("nki,nkhi->nkh", nn.functional.silu(gate) * up, module.down_proj[index])
    expected = (module.post_expert_norm(down) * weights[..., None]).sum(1)
    torch.testing.assert_close(experts_forward(module, x, index, weights), expected, rtol=1e-4, atol=1e-5)


def test_gate_of_the_class_wins(device):
    class Halved(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, -1)
            return 0.5 * gate * up

    module = experts(device)
    module.__class__ = Halved
    x, index, weights = routing(8, device)
    gate, up = torch.einsum("nh,nkih->nki", x, module.gate_up_proj[index]).chunk(2, -1)
    expected = torch.einsum("nki,nkhi,nk->nh", 0.5 * gate * up, module.down_proj[index], weights)
    torch.testing.assert_close(experts_forward(module, x, index, weights), expected, rtol=1e-4, atol=1e-5)


def test_fused_gates():
    for act in ("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh"):
        gate_up = torch.randn(3, 2 * 8)
        gate, up = gate_up.chunk(2, -1)
        torch.testing.assert_close(gate_of(ACT2FN[act]).packed(gate_up), ACT2FN[act](gate) * up)
    for act in ("relu", "quick_gelu", "gelu_10", "xielu"):
        assert gate_of(ACT2FN[act]) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_deterministic(device, dtype):
    module, args = experts(device, dtype), routing(64, device, dtype)
    first, *others = (run(experts_forward, module, *args) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_gradcheck(device):
    module = experts(device).double()
    x, index, weights = routing(6, device)
    index[1, 1] = EXPERTS
    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *module.parameters())]

    def call(x, weights, gate_up_proj, down_proj):
        holder = SimpleNamespace(gate_up_proj=gate_up_proj, down_proj=down_proj, act_fn=module.act_fn)
        return experts_forward(holder, x, index, weights)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile(device, dtype):
    torch.compiler.reset()
    module = experts(device, dtype)
    compiled = torch.compile(experts_forward, fullgraph=True, dynamic=True)
    for tokens in (17, 40):
        args = routing(tokens, device, dtype)
        for a, b in zip(run(compiled, module, *args), run(experts_forward, module, *args), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(device):
    """Master weights and tokens in float32, products in bfloat16, gradients in float32."""
    module, args = experts(device), routing(257, device)

    def under_autocast(function):
        def call(*arguments):
            with torch.autocast(device, torch.bfloat16):
                return function(*arguments)

        return call

    expected = run(under_autocast(eager), module, *args)
    actual = run(under_autocast(experts_forward), module, *args)
    assert all(t.dtype == torch.float32 for t in actual)
    assert_as_accurate(actual, expected, in_double(module, *args))


def test_frozen_arguments(device):
    module, (x, index, weights) = experts(device), routing(12, device)
    whole = run(experts_forward, module, x, index, weights)
    for wanted in range(4):
        leaves = [x, weights, *module.parameters()]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        out = experts_forward(module, x, index, weights)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        (gradient,) = torch.autograd.grad(out, leaves[wanted], upstream)
        assert torch.equal(gradient, whole[1 + wanted])


def test_inputs_are_left_alone(device):
    module, args = experts(device), routing(12, device)
    before = [t.detach().clone() for t in (*args, *module.parameters())]
    run(experts_forward, module, *args)
    assert all(map(torch.equal, before, [t.detach() for t in (*args, *module.parameters())]))


def test_grouped_product_opcheck(device):
    x = torch.randn(7, 8, device=device, requires_grad=True)
    weight = torch.randn(3, 6, 8, device=device, requires_grad=True)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
    torch.library.opcheck(_per_group, (x, weight.transpose(1, 2), ends))
    assert not grouped_linear(x, weight, ends)[5:].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_torchs_grouped_product(compiled, monkeypatch):
    """The path of the GPUs that have a kernel for it, with the CPU's implementation of the same function."""
    monkeypatch.setattr("liger_ops.nn._grouped_linear._has_grouped_kernel", lambda x, weight: True)
    module = experts(dtype=torch.bfloat16)
    x, index, weights = routing(65, dtype=torch.bfloat16)
    index[::4, 1] = EXPERTS
    torch.compiler.reset()
    function = (
        torch.compile(experts_forward, fullgraph=True, backend="aot_eager") if compiled else experts_forward
    )
    actual = run(function, module, x, index, weights)
    monkeypatch.undo()
    for a, b in zip(actual, run(experts_forward, module, x, index, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs a GPU that torch has a grouped kernel for",
)
def test_grouped_kernel_never_waits_for_the_host():
    module, args = experts("cuda", torch.bfloat16), routing(33, "cuda", torch.bfloat16)
    args[1][5] = EXPERTS
    expected = run(experts_forward, module, *args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = experts_forward(module, *args)
        upstream = torch.ones_like(out)
        torch.autograd.grad(out, [args[0], args[2], *module.parameters()], upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    per_group = run(
        experts_forward,
        copy.deepcopy(module).cpu(),
        *(a.detach().cpu().requires_grad_(a.requires_grad) for a in args),
    )
    for a, b in zip(expected, per_group, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2)


def test_registered_implementation(device):
    assert register_experts() == register_experts() == "liger_ops"
    assert moe.ALL_EXPERTS_FUNCTIONS["liger_ops"] is experts_forward
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    model = MixtralForCausalLM(config(**sizes, hidden_size=32)).to(device)
    ids = torch.randint(64, (2, 9), device=device)

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters()}

    loss, gradients = step()
    model.set_experts_implementation("liger_ops")
    with RecordLigerCalls() as record:
        ours, our_gradients = step()
    names = [f._schema.name for f, *_ in record.calls]
    assert names.count("liger::swiglu_packed") == 2
    torch.testing.assert_close(ours, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_module_of_ligers_name(device):
    module = LigerExperts(config()).to(device)
    reference = experts(device)
    assert list(module.state_dict()) == list(reference.state_dict())
    module.load_state_dict(reference.state_dict())
    args = routing(11, device)
    for a, b in zip(run(LigerExperts.forward, module, *args), run(eager, reference, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert f"{EXPERTS}, hidden_size={HIDDEN}, intermediate_size={INTERMEDIATE}" in repr(module)
    qwen = SimpleNamespace(
        hidden_size=8, intermediate_size=100, moe_intermediate_size=12, num_experts=3, hidden_act="silu"
    )
    assert LigerExperts(qwen).gate_up_proj.shape == (3, 24, 8)
    with pytest.raises(ValueError, match="config.hidden_act is 'relu'"):
        LigerExperts(config(hidden_act="relu"))
