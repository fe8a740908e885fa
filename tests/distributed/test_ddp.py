"""Patched models under DistributedDataParallel and the Trainer, against one process on the same batches."""

import os

import pytest
import torch
import torch.distributed as dist
from tiny import Operators, tiny
from torch.nn.parallel import DistributedDataParallel

from liger_ops.transformers import install, patch, uninstall
from tests.distributed import training

OPTIONS = {
    "default": {},
    "find_unused_parameters": dict(find_unused_parameters=True),
    "static_graph": dict(static_graph=True),
    "bucket_view": dict(gradient_as_bucket_view=True),
}


def same_training(options, checkpointing):
    expected = training.alone()
    model = tiny()
    patch(model, strict=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    parallel = DistributedDataParallel(model, **options)
    with Operators() as operators:
        losses = training.train(parallel)
    assert operators.calls["fused_linear_cross_entropy"] == training.STEPS
    training.assert_same_training(losses, parallel, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_same_training(name, workers):
    workers(same_training, OPTIONS[name], False)


def test_activation_checkpointing(workers):
    workers(same_training, OPTIONS["static_graph"], True)


def frozen_and_unused():
    """A head without gradients, and parameters that the loss never reaches."""
    model, stock = tiny(), tiny()
    patch(model, strict=True)
    for m in (model, stock):
        m.lm_head.requires_grad_(False)
        m.unused = torch.nn.Linear(2, 2)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for seed in range(2):
        parallel(**training.mine(seed)).loss.backward()
        stock(**training.mine(seed)).loss.backward()
    for parameter, other in zip(model.parameters(), stock.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None
            continue
        dist.all_reduce(other.grad)
        torch.testing.assert_close(parameter.grad, other.grad / 2, rtol=1e-4, atol=1e-6)


def test_frozen_and_unused(workers):
    workers(frozen_and_unused)


def accumulation():
    """Two micro-batches a step, the first without communication."""
    expected = training.alone()
    model = tiny()
    patch(model, strict=True)
    parallel = DistributedDataParallel(model)
    optimizer = training.optimizer_of(parallel)
    losses = []
    for seed in range(training.STEPS):
        inputs, count = training.mine(seed), training.targets(training.parts(seed))
        rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
        with parallel.no_sync():
            first = parallel(**rows[0], num_items_in_batch=count).loss * 2
            first.backward()
        second = parallel(**rows[1], num_items_in_batch=torch.tensor(count)).loss * 2
        second.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(training.mean_over_processes(first + second))
    training.assert_same_training(losses, parallel, expected)


def test_accumulation(workers):
    workers(accumulation)


def trained(path, batch_size, **changes):
    """Losses and Trainer of ten steps with our flag."""
    trainer = training.trainer(
        path,
        tiny(tie_word_embeddings=False),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        use_cpu=True,
        use_liger=True,
        **changes,
    )
    with Operators() as operators:
        trainer.train()
    assert operators.calls["fused_linear_cross_entropy"] == 2 * training.STEPS
    return training.logged_losses(trainer), trainer


def trainer(path, average):
    """`average_tokens_across_devices`: the loss per target of the whole batch, whatever each process has."""
    install()
    try:
        losses, parallel = trained(path, 2, average_tokens_across_devices=average)
        # The same batches in one process.
        world = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        expected, one = trained(path, 4)
        os.environ.update(world)
        assert isinstance(parallel.model_wrapped, DistributedDataParallel) and one.args.world_size == 1
    finally:
        uninstall()
    if average:
        torch.testing.assert_close(losses, expected, rtol=2e-4, atol=0)  # logged with four digits
        whole = training.whole_parameters(parallel.model_wrapped)
        training.assert_same_parameters(whole, one.model)
    else:
        assert losses != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("average", [True, False])
def test_trainer(average, workers, tmp_path):
    workers(trainer, str(tmp_path), average)
