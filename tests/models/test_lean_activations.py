"""Lean activations: the same gradients, bit by bit, from less memory."""

import copy
import gc
import io

import pytest
import torch
import torch.distributed as dist
from tiny import (
    BATCH,
    LENGTH,
    MODELS,
    Operators,
    batch,
    forget_patches,
    in_dtype_of,
    step,
    text_model,
    tiny,
    train,
    twin,
)
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.allocations import Allocations
from liger_ops.nn import _lean, lean_contexts
from liger_ops.transformers import patch, patched

TOKENS = BATCH * LENGTH
OFF = dict(rope=False, rms_norm=False, fused_linear_cross_entropy=False)
REBUILT = ("rms_norm", "layer_norm", "swiglu", "swiglu_packed", "geglu")
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")


def lean(family="llama", device="cpu", **changes):
    model = tiny(family, device, **changes)
    report = patch(model, lean_activations=True, strict=True)
    return model, report


def both(family="llama", device="cpu", **changes):
    """A patched model without and one with lean activations, and the latter's report."""
    plain = tiny(family, device, **changes)
    patch(plain)
    model, report = lean(family, device, **changes)
    return plain, model, report


def kept_bytes(model, **inputs):
    """What one forward leaves allocated for its backward."""
    with Allocations(model) as allocations:
        out = model(**in_dtype_of(model, inputs))
    kept = allocations.kept_bytes()
    del out
    return kept


def promised(report):
    """Bytes per token in all layers of a kind, by the name of the layers."""
    rows = [row for row in report.patched if row.option == "lean_activations"]
    return {row.target: row.count * int(row.operator.split()[1]) for row in rows}


def hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def same(actual, expected):
    loss, gradients = actual
    expected_loss, expected_gradients = expected
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert hooks() is None
    assert not _lean._thread.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_same_bits_from_less_memory(family, dtype, device):
    plain, model, report = both(family, device, dtype=dtype)
    inputs = batch(device, family=family)
    same(step(model, **inputs), step(plain, **inputs))
    saved = kept_bytes(plain, **inputs) - kept_bytes(model, **inputs)
    if family not in ("mllama", "mllama_text", "qwen2_vl"):
        assert saved == sum(promised(report).values()) * TOKENS
    else:
        # Images have tokens of their own, and attention across keeps, where it runs, normalised heads.
        text = {name: size for name, size in promised(report).items() if "Vision" not in name}
        assert saved >= sum(text.values()) * TOKENS > 0


@pytest.mark.parametrize("family", MODELS)
def test_under_autocast(family, device):
    """Products keep 16-bit copies: those are computed again too."""
    plain, model, report = both(family, device)
    inputs = batch(device, family=family)
    with torch.autocast(device, torch.bfloat16):
        same(step(model, **inputs), step(plain, **inputs))
        saved = kept_bytes(plain, **inputs) - kept_bytes(model, **inputs)
    if family == "llama":
        # One copy for each of q, k and v, gate and up, and the MLP's result in the dtype of its products.
        hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
        assert saved == 2 * (5 * hidden + intermediate) * model.config.num_hidden_layers * TOKENS
    assert saved > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
def test_each_is_computed_again_once(family, device):
    plain, model, _ = both(family, device)
    inputs = batch(device, family=family)
    with Operators() as before:
        plain(**inputs).loss.backward()
    with Operators() as operators:
        model(**inputs).loss.backward()
    layers = model.config.num_hidden_layers
    extra = {name: operators.calls[name] - before.calls[name] for name in REBUILT}
    gate = {"gemma2": "geglu", "phi3": "swiglu_packed", "mixtral": "swiglu_packed"}.get(family, "swiglu")
    assert {name: n for name, n in extra.items() if n} == {"rms_norm": 2 * layers, gate: layers}


def test_trains_like_without(device):
    plain, model, _ = both(device=device)
    assert train(model, 5, device=device) == train(plain, 5, device=device)


def test_undo(device):
    plain, model, report = both(device=device)
    inputs = batch(device)
    kept = kept_bytes(plain, **inputs)
    again = patch(model, lean_activations=True)
    assert all(row.already for row in again.patched if row.option == "lean_activations")
    again.undo()
    assert kept_bytes(model, **inputs) < kept
    report.undo()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    with patched(model):
        assert kept_bytes(model, **inputs) == kept


def test_only_the_mlp(device):
    model = tiny(device=device)
    report = patch(model, lean_activations=True, **OFF)
    config = model.config
    assert promised(report) == {"LlamaDecoderLayer": 4 * config.intermediate_size * config.num_hidden_layers}


def test_refusals():
    model = tiny()
    report = patch(model, lean_activations=True, swiglu=False, **OFF)
    assert [row.reason for row in report.skipped] == [
        "no layer runs an operator whose result could be computed again"
    ]
    report = patch(model_type="llama", lean_activations=True)
    assert [row.reason for row in report.skipped] == ["it hooks the layers of a model: pass the model"]
    with pytest.raises(ValueError, match="pass the model"):
        patch(model_type="llama", lean_activations=True, strict=True)


def test_layer_of_a_model_without_a_record(device):
    from tiny import TEXT
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    plain = Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8)).to(device)
    model = twin(plain)
    patch(plain)
    report = patch(model, lean_activations=True)
    inputs = batch(device)
    same(step(model, **inputs), step(plain, **inputs))
    assert promised(report).keys() == {"Qwen3DecoderLayer"}
    saved = kept_bytes(plain, **inputs) - kept_bytes(model, **inputs)
    assert saved == sum(promised(report).values()) * TOKENS


def test_two_backwards_through_one_graph(device):
    plain, model, _ = both(device=device)
    gradients = []
    for one in (plain, model):
        loss = one(**batch(device)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters()})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_gradients_of_parts(device):
    plain, model, _ = both(device=device)
    results = []
    for one in (plain, model):
        layer = text_model(one).layers[0]
        loss = one(**batch(device)).loss
        wanted = [layer.self_attn.k_proj.weight], [layer.mlp.up_proj.weight, layer.input_layernorm.weight]
        results.append([g for part in wanted for g in torch.autograd.grad(loss, part, retain_graph=True)])
        if one is model:
            # A backward that asks for one of three gives back what it computed for all of them. The gradient
            # is held: the engine's thread on CUDA lets go of it some time after the call has returned.
            with Allocations(model) as allocations:
                gradient = torch.autograd.grad(loss, wanted[0], retain_graph=True)[0]
            assert allocations.kept_bytes() == gradient.untyped_storage().nbytes()
        loss.backward()
        results[-1] += [p.grad for p in one.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_outlives_the_graph(device):
    """Neither a cycle through what nodes return and save, nor what backward computed again."""
    model, _ = lean(device=device)
    gc.collect()
    gc.disable()
    try:
        with Allocations(model) as allocations:
            out = model(**batch(device))
            out.loss.backward()
            model.zero_grad(set_to_none=True)
            del out
            out = model(**batch(device))
            del out
        assert allocations.kept_bytes() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_in_a_layer(error, device):
    plain, model, _ = both(device=device)
    inputs = batch(device)

    def fail(*_):
        raise error("in between")

    for module in (text_model(model).layers[1].mlp.down_proj, text_model(model).layers[1]):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(error, match="in between"):
            model(**inputs)
        handle.remove()
        if error is ValueError:
            assert hooks() is None
        same(step(model, **inputs), step(plain, **inputs))
        assert hooks() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_comes_first(reentrant, device):
    plain, model, _ = both(device=device)
    for one in (plain, model):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch(device)
    assert kept_bytes(model, **inputs) == kept_bytes(plain, **inputs)
    same(step(model, **inputs), step(plain, **inputs))
    same(step(model, **inputs), step(plain, **inputs))


def test_selective_checkpointing_comes_first(device):
    plain, model, _ = both(device=device)
    products = [torch.ops.aten.mm.default]

    def policy(ctx, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    for one in (plain, model):
        one.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(policy)}
        )
    inputs = batch(device)
    same(step(model, **inputs), step(plain, **inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_within_a_layer(reentrant, device):
    """The MLP keeps only its input then, which is computed again as well."""
    plain, model, _ = both(device=device)
    for one in (plain, model):
        for layer in text_model(one).layers:
            forward = layer.mlp.forward

            def checkpointed(x, forward=forward):
                return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=reentrant)

            layer.mlp.forward = checkpointed
    inputs = batch(device)
    same(step(model, **inputs), step(plain, **inputs))
    assert kept_bytes(model, **inputs) < kept_bytes(plain, **inputs)


def test_other_hooks_around_come_first(device):
    plain, model, _ = both(device=device)
    inputs = batch(device)
    expected = step(plain, **inputs)
    with save_on_cpu():
        same(step(model, **inputs), expected)
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t.detach(), lambda t: t):
        loss = model(**inputs).loss
    loss.backward()
    assert len(packed) > 20
    same(step(model, **inputs), expected)


def test_other_hooks_within_come_first(device):
    plain, model, _ = both(device=device)
    inputs = batch(device)
    expected = step(plain, **inputs)
    for layer in text_model(model).layers:
        forward = layer.mlp.forward

        def offloaded(x, forward=forward):
            with save_on_cpu():
                return forward(x)

        layer.mlp.forward = offloaded
    same(step(model, **inputs), expected)


def test_without_gradients_nothing_is_hooked(device):
    model, _ = lean(device=device)
    seen = []
    text_model(model).layers[0].mlp.register_forward_pre_hook(
        lambda *_: seen.append(bool(hooks() or _lean._thread.layers))
    )
    inputs = batch(device)
    with torch.no_grad():
        model(**inputs)
    with torch.inference_mode():
        model(**inputs)
    tokens = model.eval().generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (BATCH, LENGTH + 4)
    assert len(seen) > 3
    assert not any(seen)


def test_kept_tensor_written_to(device):
    model, _ = lean(device=device)
    inputs = batch(device)
    for find in (lambda layer: layer.input_layernorm.weight, lambda layer: layer.self_attn.o_proj.weight):
        loss = model(**inputs).loss
        with torch.no_grad():
            find(text_model(model).layers[0]).mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("under_no_grad", [False, True])
def test_result_written_to(under_no_grad, device):
    """What was written to before it was saved is kept, not computed again."""
    plain, model, _ = both(device=device)

    def double(module, args, output):
        with torch.set_grad_enabled(not under_no_grad):
            output.mul_(2)

    for one in (plain, model):
        for layer in text_model(one).layers:
            layer.input_layernorm.register_forward_hook(double)
    inputs = batch(device)
    same(step(model, **inputs), step(plain, **inputs))
    with torch.autocast(device, torch.bfloat16):
        same(step(model, **inputs), step(plain, **inputs))


def test_copies(device):
    plain, model, report = both(device=device)
    inputs = batch(device)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same(step(copied, **inputs), step(plain, **inputs))
        assert kept_bytes(copied, **inputs) == kept_bytes(model, **inputs)
    report.undo()
    forget_patches()
    assert kept_bytes(copied, **inputs) == kept_bytes(plain, **inputs)
    same(step(copied, **inputs), step(plain, **inputs))


LORA = dict(r=4, init_lora_weights=False, lora_dropout=0.3)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [PROJECTIONS, ["q_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters(dtype, targets, device):
    """Adapters keep float32 beside 16-bit weights; what their dropout drew is kept, not drawn again."""
    peft = pytest.importorskip("peft")

    def adapted(**options):
        model = tiny(device=device, dtype=dtype)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **LORA)).train()
        patch(model, **options)
        return model

    inputs = batch(device)
    results, kept = [], []
    for model in (adapted(), adapted(lean_activations=True)):
        torch.manual_seed(4)
        results.append(step(model, **inputs))
        kept.append(kept_bytes(model, **inputs))
    same(results[1], results[0])
    assert any("lora_A" in name for name in results[0][1])
    assert kept[1] <= kept[0]
    # Without dropout the adapters save what the norms return, or its copy in float32.
    for model in (adapted(), adapted(lean_activations=True)):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0
        model.eval()
        results.append(step(model, **inputs))
        kept.append(kept_bytes(model, **inputs))
    same(results[3], results[2])
    assert kept[3] < kept[2]


@pytest.fixture
def group(tmp_path, device):
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2", "phi3"])
def test_fully_sharded(family, when, group, device):
    def sharded(**options):
        model = tiny(family, device)
        if when == "before":
            patch(model, **options)
        mesh = init_device_mesh(device, (1,))
        for layer in text_model(model).layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if when == "after":
            patch(model, **options)
        return model

    inputs = batch(device, family=family)
    results = []
    for model in (sharded(), sharded(lean_activations=True)):
        for _ in range(2):
            loss, gradients = step(model, **inputs)
        results.append((loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}))
    same(results[1], results[0])


def test_norms_sharded_by_themselves(group, device):
    """Their weights are freed when the products that follow ask for their results."""
    model, _ = lean(device=device)
    mesh = init_device_mesh(device, (1,))
    for layer in text_model(model).layers:
        fully_shard(layer.input_layernorm, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**batch(device)).loss
    with pytest.raises(RuntimeError, match="freed before.*shard whole layers"):
        loss.backward()


def test_data_parallel(group, device):
    plain, model, _ = both(device=device)
    inputs = batch(device)
    results = []
    for one in (plain, model):
        parallel = torch.nn.parallel.DistributedDataParallel(one)
        for _ in range(2):
            one.zero_grad()
            loss = parallel(**inputs).loss
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in one.named_parameters()}))
    same(results[1], results[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_compiled(family, device):
    torch.compiler.reset()
    plain, model, _ = both(family, device)
    inputs = batch(device)
    expected_loss, expected = step(plain, **inputs)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    # Parts that are compiled, in a layer that is not.
    for layer in text_model(model).layers:
        layer.mlp.compile(backend="aot_eager")
    loss, gradients = step(model, **inputs)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_contexts_for_a_compiled_model(device):
    torch.compiler.reset()
    model = tiny(device=device)
    patch(model)
    model.config.use_cache = False
    inputs = batch(device)
    expected_loss, expected = step(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lean_contexts})
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_loading(tmp_path):
    from liger_ops.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel_to_llama

    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, lean_activations=True)
    assert all(_lean.is_lean(layer) for layer in text_model(loaded).layers)
    apply_liger_kernel_to_llama(model=model, lean_activations=True)
    assert all(_lean.is_lean(layer) for layer in text_model(model).layers)
