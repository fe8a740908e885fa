"""What two GPUs and NCCL change: launchers that start processes only there, FSDP1 by the Trainer, sums."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import Operators, tiny
from torch.distributed.fsdp import FullyShardedDataParallel

from liger_ops.distributed import vocab_parallel_fused_linear_cross_entropy
from liger_ops.functional import fused_linear_cross_entropy
from liger_ops.transformers import install, uninstall
from tests.distributed import training
from tests.distributed.workers import WorkerError, Workers

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def gpu_workers():
    workers = Workers(2, "nccl")
    yield workers
    workers.close()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_launch(name, tmp_path):
    if name == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "examples" / "distributed" / f"{name}.yaml")]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "accelerate_loop.py"), "--output", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "liger::fused_linear_cross_entropy" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    training.assert_saved_whole(tmp_path)


def trained(path, use_liger):
    """Losses of ten steps of the Trainer under FSDP1."""
    trainer = training.trainer(
        path,
        tiny(tie_word_embeddings=False),
        per_device_train_batch_size=2,
        use_liger=use_liger,
        fsdp=True,
        fsdp_config={"version": 1, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )
    with Operators() as operators:
        trainer.train()
    assert isinstance(trainer.model_wrapped, FullyShardedDataParallel)
    assert bool(operators.calls["fused_linear_cross_entropy"]) == use_liger
    return training.logged_losses(trainer)


def trainer_fsdp1(path):
    install()
    try:
        torch.testing.assert_close(trained(path, True), trained(path, False), rtol=2e-4, atol=0)
    finally:
        uninstall()


def test_trainer_fsdp1(gpu_workers, tmp_path):
    gpu_workers(trainer_fsdp1, str(tmp_path))


def vocab_parallel(dtype, accum_dtype, rtol):
    """Loss and gradients of a head spread over the GPUs, against one GPU with all classes in float32."""
    tokens, hidden, classes = 300, 128, 1000
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, hidden, generator=generator).cuda().to(dtype)
    weight = (torch.randn(classes, hidden, generator=generator) * 0.2).cuda().to(dtype)
    target = torch.randint(classes, (tokens,), generator=generator).cuda()
    target[::7] = -100

    whole = [tensor.detach().clone().float().requires_grad_() for tensor in (x, weight)]
    expected = fused_linear_cross_entropy(*whole, target)
    expected.backward()

    rows = slice(dist.get_rank() * classes // 2, (dist.get_rank() + 1) * classes // 2)
    mine = [x.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
    # Several chunks, so that the weight's gradient is accumulated.
    loss = vocab_parallel_fused_linear_cross_entropy(
        *mine, target, accum_dtype=accum_dtype, workspace_bytes=64 * classes * 2
    )
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=rtol, atol=0)
    for gradient, reference in ((mine[0].grad, whole[0].grad), (mine[1].grad, whole[1].grad[rows])):
        assert (gradient.float() - reference).norm() <= rtol * reference.norm()


@pytest.mark.parametrize(
    "dtype, accum_dtype, rtol",
    [
        (torch.float32, None, 1e-4),
        (torch.bfloat16, None, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.float16, torch.float32, 2e-3),
    ],
)
def test_vocab_parallel(dtype, accum_dtype, rtol, gpu_workers):
    gpu_workers(vocab_parallel, dtype, accum_dtype, rtol)


def bad_target():
    x = torch.randn(8, 16, device="cuda")
    weight = torch.randn(10, 16, device="cuda")
    # A good one first: cuBLAS is made at its first use, and would report the failed assertion as its own.
    good = torch.zeros(8, dtype=torch.int64, device="cuda")
    vocab_parallel_fused_linear_cross_entropy(x, weight, good)
    target = torch.full((8,), 20, device="cuda")
    vocab_parallel_fused_linear_cross_entropy(x, weight, target)
    torch.cuda.synchronize()


def test_bad_target():
    workers = Workers(2, "nccl")
    with pytest.raises(WorkerError, match="assert"):
        workers(bad_target)
    workers.close(kill=True)
