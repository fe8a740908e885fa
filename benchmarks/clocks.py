"""How fast the GPU's clocks run, and what power it draws, while something runs: as nvidia-smi has it."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable

import torch

INTERVAL_MS = 20

SAMPLED = ("clocks.sm", "power.draw.instant", "clocks_event_reasons.sw_power_cap")
LIMITS = ("clocks.max.sm", "power.limit")


def command(gpu: str, fields: tuple[str, ...]) -> list[str]:
    return ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def parse(line: str, fields: tuple[str, ...]) -> list[str] | None:
    """The values of a line of nvidia-smi's, or None for a line that is not whole."""
    values = [value.strip() for value in line.split(",")]
    return values if len(values) == len(fields) and values[0].isdigit() else None


def sampled(work: Callable[[], object], gpu: str | None = None) -> dict[str, float] | None:
    """Medians over the time that `work` takes, and the GPU's limits.

    Args:
        work: keeps the GPU busy, and ends when the GPU is done.
        gpu: which one, as nvidia-smi names it; by default PyTorch's current one.

    Returns:
        `sm_mhz`, `max_sm_mhz`, `watts`, `max_watts`, `samples`, their number, and `power_capped`, the share
        of them in which the driver held the clocks down to stay within the power limit. None where
        nvidia-smi does not tell.
    """
    gpu = gpu or f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    try:
        limits = subprocess.run(command(gpu, LIMITS), capture_output=True, text=True, check=True).stdout
        smi = subprocess.Popen(
            [*command(gpu, SAMPLED), f"--loop-ms={INTERVAL_MS}"], stdout=subprocess.PIPE, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    try:
        work()
    finally:
        smi.terminate()
        lines, _ = smi.communicate()
    samples = [values for line in lines.splitlines() if (values := parse(line, SAMPLED))]
    most = parse(limits, LIMITS)
    if not samples or most is None:
        return None
    clocks, watts, capped = zip(*samples, strict=True)
    return {
        "sm_mhz": statistics.median(map(float, clocks)),
        "max_sm_mhz": float(most[0]),
        "watts": statistics.median(map(float, watts)),
        "max_watts": float(most[1]),
        "power_capped": statistics.mean(value == "Active" for value in capped),
        "samples": len(samples),
    }
