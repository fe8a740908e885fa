"""What this project promises about its operators' speed and memory, checked against one run's results."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# An equally fast peer comes out ahead half the time; medians of repeated runs spread by about 2 %.
NOISE = 0.98

ROW_OPS = ("rms_norm", "rope", "swiglu", "cross_entropy")
HEAD = "fused_linear_cross_entropy"


@dataclass(frozen=True)
class Verdict:
    claim: str
    measured: str
    holds: bool


def judge(results: list[dict], device: str, tokens: int) -> list[Verdict]:
    """Verdicts on every claim whose measurements are among `results`, forward and backward together."""
    table = {(r["op"], r["provider"]): r for r in results if r["mode"] == "full" and "ms" in r}
    verdicts: list[Verdict] = []

    def faster(op: str, peer: str, factor: float, words: str) -> None:
        ours, theirs = table.get((op, "ours")), table.get((op, peer))
        if ours and theirs:
            ratio = theirs["ms"]["median"] / ours["ms"]["median"]
            quiet = ours["ms"].get("quiet", True)
            measured = f"{ratio:.2f}x {peer}" + ("" if quiet else " (disturbed)")
            verdicts.append(Verdict(f"{op}: {words}", measured, ratio >= factor))

    def memory(op: str) -> tuple[dict | None, dict | None]:
        return tuple((table.get((op, name)) or {}).get("memory") for name in ("ours", "torch"))

    if device == "cpu" and tokens == 2048:
        for op in ROW_OPS:
            faster(op, "torch", 1.0, "faster than transformers' eager code")
        faster(HEAD, "torch", NOISE, "no slower than F.cross_entropy(F.linear(...))")
        ours, eager = memory(HEAD)
        if ours and eager:
            share = ours["peak_extra_mib"] / eager["peak_extra_mib"]
            claim = f"{HEAD}: peak memory under a quarter of eager's"
            verdicts.append(Verdict(claim, f"{share:.2f} of torch", share < 0.25))
    if device == "cuda" and tokens == 8192:
        for op in ROW_OPS:
            faster(op, "liger", NOISE, "no slower than Liger")
        faster(HEAD, "liger", 1.4, "at least 1.4x Liger")
        ours, _ = memory(HEAD)
        if ours:
            beyond = ours["beyond_results_mib"]
            verdicts.append(
                Verdict(f"{HEAD}: at most 512 MiB beyond gradients", f"{beyond:.0f} MiB", beyond <= 512)
            )
    return verdicts


def as_json(verdicts: list[Verdict]) -> list[dict]:
    return [asdict(v) for v in verdicts]
