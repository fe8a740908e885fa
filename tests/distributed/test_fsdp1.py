"""Patched models under FSDP1 (`FullyShardedDataParallel`): by hand, and by the Trainer."""

import functools

import pytest
import torch
from tiny import Operators, tiny
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from liger_ops.transformers import patch
from tests.distributed import training

UNTIED = dict(tie_word_embeddings=False)


def wrapped(model, head, **options):
    def own_unit(module):
        return isinstance(module, LlamaDecoderLayer) or (head and module is model.lm_head)

    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=own_unit)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def whole_parameters(model):
    """By the names that the model had, also where FSDP has made one flat parameter of many."""
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return model.state_dict()


def same_training(head, when, use_orig_params, tied):
    changes = dict(tie_word_embeddings=tied)
    expected = training.alone(**changes)
    model = tiny(**changes)
    if when == "before":
        patch(model, strict=True)
    sharded = wrapped(model, head, use_orig_params=use_orig_params)
    if when == "after":
        assert not patch(sharded.module).skipped
    with Operators() as operators:
        losses = training.train(sharded)
    assert operators.calls["fused_linear_cross_entropy"] == training.STEPS
    assert operators.calls["cross_entropy"] == 0
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    parameters = whole_parameters(sharded)
    if tied:
        del parameters["lm_head.weight"]
    training.assert_same_parameters(parameters, expected[1])


@pytest.mark.parametrize(
    "head, when, use_orig_params, tied",
    [
        (True, "before", True, False),
        (True, "after", True, False),
        (True, "before", False, False),
        (False, "before", True, True),
        (False, "after", True, False),
    ],
)
def test_same_training(head, when, use_orig_params, tied, workers):
    workers(same_training, head, when, use_orig_params, tied)


def mixed_precision():
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = training.train(wrapped(tiny(**UNTIED), True, use_orig_params=True, mixed_precision=policy), 3)
    model = tiny(**UNTIED)
    patch(model, strict=True)
    sharded = wrapped(model, True, use_orig_params=True, mixed_precision=policy)
    torch.testing.assert_close(training.train(sharded, 3), expected, rtol=5e-3, atol=0)


def test_mixed_precision(workers):
    workers(mixed_precision)
