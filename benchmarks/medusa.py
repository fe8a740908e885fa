"""A training step of Medusa heads: plain transformers with the logits of every head, and liger_ops without.

    python -m benchmarks.medusa --json benchmarks/results/medusa_h100.json
    python -m benchmarks.medusa --device cpu --shape tiny --layers 2 --stage-2-layers 2 --lengths 32 64
    python -m benchmarks.medusa --draw benchmarks/results/medusa_h100.json

The base has a LLaMA's layers with random weights, made once for each number of layers, right on the device.
`stacked` is that model as transformers has it, with the loss as the published training programs compute it
(FasterDecoding/Medusa: medusa/train/train.py; linkedin/Liger-Kernel: examples/medusa): the logits of all
heads stacked, each head's cut out and, as in the latter, in float32. `plain` gives each head's logits, in the
model's dtype, to `F.cross_entropy` by itself: the least that code without fused operators needs. `ours` is
the same base patched, and the same heads in a `MedusaModel`. All run the same optimizer, learning rate
zero: the work is that of training, and all see the same weights, so that losses are compared. What runs
out of memory is written down as that.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich.table import Table

from . import report
from .plots import COLOURS, plt
from .shapes import SHAPES, Shape

if TYPE_CHECKING:
    from liger_ops.medusa import MedusaModel

IMPLEMENTATIONS = {"stacked": "stacked logits", "plain": "logits by head", "ours": "liger-ops"}
OUT_OF_MEMORY = "out of memory"
IMAGES = report.ROOT / "docs" / "images"
GIB = 2**30


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.medusa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = {"nargs": "+", "type": int, "metavar": "N"}
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--stages", **numbers, default=[1, 2])
    parser.add_argument("--heads", **numbers, default=[3, 5])
    parser.add_argument("--lengths", **numbers, default=[1024, 2048, 4096, 8192], help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step (1)")
    parser.add_argument("--layers", type=int, default=32, help="of the base in stage 1 (32)")
    parser.add_argument(
        "--stage-2-layers",
        type=int,
        default=8,
        help="of the base in stage 2, whose gradients and optimizer state have to fit too (8)",
    )
    parser.add_argument("--head-layers", type=int, default=1, help="residual blocks in each head (1)")
    parser.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="fused AdamW, or plain SGD"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in stage 2, for both")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones (2)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps (4)")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="S", help="start nothing new after it"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (new in benchmarks/results)"
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="draw this result into docs/images, and end"
    )
    a = parser.parse_args(argv)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.device == "cuda" and not a.draw and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if a.warm_up < 1 or a.steps < 1:
        parser.error("--warm-up and --steps must be positive")
    if unknown := set(a.stages) - {1, 2}:
        parser.error(f"--stages: unknown {', '.join(map(str, sorted(unknown)))}; known are 1 and 2")
    return a


def build_base(shape: Shape, layers: int, longest: int, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        use_cache=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def add_heads(base: torch.nn.Module, heads: int, layers: int, stage: int) -> MedusaModel:
    from liger_ops.medusa import add_medusa_heads

    base.requires_grad_(True)
    model = add_medusa_heads(base, num_heads=heads, num_layers=layers, stage=stage)
    with torch.no_grad():
        for head in model.heads:
            for block in head[:-1]:
                # At their start residual blocks are the identity, and leaving them out would change nothing.
                block.linear.weight.normal_(std=0.02)
    return model.train()


def stacked_loss(model: MedusaModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(model.stage == 2):
        hidden = model.base.model(ids, use_cache=False).last_hidden_state
        logits = [model.base.lm_head(hidden)]
    logits = torch.stack([*logits, *(head(hidden) for head in model.heads)])
    loss = 0.0
    for ahead, coefficient in enumerate([1.0, *model.coefficients], start=1):
        if ahead > 1 or model.stage == 2:
            shifted = logits[ahead - 1, :, :-ahead].contiguous().flatten(0, 1).float()
            loss = loss + coefficient * F.cross_entropy(shifted, ids[:, ahead:].flatten())
    return loss


def plain_loss(model: MedusaModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(model.stage == 2):
        hidden = model.base.model(ids, use_cache=False).last_hidden_state
    loss = 0.0
    if model.stage == 2:
        logits = model.base.lm_head(hidden)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for ahead, (head, coefficient) in enumerate(zip(model.heads, model.coefficients, strict=True), start=2):
        logits = head(hidden)
        loss = loss + coefficient * F.cross_entropy(
            logits[:, :-ahead].flatten(0, 1), ids[:, ahead:].flatten()
        )
    return loss


def our_loss(model: MedusaModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


@contextmanager
def implementation(name: str, model: MedusaModel) -> Iterator[Callable]:
    if name != "ours":
        yield {"stacked": stacked_loss, "plain": plain_loss}[name]
        return
    from liger_ops.transformers import patched

    with patched(model.base, strict=True):
        yield our_loss


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own error, or that of cuBLAS, which allocates for itself."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, model: MedusaModel, ids: torch.Tensor, a: argparse.Namespace) -> dict:
    """Tokens per second, the loss, and memory: the peak, and what is beyond weights and optimizer state."""
    device = ids.device
    cuda = device.type == "cuda"
    release(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    if a.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.0)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        return loss.detach()

    try:
        with implementation(name, model) as loss_of:
            losses = [step() for _ in range(a.warm_up)]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(a.steps):
                synchronize(device)
                start = time.perf_counter()
                step()
                synchronize(device)
                seconds.append(time.perf_counter() - start)
    finally:
        model.zero_grad(set_to_none=True)
    loss = losses[0].item()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "tokens_per_second": ids.numel() / statistics.median(seconds),
        "step_seconds": seconds,
        "peak_memory_gib": peak / GIB if cuda else None,
        "step_memory_gib": (peak - torch.cuda.memory_allocated()) / GIB if cuda else None,
        "loss": loss,
    }


def configurations(a: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    for stage in sorted(a.stages):
        for heads in a.heads:
            for length in a.lengths:
                yield stage, heads, length


def run(a: argparse.Namespace, device: torch.device) -> tuple[list[dict], bool]:
    """Results of all configurations, and whether the time limit left some out."""
    begun = time.monotonic()
    results: list[dict] = []
    built: dict[str, object] = {}
    for stage, heads, length in configurations(a):
        if time.monotonic() - begun > a.time_limit:
            report.progress.print(
                f"the time limit of {a.time_limit:.0f} s has passed: nothing new is started"
            )
            return results, True
        layers = a.layers if stage == 1 else a.stage_2_layers
        if built.get("layers") != layers:
            built.clear()
            release(device)
            torch.manual_seed(a.seed)
            built |= {"layers": layers, "base": build_base(SHAPES[a.shape], layers, max(a.lengths), device)}
        if built.get("heads") != (stage, heads):
            built.pop("model", None)
            release(device)
            built |= {
                "heads": (stage, heads),
                "model": add_heads(built["base"], heads, a.head_layers, stage),
            }
            if stage == 2 and a.gradient_checkpointing:
                built["model"].gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator().manual_seed(a.seed)
        ids = torch.randint(SHAPES[a.shape].vocab, (a.batch, length), generator=generator).to(device)
        losses: dict[str, float] = {}
        for name in a.implementations:
            row: dict = {
                "stage": stage,
                "heads": heads,
                "length": length,
                "layers": layers,
                "implementation": name,
            }
            try:
                row |= measure(name, built["model"], ids, a)
                losses[name] = row["loss"]
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                row |= {"tokens_per_second": None, "peak_memory_gib": None, "failure": OUT_OF_MEMORY}
            release(device)
            results.append(row)
            speed = row["tokens_per_second"]
            report.progress.print(
                f"  stage {stage}, {heads} heads, {length} tokens, {name}: "
                + (row["failure"] if speed is None else f"{speed:,.0f} tokens/s, loss {row['loss']:.4f}")
            )
        if losses and not math.isclose(min(losses.values()), max(losses.values()), rel_tol=1e-2):
            for row in results[-len(a.implementations) :]:
                row["failure"] = "losses differ: " + ", ".join(f"{n} {x:.5f}" for n, x in losses.items())
            report.progress.print(f"  {row['failure']}")
    return results, False


def cells(rows: dict[str, dict], key: str, shape: str) -> list[str]:
    """Every implementation's value, as words."""
    measured = [rows.get(name, {}) for name in IMPLEMENTATIONS]
    return [row.get("failure", "") if row.get(key) is None else format(row[key], shape) for row in measured]


def ratios(rows: dict[str, dict], key: str) -> list[str]:
    """Our value over that of each of the others."""
    ours = rows.get("ours", {}).get(key)
    others = [rows.get(name, {}).get(key) for name in IMPLEMENTATIONS if name != "ours"]
    return [f"{ours / other:.2f}" if ours and other else "" for other in others]


def grouped(results: list[dict]) -> dict[tuple[int, int, int], dict[str, dict]]:
    groups: dict[tuple[int, int, int], dict[str, dict]] = {}
    for row in results:
        groups.setdefault((row["stage"], row["heads"], row["length"]), {})[row["implementation"]] = row
    return groups


def print_table(results: list[dict], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("stage, heads, tokens", no_wrap=True)
    for quantity in ("tokens/s", "peak GiB", "loss"):
        for name in IMPLEMENTATIONS:
            table.add_column(f"{name} {quantity}", justify="right")
    previous = None
    for (stage, heads, length), rows in grouped(results).items():
        if previous and previous != (stage, heads):
            table.add_section()
        previous = (stage, heads)
        table.add_row(
            f"{stage}, {heads}, {length}",
            *cells(rows, "tokens_per_second", ",.0f"),
            *cells(rows, "peak_memory_gib", ".1f"),
            *cells(rows, "loss", ".4f"),
        )
    report.out.print(table)


def title_of(document: dict) -> str:
    sizes = document["sizes"]
    return (
        f"Medusa training step, {sizes['shape']} layers, batch {sizes['batch']}, {sizes['dtype']}, "
        f"{document['environment']['device']}"
    )


def draw(document: dict, path: Path) -> None:
    """Tokens per second above, peak memory below, a column for each stage and number of heads."""
    groups = grouped(document["results"])
    columns = sorted({(stage, heads) for stage, heads, _ in groups})
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.2 * len(columns), 6), layout="constrained", squeeze=False, sharey="row"
    )
    colours = {"stacked": COLOURS["compile"], "plain": COLOURS["torch"], "ours": COLOURS["ours"]}
    present = [name for name in IMPLEMENTATIONS if any(name in rows for rows in groups.values())]
    width = 0.8 / len(present)
    for column, (stage, heads) in enumerate(columns):
        lengths = sorted(length for s, h, length in groups if (s, h) == (stage, heads))
        layers = next(row["layers"] for row in groups[stage, heads, lengths[0]].values())
        for axis, key in ((axes[0][column], "tokens_per_second"), (axes[1][column], "peak_memory_gib")):
            for number, name in enumerate(present):
                rows = [groups[stage, heads, length].get(name, {}) for length in lengths]
                values = [row.get(key) or 0 for row in rows]
                places = [i + width * (number - (len(present) - 1) / 2) for i in range(len(lengths))]
                axis.bar(places, values, 0.95 * width, color=colours[name], label=IMPLEMENTATIONS[name])
                for place, row in zip(places, rows, strict=True):
                    if row.get("failure") == OUT_OF_MEMORY:
                        axis.text(
                            place,
                            0,
                            " out of memory",
                            rotation=90,
                            ha="center",
                            va="bottom",
                            fontsize="small",
                        )
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes[0][column].set_title(f"stage {stage}, {heads} heads, {layers} layers", fontsize="medium")
        axes[1][column].set_xlabel("tokens per sequence")
    axes[0][0].set_ylabel("tokens/s")
    axes[1][0].set_ylabel("peak memory, GiB")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(present), frameon=False)
    figure.suptitle(title_of(document), fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    if a.draw:
        image = IMAGES / f"{a.draw.stem}.png"
        draw(json.loads(a.draw.read_text()), image)
        report.progress.print(f"wrote {image}")
        return 0
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    environment = report.environment(device, a.commit)
    results, stopped = run(a, device)
    shape = SHAPES[a.shape]
    sizes = {
        "shape": a.shape,
        "hidden": shape.hidden,
        "vocab": shape.vocab,
        "batch": a.batch,
        "head_layers": a.head_layers,
        "optimizer": a.optimizer,
        "gradient_checkpointing": a.gradient_checkpointing,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "warm_up": a.warm_up,
        "steps": a.steps,
        "seed": a.seed,
    }
    document = {"environment": environment, "benchmark": "medusa", "sizes": sizes}
    document |= {"stopped_by_time_limit": stopped, "results": results}
    print_table(results, title_of(document))
    report.write_json(a.json or report.default_path(environment, "medusa"), document)
    failures = [row for row in results if row.get("failure") not in (None, OUT_OF_MEMORY)]
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
