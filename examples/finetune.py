"""Fine-tunes the same LLaMA twice through the Hugging Face Trainer: plain, and with `use_liger=True`.

    python examples/finetune.py

needs nothing but this machine: the text is the Python standard library, the tokenizer is trained on it, the
model starts from random weights. Real fine-tuning takes Hub names or local folders:

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --dataset roneneldan/TinyStories

Both runs see the same seed and the same data; train_once.py is what each of them executes. The output folder
receives results.json and comparison.png.

    torchrun --nproc-per-node=2 examples/finetune.py

trains in several processes, one for each GPU or all on the CPU, with DistributedDataParallel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from _text import END_OF_TEXT, load_documents, to_blocks, train_tokenizer
from train_once import WARM_UP_STEPS, Settings

VARIANTS = {"plain": "transformers", "liger": "use_liger=True"}
GIB, MIB = 2**30, 2**20


def require_liger_ops() -> None:
    """Says now, not after the first run, that the second one cannot start."""
    try:
        import liger_ops  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit(
            "liger_ops is not installed: run `make build`, or `pip install --no-build-isolation .`"
        ) from None


def small_llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int = 32000
) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }


def default_settings(arguments: argparse.Namespace) -> Settings:
    """A model and batch that take this machine minutes and give fused operators something to do."""
    if arguments.quick:
        config, dtype = small_llama(64, 2, 4, 2, 160, vocab=1000), "float32"
        steps, batch, length, learning_rate = 6, 4, 64, 2e-3
    elif arguments.device == "cpu":
        # Few hidden units beside a real vocabulary: the loss dominates, as it does in small language models.
        config, dtype = small_llama(256, 4, 8, 4, 704), "float32"
        steps, batch, length, learning_rate = 40, 8, 256, 2e-3
    elif (free := torch.cuda.mem_get_info()[0]) > 22 * GIB:
        # The shape of Llama 3.2 1B, whose vocabulary of 128256 the tokenizer here fills to a quarter.
        config, dtype = small_llama(2048, 16, 32, 8, 8192, vocab=128256), "bfloat16"
        steps, batch, length, learning_rate = 60, 8 if free > 60 * GIB else 2, 1024, 3e-4
    else:
        config, dtype = small_llama(1024, 8, 16, 8, 2816), "bfloat16"
        steps, batch, length, learning_rate = 60, 4, 512, 5e-4
    return Settings(
        output=str(arguments.output),
        device=arguments.device,
        dtype=dtype,
        seed=arguments.seed,
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        config=config,
        threads=arguments.threads,
    )


def resolve(arguments: argparse.Namespace) -> Settings:
    settings = default_settings(arguments)
    if arguments.model:
        settings.model, settings.config, settings.learning_rate = arguments.model, {}, 2e-5
    for option in ("steps", "batch", "length", "learning_rate"):
        if getattr(arguments, option) is not None:
            setattr(settings, option, getattr(arguments, option))
    if settings.steps <= WARM_UP_STEPS:
        raise SystemExit(
            f"--steps must be more than {WARM_UP_STEPS}: the first {WARM_UP_STEPS} are not timed"
        )
    return settings


def prepare_data(settings: Settings, arguments: argparse.Namespace) -> str:
    """Writes the token blocks that both runs read; returns a line that says what they are."""
    limit = int(arguments.text_mib * MIB) if not arguments.quick else 300_000
    documents = load_documents(arguments.dataset, arguments.text_column, limit)
    folder = Path(settings.output)
    if settings.model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
        end = tokenizer.eos_token_id
        entries = len(tokenizer)
    else:
        entries = min(settings.config["vocab_size"], 32000)
        tokenizer = train_tokenizer(documents, entries, folder)
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
        end = tokenizer.token_to_id(END_OF_TEXT)
        entries = tokenizer.get_vocab_size()
    blocks = to_blocks(encoded, end, settings.length)
    torch.save(blocks, folder / "blocks.pt")
    source = arguments.dataset or f"the standard library of Python {platform.python_version()}"
    return f"{source}: {len(documents)} documents, {blocks.numel():,} tokens, {entries:,} tokenizer entries"


def processes() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meeting_point() -> dict[str, str]:
    """Environment in which the training processes of one run, and no others, find each other."""
    if processes() == 1:
        # With several GPUs the Trainer would use all of them through DataParallel.
        return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    port = [None]
    if dist.get_rank() == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = [s.getsockname()[1]]
    dist.broadcast_object_list(port)
    # Not torchrun's own store, in which the names of the other run's processes are.
    return {"MASTER_PORT": str(port[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def run_variant(settings_file: Path, variant: str) -> dict:
    script = Path(__file__).with_name("train_once.py")
    variables = {
        # glibc keeps freed blocks of up to 32 MiB, and before 2.38 cannot reuse most of them for tensors:
        # resident memory would grow with every step, whatever the step needs. From 16 MiB on it gives them
        # back.
        "MALLOC_MMAP_THRESHOLD_": str(16 * MIB),
        **os.environ,
        **meeting_point(),
    }
    if subprocess.run([sys.executable, script, settings_file, variant], env=variables).returncode:
        raise SystemExit(f"the {variant} run failed; its error is above")
    return json.loads((settings_file.parent / f"{variant}.json").read_text())


def compare(plain: dict, liger: dict) -> dict:
    differences = [abs(a - b) for a, b in zip(plain["losses"], liger["losses"], strict=True)]
    return {
        "speedup": liger["tokens_per_second"] / plain["tokens_per_second"],
        "memory_ratio": liger["peak_memory_mib"] / plain["peak_memory_mib"],
        "largest_loss_difference": max(differences),
    }


def print_table(console, title: str, plain: dict, liger: dict, comparison: dict) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in (*VARIANTS.values(), "difference"):
        table.add_column(heading, justify="right")
    runs = (plain, liger)
    table.add_row(
        "tokens/s", *(f"{r['tokens_per_second']:,.0f}" for r in runs), f"{comparison['speedup']:.2f}x"
    )
    table.add_row(
        "peak memory, MiB",
        *(f"{r['peak_memory_mib']:,.0f}" for r in runs),
        f"{comparison['memory_ratio']:.2f}x",
    )
    for words, index in (("loss, first step", 0), ("loss, last step", -1)):
        first, second = (r["losses"][index] for r in runs)
        table.add_row(words, f"{first:.4f}", f"{second:.4f}", f"{second - first:+.1e}")
    table.add_row("largest loss difference", "", "", f"{comparison['largest_loss_difference']:.1e}")
    calls = [str(sum(r["liger_operator_calls_per_step"].values())) for r in runs]
    table.add_row("torch.ops.liger calls in a step", *calls, "")
    console.print(table)
    console.print(f"Peak memory: {plain['peak_memory_is']}. Speed: {plain['speed_is']}.")


def plot(path: Path, title: str, plain: dict, liger: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curve, speed, memory) = plt.subplots(
        1, 3, figsize=(11, 4), width_ratios=(2.4, 1, 1), layout="constrained"
    )
    colours = ("tab:gray", "tab:blue")
    for run, label, style, colour in zip(
        (plain, liger), VARIANTS.values(), ("-", "--"), colours, strict=True
    ):
        steps = range(1, len(run["losses"]) + 1)
        # The curves lie on each other: a wide line under a dashed one shows both.
        curve.plot(steps, run["losses"], style, label=label, color=colour, linewidth=4 if style == "-" else 2)
    curve.set(xlabel="step", ylabel="training loss")
    curve.legend()
    for axis, key, words in (
        (speed, "tokens_per_second", "tokens/s"),
        (memory, "peak_memory_mib", "peak memory, MiB"),
    ):
        bars = axis.bar(list(VARIANTS.values()), [plain[key], liger[key]], color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", padding=2)
        axis.set_title(words, fontsize="medium")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def environment() -> dict:
    packages = ("torch", "transformers", "accelerate", "tokenizers", "liger-ops")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": versions,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="Hub name or local folder of a causal language model (a small new LLaMA)"
    )
    parser.add_argument(
        "--dataset", help="text file, folder of text files, or Hub name (Python's standard library)"
    )
    parser.add_argument(
        "--text-column", default="text", help="column of a Hub data set that holds the text (text)"
    )
    parser.add_argument("--text-mib", type=float, default=12, help="read at most this much text (12)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/finetune"), help="folder (outputs/finetune)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--length", type=int, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument(
        "--quick", action="store_true", help="a toy model and few steps: does everything work?"
    )
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main() -> int:
    arguments = parse()
    require_liger_ops()
    from rich.console import Console

    if processes() > 1:
        dist.init_process_group("gloo")
    first = processes() == 1 or dist.get_rank() == 0
    console = Console(highlight=False, quiet=not first)
    started = time.perf_counter()
    settings = resolve(arguments)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "settings.json"
    if first:
        console.print("[bold]1/3[/] text and tokenizer")
        console.print(f"    {prepare_data(settings, arguments)}")
        settings_file.write_text(json.dumps(asdict(settings)))
    runs = {}
    for number, (variant, words) in enumerate(VARIANTS.items(), start=2):
        console.print(f"[bold]{number}/3[/] {settings.steps} steps with {words}")
        runs[variant] = run_variant(settings_file, variant)
    if processes() > 1:
        dist.destroy_process_group()
    if not first:
        return 0
    plain, liger = runs["plain"], runs["liger"]
    comparison = compare(plain, liger)
    name = settings.model or f"LLaMA with {plain['parameters'] / 1e6:.0f} M parameters"
    device = torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU, {plain['threads']} threads"
    sequences = f"{settings.batch} x " + (f"{processes()} processes x " if processes() > 1 else "")
    title = f"{name}, {sequences}{settings.length} tokens a step, {settings.dtype}, {device}"
    print_table(console, title, plain, liger, comparison)
    plot(folder / "comparison.png", title, plain, liger)
    results = {"environment": environment(), "device": device, "settings": asdict(settings)}
    results |= {"runs": runs, "comparison": comparison}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(
        f"{folder / 'comparison.png'} and results.json, after {time.perf_counter() - started:.0f} s"
    )
    if not liger["liger_operator_calls_per_step"]:
        console.print("[red]The second run executed no operator of torch.ops.liger: nothing was compared.[/]")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
