"""Patched models under tensor parallelism: transformers' own plan, and PyTorch's `parallelize_module`."""

import pytest
import torch
from tiny import Operators, batch, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from liger_ops.transformers import patch
from tests.distributed import training

UNTIED = dict(tie_word_embeddings=False)
VOCAB = 128


def train(model, batches, **options):
    """Losses of steps on the same batch in every process, as tensor parallelism wants it."""
    optimizer = training.optimizer_of(model)
    losses = []
    for inputs in batches:
        loss = model(**inputs, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(model, **changes):
    """Ten steps like those of one unpatched process; logits of all classes nowhere."""
    batches = [batch(seed=seed) for seed in range(training.STEPS)]
    stock = tiny(**changes)
    expected = train(stock, batches)
    with Operators() as operators, NoLogits():
        losses = train(model, batches)
    assert operators.calls["rms_norm"] == training.STEPS * 5
    training.assert_same_training(losses, model, (expected, stock))
    return operators


class NoLogits(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a result has all classes for every token."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            tokens = 2 * 12
            if type(value) is torch.Tensor and value.is_floating_point():
                assert value.numel() < tokens * VOCAB or value.shape[-1] != VOCAB, (func, value.shape)
        return result


def automatic(path, when):
    """`from_pretrained(tp_plan="auto")`."""
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32).train()
    assert isinstance(model.lm_head.weight, DTensor)
    report = patch(model, strict=True)
    assert not report.skipped
    compare(model, **UNTIED)
    # Logits are gathered by the model's own plan, and the loss from them is the same.
    inputs = batch(seed=50)
    with torch.no_grad():
        fused = model(**inputs, return_token_accuracy=True, return_predicted_tokens=True)
        logits = model(**inputs, skip_logits=False, return_token_accuracy=True)
    torch.testing.assert_close(fused.loss, logits.loss, rtol=1e-5, atol=0)
    assert fused.logits is None and logits.logits.shape[-1] == VOCAB
    assert fused.token_accuracy == logits.token_accuracy
    kept = inputs["labels"][:, 1:] != -100
    assert torch.equal(fused.predicted_tokens[:, :-1][kept], logits.logits.argmax(-1)[:, :-1][kept])
    return fused.loss.item()


def test_transformers_plan(workers, tmp_path):
    tiny(**UNTIED).save_pretrained(tmp_path)
    first, second = workers(automatic, str(tmp_path), "after")
    assert first == second


def plan_of(model, sequence, head):
    """PyTorch's plan for a LLaMA, with the norms on a shard of the sequence or on all of it."""
    plan = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1) if sequence else Replicate()
        ),
        "lm_head": head,
    }
    if sequence:
        plan["model.norm"] = SequenceParallel()
    for i in range(len(model.model.layers)):
        layer = f"model.layers.{i}."
        back = RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()
        plan |= {layer + f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {layer + f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {layer + "self_attn.o_proj": back, layer + "mlp.down_proj": back}
        if sequence:
            plan |= {layer + "input_layernorm": SequenceParallel()}
            plan |= {layer + "post_attention_layernorm": SequenceParallel()}
            plan[layer + "self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            )
            plan[layer + "mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
            )
    return plan


class ShardedPositions(torch.nn.Module):
    """transformers makes positions from the embeddings, which are a shard: they are given instead."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, attention_mask, **options):
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        return self.model(
            input_ids=input_ids, labels=labels, position_ids=positions, use_cache=False, **options
        )


def own_plan(when, layouts):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tiny(**UNTIED)
    if when == "before":
        patch(model, strict=True)
    head = {
        "gathered": ColwiseParallel(output_layouts=Replicate()),
        "shards": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }[layouts]
    parallelize_module(model, mesh, plan_of(model, sequence=False, head=head))
    if when == "after":
        assert not patch(model, strict=True).skipped
    compare(model, **UNTIED)
    inputs = batch(seed=50)
    with torch.no_grad():
        fused = model(**inputs).loss
        # With classes left in shards, the loss from logits exchanges two numbers a token too.
        torch.testing.assert_close(model(**inputs, skip_logits=False).loss, fused, rtol=1e-5, atol=0)


@pytest.mark.parametrize("when, layouts", [("before", "gathered"), ("after", "shards")])
def test_own_plan(when, layouts, workers):
    workers(own_plan, when, layouts)


def sequence_parallel():
    """Norms on DTensors, a shard of the sequence each; the head's own hook gathers its input."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tiny(**UNTIED)
    patch(model, strict=True)
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, plan_of(model, sequence=True, head=head))
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.to_local().shape))
    batches = [batch(seed=seed) for seed in range(training.STEPS)]
    stock = tiny(**UNTIED)
    expected = train(stock, batches)
    with NoLogits():
        losses = train(ShardedPositions(model), batches)
    assert set(seen) == {(2, 6, 32)}
    training.assert_same_training(losses, model, (expected, stock))


def test_sequence_parallel(workers):
    workers(sequence_parallel)


def two_dimensions():
    """FSDP2 over pairs, tensor parallelism within them, the head sharded by both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tiny(**UNTIED)
    patch(model, strict=True)
    head = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh["tp"], plan_of(model, sequence=False, head=head))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model.lm_head, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    stock = tiny(**UNTIED)
    parts = [[batch(seed=2 * step + r) for r in range(2)] for step in range(training.STEPS)]
    together = [{name: torch.cat([p[name] for p in pair]) for name in pair[0]} for pair in parts]
    expected = train(stock, together)
    with NoLogits():
        losses = train(model, [pair[mesh["dp"].get_local_rank()] for pair in parts])
    # As many targets in every part, so that the mean of means is the mean.
    means = [training.mean_over_processes(torch.tensor(loss)) for loss in losses]
    training.assert_same_training(means, model, (expected, stock))


def test_fsdp_and_tensor_parallel(four_workers):
    four_workers(two_dimensions)


def little_traffic():
    """Of the head's loss: two numbers a token, and the sum of the input's gradient."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tiny(**UNTIED)
    patch(model, strict=True)
    head = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"lm_head": head})
    with CommDebugMode() as traffic:
        model(**batch()).loss.backward()
    counts = {str(op): count for op, count in traffic.get_comm_counts().items()}
    assert sum(counts.values()) == 3 and all("all_reduce" in op for op in counts), counts


def test_little_traffic(workers):
    workers(little_traffic)


def uneven_classes():
    mesh = init_device_mesh("cpu", (2,))
    changes = UNTIED | dict(vocab_size=127, lm_head_bias=True)
    model = tiny(**changes)
    patch(model, strict=True)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    compare(model, **changes)


def test_uneven_classes_and_bias(workers):
    workers(uneven_classes)


def other_placements():
    """Heads that the loss cannot be computed from are called, with the reason in the report."""
    mesh = init_device_mesh("cpu", (2,))
    model = tiny(**UNTIED)
    parallelize_module(model, mesh, {"lm_head": RowwiseParallel(input_layouts=Replicate())})
    report = patch(model)
    assert "placements (Shard(dim=1),)" in report.skipped[0].reason
    inputs = batch()
    torch.testing.assert_close(model(**inputs).loss, tiny(**UNTIED)(**inputs).loss, rtol=1e-5, atol=0)


def test_other_placements(workers):
    workers(other_placements)
