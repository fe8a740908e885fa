"""Patched models under FSDP2, in one process: sharded parameters in and around the patched forwards."""

import pytest
import torch
import torch.distributed as dist
from tiny import CALLS, MODELS, Operators, assert_same_gradients, batch, step, text_model, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liger_ops.transformers import patch


@pytest.fixture
def mesh(tmp_path, device):
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def shard(model, mesh, head):
    for layer in text_model(model).layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("head", [False, True], ids=["head_in_root", "head_alone"])
@pytest.mark.parametrize("family", MODELS)
def test_fully_shard(family, head, when, mesh, device):
    # A tied head cannot be sharded apart from the embedding.
    untied = {} if family.startswith("mllama") else dict(tie_word_embeddings=False)
    loss, gradients = step(tiny(family, device, **untied), **batch(device, family=family))
    model = tiny(family, device, **untied)
    if when == "before":
        patch(model)
    shard(model, mesh, head)
    if when == "after":
        patch(model)
    with Operators() as operators:
        out = model(**batch(device, family=family))
        out.loss.backward()
    # A head that is sharded alone is gathered by its own hooks: the loss runs inside its call.
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert operators.calls["cross_entropy"] == 0
    assert operators.calls["rms_norm"] == CALLS[family]["rms_norm"]
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-5, atol=0)
    gathered = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_same_gradients(gathered, gradients)
