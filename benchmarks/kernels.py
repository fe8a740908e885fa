"""Registers, spills and occupancy of the compiled CUDA kernels: reads them from the library.

    python -m benchmarks.kernels --json benchmarks/results/kernels_h200.json

`cuobjdump` lists what each kernel takes. Where there is a GPU, every operator runs once under PyTorch's
profiler at the sizes of LLaMA 3.1 8B, which tells which of the kernels these sizes launch, and with what
grid; otherwise all kernels of bfloat16 with whole vectors are listed, with the threads that their launch
bounds allow, and the occupancy that registers, threads and declared shared memory allow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import report
from .measure import Subject, prepare
from .ops import LOSSES, OPS, Problem
from .providers import PROVIDERS
from .shapes import SHAPES


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of a multiprocessor share, and the units in which they get it."""

    threads: int
    blocks: int
    registers: int
    shared_bytes: int
    # The driver keeps some of the shared memory of each block.
    reserved_shared_bytes: int
    warp: int = 32
    registers_per_warp_unit: int = 256
    warps_unit: int = 4


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 65536, 164 * 1024, 1024),
    "sm_90": Multiprocessor(2048, 32, 65536, 228 * 1024, 1024),
    "sm_100": Multiprocessor(2048, 32, 65536, 228 * 1024, 1024),
}


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks run at once, by the registers, shared memory and threads that they take."""
    m = MULTIPROCESSORS[arch]
    warps = math.ceil(threads / m.warp)
    per_warp = math.ceil(registers * m.warp / m.registers_per_warp_unit) * m.registers_per_warp_unit
    # Registers belong to one of four schedulers, and so do warps.
    warps_by_registers = m.registers // per_warp // m.warps_unit * m.warps_unit if per_warp else math.inf
    limits = [m.blocks, m.threads // m.warp // warps, warps_by_registers // warps]
    limits.append(m.shared_bytes // (shared_bytes + m.reserved_shared_bytes))
    return int(min(limits))


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit, which Triton ships too."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if not found:
        raise SystemExit(f"{name} not found: install a CUDA toolkit, or triton, which ships it")
    return found


def demangled(name: str) -> str:
    """`liger::cuda::kernel<int, 4>` of a mangled kernel's name: without arguments and return type."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    return plain_name(text)


def plain_name(text: str) -> str:
    # The arguments' parenthesis is the first one outside of the template's brackets.
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            text = text[:place]
            break
    return text.removeprefix("void ").strip()


def resources(library: Path) -> Iterator[dict]:
    """Arch, name, registers, bytes of stack and of shared memory of each kernel in the library."""
    listed = subprocess.run(
        [tool("cuobjdump"), "-res-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    arch = name = None
    for line in listed.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+?):", line):
            name = found[1]
        elif name and (usage := dict(re.findall(r"([A-Z]+):(\d+)", line))).get("REG"):
            yield {
                "arch": arch,
                "mangled": name,
                "kernel": demangled(name),
                "registers": int(usage["REG"]),
                # Where registers do not suffice, values spill to the stack, in local memory.
                "stack_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
                # What the driver keeps is counted where a kernel has any.
                "shared_bytes": max(0, int(usage["SHARED"]) - 1024),
            }
            name = None


def most_threads(library: Path) -> dict[str, int]:
    """The threads of a block that each kernel's launch bounds allow, by mangled name."""
    listed = subprocess.run(
        [tool("cuobjdump"), "-elf", str(library)], capture_output=True, text=True, check=True
    ).stdout
    threads: dict[str, int] = {}
    name = attribute = None
    for line in listed.splitlines():
        if found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif found := re.match(r"\s*Attribute:\s*(\S+)", line):
            attribute = found[1]
        elif name and attribute == "EIATTR_MAX_THREADS" and (values := re.findall(r"0x([0-9a-f]+)", line)):
            threads[name] = math.prod(int(value, 16) for value in values[:3])
            attribute = None
    return threads


def launches(shape: str, tokens: int, ops: list[str]) -> list[dict]:
    """The kernels of ours that each operator launches, with their grids, from PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda")
    functions = PROVIDERS["ours"](device)
    found = []
    for op in ops:
        case = OPS[op](Problem(SHAPES[shape], tokens, 2, torch.bfloat16, device, 1.0, 0))
        # The losses have different kernels where gradients are wanted.
        for mode in ("fwd", "full") if op in LOSSES else ("fwd", "bwd"):
            prepare(Subject("ours", functions[case.function]), case, mode)[0]()
            call, _ = prepare(Subject("ours", functions[case.function]), case, mode)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(path))
                events = json.loads(path.read_text())["traceEvents"]
            seen = set()
            for event in events:
                name = plain_name(event.get("name", ""))
                if event.get("cat") != "kernel" or not name.startswith("liger::"):
                    continue
                detail = event["args"]
                launch = {
                    "op": op,
                    "mode": mode,
                    "kernel": name,
                    "grid": detail["grid"],
                    "block": detail["block"],
                }
                # The runtime allocates shared memory on top of what the kernel declares.
                launch["shared_bytes"] = detail.get("shared memory", 0)
                if (key := json.dumps(launch)) not in seen:
                    seen.add(key)
                    found.append(launch)
        del case
        gc.collect()
        torch.cuda.empty_cache()
    return found


def measured(library: Path, arch: str, ran: list[dict]) -> list[dict]:
    """The table: launched kernels where it is known which they are, or all of bfloat16 with whole vectors."""
    kernels = [k for k in resources(library) if k["arch"] == arch]
    if not kernels:
        raise SystemExit(f"{library} has no kernels for {arch}: set TORCH_CUDA_ARCH_LIST and build again")
    rows = []
    if ran:
        by_name = {k["kernel"]: k for k in kernels}
        for launch in ran:
            if kernel := by_name.get(launch["kernel"]):
                shared = max(launch["shared_bytes"], kernel["shared_bytes"])
                rows.append(
                    {**kernel, **launch, "threads": math.prod(launch["block"]), "shared_bytes": shared}
                )
    else:
        bounds = most_threads(library)
        for kernel in kernels:
            name = kernel["kernel"]
            # The backward kernels of the norms take whole vectors alone, and have no parameter for it.
            whole = re.search(
                r"norm_backward_kernel<__nv_bfloat16, __nv_bfloat16"
                r"|<(liger::cuda::\w+, )?__nv_bfloat16, (__nv_bfloat16, )?(8\b|true|false)",
                name,
            )
            if whole and not re.search(r"_(loop|rows|columns)_kernel", name):
                rows.append({**kernel, "threads": bounds.get(kernel["mangled"])})
    for row in rows:
        del row["mangled"]
        if row["threads"]:
            blocks = blocks_per_multiprocessor(arch, row["threads"], row["registers"], row["shared_bytes"])
            row["blocks_per_sm"] = blocks
            row["occupancy"] = blocks * row["threads"] / MULTIPROCESSORS[arch].threads
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--library", type=Path, help="the compiled library (the one that is imported)")
    parser.add_argument("--arch", choices=MULTIPROCESSORS, default="sm_90")
    parser.add_argument("--no-launches", action="store_true", help="list all kernels, even where a GPU is")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (new in benchmarks/results)"
    )
    a = parser.parse_args(argv)
    from liger_ops import _library

    library = a.library or Path(_library.build_info()["library"])
    cuda = torch.cuda.is_available() and not a.no_launches
    environment = report.environment(torch.device("cuda" if cuda else "cpu"), a.commit)
    ran = launches(a.shape, a.tokens, list(OPS)) if cuda else []
    if cuda and not ran:
        report.progress.print("the profiler saw no kernel of ours: all kernels are listed")
    rows = measured(library, a.arch, ran)
    sizes = {"shape": a.shape, "tokens": a.tokens, "dtype": "bfloat16"} if ran else None
    document = {
        "environment": environment,
        "arch": a.arch,
        "multiprocessor": asdict(MULTIPROCESSORS[a.arch]),
        "sizes": sizes,
        "kernels": rows,
    }
    for row in rows:
        occupancy = f"{100 * row['occupancy']:.0f} %" if "occupancy" in row else "?"
        report.out.print(
            f"{row['registers']:4} registers {row['stack_bytes']:4} B stack {row['shared_bytes']:6} B shared "
            f"{row['threads'] or 0:5} threads {occupancy:>6}  {row['kernel']}"
        )
    report.write_json(a.json or report.default_path(environment, "kernels"), document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
