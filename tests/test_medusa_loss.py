"""The fused loss of several heads against its plain reference; torch alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import liger_ops.medusa.loss as implementation
from liger_ops.medusa import MedusaConfig, MedusaHeads, medusa_loss
from liger_ops.medusa.heads import HeadTensors
from tests.reference import medusa as reference

BATCH, LENGTH, HIDDEN, VOCAB = 2, 9, 16, 50


def make(device="cpu", dtype=torch.float32, heads=3, layers=1, bias=False, length=LENGTH):
    """Hidden states, heads that are not at their start, labels with some ignored, coefficients."""
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=dtype)
    modules = MedusaHeads(heads, layers, weight, weight[:, 0].clone() if bias else None)
    for parameter in modules.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    hidden = torch.randn(BATCH, length, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH, length), device=device)
    labels[:, :2] = -100
    coefficients = torch.tensor(MedusaConfig(heads).coefficients(), device=device)
    return hidden, modules, labels, coefficients


def targets_of(labels):
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def gradients(loss, hidden, modules, upstream=1.0):
    wanted = [t for t in (hidden, *modules.parameters()) if t.requires_grad]
    return torch.autograd.grad(upstream * loss, wanted)


def expected_loss(hidden, modules, labels, coefficients, **options):
    heads = [
        reference.head(
            hidden, [(b.linear.weight, b.linear.bias) for b in head[:-1]], head[-1].weight, head[-1].bias
        )
        for head in modules
    ]
    each = reference.losses(heads, labels, **options)
    return reference.weighed(each, coefficients.tolist()), torch.stack(each)


def close(actual, expected, share):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert (a - e).norm() <= share * e.norm() + 1e-12, (a - e).norm() / e.norm()


@pytest.fixture(params=["accumulated", "autograd"])
def way(request, monkeypatch):
    """Both ways to the gradients: what eager code takes, and what compiled code and float16 take."""
    if request.param == "autograd":
        monkeypatch.setattr(implementation, "_accumulates", lambda *_: False)
    return request.param


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients(device, way, layers, bias):
    hidden, modules, labels, coefficients = make(device, torch.float64, layers=layers, bias=bias)
    loss, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    expected, each = expected_loss(hidden, modules, labels, coefficients)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(losses, each)
    assert not losses.requires_grad
    close(
        gradients(loss, hidden, modules, upstream=3.0),
        gradients(expected, hidden, modules, upstream=3.0),
        1e-7,
    )


@pytest.mark.parametrize(
    "options",
    [dict(num_items=7), dict(num_items=torch.tensor([5])), dict(softcap=0.5), dict(ignore_index=3)],
    ids=["num_items", "tensor", "softcap", "ignore_index"],
)
def test_options(device, way, options):
    hidden, modules, labels, coefficients = make(device)
    index = options.get("ignore_index", -100)
    labels[labels == -100] = index
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=index)
    loss, losses = medusa_loss(hidden, modules.tensors(), targets, coefficients, **options)
    plain = {
        "cap" if k == "softcap" else k: v.item() if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    expected, each = expected_loss(hidden, modules, labels, coefficients, **plain)
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(loss, expected)
    close(gradients(loss, hidden, modules), gradients(expected, hidden, modules), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shorter_than_the_heads_look_ahead(device, way, length):
    hidden, modules, labels, coefficients = make(device, length=length)
    labels[:, :2] = 1
    loss, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    expected, each = expected_loss(hidden, modules, labels, coefficients)
    torch.testing.assert_close(losses, each)
    assert (losses[max(0, length - 2) :] == 0).all() and loss.isfinite()
    loss.backward()
    # Every parameter has a gradient, for DistributedDataParallel, and it is zero for a head without targets.
    for k, head in enumerate(modules):
        for parameter in head.parameters():
            assert (parameter.grad.abs().max() > 0) == (k + 2 < length)


def test_all_ignored(device, way):
    hidden, modules, labels, coefficients = make(device)
    loss, _ = medusa_loss(hidden, modules.tensors(), torch.full_like(labels, -100), coefficients)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, hidden, modules))


@pytest.mark.parametrize("frozen", ["backbone", "heads", "one head", "projections"])
def test_frozen_parts(device, way, frozen):
    hidden, modules, labels, coefficients = make(device)
    if frozen == "backbone":
        hidden = hidden.detach()
    elif frozen == "heads":
        modules.requires_grad_(False)
    elif frozen == "one head":
        modules[1].requires_grad_(False)
    else:
        for head in modules:
            head[-1].requires_grad_(False)
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    expected, _ = expected_loss(hidden, modules, labels, coefficients)
    close(gradients(loss, hidden, modules), gradients(expected, hidden, modules), 1e-5)
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    loss.backward()
    for parameter in modules.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.abs().max() > 0


def test_residual_blocks_take_part(device, way):
    """What goes wrong in Liger's example: two paths that train different functions."""
    hidden, modules, labels, coefficients = make(device)
    before, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    for head in modules:
        head[0].linear.bias.data.add_(1.0)
    after, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    assert abs(after - before) > 1e-2


def test_coefficients_take_part(device, way):
    hidden, modules, labels, coefficients = make(device)
    one, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    torch.testing.assert_close(one, (losses * coefficients).sum())
    _, *first = gradients(one, hidden, modules)
    two, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), 2 * coefficients)
    _, *second = gradients(two, hidden, modules)
    close(second, [2 * gradient for gradient in first], 1e-6)
    none, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), 0 * coefficients)
    assert all((gradient == 0).all() for gradient in gradients(none, hidden, modules))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(device, dtype):
    hidden, modules, labels, coefficients = make(device, dtype)
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = MedusaHeads(3, 1, modules[0][-1].weight.double())
    exact.load_state_dict(modules.state_dict())
    expected, _ = expected_loss(exact_hidden, exact, labels, coefficients)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    # A GradScaler's factor: without it float16 gradients of a real batch would be zero.
    scale = 1024.0
    for ours, theirs in zip(
        gradients(loss, hidden, modules, scale), gradients(expected, exact_hidden, exact, scale), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= 3e-2 * theirs.norm()


def test_float16_gradients_do_not_underflow(device):
    hidden, modules, labels, coefficients = make(device, torch.float16)
    # A loss over very many tokens, scaled as a GradScaler does.
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients, num_items=1e6)
    plain, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients, num_items=16)
    factor = 16 / 1e6
    for small, usual in zip(
        gradients(loss, hidden, modules, 1 / factor), gradients(plain, hidden, modules), strict=True
    ):
        assert (small - usual).float().norm() <= 2e-2 * usual.float().norm()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_gradients(device, way, cast):
    if cast == torch.float16 and way == "accumulated":
        pytest.skip("float16 is left to autograd")
    hidden, modules, labels, coefficients = make(device)
    with torch.autocast(device, cast):
        loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    expected, _ = expected_loss(hidden, modules, labels, coefficients)
    close(gradients(loss, hidden, modules), gradients(expected, hidden, modules), 2e-2)


def test_float32_heads_on_16_bit_hidden_states(device, way):
    hidden, modules, labels, coefficients = make(device)
    half = hidden.detach().bfloat16().requires_grad_()
    loss, _ = medusa_loss(half, modules.tensors(), targets_of(labels), coefficients)
    expected, _ = expected_loss(half.float(), modules, labels, coefficients)
    torch.testing.assert_close(loss, expected)
    close(gradients(loss, half, modules)[1:], gradients(expected, half, modules)[1:], 1e-5)


def test_graph_can_be_run_backward_twice(device, way):
    hidden, modules, labels, coefficients = make(device)
    wanted = (hidden, *modules.parameters())
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    first = torch.autograd.grad(loss * 2, wanted, retain_graph=True)
    first = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss * 2, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected, _ = expected_loss(hidden, modules, labels, coefficients)
    close(first, gradients(expected, hidden, modules, upstream=2.0), 1e-5)


def test_bitwise_reproducible_and_inputs_unchanged(device, way):
    runs = []
    for _ in range(2):
        hidden, modules, labels, coefficients = make(device)
        before = [t.detach().clone() for t in (hidden, *modules.parameters())]
        loss, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
        runs.append([loss, losses, *gradients(loss, hidden, modules)])
        after = (hidden, *modules.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_both_ways_agree(device, monkeypatch):
    hidden, modules, labels, coefficients = make(device)
    results = []
    for accumulate in (True, False):
        monkeypatch.setattr(implementation, "_accumulates", lambda *_, yes=accumulate: yes)
        loss, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
        results.append((loss, losses, *gradients(loss, hidden, modules)))
    torch.testing.assert_close(*results)


def test_parameter_hooks_run_once(device):
    hidden, modules, labels, coefficients = make(device)
    seen = []
    modules[0][-1].weight.register_hook(seen.append)
    loss, _ = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    assert not seen
    loss.backward()
    assert len(seen) == 1


def test_compiled(device):
    torch.compiler.reset()
    hidden, modules, labels, coefficients = make(device)

    @torch.compile(fullgraph=True)
    def compiled(hidden, labels, coefficients):
        return medusa_loss(hidden, modules.tensors(), labels, coefficients)

    loss, losses = compiled(hidden, targets_of(labels), coefficients)
    expected, each = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    torch.testing.assert_close((loss, losses), (expected, each))
    close(gradients(loss, hidden, modules), gradients(expected, hidden, modules), 1e-5)


def test_logits_are_never_held(device):
    """No tensor of tokens x vocabulary elements, when the workspace holds less."""
    hidden, modules, labels, coefficients = make(device, heads=2, length=64)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    with Sizes():
        loss, _ = medusa_loss(
            hidden, modules.tensors(), targets_of(labels), coefficients, workspace_bytes=4096
        )
        loss.backward()
    assert max(sizes) < hidden[..., 0].numel() * VOCAB


def test_meta_tensors():
    hidden, modules, labels, coefficients = (
        each.to("meta") if hasattr(each, "to") else each for each in make()
    )
    hidden = hidden.detach().requires_grad_()
    loss, losses = medusa_loss(hidden, modules.tensors(), targets_of(labels), coefficients)
    assert loss.shape == () and losses.shape == (3,) and loss.is_meta
    assert all(g.is_meta for g in gradients(loss, hidden, modules))


def test_errors(device):
    hidden, modules, labels, coefficients = make(device)
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 9\).*got \(2, 8\)"):
        medusa_loss(hidden, modules.tensors(), labels[:, 1:], coefficients)
    with pytest.raises(ValueError, match="3 heads need as many coefficients"):
        medusa_loss(hidden, modules.tensors(), labels, coefficients[1:])
    with pytest.raises(NotImplementedError, match="with respect to coefficients"):
        medusa_loss(hidden, modules.tensors(), labels, coefficients.requires_grad_())
    modules[1][-1] = torch.nn.Sequential(modules[1][-1])
    with pytest.raises(NotImplementedError, match="head 1 of the Medusa heads has a Sequential"):
        modules.tensors()


def test_start_as_copies_of_the_base(device):
    weight = torch.randn(VOCAB, HIDDEN, device=device)
    modules = MedusaHeads(3, 2, weight)
    hidden = torch.randn(BATCH, HIDDEN, device=device)
    for logits in modules(hidden):
        torch.testing.assert_close(logits, hidden @ weight.T)
    assert all(head[-1].weight.data_ptr() != weight.data_ptr() for head in modules)
    assert list(modules[0].state_dict()) == [
        "0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias", "2.weight",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- memory

PEAK = """
import json, sys
from pathlib import Path
import torch
import liger_ops.medusa.loss as implementation
from liger_ops.medusa import MedusaHeads, medusa_loss
torch.set_num_threads(1)
choose = implementation._accumulates
weight = torch.randn(256, 512)
labels = torch.randint(256, (1, 4096))
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
def growth(way, trained):
    implementation._accumulates = choose if way == "accumulated" else lambda *_: False
    hidden = torch.randn(1, 4096, 512, requires_grad=trained)
    peaks = []
    for heads in (2, 8):
        modules = MedusaHeads(heads, 1, weight)
        coefficients = torch.full((heads,), 0.5)
        for rows in (8, 4096):
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            medusa_loss(hidden[:, :rows], modules.tensors(), labels[:, :rows], coefficients).loss.backward()
            hidden.grad = None
            modules.zero_grad()
        gradients = sum(p.nbytes for p in modules.parameters())
        peaks.append((resident("VmHWM") - before - gradients) / hidden.nbytes)
    return peaks[1] - peaks[0]
ways = ("accumulated", "autograd")
print(json.dumps({way: [growth(way, trained) for trained in (True, False)] for way in ways}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is Linux's to tell")
def test_memory_does_not_depend_on_the_number_of_heads():
    """Six heads more, in tensors of the hidden states' size, beyond the parameters' gradients."""
    # glibc would keep freed tensors up to 32 MiB for itself.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True, env=variables)
    growth = json.loads(done.stdout)
    assert max(growth["accumulated"]) < 1, growth
    # What autograd alone would keep, of a backbone that is trained and of a frozen one: this test can fail.
    assert min(growth["autograd"]) > 9, growth


@pytest.mark.gpu
def test_memory_on_cuda():
    """At the size of Llama 3.1 8B: the workspace, and a few tensors of the hidden states' size."""
    weight = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) * 0.02
    hidden = torch.randn(1, 8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(128256, (1, 8192), device="cuda")
    peaks = []
    for heads in (1, 4):
        modules = MedusaHeads(heads, 1, weight)
        coefficients = torch.full((heads,), 0.5, device="cuda")
        for _ in range(2):  # the first run allocates the workspaces of cuBLAS, which stay
            hidden.grad = None
            modules.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            medusa_loss(hidden, modules.tensors(), labels, coefficients).loss.backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak - sum(p.nbytes for p in modules.parameters()))
        del modules
    assert peaks[1] - peaks[0] <= 3 * hidden.nbytes, [p >> 20 for p in peaks]
    assert peaks[1] <= (512 << 20) + 8 * hidden.nbytes, [p >> 20 for p in peaks]


# ------------------------------------------------------------------------------------------ configuration


def test_coefficients_and_schedules():
    assert MedusaConfig(3).coefficients() == pytest.approx([0.8, 0.64, 0.512])
    assert MedusaConfig(2, heads_coefficient=0.2, decay=0.5).coefficients() == pytest.approx([0.1, 0.05])
    assert MedusaConfig(2, heads_coefficient=[1, 3], decay=1.0).coefficients() == [1, 3]
    assert MedusaConfig().ramp(0) == 1
    linear = MedusaConfig(schedule="linear", schedule_steps=10)
    assert [linear.ramp(s) for s in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    sine = MedusaConfig(schedule="sine")
    assert [sine.ramp(s, 9) for s in (0, 3, 9, 12)] == pytest.approx([0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="sine schedule needs its length"):
        sine.ramp(0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_heads=0), ValueError, "num_heads must be at least 1"),
        (dict(num_heads=2.0), TypeError, "num_heads must be an int, got float"),
        (dict(num_layers=-1), ValueError, "num_layers must be at least 0"),
        (dict(num_heads=3, heads_coefficient=[1, 2]), ValueError, "one for each of the 3 heads, got 2"),
        (dict(heads_coefficient="1"), TypeError, "heads_coefficient must be a number"),
        (dict(heads_coefficient=-1), ValueError, "not negative"),
        (dict(decay=float("nan")), ValueError, "finite"),
        (dict(schedule="cosine"), ValueError, "one of constant, linear, sine, got 'cosine'"),
        (dict(schedule_steps=0), ValueError, "schedule_steps must be positive"),
    ],
)
def test_config_errors(options, error, message):
    with pytest.raises(error, match=message):
        MedusaConfig(**options)


def test_config_is_saved_whole(tmp_path):
    config = MedusaConfig(3, 2, (0.5, 0.25, 0.125), 0.9, "sine", 12)
    config.save(tmp_path, model_type="llama")
    assert MedusaConfig.load(tmp_path) == (config, {"model_type": "llama"})
    with pytest.raises(FileNotFoundError, match="holds no Medusa heads"):
        MedusaConfig.load(tmp_path / "elsewhere")


def test_without_transformers():
    """The heads and their loss are for models of one's own too."""
    code = (
        "import sys; sys.modules['transformers'] = None; import liger_ops.medusa as m; "
        "m.MedusaHeads, m.medusa_loss, m.MedusaConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_tensors_as_heads(device):
    hidden, _, labels, _ = make(device)
    weight = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=True)
    loss, _ = medusa_loss(
        hidden, [HeadTensors((), weight, None)], targets_of(labels), torch.ones(1, device=device), shifts=[0]
    )
    expected = reference.losses([hidden @ weight.T], labels, first=0)[0]
    torch.testing.assert_close(loss, expected)
