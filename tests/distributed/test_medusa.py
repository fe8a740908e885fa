"""Medusa heads on a base under FSDP2, against one process on the same batches."""

import pytest
import torch
from tiny import tiny
from torch.distributed.fsdp import fully_shard

from liger_ops.medusa import add_medusa_heads
from liger_ops.transformers import patch
from tests.distributed import training

STEPS = 5


def with_heads(stage):
    base = tiny(tie_word_embeddings=False)
    patch(base, strict=True)
    model = add_medusa_heads(base, num_heads=3, stage=stage)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in model.heads:
            head[0].linear.weight.normal_(std=0.1, generator=generator)
    return model.train()


def same_training(stage, head):
    expected = with_heads(stage)
    optimizer = training.optimizer_of(expected)
    expected_losses = []
    for seed in range(STEPS):
        inputs = training.parts(seed)
        together = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
        loss = expected(**together, num_items_in_batch=training.targets(inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected_losses.append(loss.item())

    model = with_heads(stage)
    for layer in model.base.model.layers:
        fully_shard(layer)
    if head == "alone":
        fully_shard(model.base.lm_head)
    fully_shard(model)
    losses = training.train(model, steps=STEPS)
    training.assert_same_training(losses, model, (expected_losses, expected))


@pytest.mark.parametrize("stage, head", [(1, "root"), (2, "root"), (2, "alone")])
def test_same_training(stage, head, workers):
    workers(same_training, stage, head)
