"""Writes docs/performance.md from the JSON files in benchmarks/results.

    python -m benchmarks.document

Every number on that page comes from these files; run it again after adding one.
"""

from __future__ import annotations

import json

from .report import RESULTS, ROOT, digits

PAGE = ROOT / "docs" / "performance.md"

INTRODUCTION = """# Performance

Measured with `python -m benchmarks.run`; [benchmarks/README.md](../benchmarks/README.md) says how to read
the columns and how the timing is done. Each section names its result file, which holds versions, driver,
command and spread. This page is written by `python -m benchmarks.document`.
"""

MODES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}


def section(name: str, document: dict) -> str:
    environment, sizes = document["environment"], document["sizes"]
    lines = [
        f"## {environment['device']}: {sizes['shape']}, {sizes['tokens']} tokens, {sizes['dtype']}",
        "",
        f"`{environment['command']}`, {environment['date'][:10]}, torch {environment['versions']['torch']}, "
        f"{environment['threads']} CPU threads. Result file: [{name}](../benchmarks/results/{name}).",
        "",
        f"hidden {sizes['hidden']}, intermediate {sizes['intermediate']}, vocabulary {sizes['vocab']}, "
        f"heads {sizes['heads']}/{sizes['kv_heads']} x {sizes['head_dim']}, batch {sizes['batch']}. "
        f"Measured in the same run: copy {document['rates']['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matrix products {document['rates']['floor_flops_per_s'] / 1e12:.3g} TFLOP/s.",
        "",
        "| operator | pass | implementation | ms | of the floor | memory beyond results, MiB |",
        "|---|---|---|--:|--:|--:|",
    ]
    for result in document["results"]:
        if "ms" not in result:
            continue
        share, memory = result.get("share_of_floor"), result.get("memory")
        provider = f"**{result['provider']}**" if result["provider"] == "ours" else result["provider"]
        cells = [
            f"`{result['op']}`",
            MODES[result["mode"]],
            provider,
            digits(result["ms"]["median"]) + ("" if result["ms"]["quiet"] else " (disturbed)"),
            f"{100 * share:.0f} %" if share else "",
            f"{memory['beyond_results_mib']:.0f}" if memory else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    documents = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    # Other files hold host times or training runs.
    sections = [section(name, d) for name, d in documents.items() if "results" in d and "rates" in d]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([INTRODUCTION, *sections]))


if __name__ == "__main__":
    main()
