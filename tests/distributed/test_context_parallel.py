"""A sequence in two parts: the Trainer hands each process its `shift_labels`, and the loss is the whole's."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from tiny import Operators, batch, tiny
from transformers import AttentionInterface

from liger_ops.transformers import patch
from tests.distributed import training

LENGTH = 12


def attention_over_all_keys(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention of this process's queries to the keys of all processes: what ring attention computes."""
    group = dist.group.WORLD
    key, value = (
        collectives.all_gather_tensor_autograd(t.contiguous(), 2, group).repeat_interleave(
            module.num_key_value_groups, dim=1
        )
        for t in (key, value)
    )
    size = query.shape[2]
    first = dist.get_rank() * size
    mask = torch.arange(first, first + size)[:, None] >= torch.arange(key.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def same_training():
    expected = training.alone(tie_word_embeddings=False)
    AttentionInterface.register("over_all_keys", attention_over_all_keys)
    model = tiny(tie_word_embeddings=False)
    patch(model, strict=True)
    model.set_attn_implementation("over_all_keys")
    optimizer = training.optimizer_of(model)
    size = LENGTH // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    losses = []
    with Operators() as operators:
        for seed in range(training.STEPS):
            inputs = training.parts(seed)
            together = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
            # Shifted before the sequence is cut: the last token of a part has its target in the next one.
            shift_labels = torch.nn.functional.pad(together["labels"], (0, 1), value=-100)[:, 1:]
            loss = model(
                input_ids=together["input_ids"][:, mine],
                position_ids=torch.arange(LENGTH)[None, mine],
                labels=together["labels"][:, mine],
                shift_labels=shift_labels[:, mine].contiguous(),
                num_items_in_batch=(shift_labels != -100).sum(),
                use_cache=False,
            ).loss
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(training.mean_over_processes(loss) * dist.get_world_size())
    assert operators.calls["fused_linear_cross_entropy"] == training.STEPS
    training.assert_same_training(losses, model, expected)


def test_same_training(workers):
    workers(same_training)


def shift_labels_alone():
    """Without `labels`, a loss beside the logits, or alone on request: as without context parallelism."""
    model = tiny()
    patch(model, strict=True)
    inputs = batch(seed=4)
    labels = inputs.pop("labels")
    whole = model(**inputs, labels=labels).loss
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    out = model(**inputs, shift_labels=shifted)
    fused = model(**inputs, shift_labels=shifted, skip_logits=True)
    assert out.logits is not None and fused.logits is None
    torch.testing.assert_close(out.loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.loss, whole, rtol=1e-6, atol=0)


def test_shift_labels_alone(workers):
    workers(shift_labels_alone)
