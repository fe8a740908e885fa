"""Patched models under DeepSpeed's ZeRO-3: outside a call of its module, a parameter has no elements."""

import os

import pytest
import torch
import torch.distributed as dist
from tiny import Operators, tiny

from liger_ops.transformers import patch
from tests.distributed import training

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="pip install deepspeed")


def engine_of(model):
    import deepspeed

    # It would compile an all-reduce through shared memory, which gloo has.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    config = dict(
        train_micro_batch_size_per_gpu=2,
        zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        gradient_clipping=0.0,  # 1 by default
    )
    return deepspeed.initialize(model=model, optimizer=training.optimizer_of(model), config=config)[0]


def same_training(tied, when):
    import deepspeed

    changes = dict(tie_word_embeddings=tied)
    expected = training.alone(**changes)
    model = tiny(**changes)
    if when == "before":
        patch(model, strict=True)
    engine = engine_of(model)
    if when == "after":
        assert not patch(model).skipped
    assert model.lm_head.weight.numel() == 0
    losses = []
    with Operators() as operators:
        for seed in range(training.STEPS):
            count = training.targets(training.parts(seed))
            loss = engine(**training.mine(seed), num_items_in_batch=count).loss * dist.get_world_size()
            engine.backward(loss)
            engine.step()
            losses.append(training.mean_over_processes(loss))
    assert operators.calls["fused_linear_cross_entropy"] == training.STEPS
    assert operators.calls["cross_entropy"] == 0
    assert model.lm_head.weight.numel() == 0, "the head's weight stays gathered after its call"
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.assert_same_parameters(whole, expected[1])
    # Logits, in evaluation.
    engine.eval()
    with torch.no_grad():
        out = engine(**training.mine(0))
        fused = engine(**training.mine(0), skip_logits=True)
    assert out.logits is not None and fused.logits is None
    torch.testing.assert_close(out.loss, fused.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied, when", [(False, "before"), (False, "after"), (True, "before")])
def test_same_training(tied, when, workers):
    workers(same_training, tied, when)


def empty_shard():
    """A weight that nobody gathers is an error, never another loss."""
    from liger_ops.functional import fused_linear_cross_entropy

    model = tiny(tie_word_embeddings=False)
    patch(model, strict=True)
    engine_of(model)
    hidden = torch.randn(4, 32)
    with pytest.raises(ValueError, match="liger::fused_linear_cross_entropy: weight"):
        fused_linear_cross_entropy(hidden, model.lm_head.weight, torch.arange(4))


def test_empty_shard(workers):
    workers(empty_shard)
