"""Writes docs/performance.md, accuracy.md and medusa_results.md from the JSON files in benchmarks/results.

    python -m benchmarks.document

Every number on those pages comes from these files; run it again after adding one.
"""

from __future__ import annotations

import json
import math

from . import fsdp, medusa, plots
from .report import RESULTS, ROOT, digits

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
ACCURACY_PAGE = ROOT / "docs" / "accuracy.md"
MEDUSA_PAGE = ROOT / "docs" / "medusa_results.md"
DISTRIBUTED_PAGE = ROOT / "docs" / "distributed_results.md"

INTRODUCTION = """# Performance

Measured with `python -m benchmarks.models` and `python -m benchmarks.run`;
[benchmarks/README.md](../benchmarks/README.md) says how to read the columns and how the timing is done. Each
section names its result file, which holds versions, driver, command and spread. This page is written by
`python -m benchmarks.document`.
"""

MODES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}


def section(name: str, document: dict) -> str:
    environment, sizes = document["environment"], document["sizes"]
    picture = f"{name.removesuffix('.json')}.png"
    plots.operators(IMAGES / picture, document)
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
        f"![time of forward and backward of each operator](images/{picture})",
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


ACCURACY = """# Accuracy

`python -m liger_ops doctor --accuracy` runs every operator and transformers' eager code on the same inputs,
forward and backward, and compares both with float64. An error is the root mean square of the deviations over
that of the exact values. The inputs are typical, tiny and large ones, long rows, a large mean, a softmax that
is sure of its class, logits of 1e4; `python -m liger_ops doctor --accuracy` prints each line. Here the
results of an operator are taken together: the geometric mean of our error over transformers', and the
smallest and largest of the ratios. A line fails when ours is more than 1.05 times transformers' (2 times for
the weight's gradient of fused linear cross entropy, summed over chunks in 16 bits) and more than rounding the
exact result leaves, which in float32 is taken as 1.2e-7, two roundings at their worst. This page is written
by `python -m benchmarks.document`.
"""


def accuracy_section(name: str, document: dict) -> str:
    lines = [
        f"## {', '.join(document['devices'])}",
        "",
        f"`{document['command']}`, {document['date']}, torch {document['versions']['torch']}, transformers "
        f"{document['versions']['transformers']}. Result file: [{name}](../benchmarks/results/{name}). "
        f"{sum(line['passed'] for line in document['lines'])} of {len(document['lines'])} lines pass.",
        "",
        "| operator | device | dtype | results | ours / transformers | smallest | largest |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str, str], list[float]] = {}
    for line in document["lines"]:
        ratios = groups.setdefault((line["operator"], line["device"], line["dtype"]), [])
        if line["ours"] > 0 and math.isfinite(line["ours"]) and 0 < line["transformers"] < math.inf:
            ratios.append(line["ours"] / line["transformers"])
    for (operator, device, dtype), ratios in groups.items():
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"| `{operator}` | {device} | {dtype} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} "
            f"| {max(ratios):.2f} |"
        )
    return "\n".join([*lines, ""])


def same_training(documents: dict[str, dict]) -> list[dict[str, dict]]:
    """The measurements of whole models, those of the same steps on the same device together."""
    groups: dict[str, dict[str, dict]] = {}
    for name, document in documents.items():
        if "training_results" in document:
            kind = {k: v for k, v in document["training"].items() if k != "steps"}
            key = json.dumps([document["environment"]["device"], kind])
            groups.setdefault(key, {})[name] = document
    return list(groups.values())


def training_section(documents: dict[str, dict]) -> str:
    """Whole training steps: a picture and a table of one or more runs."""
    name, document = next(iter(documents.items()))
    environment, training = document["environment"], document["training"]
    models = {model: row for d in documents.values() for model, row in d["models"].items()}
    results = [row for d in documents.values() for row in d["training_results"]]
    document = document | {"models": models, "training_results": results}
    picture = f"{name.removesuffix('.json')}.png"
    plots.training(IMAGES / picture, document)
    checkpointing = "with" if training["activation_checkpointing"] else "without"
    lines = [
        f"## {environment['device']}: training steps of whole models, "
        f"{training['batch']} x {training['length']} tokens, {training['dtype']}",
        "",
        f"{environment['date'][:10]}, torch {environment['versions']['torch']}, "
        f"transformers {environment['versions']['transformers']}. Commands and result files: "
        + "; ".join(
            f"`{d['environment']['command']}`, [{file}](../benchmarks/results/{file})"
            for file, d in documents.items()
        )
        + ".",
        "",
        f"Random weights of the models' real layer shapes, random tokens, {training['optimizer']}, "
        f"{training['attention']} attention, {checkpointing} activation checkpointing; median of "
        f"{training['steps']} steps after {training['warm_up_steps']}. *Beyond states* is the peak less the "
        "weights, gradients and optimizer states, which no kernel can change; gradients come as activations "
        "go, so it can be less than the activations. The loss difference is the largest of all steps, "
        "against transformers' own.",
        "",
        f"![tokens per second and peak memory of each model](images/{picture})",
        "",
        "| model | layers | implementation | tokens/s | speed-up | peak GiB | of plain | beyond states GiB "
        "| of plain | loss difference |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def cell(record: dict, key: str, form: str, scale: float = 1) -> str:
        return format(record[key] / scale, form) if key in record else ""

    for record in results:
        model = models[record["model"]]
        layers = f"{record['layers']} of {model['layers']}" if "layers" in record else ""
        provider = record["provider"]
        cells = [
            model["title"],
            layers,
            f"**{provider}**" if provider.startswith("liger-ops") else provider,
            record.get("failure") or cell(record, "tokens_per_second", ".0f"),
            cell(record, "speedup", ".2f"),
            cell(record, "peak_mib", ".1f", 1024),
            cell(record, "memory_ratio", ".2f"),
            cell(record, "peak_beyond_states_mib", ".1f", 1024),
            cell(record, "memory_beyond_states_ratio", ".2f"),
            cell(record, "largest_loss_difference", ".1e"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


MEDUSA = """# Training Medusa heads, measured

A training step (forward, backward, optimizer) on the same weights and tokens, by three implementations:
*stacked logits*, as the published training programs compute the loss (FasterDecoding/Medusa,
Liger-Kernel's example); *logits by head*, the least that transformers and PyTorch need without fused
operators; and *liger-ops*. [medusa.md](medusa.md) says what is trained, `python -m benchmarks.medusa --help`
how it is measured. *Peak* is the most that PyTorch had allocated; *step* is the part of it beyond weights and
optimizer state, which several GPUs divide between them while each of them needs the whole step. This page is
written by `python -m benchmarks.document`.
"""


def medusa_section(name: str, document: dict) -> str:
    environment, sizes = document["environment"], document["sizes"]
    lines = [
        f"## {environment['device']}: {sizes['shape']} layers, batch {sizes['batch']}, {sizes['dtype']}",
        "",
        f"`{environment['command']}`, {environment['date'][:10]}, torch {environment['versions']['torch']}, "
        f"transformers {environment['versions']['transformers']}. Result file: "
        f"[{name}](../benchmarks/results/{name}). Optimizer {sizes['optimizer']}, residual blocks in each "
        f"head: {sizes['head_layers']}.",
    ]
    stacked, plain, _ = medusa.IMPLEMENTATIONS.values()
    quantities = {
        "Tokens per second": ("tokens_per_second", ",.0f"),
        "Peak memory, GiB": ("peak_memory_gib", ".1f"),
        "Memory of a step, GiB": ("step_memory_gib", ".1f"),
    }
    for title, (key, shape) in quantities.items():
        heading = ["stage", "layers", "heads", "tokens", *medusa.IMPLEMENTATIONS.values()]
        heading += [f"over {stacked}", f"over {plain}"]
        lines += ["", f"{title}:", "", f"| {' | '.join(heading)} |", f"|{'--:|' * len(heading)}"]
        for (stage, heads, length), rows in medusa.grouped(document["results"]).items():
            row = [stage, next(iter(rows.values()))["layers"], heads, length]
            row += medusa.cells(rows, key, shape) + medusa.ratios(rows, key)
            lines.append(f"| {' | '.join(map(str, row))} |")
    picture = f"{name.removesuffix('.json')}.png"
    medusa.draw(document, IMAGES / picture)
    lines += ["", f"![tokens per second and peak memory](images/{picture})"]
    return "\n".join([*lines, ""])


DISTRIBUTED = """# Several GPUs, measured

Training a LLaMA of the 8B shape under FSDP2, with random weights and tokens, parameters and AdamW's moments
in bfloat16; then the head and its loss with the classes spread over the GPUs.
[distributed.md](distributed.md) says how both work. *Checkpointing* is activation checkpointing. This page
is written by `python -m benchmarks.document`.
"""


def distributed_page(documents: dict[str, dict]) -> str:
    """One section for all runs on a kind of device."""
    lines = [DISTRIBUTED]
    for device in dict.fromkeys(d["environment"]["device"] for d in documents.values()):
        runs = {name: d for name, d in documents.items() if d["environment"]["device"] == device}
        picture = f"{next(iter(runs)).partition('_')[0]}.png"
        merged = fsdp.merged(list(runs.values()))
        fsdp.plot(merged, IMAGES / picture)
        lines += [f"## {device}", "", "Commands and result files:", ""]
        lines += [
            f"- `{d['environment']['command']}`, {d['environment']['date'][:10]}, torch "
            f"{d['environment']['versions']['torch']}: [{name}](../benchmarks/results/{name})"
            for name, d in runs.items()
        ]
        lines += ["", f"![tokens per second and peak memory of each GPU](images/{picture})", ""]
        lines += [fsdp.markdown(merged), ""]
    return "\n".join(lines)


def main() -> None:
    documents = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    # Other files hold host times or the demo's runs.
    sections = [training_section(group) for group in same_training(documents)]
    sections += [section(name, d) for name, d in documents.items() if "results" in d and "rates" in d]
    heads = [medusa_section(name, d) for name, d in documents.items() if d.get("benchmark") == "medusa"]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([INTRODUCTION, *sections]))
    measured = [accuracy_section(name, d) for name, d in documents.items() if "lines" in d]
    ACCURACY_PAGE.write_text("\n".join([ACCURACY, *measured]))
    distributed = {name: d for name, d in documents.items() if d.get("kind") == "fsdp"}
    if distributed:
        DISTRIBUTED_PAGE.write_text(distributed_page(distributed))
    if heads:
        MEDUSA_PAGE.write_text("\n".join([MEDUSA, *heads]))


if __name__ == "__main__":
    main()
