"""What a decoder layer keeps for its backward pass, operator by operator, with and without lean activations.

Measured, not derived: every allocation of a forward is recorded, and what is still there at its end is kept.
On CUDA the allocator's own counts, at the end of the forward and at the peak of both passes, stand beside it.

    python -m benchmarks.activations                     a layer of LLaMA 3.1 8B; few tokens on the CPU
    python -m benchmarks.activations --picture FILE      and draws it
    python -m benchmarks.activations --from RESULT.json --picture FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.table import Table

from . import measure, report
from .allocations import Allocations
from .lean import VARIANTS, build, random_tokens
from .run import DTYPES, release
from .shapes import SHAPES

# The second of three: the first one's input is the embedding's, the last one's result is the head's.
LAYERS, LAYER = 3, 1
PREFIX = f"model.layers.{LAYER}"


def measure_layer(a: argparse.Namespace, device: torch.device) -> list[dict]:
    """For each variant what one layer keeps, in the order of the forward."""
    from liger_ops.transformers import patch, patched

    torch.manual_seed(a.seed)
    # The vocabulary is no part of a layer.
    shape = SHAPES[a.shape].__class__(**{**vars(SHAPES[a.shape]), "vocab": 1024})
    model = build(shape, LAYERS, a.length, DTYPES[a.dtype], device)
    patch(model, strict=True)
    inputs = random_tokens(shape, a.batch, a.length, device, a.seed)
    model(**inputs).loss.backward()  # makes the gradients, which stay
    results = []
    for name, on in VARIANTS.items():
        with patched(model, lean_activations=on):
            results.append({"variant": name} | measure_variant(model, inputs, a.batch * a.length, device))
    return results


def measure_variant(model: torch.nn.Module, inputs: dict, tokens: int, device: torch.device) -> dict:
    cuda = device.type == "cuda"
    release()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Allocations(model) as allocations:
        out = model(**inputs)
    kept = [
        {
            "module": record.module.removeprefix(PREFIX).removeprefix(".") or "layer",
            "operator": record.operator,
            "shape": list(record.shape),
            "bytes": record.bytes,
            "bytes_per_token": record.bytes / tokens,
        }
        for record in allocations.kept()
        if record.module == PREFIX or record.module.startswith(PREFIX + ".")
    ]
    row = {
        "kept": kept,
        "bytes_per_token": sum(entry["bytes_per_token"] for entry in kept),
        "model_bytes": allocations.kept_bytes(),
    }
    if cuda:
        row["model_bytes_of_allocator"] = torch.cuda.memory_allocated(device) - before
    out.loss.backward()
    if cuda:
        torch.cuda.synchronize(device)
        row["model_peak_bytes_of_allocator"] = torch.cuda.max_memory_allocated(device) - before
    return row


def label(entry: dict) -> str:
    operator = entry["operator"].split("::")[-1]
    # One operator of PyTorch for each implementation of attention.
    return f"{entry['module']}: {'attention' if 'attention' in operator else operator}"


def print_results(document: dict) -> None:
    sizes, results = document["sizes"], document["results"]
    title = f"kept for backward by one layer of {sizes['shape']}, {sizes['dtype']}; MiB for 8192 tokens"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("allocated by", "shape", *(row["variant"] for row in results)):
        table.add_column(name, justify="left" if name in ("allocated by", "shape") else "right")

    def mebibytes(bytes_per_token: float) -> str:
        return f"{8192 * bytes_per_token / measure.MEBI:.1f}"

    lean = [(label(entry), entry["shape"]) for entry in results[1]["kept"]]
    for entry in results[0]["kept"]:
        key = (label(entry), entry["shape"])
        size = mebibytes(entry["bytes_per_token"])
        if found := key in lean:
            lean.remove(key)
        table.add_row(key[0], " x ".join(map(str, key[1])), size, size if found else "computed again")
    table.add_section()
    table.add_row("together", "", *(mebibytes(row["bytes_per_token"]) for row in results))
    report.out.print(table)


def draw(document: dict, path: Path) -> None:
    """Two bars, one for each variant, of what is kept in the order of the forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, results = document["sizes"], document["results"]
    names = list(dict.fromkeys(label(entry) for entry in results[0]["kept"]))
    total = results[0]["bytes_per_token"]
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for y, row in enumerate(results):
        left = 0.0
        for entry in row["kept"]:
            width, name = entry["bytes_per_token"] / 1024, label(entry)
            colour = colours[names.index(name) % len(colours)]
            axes.barh(y, width, left=left, height=0.6, color=colour, edgecolor="w", label=name)
            if entry["bytes_per_token"] > 0.01 * total:
                axes.text(left + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=8)
            left += width
        axes.text(left, y, f"  {left:.0f} KiB", va="center", fontsize=9)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_yticks(range(len(results)), [row["variant"] for row in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * total / 1024)
    axes.set_xlabel("KiB per token")
    axes.set_title(
        f"kept for backward by one layer of {sizes['shape']}, {sizes['dtype']}, "
        f"{sizes['batch']} x {sizes['length']} tokens, {document['environment']['device']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, so that the same results draw the same file.
    figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
    plt.close(figure)
    report.progress.print(f"wrote {path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens of a sequence; cpu: 32, cuda: 4096")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show an earlier result")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the result, as .png or .svg")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (new in benchmarks/results)"
    )
    a = parser.parse_args(argv)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    a.length = a.length or (4096 if a.device == "cuda" else 32)
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    if a.source:
        document = json.loads(a.source.read_text())
    else:
        torch.set_num_threads(a.threads)
        device = torch.device(a.device)
        document = {"environment": report.environment(device, a.commit)}
        document["sizes"] = {name: getattr(a, name) for name in ("shape", "batch", "length", "dtype", "seed")}
        document["results"] = measure_layer(a, device)
        report.write_json(a.json or report.default_path(document["environment"], "activations"), document)
    print_results(document)
    if a.picture:
        draw(document, a.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
