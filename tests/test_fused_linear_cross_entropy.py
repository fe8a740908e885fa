"""What is special about fused linear cross entropy; the contract is in test_loss_contract.py."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import fused_linear_cross_entropy
from tests.reference.fused_linear_cross_entropy import fused_linear_cross_entropy as reference

# Noise between two ways to round the same numbers.
NO_WORSE = 1.05


def make(device, dtype=torch.float32, tokens=64, hidden=32, classes=53, scale=1.0):
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    weight = scale * torch.randn(classes, hidden, dtype=torch.float64) / hidden**0.5
    target = torch.randint(classes, (tokens,)).index_fill(0, torch.arange(0, tokens, 5), -100)
    return x.to(device, dtype), weight.to(device, dtype), target.to(device)


def gradients(function, x, weight, target, *args, upstream=1.0, **kwargs):
    """Loss, and gradients of x, weight and bias."""
    bias, *rest = args if args else (None,)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = function(leaves[0], leaves[1], target, *leaves[2:], *rest, **kwargs)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def eager(x, weight, target, bias=None, **kwargs):
    """What a Hugging Face model does: logits in the dtype of the model, loss in float32."""
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, **kwargs)


def error(result, exact):
    return (result.double() - exact.double()).norm().item() / exact.double().norm().item()


def row_bytes(device, classes, dtype):
    """One row of the logits buffer, which is padded on CUDA."""
    size = classes * dtype.itemsize
    return -(-size // 128) * 128 if device == "cuda" else size


# ---------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("accum_dtype", [None, torch.float32], ids=["", "float32 sums"])
def test_no_less_accurate_than_eager(device, dtype, accum_dtype):
    x, weight, target = make(device, dtype, tokens=512, hidden=64, classes=301, scale=2.0)
    workspace = 4 * 4 * 512 + 128 * row_bytes(device, 301, dtype)
    exact = gradients(eager, x.double(), weight.double(), target)
    ours = gradients(
        partial(fused_linear_cross_entropy, accum_dtype=accum_dtype, workspace_bytes=workspace),
        x,
        weight,
        target,
    )
    eagers = gradients(eager, x, weight, target)
    # Four chunks: the weight's gradient is rounded four times, unless it is summed up in float32.
    rounded_per_chunk = dtype != torch.float32 and accum_dtype is None
    for name, a, b, e in zip(("loss", "dinput", "dweight"), ours, eagers, exact, strict=True):
        limit = 2 if name == "dweight" and rounded_per_chunk else NO_WORSE
        # For another number of rows cuBLAS adds up in another order.
        floor = (2 if device == "cuda" else 1) * torch.finfo(torch.float32).eps
        assert error(a, e) <= limit * max(error(b, e), floor), f"{name}: {error(a, e)}, eager {error(b, e)}"


def test_float32_sums_round_once(device):
    """With a chunk per row, sums in bfloat16 drift; sums in float32 stay within one rounding."""
    x, weight, target = make(device, torch.bfloat16, tokens=256, classes=16)
    exact = gradients(eager, x.double(), weight.double(), target)[2]
    narrow, wide = (
        gradients(
            partial(fused_linear_cross_entropy, workspace_bytes=1, accum_dtype=dtype), x, weight, target
        )[2]
        for dtype in (None, torch.float32)
    )
    assert narrow.dtype == wide.dtype == torch.bfloat16
    assert error(wide, exact) < error(narrow, exact) / 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_neither_underflows_nor_overflows(device, reduction):
    """Divided by the number of tokens, probabilities are below float16; not divided, their sums are above."""
    tokens = 4096
    x, weight, target = make(device, torch.float16, tokens=tokens, hidden=8, classes=64)
    x[:, 0] = 60.0  # summed up over the tokens: 250 000
    target.fill_(3)
    exact = gradients(eager, x.double(), weight.double(), target)
    upstream = 1.0 if reduction == "mean" else 1 / tokens
    ours = gradients(
        partial(fused_linear_cross_entropy, reduction=reduction), x, weight, target, upstream=upstream
    )
    eagers = gradients(eager, x, weight, target)
    for a, b, e in zip(ours[1:], eagers[1:], exact[1:], strict=True):
        assert a.isfinite().all()
        assert error(a, e) <= NO_WORSE * error(b, e)


def test_float16_keeps_what_a_loss_scale_saves(device):
    """The division by N and the loss scale meet in float32: the gradient of the input is rounded once."""
    x, weight, target = make(device, torch.float16, tokens=2048, hidden=8, classes=64, scale=0.05)
    scale = 2.0**14
    exact = gradients(eager, x.double(), weight.double(), target, upstream=scale)
    ours = gradients(fused_linear_cross_entropy, x, weight, target, upstream=scale)
    assert error(ours[1], exact[1]) < 2e-3
    # Without the loss scale this gradient is below the normal numbers of float16.
    assert exact[1].abs().max() / scale < torch.finfo(torch.float16).tiny


# At the ends of what each kernel keeps of a row, an odd number, and more than any of them keeps.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "classes", [8, 1000, 32000, 32001, 32768, 32776, 65536, 65544, 128256, 131072, 131080, 163840, 163848]
)
def test_gradient_of_each_logit(classes, dtype):
    """With the unit matrix for input, the weight holds the logits, and its gradient is theirs."""
    rows = 700  # more than there are blocks at a time, so that a block goes on to another row
    logits = 3 * torch.randn(rows, classes, device="cuda").to(dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    logits[-1] = 1  # no row of the distribution stands out
    logits[-2] -= 30000  # far from zero, where a float32 has few digits left
    logits[-3, target[-3]] = 60  # as sure as can be
    logits[-4, target[-4]] = -60
    target[::7] = target[100:350] = target[-5] = -100
    weight = logits.T.contiguous().requires_grad_()
    loss = fused_linear_cross_entropy(
        torch.eye(rows, device="cuda", dtype=dtype), weight, target, workspace_bytes=2**30
    )
    loss.backward()
    exact_logits = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_logits, target)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    info = torch.finfo(dtype)
    # Sums over tokens are kept smaller than they are while they might overflow in float16, so numbers below
    # the smallest normal one are rounded twice.
    torch.testing.assert_close(
        weight.grad.T.double(),
        exact_logits.grad,
        rtol=0.55 * info.eps,
        atol=1.5 * info.smallest_normal * info.eps,
    )


@pytest.mark.parametrize("rows", [1, 3, 50, 127, 128, 129, 300, 10**6])
def test_any_number_of_chunks(device, rows):
    x, weight, target = make(device, tokens=300)
    workspace = 4 * 4 * 300 + rows * row_bytes(device, 53, torch.float32)
    bias = torch.randn(53, device=device)
    expected = gradients(reference, x, weight, target, bias)
    ours = gradients(partial(fused_linear_cross_entropy, workspace_bytes=workspace), x, weight, target, bias)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_strided_arguments(device):
    """Every second row, a transposed weight, a column of a table: read where they are."""
    x, weight, target = make(device, tokens=32)
    table = torch.stack([target, target + 1], 1)
    ours = gradients(fused_linear_cross_entropy, x, weight, target)
    wide = torch.zeros(64, 40, device=device)
    wide[::2, 4:36] = x
    view, head = wide[::2, 4:36].requires_grad_(), weight.t().contiguous().t().requires_grad_()
    loss = fused_linear_cross_entropy(view, head, table[:, 0])
    dx, dweight = torch.autograd.grad(loss, (view, head))
    torch.testing.assert_close([loss, dx, dweight], ours)


# ------------------------------------------------------------------------------------------ number of items


@pytest.mark.parametrize(
    "items", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7]], dtype=torch.int32)], ids=repr
)
def test_num_items(device, items):
    """A number, or one element of any dtype and shape, on any device."""
    x, weight, target = make(device)
    expected = gradients(partial(reference, num_items=7), x, weight, target)
    torch.testing.assert_close(
        gradients(partial(fused_linear_cross_entropy, num_items=items), x, weight, target), expected
    )


def test_num_items_replaces_the_divisor_of_the_mean(device):
    x, weight, target = make(device)
    for reduction in ("sum", "none"):
        with pytest.raises(
            ValueError, match='num_items replaces the divisor of reduction "mean", got reduction'
        ):
            fused_linear_cross_entropy(x, weight, target, num_items=7, reduction=reduction)
    with pytest.raises(ValueError, match=r"num_items must have one element, got shape \[2\]"):
        torch.ops.liger.fused_linear_cross_entropy(x, weight, target, num_items=torch.ones(2, device=device))
    with pytest.raises(NotImplementedError, match="gradient with respect to num_items is not implemented"):
        fused_linear_cross_entropy(
            x, weight, target, num_items=torch.ones((), device=device, requires_grad=True)
        )


# ------------------------------------------------------------------------------------------------ autograd


def products(call):
    """Matrix products that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    counts = {e.key: e.count for e in profile.key_averages()}
    return counts.get("aten::mm", 0) + counts.get("aten::addmm", 0)


def test_only_wanted_gradients_are_computed(device):
    x, weight, target = make(device)

    def run(x_grad, weight_grad, bias=None):
        x.requires_grad_(x_grad), weight.requires_grad_(weight_grad)
        return products(lambda: fused_linear_cross_entropy(x, weight, target, bias))

    assert run(True, True) == 3
    assert run(True, False) == 2  # frozen head
    assert run(False, True) == 2  # frozen backbone
    assert run(False, False) == 1
    assert run(False, False, torch.zeros(53, device=device, requires_grad=True)) == 1
    with torch.no_grad():
        assert run(True, True) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_gradients_of_a_released_graph_are_scaled_in_place(device, dtype, upstream):
    """No second copy of the weight's gradient in eager backward; the values are those of a retained graph."""
    x, weight, target = make(device, dtype)
    results = []
    for retain in (True, False):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_linear_cross_entropy(*leaves, target) * upstream
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward(retain_graph=retain)
        calls = {e.key for e in profile.key_averages() if "liger::cross_entropy_scale" in e.key}
        assert calls == {"liger::cross_entropy_scale" + ("" if retain else "_")}
        # AccumulateGrad clones what something else still holds.
        assert ("aten::clone" in {e.key for e in profile.key_averages()}) is False
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_gradients_that_somebody_keeps_are_not_written_to(device):
    """Such as the hooks of saved tensors, which may give the tensor that they packed a second time."""
    x, weight, target = make(device)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fused_linear_cross_entropy(*leaves, target)
    before = [tensor.clone() for tensor in kept]
    (0.3 * loss).backward()
    assert len(kept) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    expected = gradients(fused_linear_cross_entropy, x, weight, target, upstream=0.3)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected)[-2:])


def test_tied_embedding(device):
    """The weight's gradient from the head and from the embedding are added up."""
    tokens = torch.randint(53, (20,), device=device)
    table = torch.randn(53, 8, device=device, requires_grad=True)
    loss = fused_linear_cross_entropy(F.embedding(tokens, table), table, tokens.roll(-1))
    expected = eager(F.embedding(tokens, table), table, tokens.roll(-1))
    for _ in range(2):  # and over backward passes
        torch.testing.assert_close(
            torch.autograd.grad(loss, table, retain_graph=True)[0],
            torch.autograd.grad(expected, table, retain_graph=True)[0],
        )
    loss.backward()
    fused_linear_cross_entropy(F.embedding(tokens, table), table, tokens.roll(-1)).backward()
    torch.testing.assert_close(table.grad, 2 * torch.autograd.grad(expected, table)[0])


def test_checkpoint_and_offload(device):
    x, weight, target = make(device)
    expected = gradients(fused_linear_cross_entropy, x, weight, target)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(fused_linear_cross_entropy, *args, use_reentrant=False)

    torch.testing.assert_close(gradients(checkpointed, x, weight, target, upstream=1.0), expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(fused_linear_cross_entropy, x, weight, target), expected)


def test_scale_rounds_once(device):
    """A factor that bfloat16 cannot hold, times bfloat16 gradients."""
    scale = torch.tensor(1 + 2**-12, device=device)
    for shape in ((5, 7), (4, 64), (0, 3)):
        grad = torch.randn(shape, device=device).bfloat16()
        expected = (grad.float() * scale).bfloat16()
        assert torch.equal(torch.ops.liger.cross_entropy_scale(grad, scale), expected)
        torch.ops.liger.cross_entropy_scale_(grad, scale)
        assert torch.equal(grad, expected)


def test_unreduced_weights_each_token(device):
    """Per-token upstream gradients, as policy-gradient losses have them."""
    x, weight, target = make(device)
    upstream = torch.randn(64, device=device)
    expected = gradients(partial(reference, reduction="none"), x, weight, target, upstream=upstream)
    for workspace in (None, 1):
        ours = gradients(
            partial(fused_linear_cross_entropy, reduction="none", workspace_bytes=workspace),
            x,
            weight,
            target,
            upstream=upstream,
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_leaves_master_gradients_unrounded(device, autocast, reduction):
    """The products take operands rounded to the autocast dtype, and their results stay in float32."""
    x, weight, target = make(device, tokens=256)
    bias = torch.randn(53, device=device)
    with torch.autocast(device, dtype=autocast):
        ours = gradients(
            partial(fused_linear_cross_entropy, reduction=reduction), x, weight, target, bias, upstream=0.7
        )
        eagers = gradients(partial(eager, reduction=reduction), x, weight, target, bias, upstream=0.7)
    rounded = [t.to(autocast).double() for t in (x, weight, bias)]
    exact = gradients(
        partial(eager, reduction=reduction), rounded[0], rounded[1], target, rounded[2], upstream=0.7
    )
    for a, b, e in zip(ours, eagers, exact, strict=True):
        assert a.dtype == torch.float32
        assert error(a, e) <= NO_WORSE * max(error(b, e), torch.finfo(torch.float32).eps)
    for a in ours[1:]:
        assert not torch.equal(a, a.to(autocast).float())


def test_autocast_takes_any_mix_of_dtypes(device):
    x, weight, target = make(device)
    expected = gradients(reference, x, weight, target)
    with torch.autocast(device, dtype=torch.bfloat16):
        for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2):
            ours = gradients(fused_linear_cross_entropy, x.to(a), weight.to(b), target)
            assert [t.dtype for t in ours] == [torch.float32, a, b]
            assert all(error(o, e) < 2e-2 for o, e in zip(ours, expected, strict=True))
        # float64 takes no part in autocast.
        assert fused_linear_cross_entropy(x.double(), weight.double(), target).dtype == torch.float64


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_errors(where):
    x, weight, target = (t.to(where) for t in make("cpu"))
    op = "liger::fused_linear_cross_entropy: "

    def fails(exception, message, *args, **kwargs):
        with pytest.raises(exception, match=op + message):
            fused_linear_cross_entropy(*args, **kwargs)

    fails(
        TypeError,
        r"weight must have dtype float32 \(dtype of input\), got bfloat16; cast one of them, or use",
        x,
        weight.bfloat16(),
        target,
    )
    fails(
        TypeError,
        r"bias must have dtype float32 \(dtype of input\), got float16",
        x,
        weight,
        target,
        weight[:, 0].half(),
    )
    fails(
        ValueError,
        r"weight must have shape \[classes, 32\] \(last dimension of input\), got \[53, 31\]",
        x,
        weight[:, 1:],
        target,
    )
    fails(ValueError, r"input must be 2-D, got shape \[64, 1, 32\]", x[:, None], weight, target)
    fails(
        TypeError,
        r"accum_dtype must be float32 or the weight's dtype float32, got bfloat16",
        x,
        weight,
        target,
        accum_dtype=torch.bfloat16,
    )
    fails(ValueError, "workspace_bytes must be positive, got 0", x, weight, target, workspace_bytes=0)
    fails(
        ValueError,
        r"ce_weight must be 1-D of size 53 \(number of classes\), got \[32\]",
        x,
        weight,
        target,
        None,
        x[0],
    )


def test_offloaded_weight_is_refused(device):
    """A weight on the meta device stands for one that accelerate has moved away."""
    x, weight, target = make(device)
    with pytest.raises(ValueError, match=rf"weight must be on {device}(:0)? \(device of input\), got meta"):
        fused_linear_cross_entropy(x, weight.to("meta"), target)


# --------------------------------------------------------------------------------------------------- memory

PEAK = """
import json, sys
from pathlib import Path
import torch, torch.nn.functional as F
import liger_ops.functional as LF
torch.set_num_threads(2)
x = torch.randn(2048, 512, requires_grad=True)
weight = torch.randn(32000, 512, requires_grad=True)
target = torch.randint(32000, (2048,))
def run(rows):
    call = {
        "ours": LF.fused_linear_cross_entropy,
        "details": lambda *a: LF.fused_linear_cross_entropy(*a, use_token_scaling=True, return_z_loss=True,
            return_token_accuracy=True, return_predicted_tokens=True).loss,
        "eager": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    }[sys.argv[1]]
    (0.5 * call(x[:rows], weight, target[:rows])).backward()
    x.grad = weight.grad = None
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
run(8)
before = resident("VmRSS")
run(2048)
# Not ru_maxrss, which starts at the size of the process that started this one.
print(json.dumps(resident("VmHWM") - before))
"""


def test_peak_memory_on_the_cpu():
    """Beyond its arguments, under a quarter of what eager takes; the upstream gradient is not 1."""
    ours, details, eagers = (
        json.loads(subprocess.run([sys.executable, "-c", PEAK, who], capture_output=True, check=True).stdout)
        for who in ("ours", "details", "eager")
    )
    for mine in (ours, details):
        assert mine < eagers / 4, f"{mine >> 20} MiB, eager {eagers >> 20} MiB"


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_token_scaling": True, "return_token_accuracy": True, "return_predicted_tokens": True}],
    ids=["", "details"],
)
def test_peak_memory_on_cuda(upstream, options):
    """At the size of Llama 3.1 8B: 512 MiB beyond the gradients, forward and backward."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(128256, (8192,), device="cuda")
    for _ in range(2):  # the first run allocates the workspaces of cuBLAS, which stay
        x.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fused_linear_cross_entropy(x, weight, target, **options)
        ((result.loss if options else result) * upstream).backward()
        peak = torch.cuda.max_memory_allocated() - before
    gradient_bytes = x.nbytes + weight.nbytes
    assert peak - gradient_bytes <= 512 << 20, f"{(peak - gradient_bytes) / 2**20:.0f} MiB"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_penalty_raises(device, reduction):
    """A penalty on the gradient needs a second derivative: an error, not a gradient that lacks a term."""
    x, weight, target = make(device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    dx, dweight = torch.autograd.grad(loss, (x, weight), create_graph=True)
    with pytest.raises(RuntimeError, match=r"liger::\w+ is not implemented"):
        (loss + dx.pow(2).sum() + dweight.pow(2).sum()).backward()
