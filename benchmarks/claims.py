"""What this project promises about its operators' speed and memory, checked against one run's results."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .ops import HEAD, OPS

# An equally fast peer comes out ahead half the time; medians of repeated runs spread by about 2 %.
NOISE = 0.98

# On CUDA, of LLaMA 3.1 8B's shapes in bfloat16: the least share of the floor, by mode.
SHARES: dict[str, dict[str, float]] = {
    "rms_norm": {"fwd": 0.92, "bwd": 0.85},
    "add_rms_norm": {"fwd": 0.95, "bwd": 0.88},
    "layer_norm": {"fwd": 0.92, "bwd": 0.85},
    "rope": {"fwd": 0.92, "bwd": 0.92},
    "mrope": {"fwd": 0.92, "bwd": 0.92},
    "swiglu": {"fwd": 0.98, "bwd": 0.98},
    "swiglu_packed": {"fwd": 0.98, "bwd": 0.98},
    "geglu": {"fwd": 0.98, "bwd": 0.98},
    "geglu_packed": {"fwd": 0.98, "bwd": 0.98},
    "cross_entropy": {"fwd": 0.97, "full": 0.85},
}
CUDA_SIZES = {"shape": "llama-3.1-8b", "tokens": 8192, "dtype": "bfloat16"}
# The head's products and the traffic of its loss, over the whole: of the loss alone and with gradients.
HEAD_FACTOR = 1.04
HEAD_MEMORY_MIB = 512
SMALL_HEAD_MEMORY_MIB = 128
SMALL_HEAD_SPEEDUP = 1.4
CPU_SIZES = {"shape": "llama-h512", "tokens": 2048, "dtype": "float32"}
CPU_SPEEDUP = 1.5
CPU_HEAD_MEMORY = 0.25
# Host time of a call, over that of `F.layer_norm`. A head's loss has a call for each product of each chunk.
HOST_FACTOR = 1.05
HOST_OPS = tuple(op for op in OPS if op != HEAD)


@dataclass(frozen=True)
class Verdict:
    claim: str
    measured: str
    holds: bool


def judge(results: list[dict], device: str) -> list[Verdict]:
    """Verdicts on every claim whose measurements are among `results`."""
    sizes = CUDA_SIZES if device == "cuda" else CPU_SIZES
    rows = [r for r in results if "ms" in r and all(r[key] == size for key, size in sizes.items())]
    table = {(r["op"], r["mode"], r["provider"]): r for r in rows}
    # A limit that the operator takes by itself is not in its name.
    for r in rows:
        if r.get("workspace_mib"):
            table[r["op"], r["mode"], r["workspace_mib"]] = r
    return list(cuda_claims(table) if device == "cuda" else cpu_claims(table))


def speed(ours: dict, theirs: dict, claim: str, factor: float) -> Verdict:
    ratio = theirs["ms"]["median"] / ours["ms"]["median"]
    quiet = ours["ms"].get("quiet", True)
    measured = f"{ratio:.2f}x {theirs['provider']}" + ("" if quiet else " (disturbed)")
    return Verdict(claim, measured, ratio >= factor)


def cuda_claims(table: dict):
    for op, modes in SHARES.items():
        for mode, least in modes.items():
            if ours := table.get((op, mode, "ours")):
                share = ours["share_of_floor"]
                yield Verdict(
                    f"{op} {mode}: at least {100 * least:.0f} % of the floor",
                    f"{100 * share:.1f} %",
                    share >= least,
                )
    for mode, products in (
        ("fwd", "its product and one read"),
        ("full", "its products and cross entropy's floor"),
    ):
        if ours := table.get((HEAD, mode, HEAD_MEMORY_MIB)):
            factor = 1 / ours["share_of_floor"]
            yield Verdict(
                f"{HEAD} {mode}: at most {HEAD_FACTOR} times {products}",
                f"{factor:.3f}",
                factor <= HEAD_FACTOR,
            )
    for limit in (HEAD_MEMORY_MIB, SMALL_HEAD_MEMORY_MIB):
        ours = table.get((HEAD, "full", limit))
        if ours and ours.get("memory"):
            beyond = ours["memory"]["beyond_results_mib"]
            yield Verdict(
                f"{HEAD}: at most {limit} MiB beyond gradients", f"{beyond:.0f} MiB", beyond <= limit
            )
    ours, liger = table.get((HEAD, "full", SMALL_HEAD_MEMORY_MIB)), table.get((HEAD, "full", "liger"))
    if ours and liger:
        claim = f"{HEAD}: at least {SMALL_HEAD_SPEEDUP}x Liger with {SMALL_HEAD_MEMORY_MIB} MiB"
        yield speed(ours, liger, claim, SMALL_HEAD_SPEEDUP)


def cpu_claims(table: dict):
    for op in OPS:
        ours, eager, compiled = (table.get((op, "full", name)) for name in ("ours", "torch", "compile"))
        if ours and eager:
            least = 1.0 if op == HEAD else CPU_SPEEDUP
            yield speed(ours, eager, f"{op}: at least {least}x transformers' eager code", least)
        if ours and compiled and op != HEAD:
            yield speed(ours, compiled, f"{op}: no slower than torch.compile", NOISE)
        if op == HEAD and ours and eager and ours.get("memory") and eager.get("memory"):
            share = ours["memory"]["peak_extra_mib"] / eager["memory"]["peak_extra_mib"]
            claim = f"{HEAD}: peak memory under a quarter of eager's"
            yield Verdict(claim, f"{share:.2f} of torch", share < CPU_HEAD_MEMORY)


def judge_host(rows: list[dict]) -> list[Verdict]:
    """Host time per call beside `F.layer_norm`, the first of the rows."""
    yardstick, verdicts = rows[0], []
    for row in rows:
        if row["provider"] != "ours" or row["op"] not in HOST_OPS:
            continue
        for key, words in (("forward_us", "forward"), ("full_us", "forward and backward")):
            factor = row[key] / yardstick[key]
            claim = f"{row['op']} {words}: host time at most {HOST_FACTOR} times F.layer_norm's"
            verdicts.append(Verdict(claim, f"{factor:.2f}", factor <= HOST_FACTOR))
    return verdicts


def as_json(verdicts: list[Verdict]) -> list[dict]:
    return [asdict(v) for v in verdicts]
