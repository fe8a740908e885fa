"""Writes docs/performance.md, accuracy.md, medusa_results.md and distributed_results.md, and their pictures,
from the JSON files in benchmarks/results.

    make plots      (or python -m benchmarks.document)

Every number on those pages comes from these files; run it again after adding one. What is said beside the
numbers of docs/performance.md stands in notes.md: the introduction, then how each operator's kernels came to
be, and at the end the reasons why a peer is faster, by operator, pass and where needed size and dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from . import fsdp, medusa, plots
from .models import KERNEL_GROUPS
from .ops import OPS
from .report import RESULTS, ROOT, digits, size_of

NOTES = Path(__file__).resolve().parent / "notes.md"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
ACCURACY_PAGE = ROOT / "docs" / "accuracy.md"
MEDUSA_PAGE = ROOT / "docs" / "medusa_results.md"
DISTRIBUTED_PAGE = ROOT / "docs" / "distributed_results.md"

MODES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
SLOWER_TITLE = "Where a peer is faster"
# A peer that is faster by less than this is as fast: medians of repeated runs spread by about 2 %.
SLOWER = 1.03


def notes() -> tuple[str, dict[str, str], dict[str, str]]:
    """Introduction, text by operator, and reason by case."""
    introduction, *sections = NOTES.read_text().split("\n## ")
    texts = {title: text.strip() for title, _, text in (section.partition("\n") for section in sections)}
    reasons = texts.pop(SLOWER_TITLE)
    return introduction, texts, dict(re.findall(r"^- (.+?): (.+)$", reasons, re.MULTILINE))


def reason(reasons: dict[str, str], case: str) -> str:
    """Of the longest key that the case begins with."""
    keys = [key for key in reasons if f"{case} ".startswith(f"{key} ")]
    return reasons[max(keys, key=len)] if keys else ""


def is_operators(document: dict) -> bool:
    return "results" in document and "rates" in document


def includes_host(document: dict) -> bool:
    """Whether the GPU waited for the host in what was timed."""
    return "cuda" in document["environment"] and document["settings"]["queue_ahead_us"] == 0


def device_of(document: dict) -> str:
    return document["environment"]["device"] + (", host time in ms" if includes_host(document) else "")


def table(heading: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table; columns whose heading ends in a colon are aligned to the right."""
    names = heading.split("|")
    marks = ["--:" if name.endswith(":") else "---" for name in names]
    lines = [f"| {' | '.join(name.removesuffix(':') for name in names)} |", f"|{'|'.join(marks)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def host_cell(row: dict) -> str:
    if row.get("host_us") is None:
        return ""
    return f"{row['host_us']:.0f}{' w' if row.get('waits_for_gpu') else ''}"


def cases(documents: dict[str, dict]) -> Iterator[tuple[dict, str, dict[str, dict]]]:
    """Each measured case: its document, the file's name, and its rows by provider."""
    for name, document in documents.items():
        groups: dict[tuple, dict[str, dict]] = {}
        for row in document["results"]:
            if "ms" in row:
                key = (row["op"], size_of(row), row["dtype"], row["mode"])
                groups.setdefault(key, {})[row["provider"]] = row
        for rows in groups.values():
            yield document, name, rows


def best_peer(rows: dict[str, dict]) -> dict | None:
    peers = [row for provider, row in rows.items() if not provider.startswith("ours")]
    return min(peers, key=lambda row: row["ms"]["median"], default=None)


def share_cell(row: dict) -> str:
    return f"{100 * row['share_of_floor']:.0f} %" if row.get("share_of_floor") else ""


def full_table(documents: dict[str, dict], op: str) -> list[str]:
    """Every provider of the runs that took their time."""
    lines = []
    for document, _, rows in cases({n: d for n, d in documents.items() if not d["settings"]["quick"]}):
        for row in rows.values():
            if row["op"] != op:
                continue
            memory = row.get("memory")
            provider = f"**{row['provider']}**" if row["provider"].startswith("ours") else row["provider"]
            lines.append(
                [
                    device_of(document),
                    f"{size_of(row)} {row['dtype']}",
                    MODES[row["mode"]],
                    provider,
                    digits(row["ms"]["median"]) + ("" if row["ms"]["quiet"] else " (disturbed)"),
                    share_cell(row),
                    host_cell(row),
                    f"{memory['beyond_results_mib']:.0f}" if memory else "",
                ]
            )
    heading = "device|size|pass|implementation|ms:|of the floor:|host µs:|memory beyond results, MiB:"
    return table(heading, lines) if lines else []


def least(documents: dict[str, dict], op: str) -> list[str]:
    """The least bytes and flops of the first case, and its floor."""
    lines = []
    for document, _, rows in cases(documents):
        row = next(iter(rows.values()))
        if row["op"] != op or not row.get("floor_ms") or document["settings"]["quick"]:
            continue
        lines.append(
            [
                device_of(document),
                f"{size_of(row)} {row['dtype']}",
                MODES[row["mode"]],
                f"{row['least_bytes'] / 1e6:,.0f}",
                f"{row['least_flops'] / 1e12:.3g}" if row["least_flops"] else "",
                f"{row.get('chunk_rows', '')}",
                digits(row["floor_ms"]),
            ]
        )
    heading = "device|size|pass|least MB:|least TFLOP:|rows of a chunk:|floor, ms:"
    return table(heading, lines) if lines else []


def sweep_table(documents: dict[str, dict], op: str) -> list[str]:
    """Ours and the fastest peer at many sizes."""
    lines = []
    for document, _, rows in cases({n: d for n, d in documents.items() if d["settings"]["quick"]}):
        ours = rows.get("ours")
        if ours is None or ours["op"] != op:
            continue
        peer = best_peer(rows)
        cells = [
            device_of(document),
            size_of(ours),
            ours["dtype"],
            MODES[ours["mode"]],
            digits(ours["ms"]["median"]) + ("" if ours["ms"]["quiet"] else " (disturbed)"),
            share_cell(ours),
            host_cell(ours),
        ]
        if peer:
            ratio = peer["ms"]["median"] / ours["ms"]["median"]
            cells += [peer["provider"], digits(peer["ms"]["median"]), f"{ratio:.2f}", host_cell(peer)]
        lines.append(cells + [""] * (11 - len(cells)))
    heading = "device|size|dtype|pass|ours, ms:|of the floor:|host µs:|fastest peer|ms:|speed-up:|host µs:"
    return ["Other sizes:", "", *table(heading, lines)] if lines else []


def operator_section(documents: dict[str, dict], op: str, text: str) -> str:
    lines = [f"## {op}", "", text, ""]
    picture = f"sweep_{op}.png"
    swept = plots.sweep(IMAGES / picture, op, documents)
    if swept:
        lines += [f"![share of the floor at several sizes](images/{picture})", ""]
    lines += [*least(documents, op), *full_table(documents, op), *sweep_table(documents, op)]
    return "\n".join(lines)


def slower_section(documents: dict[str, dict], reasons: dict[str, str]) -> str:
    lines = [
        f"## {SLOWER_TITLE}",
        "",
        f"Every measured case in which the fastest peer needs less than 1/{SLOWER} of our time, of all runs.",
        "",
    ]
    rows = []
    for document, _, providers in cases(documents):
        ours, peer = providers.get("ours"), best_peer(providers)
        if ours is None or peer is None or ours["ms"]["median"] <= SLOWER * peer["ms"]["median"]:
            continue
        op, mode, size, dtype = ours["op"], ours["mode"], size_of(ours), ours["dtype"]
        disturbed = "" if ours["ms"]["quiet"] and peer["ms"]["quiet"] else " (disturbed)"
        rows.append(
            [
                device_of(document),
                f"`{op}`",
                f"{size} {dtype}",
                MODES[mode],
                digits(ours["ms"]["median"]),
                f"{peer['provider']} {digits(peer['ms']['median'])}",
                f"{ours['ms']['median'] / peer['ms']['median']:.2f}{disturbed}",
                reason(reasons, f"{op} {MODES[mode]} {size} {dtype}"),
            ]
        )
    if not rows:
        return "\n".join([*lines, "There is none.", ""])
    heading = "device|operator|size|pass|ours, ms:|fastest peer, ms:|ours / peer:|reason"
    return "\n".join([*lines, *table(heading, rows)])


def pictures_section(documents: dict[str, dict]) -> str:
    """Operators side by side: what they need of the floor, and of memory."""
    lines = ["## At a glance", ""]
    for name, document in documents.items():
        if document["settings"]["quick"]:
            continue
        stem, device = name.removesuffix(".json"), document["environment"]["device"]
        if plots.operators(IMAGES / f"{stem}.png", document):
            lines += [f"![share of the floor of each operator, {device}](images/{stem}.png)", ""]
        if plots.memory(IMAGES / f"{stem}_memory.png", document):
            lines += [f"![memory beyond the results, {device}](images/{stem}_memory.png)", ""]
    return "\n".join(lines)


def host_section(documents: dict[str, dict]) -> str:
    lines = [
        "## Host time",
        "",
        "The host's time for a call on an input so small that nothing else counts, in a tight loop: forward "
        "without gradients, and forward with `autograd.grad`. The yardstick is `F.layer_norm`, an operator "
        "of PyTorch itself.",
        "",
    ]
    for name, document in documents.items():
        environment, yardstick = document["environment"], document["host"][0]
        lines += [f"{environment['device']}, [{name}](../benchmarks/results/{name}):", ""]
        rows = []
        for row in document["host"]:
            provider = f"**{row['provider']}**" if row["provider"] == "ours" else row["provider"]
            ratios = [f"{row[key] / yardstick[key]:.2f}" for key in ("forward_us", "full_us")]
            times = [f"{row[key]:.1f}" for key in ("forward_us", "full_us")]
            rows.append([f"`{row['op']}`", provider, times[0], ratios[0], times[1], ratios[1]])
        ratio = "of F.layer_norm's:"
        heading = f"operator|implementation|forward, µs:|{ratio}|forward + backward, µs:|{ratio}"
        lines += table(heading, rows)
    return "\n".join(lines)


def kernels_section(documents: dict[str, dict]) -> str:
    lines = [
        "## Registers, spills, occupancy",
        "",
        "What the compiled kernels take, read from the library by `python -m benchmarks.kernels`. A kernel "
        "without stack spills no register. Occupancy is the share of a multiprocessor's threads that run at "
        "once, by registers, shared memory and threads of a block; kernels that keep a row in registers "
        "trade it for loads in flight.",
        "",
    ]
    for name, document in documents.items():
        sizes = document["sizes"]
        what = (
            f"launched by {sizes['shape']}, {sizes['tokens']} tokens, {sizes['dtype']}"
            if sizes
            else "bfloat16, whole vectors"
        )
        lines += [f"{document['arch']}, {what}: [{name}](../benchmarks/results/{name}).", ""]
        rows = []
        for kernel in document["kernels"]:
            short = kernel["kernel"].replace("liger::cuda::", "").replace("__nv_", "")
            occupancy = kernel.get("occupancy")
            rows.append(
                [
                    f"`{kernel['op']}` {MODES[kernel['mode']]}" if "op" in kernel else "",
                    f"`{short}`",
                    f"{kernel['threads'] or ''}",
                    str(kernel["registers"]),
                    str(kernel["stack_bytes"]),
                    str(kernel["shared_bytes"]),
                    f"{kernel.get('blocks_per_sm', '')}",
                    f"{100 * occupancy:.0f} %" if occupancy else "",
                ]
            )
        heading = (
            "operator|kernel|threads:|registers:|stack, B:|shared, B:|blocks a multiprocessor:|occupancy:"
        )
        lines += table(heading, rows)
    return "\n".join(lines)


def claims_section(documents: dict[str, dict]) -> str:
    lines = ["## Promises", "", "What claims.py says of a run, judged by the run itself.", ""]
    rows = [
        [
            name.removesuffix(".json"),
            claim["claim"],
            claim["measured"],
            "holds" if claim["holds"] else "**fails**",
        ]
        for name, document in documents.items()
        for claim in document.get("claims", [])
    ]
    return "\n".join([*lines, *table("run|promise|measured:|", rows)]) if rows else ""


def runs_section(documents: dict[str, dict]) -> str:
    """Where everything above comes from."""
    lines = ["## Runs", ""]
    for name, document in documents.items():
        environment = document["environment"]
        driver = environment.get("driver, SM clock, its maximum, power limit")
        parts = [
            environment["device"],
            f"driver {driver.split(',')[0]}" if driver else "",
            f"torch {environment['versions']['torch']}",
            f"{environment['threads']} CPU threads",
            f"commit {environment['commit'][:7]}" if environment.get("commit") else "",
        ]
        if "rates" in document:
            rates = document["rates"]
            copies = [
                f"{c['bytes'] / 2**20:.0f} MiB {c['bytes_per_s'] / 1e9:.0f} GB/s" for c in rates["copies"]
            ]
            parts.append(f"copies: {', '.join(copies)}")
            parts.append(f"large product {rates['product_flops_per_s'] / 1e12:.3g} TFLOP/s")
            for product in rates["head_products"]:
                if rate := product.get("full_flops_per_s"):
                    sizes = " x ".join(str(product[key]) for key in ("tokens", "hidden", "classes"))
                    chunks = f"chunks of {product['chunk_rows']} rows"
                    parts.append(f"three products of {sizes} in {chunks} {rate / 1e12:.3g} TFLOP/s")
            if includes_host(document):
                parts.append("**the host's time is in the times of this run**")
        missing = document.get("missing_providers")
        if missing:
            parts.append(f"without {', '.join(missing)}")
        lines += [
            f"- [{name}](../benchmarks/results/{name}): `{environment['command']}`, "
            f"{environment['date'][:10]}; " + "; ".join(part for part in parts if part) + "."
        ]
    return "\n".join([*lines, ""])


def performance_page(documents: dict[str, dict]) -> str:
    operators = {name: d for name, d in documents.items() if is_operators(d)}
    # GPUs first.
    operators = dict(sorted(operators.items(), key=lambda item: "cuda" not in item[1]["environment"]))
    host = {name: d for name, d in documents.items() if isinstance(d.get("host"), list)}
    kernels = {name: d for name, d in documents.items() if "kernels" in d}
    measured = {row["op"] for d in operators.values() for row in d["results"]}
    introduction, texts, reasons = notes()
    sections = [introduction, "", pictures_section(operators)]
    sections += [training_section(group) for group in same_training(documents)]
    sections += [operator_section(operators, op, texts[op]) for op in OPS if op in measured]
    sections.append(slower_section(operators, reasons))
    sections += [host_section(host)] if host else []
    sections += [kernels_section(kernels)] if kernels else []
    sections += [claims_section({**operators, **host}), runs_section({**operators, **host})]
    return "\n".join(section for section in sections if section)


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
    """The measurements of whole models: other models in the same steps on the same device together."""
    groups: list[tuple[str, dict[str, dict]]] = []

    def measured(document: dict) -> set[tuple[str, str]]:
        return {(row["model"], row["provider"]) for row in document["training_results"]}

    for name, document in documents.items():
        if "training_results" not in document:
            continue
        kind = {k: v for k, v in document["training"].items() if k != "steps"}
        key = json.dumps([document["environment"]["device"], kind])
        for other, group in groups:
            if other == key and not any(measured(d) & measured(document) for d in group.values()):
                group[name] = document
                break
        else:
            groups.append((key, {name: document}))
    # Whole models first, then single ones.
    return [
        group for _, group in sorted(groups, key=lambda item: -len(next(iter(item[1].values()))["models"]))
    ]


# What of a model runs under torch.compile, as headings say it.
COMPILED = {
    None: "",
    "layers": ", each layer under torch.compile",
    "model": ", the whole model under torch.compile",
}


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
    compiled = COMPILED[training.get("compiled")]
    lines = [
        f"## {environment['device']}: training steps of whole models, "
        f"{training['batch']} x {training['length']} tokens, {training['dtype']}{compiled}",
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
        f"{training['attention']} attention, {checkpointing} activation checkpointing{compiled}; median of "
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
    return "\n".join([*lines, "", *kernel_time_lines(models, results)])


def kernel_time_lines(models: dict[str, dict], results: list[dict]) -> list[str]:
    """A table of where the GPU's time goes, of the records that know it."""
    results = [record for record in results if "kernel_times" in record]
    if not results:
        return []
    groups = [*KERNEL_GROUPS, "other", "idle"]
    lines = [
        "Where the GPU's time goes, milliseconds of one step under PyTorch's profiler by kind of kernel. "
        "*Idle* is the time between the first and the last kernel in which none ran. *SM clock* and *power* "
        "are medians over other steps (nvidia-smi), beside what the GPU allows; *capped* is the share of "
        "samples in which the driver held the clock down to stay within the power limit.",
        "",
        f"| model | implementation | {' | '.join(groups)} | all | SM clock, MHz | power, W | capped |",
        f"|---|---|{'--:|' * (len(groups) + 4)}",
    ]
    for record in results:
        times = [record["kernel_times"].get(group, {"ms": 0})["ms"] for group in groups]
        cells = [models[record["model"]]["title"], record["provider"]]
        cells += [f"{ms:.1f}" for ms in (*times, sum(times))]
        if clocks := record.get("clocks"):
            cells.append(f"{clocks['sm_mhz']:.0f} of {clocks['max_sm_mhz']:.0f}")
            cells.append(f"{clocks['watts']:.0f} of {clocks['max_watts']:.0f}")
            cells.append(f"{clocks['power_capped']:.0%}")
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


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
        names = ["stage", "layers", "heads", "tokens", *medusa.IMPLEMENTATIONS.values()]
        names += [f"over {stacked}", f"over {plain}"]
        cells = []
        for (stage, heads, length), rows in medusa.grouped(document["results"]).items():
            place = [stage, next(iter(rows.values()))["layers"], heads, length]
            cells.append([*map(str, place), *medusa.cells(rows, key, shape), *medusa.ratios(rows, key)])
        lines += ["", f"{title}:", "", *table("|".join(f"{name}:" for name in names), cells)[:-1]]
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
    heads = [medusa_section(name, d) for name, d in documents.items() if d.get("benchmark") == "medusa"]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(performance_page(documents))
    measured = [accuracy_section(name, d) for name, d in documents.items() if "lines" in d]
    ACCURACY_PAGE.write_text("\n".join([ACCURACY, *measured]))
    distributed = {name: d for name, d in documents.items() if d.get("kind") == "fsdp"}
    if distributed:
        DISTRIBUTED_PAGE.write_text(distributed_page(distributed))
    if heads:
        MEDUSA_PAGE.write_text("\n".join([MEDUSA, *heads]))


if __name__ == "__main__":
    main()
