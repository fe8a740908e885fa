"""Training steps with and without lean activations: tokens per second, peak memory, host time per layer.

One model with random weights, patched by liger_ops; its layers are made lean and plain again in turns, so
that drifting clocks hit both alike.

    python -m benchmarks.lean                 12 layers of LLaMA 3.1 8B, 2 x 4096 tokens, bfloat16: a minute
    python -m benchmarks.lean --device cpu    a small model, to see it work
    python -m benchmarks.lean --host          host time alone: seconds
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from . import measure, memory, report
from .allocations import Allocations
from .run import DTYPES, release
from .shapes import SHAPES, Shape

VARIANTS = {"plain": False, "lean": True}
HOST_TURNS = 400
HOST_WARM_UP_TURNS = 20


def build(
    shape: Shape, layers: int, length: int, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A LLaMA with random weights, made where and as it is used: in float32 it would need twice the room."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=layers,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)


def random_tokens(shape: Shape, batch: int, length: int, device: torch.device, seed: int) -> dict:
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(shape.vocab, (batch, length), generator=generator, device=device)
    return {"input_ids": ids, "labels": ids}


def measure_steps(a: argparse.Namespace, device: torch.device) -> list[dict]:
    """Whole training steps: each variant's seconds, and its peak of allocated memory."""
    from liger_ops.transformers import patch, patched

    shape, cuda = SHAPES[a.shape], device.type == "cuda"
    torch.manual_seed(a.seed)
    model = build(shape, a.layers, a.length, DTYPES[a.dtype], device)
    patch(model, strict=True)
    make_optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[a.optimizer]
    optimizer = make_optimizer(model.parameters(), lr=1e-5, fused=True)
    inputs = random_tokens(shape, a.batch, a.length, device, a.seed)

    def step() -> torch.Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def finish() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rows = {name: {"variant": name} for name in VARIANTS}
    for turn in range(-1, a.rounds):
        for name, on in VARIANTS.items():
            with patched(model, lean_activations=on):
                if turn < 0:
                    # The first steps load kernels and make the optimizer's state.
                    for _ in range(2):
                        step()
                    rows[name] |= memory_of_a_step(model, inputs, step, cuda)
                    continue
                start = finish()
                taken = [step() for _ in range(a.steps)]
                seconds[name].append((finish() - start) / a.steps)
                losses[name] += [loss.item() for loss in taken]
            report.progress.print(f"  round {turn + 1} {name}: {1e3 * seconds[name][-1]:.0f} ms a step")
    for name, row in rows.items():
        median = statistics.median(seconds[name])
        row |= {"seconds": seconds[name], "median_s": median, "losses": losses[name]}
        row["tokens_per_s"] = a.batch * a.length / median
    return list(rows.values())


def memory_of_a_step(model: torch.nn.Module, inputs: dict, step: Callable, cuda: bool) -> dict[str, float]:
    """What the forward keeps for backward and, on CUDA, the most that a step has allocated."""
    with Allocations(model) as allocations:
        out = model(**inputs)
    row = {"kept_for_backward_mib": allocations.kept_bytes() / measure.MEBI}
    del out
    if cuda:
        release()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak_mib"] = torch.cuda.max_memory_allocated() / measure.MEBI
    elif memory.STATUS.exists():
        row["resident_mib"] = memory.status_bytes("VmRSS") / measure.MEBI
    return row


def measure_host(device: torch.device, layers: int = 8) -> dict[str, float]:
    """Microseconds of host time per layer, forward and backward, of models so small that nothing else is.

    Two models take turns, one step each. What a shared host does besides changes from one moment to the next
    by more than lean activations take, so the difference is the median of those between neighbouring steps.
    """
    from liger_ops.transformers import patch

    models = {}
    for name, on in VARIANTS.items():
        torch.manual_seed(0)
        models[name] = build(SHAPES["tiny"], layers, 8, torch.float32, device)
        patch(models[name], strict=True, lean_activations=on)
    inputs = random_tokens(SHAPES["tiny"], 1, 8, device, 0)

    def microseconds(name: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        models[name](**inputs).loss.backward()
        return 1e6 * (time.perf_counter() - start) / layers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns = []
    for turn in range(HOST_WARM_UP_TURNS + HOST_TURNS):
        # Neither is always the first.
        order = list(VARIANTS) if turn % 2 == 0 else list(VARIANTS)[::-1]
        taken = {name: microseconds(name) for name in order}
        if turn >= HOST_WARM_UP_TURNS:
            turns.append(taken)
    torch.set_num_threads(threads)
    differences = sorted(turn["lean"] - turn["plain"] for turn in turns)
    # Of the median of n independent values: n / 2 -+ sqrt(n) places from the ends, 95 % of the time.
    middle, margin = len(differences) // 2, round(math.sqrt(len(differences)))
    return {f"{name}_us": statistics.median(turn[name] for turn in turns) for name in VARIANTS} | {
        "added_us": differences[middle],
        "added_us_interval": [
            differences[max(middle - margin, 0)],
            differences[min(middle + margin, len(turns) - 1)],
        ],
    }


def print_results(a: argparse.Namespace, rows: list[dict], host: dict[str, float]) -> None:
    title = f"{a.layers} layers of {a.shape}, {a.batch} x {a.length} tokens, {a.dtype}, {a.optimizer}"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("activations", "ms a step", "tokens/s", "", "kept for backward, MiB", "peak, MiB"):
        table.add_column(name, justify="left" if name == "activations" else "right")
    plain = rows[0]
    for row in rows:
        table.add_row(
            row["variant"],
            f"{1e3 * row['median_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{100 * (row['tokens_per_s'] / plain['tokens_per_s'] - 1):+.1f} %",
            f"{row['kept_for_backward_mib']:.0f}",
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-",
        )
    report.out.print(table)
    print_host(host)


def print_host(host: dict[str, float]) -> None:
    report.out.print(
        f"host time per layer, forward and backward: {host['plain_us']:.0f} µs plain, "
        f"{host['lean_us']:.0f} µs lean, {host['added_us']:.0f} µs more "
        f"({host['added_us_interval'][0]:.0f} to {host['added_us_interval'][1]:.0f})"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lean",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--host", action="store_true", help="measure host time alone, and record nothing")
    parser.add_argument("--shape", choices=SHAPES, help="cpu: llama-h512, cuda: llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="cpu: 4, cuda: 12")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens of a sequence; cpu: 256, cuda: 4096")
    parser.add_argument("--dtype", choices=DTYPES, help="cpu: float32, cuda: bfloat16")
    parser.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="AdamW, or SGD, which keeps no state"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed at a stretch (3)")
    parser.add_argument("--rounds", type=int, default=4, help="of both variants (4)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (new in benchmarks/results)"
    )
    a = parser.parse_args(argv)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = a.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    a.shape = a.shape or ("llama-3.1-8b" if cuda else "llama-h512")
    a.layers = a.layers or (12 if cuda else 4)
    a.length = a.length or (4096 if cuda else 256)
    a.dtype = a.dtype or ("bfloat16" if cuda else "float32")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    if a.host:
        print_host(measure_host(device))
        return 0
    document = {"environment": report.environment(device, a.commit)}
    sizes = ("shape", "layers", "batch", "length", "dtype", "optimizer", "steps", "rounds", "seed")
    document["sizes"] = {name: getattr(a, name) for name in sizes}
    document["host"] = measure_host(device)
    document["results"] = measure_steps(a, device)
    print_results(a, document["results"], document["host"])
    report.write_json(a.json or report.default_path(document["environment"], "lean"), document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
