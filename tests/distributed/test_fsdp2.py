"""Patched models under PyTorch's FSDP2 (`fully_shard`), against one process on the same batches."""

import pytest
import torch
import torch.distributed as dist
from tiny import CALLS, Operators, text_model, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from liger_ops.transformers import patch
from tests.distributed import training
from tests.distributed.memory import peak_bytes

UNTIED = dict(tie_word_embeddings=False)
TIED = dict(tie_word_embeddings=True)


def shard(model, head="root", **policies):
    """Per block and root; the head in the root's group, in one of its own, or with its neighbours."""
    for layer in text_model(model).layers:
        fully_shard(layer, **policies)
    if head == "alone":
        fully_shard(model.lm_head, **policies)
    elif head == "with_norm":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **policies)
    elif head == "with_embedding":
        fully_shard([model.model.embed_tokens, model.lm_head], **policies)
    fully_shard(model, **policies)
    return model


class NoDTensor(Operators):
    """Counts calls, none of which may see a DTensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger":
            assert not any(isinstance(value, DTensor) for value in args), func
        return super().__torch_dispatch__(func, types, args, kwargs)


def same_training(head, when, tied, family):
    changes = (TIED if tied else UNTIED) | dict(family=family)
    expected = training.alone(**changes)
    model = tiny(**changes)
    if when == "before":
        patch(model, strict=True)
    shard(model, head)
    if when == "after":
        patch(model, strict=True)
    with NoDTensor() as operators:
        losses = training.train(model)
    assert operators.calls["fused_linear_cross_entropy"] == training.STEPS
    assert operators.calls["cross_entropy"] == 0
    assert operators.calls["rms_norm"] == training.STEPS * CALLS[family]["rms_norm"]
    training.assert_same_training(losses, model, expected)


@pytest.mark.parametrize(
    "head, when, tied, family",
    [
        ("root", "before", False, "llama"),
        ("root", "after", True, "llama"),
        ("alone", "before", False, "llama"),
        ("alone", "after", False, "gemma2"),
        ("with_norm", "before", False, "qwen2"),
        ("with_embedding", "after", True, "llama"),
    ],
)
def test_same_training(head, when, tied, family, workers):
    workers(same_training, head, when, tied, family)


BF16 = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed_precision(head):
    """Beside the unpatched model under the same policy: the head's products run in bfloat16 in both."""
    policy = MixedPrecisionPolicy(**BF16)
    stock = shard(tiny(**UNTIED), head, mp_policy=policy)
    # Rounding to bfloat16 grows from step to step.
    expected = training.train(stock, steps=3)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    # What the head's own policy would make of logits must not round the loss.
    own = dict(mp_policy=MixedPrecisionPolicy(**BF16, output_dtype=torch.bfloat16))
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    if head == "alone":
        fully_shard(model.lm_head, **own)
    fully_shard(model, mp_policy=policy)
    count = torch.tensor(float(training.targets(training.parts(0))) + 0.25)
    out = model(**training.mine(0), num_items_in_batch=count)
    whole = model(**training.mine(0), num_items_in_batch=1)
    assert out.loss.dtype == torch.float32
    # Not an integer, and not a number of bfloat16.
    torch.testing.assert_close(out.loss * count, whole.loss, rtol=1e-6, atol=0)
    losses = training.train(model, steps=3)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("head", ["root", "alone"])
def test_mixed_precision(head, workers):
    workers(mixed_precision, head)


def checkpointed_blocks(compiled):
    expected = training.alone(**UNTIED)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    for layer in model.model.layers:
        if compiled:
            layer.compile(backend="aot_eager")
    if not compiled:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    shard(model, "alone")
    with NoDTensor() as operators:
        losses = training.train(model)
    if not compiled:
        # Of a block's norms each runs again; the one before the head does not.
        assert operators.calls["rms_norm"] == training.STEPS * (2 * 4 + 1)
    training.assert_same_training(losses, model, expected)


def test_activation_checkpointing(workers):
    workers(checkpointed_blocks, False)


def test_compiled_blocks(workers):
    workers(checkpointed_blocks, True)


def cpu_offload():
    expected = training.alone(**UNTIED)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    shard(model, "alone", offload_policy=CPUOffloadPolicy(pin_memory=False))
    losses = training.train(model)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    training.assert_same_training(losses, model, expected)


def test_cpu_offload(workers):
    workers(cpu_offload)


def state_dict(path):
    """Saved sharded, loaded into an unsharded model that is not patched."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = tiny(**UNTIED)
    patch(model, strict=True)
    shard(model, "alone")
    training.train(model, steps=2)
    state = get_model_state_dict(model)
    assert all(isinstance(value, DTensor) for value in state.values())
    save(state, checkpoint_id=path)
    trained = {name: training.full(p.detach()) for name, p in model.named_parameters()}

    loaded = tiny(**UNTIED)
    state = loaded.state_dict()
    load(state, checkpoint_id=path)
    loaded.load_state_dict(state)
    training.assert_same_parameters(trained, loaded, rtol=0)

    other = tiny(**UNTIED)
    patch(other, strict=True)
    shard(other, "root")
    state = get_model_state_dict(other)
    load(state, checkpoint_id=path)
    set_model_state_dict(other, state)
    inputs = training.mine(7)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).loss, loaded(**inputs).loss, rtol=1e-6, atol=0)


def test_state_dict(workers, tmp_path):
    workers(state_dict, str(tmp_path))


def gradients_accumulate():
    """Two micro-batches a step, of which only the second reduces gradients."""
    expected, expected_model = training.alone(**UNTIED, steps=1)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    shard(model, "alone")
    inputs = training.mine(0)
    count = training.targets(training.parts(0))
    total = 0.0
    for row in range(2):
        model.set_requires_gradient_sync(row == 1)
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        loss = model(**part, num_items_in_batch=count).loss * dist.get_world_size()
        loss.backward()
        total += training.mean_over_processes(loss)
    training.optimizer_of(model).step()
    training.assert_same_training([total], model, (expected, expected_model))


def test_gradient_accumulation(workers):
    workers(gradients_accumulate)


def evaluation():
    """Without gradients: logits, and a loss on request without them."""
    stock = tiny(**UNTIED).eval()
    model = tiny(**UNTIED)
    patch(model, strict=True)
    shard(model, "alone").eval()
    inputs = training.mine(3)
    with torch.no_grad():
        expected = stock(**inputs)
        out = model(**inputs)
        fused = model(**inputs, skip_logits=True, return_token_accuracy=True, return_predicted_tokens=True)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(fused.loss, expected.loss, rtol=1e-5, atol=0)
    assert fused.logits is None
    assert torch.equal(fused.predicted_tokens[:, 3:-1], expected.logits.argmax(-1)[:, 3:-1])


def test_evaluation(workers):
    workers(evaluation)


def frozen_head():
    expected = tiny(**UNTIED)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    for m in (expected, model):
        m.lm_head.requires_grad_(False)
    shard(model, "alone")
    inputs = training.mine(0)
    loss = model(**inputs).loss
    loss.backward()
    expected_loss = expected(**inputs).loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad is not None


def test_frozen_head(workers):
    workers(frozen_head)


def device_mesh_of_two_dimensions():
    """Hybrid sharding: shards within pairs, replicas across them."""
    expected = training.alone(**UNTIED)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    shard(model, "alone", mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    training.assert_same_training(training.train(model), model, expected)


def test_hybrid_sharding(four_workers):
    four_workers(device_mesh_of_two_dimensions)


def prepared_by_accelerate(tied, mixed_precision):
    """Accelerate's own wrapping: blocks, embedding, and the last norm and the head as one group."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    changes = dict(tie_word_embeddings=tied)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=mixed_precision,
    )
    # On a CPU the launcher offers nothing but DDP; the function that wraps takes any device.
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    model = tiny(**changes)
    patch(model, strict=True)
    model = fsdp2_prepare_model(accelerator, model)
    assert type(model.lm_head).__name__ == "FSDPLinear"
    with NoDTensor() as operators:
        losses = training.train(model, steps=3 if mixed_precision else training.STEPS)
    assert operators.calls["cross_entropy"] == 0
    if mixed_precision is None:
        training.assert_same_training(losses, model, training.alone(**changes))
    else:
        torch.testing.assert_close(losses, training.alone(**changes)[0][:3], rtol=2e-2, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixed_precision", [None, "bf16"])
def test_prepared_by_accelerate(tied, mixed_precision, workers):
    workers(prepared_by_accelerate, tied, mixed_precision)


def loss_memory():
    """A step takes the workspace of the loss, 64 MiB here, and never the logits."""
    classes, rows, length = 8192, 64, 64
    model = tiny(vocab_size=classes, **UNTIED)
    patch(model, strict=True)
    shard(model, "alone")
    ids = torch.randint(3, classes, (rows, length))
    logits = 4 * rows * length * classes

    def step(**options):
        model(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()
        model.zero_grad()

    step()
    backbone = tiny(vocab_size=classes, **UNTIED).model
    activations = peak_bytes(lambda: backbone(input_ids=ids, use_cache=False)[0].sum().backward())
    # Beside the workspace: the head's whole weight and its gradient.
    assert peak_bytes(step) <= activations + 2**26 + 6 * 4 * classes * 32
    assert peak_bytes(lambda: step(skip_logits=False)) > 2 * logits > 2 * 2**26


def test_memory_of_the_loss(workers):
    workers(loss_memory)
