"""What PyTorch users do with operators and modules, beyond calling them. Every operator is in `Block`."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import liger_ops.functional as LF
from liger_ops import nn as liger_nn
from tests.contract import RecordLigerCalls
from tests.test_export import Block, arguments

ROOT = Path(__file__).resolve().parent.parent
TOKENS, HIDDEN, CLASSES = 12, 32, 97


def block(device, dtype=torch.float32):
    torch.manual_seed(0)
    return Block().to(device, dtype), tuple(
        a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in arguments()
    )


def losses_and_gradients(module, inputs, call=None):
    module.zero_grad(set_to_none=True)
    losses = (module if call is None else call)(*inputs)
    sum(losses).backward()
    return [*losses, *(p.grad for p in module.parameters())]


def assert_same(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(device, dtype, inside):
    module, inputs = block(device)
    expected = losses_and_gradients(module, inputs)
    module.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=dtype):
        losses = module(*inputs)
        if inside:
            sum(losses).backward()
    if not inside:
        sum(losses).backward()
    eps = torch.finfo(dtype).eps
    for a, b in zip([*losses, *(p.grad for p in module.parameters())], expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 16 * eps * b.norm()


def test_grad_scaler(device):
    """float16 with loss scaling takes the steps that float32 takes."""
    module, inputs = block(device)
    plain = copy.deepcopy(module)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, plain)]
    for _ in range(3):
        with torch.autocast(device, dtype=torch.float16):
            loss = sum(module(*inputs))
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        sum(plain(*inputs)).backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**10, "a step was skipped"
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.005)


def test_scaled_gradients_that_overflow_are_found(device):
    module, inputs = block(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.autocast(device, dtype=torch.float16):
        loss = sum(module(*inputs)) * 1e6
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**24
    assert_same(module.parameters(), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ compilers


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device, dynamic):
    torch.compiler.reset()
    module, inputs = block(device)
    expected = losses_and_gradients(module, inputs)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    assert_same(losses_and_gradients(module, inputs, compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_compile_with_cuda_graphs():
    torch.compiler.reset()
    module, inputs = block("cuda")
    expected = losses_and_gradients(module, inputs)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        results = [r.clone() for r in losses_and_gradients(module, inputs, compiled)]
    assert_same(results, expected, rtol=1e-4, atol=1e-5)


AHEAD_OF_TIME = """
import sys
import torch
from tests.test_behaviour import assert_same, block

device, path, plain = sys.argv[1], sys.argv[2], sys.argv[3] == "plain"
module, inputs = block(device)
if plain:
    module, inputs = torch.nn.Linear(4, 4).to(device), (torch.randn(2, 4, device=device),)
program = torch.export.export(module.eval(), inputs)
package = torch._inductor.aoti_compile_and_package(program, package_path=path)
loaded = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    results, expected = loaded(*inputs), module(*inputs)
    assert_same(*([[r] for r in (results, expected)] if plain else (results, expected)))
"""


def run_ahead_of_time(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_ahead_of_time_inductor(device, tmp_path):
    """In a process of its own, since a package that does not load ends it."""
    finished = run_ahead_of_time(device, str(tmp_path / "block.pt2"), "block")
    if (
        finished.returncode < 0
        and run_ahead_of_time(device, str(tmp_path / "plain.pt2"), "plain").returncode < 0
    ):
        pytest.skip("this PyTorch crashes when it loads a package of nothing but a Linear")
    assert finished.returncode == 0, finished.stderr[-2000:]


# ------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoint(device, use_reentrant):
    module, inputs = block(device)
    expected = losses_and_gradients(module, inputs)
    inputs = (inputs[0].requires_grad_(), *inputs[1:])  # reentrant checkpoints ask for one
    recomputed = losses_and_gradients(
        module, inputs, lambda *args: checkpoint(module, *args, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, expected, rtol=0, atol=0)


def test_selective_checkpoint_by_operator(device):
    """The operator that is to be kept runs once, the others twice."""
    module, inputs = block(device)
    expected = losses_and_gradients(module, inputs)

    def policy(ctx, op, *args, **kwargs):
        keep = op is torch.ops.liger.rms_norm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def run(*args):
        return checkpoint(
            module,
            *args,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    with RecordLigerCalls() as record:
        actual = losses_and_gradients(module, inputs, run)
    assert_same(actual, expected, rtol=0, atol=0)
    calls = [func._schema.name.removeprefix("liger::") for func, _, _ in record.calls]
    assert calls.count("rms_norm") == 1
    assert calls.count("swiglu") == 2


# ------------------------------------------------------------------------------------------ counting


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_flop_counter(device, reduction):
    """The products of the fused loss, and what a frozen argument saves."""
    x = torch.randn(TOKENS, HIDDEN, device=device)
    weight = torch.randn(CLASSES, HIDDEN, device=device)
    target = torch.randint(CLASSES, (TOKENS,), device=device)
    product = 2 * TOKENS * HIDDEN * CLASSES

    def step(dx, dw):
        a, b = x.clone().requires_grad_(dx), weight.clone().requires_grad_(dw)
        loss = LF.fused_linear_cross_entropy(a, b, target, reduction=reduction).sum()
        if dx or dw:
            loss.backward()

    # Without a reduction, backward computes the logits again.
    again = product if reduction == "none" else 0
    assert counted(lambda: step(False, False)) == product
    assert counted(lambda: step(True, False)) == 2 * product + again
    assert counted(lambda: step(True, True)) == 3 * product + again
    plain = counted(lambda: F.cross_entropy(F.linear(x, weight.clone().requires_grad_()), target).backward())
    assert counted(lambda: step(False, True)) == plain + again


# ------------------------------------------------------------------------------------------ transforms


def test_inference_mode(device):
    module, inputs = block(device)
    expected = module(*inputs)
    with torch.inference_mode():
        results = module(*inputs)
    assert all(r.is_inference() for r in results)
    assert_same(results, expected, rtol=0, atol=0)


def test_deterministic_algorithms(device):
    module, inputs = block(device)
    expected = losses_and_gradients(module, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(losses_and_gradients(module, inputs), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


def rms_norm_in_pytorch(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda x, w: f(x, w).sin().sum(), argnums=(0, 1)),
        lambda f: torch.func.jacrev(f, argnums=(0, 1)),
        lambda f: torch.func.vmap(torch.func.grad(lambda x, w: f(x, w).sin().sum()), in_dims=(0, None)),
    ],
    ids=["grad", "jacrev", "vmap of grad"],
)
def test_function_transforms(device, transform):
    """The transforms of reverse mode, as on PyTorch's own operators."""
    x = torch.randn(4, 8, device=device, dtype=torch.float64)
    weight = torch.randn(8, device=device, dtype=torch.float64)
    torch.testing.assert_close(
        transform(LF.rms_norm)(x, weight), transform(rms_norm_in_pytorch)(x, weight), rtol=1e-10, atol=1e-12
    )


def test_second_derivatives_by_transforms_are_refused(device):
    x = torch.randn(4, 8, device=device)
    first = torch.func.grad(lambda x: LF.swiglu(x, x).sum())
    with pytest.raises(RuntimeError, match="derivative for liger::swiglu_backward is not implemented"):
        torch.func.grad(lambda x: first(x).sum())(x)


def test_inplace_changes_of_saved_tensors_are_found(device):
    x, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(8, device=device)
    for change_input in (True, False):
        hidden = x * 1
        y, total = LF.add_rms_norm(hidden, hidden, weight)
        out = LF.rms_norm(hidden, weight)
        (hidden if change_input else total).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (out if change_input else y).sum().backward()


def test_nodes_have_names(device):
    """What `print` shows of a result, and what profilers and anomaly detection show of backward."""
    module, inputs = block(device)
    found, waiting = set(), [loss.grad_fn for loss in module(*inputs)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    ours = {node.name() for node in found if "liger" in node.name()}
    operators = ["RmsNorm", "Rope", "Swiglu", "CrossEntropy", "FusedLinearCrossEntropy"]
    assert ours >= {f"liger::{operator}Backward" for operator in operators}
    assert not any("anonymous" in name for name in ours)


def test_nodes_are_freed(device):
    """A result that its own node saves must not keep the node alive."""
    x = torch.randn(4, 8, device=device, requires_grad=True)
    gc.disable()
    try:
        for function in (LF.rms_norm, lambda x: LF.add_rms_norm(x, x)[1], LF.layer_norm):
            saved = torch.randn(4, 8, device=device)
            alive = weakref.ref(saved)
            hidden = x * saved
            del saved
            out = function(hidden)
            assert alive() is not None
            del out, hidden
            assert alive() is None
    finally:
        gc.enable()


def losses():
    """Every differentiable operator: name, function of its differentiable arguments, and their shapes."""
    angles = torch.randn(1, TOKENS, 8), torch.randn(1, TOKENS, 8)
    planes = torch.randn(3, 1, TOKENS, 8), torch.randn(3, 1, TOKENS, 8)
    target = torch.randint(CLASSES, (TOKENS,))
    row, heads, key_heads = (TOKENS, HIDDEN), (1, 4, TOKENS, 8), (1, 2, TOKENS, 8)
    head = (CLASSES, HIDDEN)
    return {
        "rms_norm": (LF.rms_norm, (row, (HIDDEN,))),
        "rms_norm without weight": (lambda x: LF.rms_norm(x, casting_mode="gemma"), (row,)),
        "add_rms_norm": (LF.add_rms_norm, (row, row, (HIDDEN,))),
        "add_rms_norm, sum alone": (lambda x, r: LF.add_rms_norm(x, r)[1], (row, row)),
        "layer_norm": (LF.layer_norm, (row, (HIDDEN,), (HIDDEN,))),
        "layer_norm, bias alone": (lambda x, b: LF.layer_norm(x, None, b), (row, (HIDDEN,))),
        "rope": (lambda q, k: LF.rope(q, k, *angles), (heads, key_heads)),
        "rope, q alone": (lambda q, k: LF.rope(q, k, *angles, True)[0], (heads, key_heads)),
        "mrope, k alone": (lambda q, k: LF.mrope(q, k, *planes, [1, 1, 2])[1], (heads, key_heads)),
        "swiglu": (LF.swiglu, (row, row)),
        "swiglu_packed": (LF.swiglu_packed, (row,)),
        "geglu": (lambda gate, up: LF.geglu(gate, up, "none"), (row, row)),
        "geglu_packed": (LF.geglu_packed, (row,)),
        "cross_entropy": (lambda x: LF.cross_entropy(x, target, softcap=5.0), ((TOKENS, CLASSES),)),
        "fused_linear_cross_entropy": (lambda x, w: LF.fused_linear_cross_entropy(x, w, target), (row, head)),
        "fused_linear_cross_entropy, none": (
            lambda x, w: LF.fused_linear_cross_entropy(x, w, target, reduction="none"),
            (row, head),
        ),
    }


@pytest.mark.parametrize("name", losses())
def test_compiled_autograd(name):
    function, shapes = losses()[name]
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def gradients():
        for argument in arguments:
            argument.grad = None
        outputs = function(*arguments)
        sum(o.tanh().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        return [argument.grad for argument in arguments]

    expected = gradients()
    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        assert_same(gradients(), expected, rtol=0, atol=0)
        assert_same(gradients(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_transforms_are_refused(device, transform):
    x = torch.randn(4, 8, device=device)
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not implemented"):
        transform(lambda x: LF.swiglu(x, x).sum())(x)


def test_forward_mode_is_refused(device):
    x = torch.randn(4, 8, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not implemented"):
            LF.swiglu(dual, dual)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(device):
    """Without gradients, vmap calls the operator once for each element of the batch."""
    x, weight = torch.randn(3, 4, 8, device=device), torch.randn(8, device=device)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: LF.rms_norm(x, weight))(x), LF.rms_norm(x, weight), rtol=0, atol=0
    )


# ------------------------------------------------------------------------------------------ modules


def modules():
    return [
        liger_nn.LigerRMSNorm(HIDDEN),
        liger_nn.LigerCrossEntropyLoss(weight=torch.rand(HIDDEN) + 0.1),
        liger_nn.LigerFusedLinearCrossEntropyLoss(ce_weight=torch.rand(CLASSES) + 0.1),
    ]


def result_of(module, device):
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    if isinstance(module, liger_nn.LigerCrossEntropyLoss):
        return module(x, torch.arange(TOKENS, device=device))
    if isinstance(module, liger_nn.LigerFusedLinearCrossEntropyLoss):
        weight = torch.randn(CLASSES, HIDDEN, generator=torch.Generator().manual_seed(2)).to(device)
        return module(weight, x, torch.arange(TOKENS, device=device))
    return module(x)


@pytest.mark.parametrize("position", range(3))
def test_modules_are_copied_and_pickled(device, position):
    module = modules()[position].to(device)
    expected = result_of(module, device)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin.state_dict().keys() == module.state_dict().keys()
        torch.testing.assert_close(result_of(twin, device), expected, rtol=0, atol=0)


def test_data_parallel_replica():
    """What `nn.DataParallel` makes of a module on each device: its tensors are no parameters any more."""
    module = liger_nn.LigerRMSNorm(HIDDEN)
    replica = module._replicate_for_data_parallel()
    replica._parameters = {}
    replica.weight = module.weight * 2
    x = torch.randn(TOKENS, HIDDEN)
    torch.testing.assert_close(replica(x), LF.rms_norm(x, module.weight * 2, 1e-6))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel():
    module = nn.Sequential(liger_nn.LigerRMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)).cuda()
    x = torch.randn(TOKENS, HIDDEN, device="cuda")
    torch.testing.assert_close(nn.DataParallel(module)(x), module(x))


def test_default_dtype_and_device(device):
    """New parameters follow the defaults; statistics and losses do not become wider or narrower."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            norm = liger_nn.LigerRMSNorm(HIDDEN)
            assert norm.weight.dtype == torch.bfloat16 and norm.weight.device.type == device
            x = torch.randn(TOKENS, HIDDEN)
            loss = LF.cross_entropy(norm(x), torch.zeros(TOKENS, dtype=torch.int64))
        assert loss.dtype == torch.float32 and loss.device.type == device
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------ CUDA


@pytest.mark.gpu
def test_two_streams_at_once():
    module, inputs = block("cuda")
    expected = losses_and_gradients(module, inputs)
    streams = [torch.cuda.Stream() for _ in range(2)]
    twins = [copy.deepcopy(module) for _ in streams]
    torch.cuda.synchronize()
    results = []
    for stream, twin in zip(streams, twins, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(5):
                result = losses_and_gradients(twin, inputs)
            results.append(result)
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected, rtol=0, atol=0)


def run_out_of_memory(reduction):
    tokens, hidden, classes = 4096, 1024, 65536
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(classes, (tokens,), device="cuda")

    def step():
        loss = LF.fused_linear_cross_entropy(x, weight, target, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), (x, weight))]

    expected = step()
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    failures = 0
    # Room for some of the buffers, not for all.
    for extra in (2**20, 2**26, 2**27, 2**28):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)
        try:
            step()
        except torch.OutOfMemoryError:
            failures += 1
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.cuda.memory_allocated() == before
    assert failures >= 2
    assert_same(step(), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_out_of_memory_leaves_the_process_usable(reduction):
    """The fused loss runs out of memory between its allocations, and works when called again.

    In a process of its own: memory that other tests have left in the allocator would do for the loss.
    """
    process = multiprocessing.get_context("spawn").Process(target=run_out_of_memory, args=(reduction,))
    process.start()
    process.join()
    assert process.exitcode == 0
