"""What is written down about a run: the machine, the tables on the terminal, the JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .claims import Verdict

# The folder that this package is imported from: the checkout, or where the wheel was installed.
ROOT = Path(__file__).resolve().parents[__package__.count(".") + 1]
IN_CHECKOUT = __package__ == "benchmarks"
RESULTS = Path(__file__).resolve().parent / "results" if IN_CHECKOUT else Path.cwd()

# Tables must not fold where the output is a file or a pipe, whose width rich takes for 80.
out = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
progress = Console(stderr=True, width=None if sys.stderr.isatty() else 190, highlight=False)


def first_line_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (
        name := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        return name.group(1).strip()
    return platform.processor() or platform.machine()


def program() -> list[str]:
    """How the running program was started: as a module, or as a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__")]
    return [os.path.relpath(sys.argv[0], ROOT)]


def environment(device: torch.device, commit: str | None) -> dict:
    """Everything one needs to repeat a run, and nothing about whose machine it was."""
    head = first_line_of("git", "rev-parse", "HEAD") if IN_CHECKOUT else None
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program(), *sys.argv[1:]]),
        "commit": commit or head,
        "uncommitted_changes": head and first_line_of("git", "status", "--porcelain") is not None,
        "device": processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("torch", "triton", "transformers", "liger-kernel", "trl", "liger-ops")
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
        record |= {
            "device": properties.name,
            "host_processor": processor(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver, SM clock, its maximum, power limit": first_line_of(
                "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"
            ),
        }
    return record


def default_path(environment: dict, kind: str) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", environment["date"][:19])
    return RESULTS / f"{kind}_{device}_{stamp}.json"


def write_json(path: Path, document: dict, quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    if not quiet:
        progress.print(f"wrote {path}")


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.4f}"


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A live bar on a terminal; the function takes what is measured next and counts it.

    It draws between measurements only: a thread that draws would take time from them.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=progress,
        auto_refresh=False,
        transient=True,
        disable=not progress.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        started = False

        def step(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, advance=int(started), refresh=True)
            started = True

        yield step


def size_of(row: dict) -> str:
    """The sizes of a measured case in few words, as `8192 x 4096`."""
    sizes = row["sizes"]
    if "head_dim" in sizes:
        return f"{sizes['tokens']}, {sizes['heads']}/{sizes['kv_heads']} x {sizes['head_dim']}"
    return " x ".join(map(str, sizes.values()))


def print_results(results: list[dict], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    columns = (
        "op",
        "size",
        "dtype",
        "mode",
        "provider",
        "ms",
        "p20 - p80",
        "host µs",
        "vs torch",
        "of floor",
        "peak MiB",
        "beyond results",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:5] else "right", no_wrap=True)
    table.add_column("error", justify="right")
    previous = None
    for r in results:
        case = (r["op"], size_of(r), r["dtype"], r["mode"])
        if previous and case != previous:
            table.add_section()
        previous = case
        if "ms" not in r:
            table.add_row(*case, r["provider"], "-", *[""] * 6, r["failure"])
            continue
        ms, memory = r["ms"], r.get("memory") or {}
        host = r.get("host_us")
        optional = {
            "host": f"{host:.0f}{' w' if r.get('waits_for_gpu') else ''}" if host else "",
            "speedup": f"{r['speedup_vs_torch']:.2f}x" if r.get("speedup_vs_torch") else "",
            "floor": f"{100 * r['share_of_floor']:.0f} %" if r.get("share_of_floor") else "",
            "peak": f"{memory['peak_extra_mib']:.0f}" if memory else "",
            "beyond": f"{memory['beyond_results_mib']:.0f}" if memory else "",
        }
        spread = f"{digits(ms['p20'])} - {digits(ms['p80'])}"
        if not ms["quiet"]:
            spread += " !"
        worst = f"{max(r['errors'].values()):.1e}"
        table.add_row(*case, r["provider"], digits(ms["median"]), spread, *optional.values(), worst)
    out.print(table)
    if any("ms" in r and not r["ms"]["quiet"] for r in results):
        out.print("! disturbed: other programs took cores, or the GPU waited for the host; repeat these")
    if any(r.get("waits_for_gpu") for r in results):
        out.print("w waits for the GPU inside the call, whose time is in its host time")


def print_host(rows: list[dict]) -> None:
    table = Table(
        title="host time per call on a tiny input, µs (best loop)", title_justify="left", header_style="bold"
    )
    for name in ("op", "provider", "forward", "forward + backward", "forward vs F.layer_norm"):
        table.add_column(name, justify="left" if name in ("op", "provider") else "right")
    for r in rows:
        ratio = f"{r['forward_us'] / rows[0]['forward_us']:.2f}x"
        table.add_row(r["op"], r["provider"], f"{r['forward_us']:.1f}", f"{r['full_us']:.1f}", ratio)
    out.print(table)


def print_verdicts(verdicts: list[Verdict]) -> None:
    for v in verdicts:
        out.print(f"{'holds' if v.holds else 'FAILS':>6}  {v.claim}: {v.measured}")
