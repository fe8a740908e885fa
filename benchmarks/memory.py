"""Peak resident memory of one operator call on the CPU, in a process of its own.

As a program, with an operator, a provider and a problem in JSON, it prints one JSON line. A fresh process,
because memory that an allocator kept from an earlier call would hide what this one needs. Linux only: the
peak is the kernel's own (`VmHWM`), reset just before the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .measure import Subject, bytes_of_results, memory_record, prepare
from .ops import OPS, Problem
from .providers import PROVIDERS, within
from .report import ROOT
from .shapes import Shape

STATUS = Path("/proc/self/status")


def status_bytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def peak_of_call(op: str, provider: str, workspace_mib: int | None, problem: Problem) -> dict[str, float]:
    case = OPS[op](problem)
    function = PROVIDERS[provider](problem.device)[case.function]
    subject = Subject(provider, within(function, workspace_mib))
    # The first call starts thread pools, loads libraries and compiles; none of that is the operator's memory.
    prepare(subject, case, "full")[0]()
    call, given = prepare(subject, case, "full")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    results = call()
    extra = status_bytes("VmHWM") - before
    return memory_record(extra, bytes_of_results(results, given))


def in_subprocess(
    op: str, provider: str, workspace_mib: int | None, problem: Problem
) -> dict[str, float] | None:
    """`peak_of_call` in a new interpreter; None where this system does not tell peaks."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    fields = {**asdict(problem), "dtype": str(problem.dtype).removeprefix("torch."), "device": "cpu"}
    command = [sys.executable, "-m", f"{__package__}.memory", op, provider, json.dumps(fields)]
    command += [str(torch.get_num_threads()), str(workspace_mib or 0)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"measuring memory of {op} by {provider} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("problem", type=json.loads)
    parser.add_argument("threads", type=int)
    parser.add_argument("workspace_mib", type=int)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    fields = {
        **a.problem,
        "shape": Shape(**a.problem["shape"]),
        "dtype": getattr(torch, a.problem["dtype"]),
        "device": torch.device("cpu"),
    }
    print(json.dumps(peak_of_call(a.op, a.provider, a.workspace_mib or None, Problem(**fields))))


if __name__ == "__main__":
    main()
