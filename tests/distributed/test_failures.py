"""What must not happen: a hang when a process is gone, and memory that the loss should not take."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from liger_ops.distributed import vocab_parallel_fused_linear_cross_entropy
from tests.distributed.memory import peak_bytes
from tests.distributed.workers import WorkerError, Workers


def dies(step):
    for i in range(10):
        if i == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        x, w = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
        vocab_parallel_fused_linear_cross_entropy(x, w, torch.arange(8)).backward()


def test_killed_worker():
    workers = Workers(2)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 died with exit code -9"):
        workers(dies, 2)
    assert time.monotonic() - start < 60
    assert not workers.processes


SCRIPT = """
import torch.distributed as dist
from tests.distributed.test_failures import dies
dist.init_process_group("gloo")
dies(3)
"""


def test_killed_under_torchrun(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode != 0
    assert "script.py FAILED" in done.stderr and "ImportError" not in done.stderr


def loss_memory():
    """Of the vocabulary-parallel loss: results, the workspace, and a few numbers a token."""
    tokens, hidden, classes = 4096, 64, 8192
    workspace = 2**22
    width = classes // 2
    x = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(width, hidden, requires_grad=True)
    target = torch.randint(classes, (tokens,))

    def call():
        vocab_parallel_fused_linear_cross_entropy(x, w, target, workspace_bytes=workspace).backward()

    call()
    x.grad = w.grad = None
    peak = peak_bytes(call)
    results = 4 * (tokens * hidden + width * hidden)
    per_token = 200 * tokens
    # Results twice: the parts of the input's gradient are joined.
    assert results < peak <= 2 * results + workspace + per_token, (peak, results)
    assert peak < 4 * tokens * width / 4, "a quarter of this process's logits"


def test_memory_of_the_loss(workers):
    workers(loss_memory)
