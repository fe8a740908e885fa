"""Processes that form one process group, on the CPU or with a GPU each, and run functions together."""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# A collective that waits for a process which has failed gives up after this many seconds.
COLLECTIVE_TIMEOUT = 30
CHECK_TIMEOUT = 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class WorkerError(AssertionError):
    """What went wrong in the workers, with their tracebacks."""


def _work(rank: int, size: int, port: int, backend: str, pipe: Connection) -> None:
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if backend == "gloo":
        environment["ACCELERATE_USE_CPU"] = "true"
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT))
    while (task := pipe.recv()) is not None:
        function, args = task
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        from tiny import forget_patches

        forget_patches()
        gc.collect()
    dist.destroy_process_group()


class Workers:
    """``size`` processes. They start with the first call, and again after a call that failed.

    With the backend ``"nccl"`` each has the GPU of its rank.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, port, self.backend, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = CHECK_TIMEOUT) -> list[Any]:
        """``function(*args)`` in every process; what they return, by rank.

        Raises:
            WorkerError: a process raised or died, or not all were done in time. No process outlives it.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout
        while len(results) < self.size and not errors:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                slow = [rank for rank in range(self.size) if rank not in results]
                errors.append(f"after {timeout} s, still running: ranks {slow}")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    done, value = pipe.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(10)
                    errors.append(f"rank {rank} died with exit code {self.processes[rank].exitcode}")
                    continue
                results[rank] = value
                if not done:
                    errors.append(f"rank {rank}:\n{value}")
        if errors:
            errors += self._late_errors(results)
            self.close(kill=True)
            raise WorkerError("\n".join(errors))
        return [results[rank] for rank in range(self.size)]

    def _late_errors(self, results: dict[int, Any]) -> list[str]:
        """The errors of the others, which often fail because one did, and sometimes say why."""
        errors = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if rank not in results and pipe.poll(2):
                    done, value = pipe.recv()
                    errors += [] if done else [f"rank {rank}:\n{value}"]
            except (EOFError, ConnectionError):
                pass
        return errors

    def close(self, kill: bool = False) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            with contextlib.suppress(BrokenPipeError, ConnectionError):
                process.kill() if kill else pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.processes, self.pipes = [], []
