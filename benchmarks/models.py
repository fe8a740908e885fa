"""Whole training steps of whole models: transformers alone, with Liger Kernel, and with liger_ops.

Real layer shapes, random weights, random tokens; forward, backward and a fused AdamW step, in bfloat16. Each
measurement has a process of its own, so that none inherits what another left in memory. All start from the
same weights and see the same tokens: their losses are compared.

    python -m benchmarks.models                                  every model, on this machine's GPU
    python -m benchmarks.models --models llama-3.1-8b --batch 2 --length 4096
    python -m benchmarks.models --device cpu --tiny --steps 2    seconds, for a look at the program
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from . import clocks, report

LEAN = "liger-ops-lean"
PROVIDERS = ("transformers", "liger-kernel", "liger-ops", LEAN)
OUT_OF_MEMORY = "out of memory"
WARM_UP_STEPS = 2
# Steps over which clocks and power are sampled.
CLOCKED_STEPS = 8
MIB = 2**20


@dataclass(frozen=True)
class Model:
    """A published model: the sizes in its configuration file, and how much of it is run.

    Attributes:
        config: arguments of transformers' configuration class for ``model_type``.
        source: where the numbers come from.
        measured_layers: fewer than the model has where a training step of it needs more memory than one GPU
            has.
    """

    title: str
    model_type: str
    source: str
    config: dict[str, Any]
    measured_layers: int | None = None


MODELS: dict[str, Model] = {
    "llama-3.1-8b": Model(
        "LLaMA 3.1 8B",
        "llama",
        "meta-llama/Llama-3.1-8B",
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
        ),
    ),
    "mistral-7b": Model(
        "Mistral 7B",
        "mistral",
        "mistralai/Mistral-7B-v0.3",
        dict(
            vocab_size=32768,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            sliding_window=None,
        ),
    ),
    "qwen2-7b": Model(
        "Qwen2 7B",
        "qwen2",
        "Qwen/Qwen2-7B",
        dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
    ),
    "gemma-7b": Model(
        "Gemma 7B",
        "gemma",
        "google/gemma-7b",
        dict(
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
        ),
    ),
    "gemma2-9b": Model(
        "Gemma 2 9B",
        "gemma2",
        "google/gemma-2-9b",
        dict(
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
        ),
    ),
    "phi3-mini": Model(
        "Phi-3 mini",
        "phi3",
        "microsoft/Phi-3-mini-128k-instruct",
        dict(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            pad_token_id=32000,
        ),
    ),
    "mixtral-8x7b": Model(
        "Mixtral 8x7B",
        "mixtral",
        "mistralai/Mixtral-8x7B-v0.1",
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        # 46.7 billion parameters with their gradients and AdamW's two states are 374 GB in bfloat16.
        measured_layers=4,
    ),
}

# What --tiny makes of any of them.
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)


@dataclass(frozen=True)
class Job:
    """One measurement; travels to its process."""

    model: str
    provider: str
    batch: int
    length: int
    steps: int
    device: str
    dtype: str
    tiny: bool
    layers: int | None
    checkpointing: bool
    seed: int
    kernels: bool = False
    compiled: str | None = None

    def config(self) -> Any:
        from transformers import AutoConfig

        model = MODELS[self.model]
        sizes = model.config | {"max_position_embeddings": self.length, "use_cache": False}
        sizes["num_hidden_layers"] = self.layers or model.measured_layers or sizes["num_hidden_layers"]
        if self.tiny:
            sizes |= TINY | {"num_key_value_heads": min(2, sizes["num_key_value_heads"]), "pad_token_id": 0}
            if "head_dim" in sizes:
                sizes["head_dim"] = 16
        return AutoConfig.for_model(model.model_type, **sizes)


def build(job: Job) -> torch.nn.Module:
    """The model with the provider's kernels, weights drawn on the device from the job's seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.seed)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(
            job.config(), dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
        )
    model.train()
    if job.provider.startswith("liger-ops"):
        from liger_ops.transformers import patch

        patch(model, strict=True, lean_activations=job.provider == LEAN)
    elif job.provider == "liger-kernel":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if job.compiled == "layers":
        for layer in model.get_decoder().layers:
            layer.compile()
    elif job.compiled == "model":
        model.compile()
    return model


def persistent_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients and optimizer states: what a step needs whatever its kernels do."""
    parameters = [p.numel() * p.element_size() for p in model.parameters()]
    states = [
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    return 2 * sum(parameters) + sum(states)


# What a kernel is for, by what its name contains; the first that fits.
KERNEL_GROUPS = {
    "attention": ("flash", "fmha", "attention", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "optimizer": ("multi_tensor_apply", "Adam"),
    "fused operators": ("liger", "_rms_norm", "_swiglu", "_triton_rope", "element_mul"),
}


def kernel_times(step: Callable[[], object]) -> dict[str, dict]:
    """GPU time of one step: milliseconds, launches and the kernels that take the most, by KERNEL_GROUPS.

    "idle" has the milliseconds between the first kernel and the last in which none ran.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    groups: dict[str, dict] = {}
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation or ms == 0:
            continue
        name = event.key
        fits = (group for group, words in KERNEL_GROUPS.items() if any(word in name for word in words))
        group = groups.setdefault(next(fits, "other"), {"ms": 0.0, "launches": 0, "kernels": []})
        group["ms"] += ms
        group["launches"] += event.count
        group["kernels"].append({"name": name[:160], "ms": ms, "launches": event.count})
    for group in groups.values():
        group["kernels"] = sorted(group["kernels"], key=lambda kernel: -kernel["ms"])[:8]
    found = dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return found | {"idle": {"ms": idle / 1e3}}


def run(job: Job) -> dict:
    """Train for a few steps; what came of it."""
    cuda = job.device == "cuda"
    record: dict = {"model": job.model, "provider": job.provider}
    try:
        model = build(job)
        config = model.config
        record |= {
            "layers": config.num_hidden_layers,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)
        generator = torch.Generator(job.device).manual_seed(job.seed)
        seconds, losses = [], []

        def train(tokens: torch.Tensor) -> torch.Tensor:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        for step in range(WARM_UP_STEPS + job.steps):
            tokens = torch.randint(
                config.vocab_size, (job.batch, job.length), generator=generator, device=job.device
            )
            if cuda:
                torch.cuda.synchronize()
                if step == WARM_UP_STEPS:
                    torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            loss = train(tokens)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            losses.append(loss.detach())
        record |= {
            "step_seconds": seconds[WARM_UP_STEPS:],
            "first_step_seconds": seconds[0],
            "tokens_per_second": job.batch * job.length / statistics.median(seconds[WARM_UP_STEPS:]),
            "losses": [loss.item() for loss in losses],
        }
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            record["peak_mib"] = peak / MIB
            record["peak_beyond_states_mib"] = (peak - persistent_bytes(model, optimizer)) / MIB
            if job.kernels:
                record["kernel_times"] = kernel_times(lambda: train(tokens))

                def busy() -> None:
                    for _ in range(CLOCKED_STEPS):
                        train(tokens)
                    torch.cuda.synchronize()

                record["clocks"] = clocks.sampled(busy)
    except torch.OutOfMemoryError:
        record["failure"] = OUT_OF_MEMORY
    return record


def preloaded() -> list[str]:
    """Modules that every measurement needs, imported once in the process that the others are forked from."""
    families = sorted({model.model_type for model in MODELS.values()})
    modeling = [f"transformers.models.{family}.modeling_{family}" for family in families]
    return ["torch", "transformers", *modeling, "liger_ops.transformers"]


def send(job: Job, results: Connection) -> None:
    """What a measurement's process runs."""
    try:
        results.send(run(job))
    # Whatever a peer raises is a result of this benchmark.
    except Exception as error:
        failure = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        results.send({"model": job.model, "provider": job.provider, "failure": failure})


def in_own_process(job: Job, context: multiprocessing.context.BaseContext, seconds: float) -> dict:
    """The job's record, or why there is none: an error, a crash, or no result in that many seconds."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(job, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        failure = f"no result after {seconds:.0f} s"
    except EOFError:
        failure = "the process died"
    finally:
        process.kill()
        process.join()
    return {"model": job.model, "provider": job.provider, "failure": failure}


def compare(results: list[dict]) -> None:
    """Adds to each measurement its ratios to transformers', and how far its losses are from them."""
    plain = {r["model"]: r for r in results if r["provider"] == "transformers" and "failure" not in r}
    for record in results:
        other = plain.get(record["model"])
        if other is None or "failure" in record:
            continue
        record["speedup"] = record["tokens_per_second"] / other["tokens_per_second"]
        if "peak_mib" in record:
            record["memory_ratio"] = record["peak_mib"] / other["peak_mib"]
            record["memory_beyond_states_ratio"] = (
                record["peak_beyond_states_mib"] / other["peak_beyond_states_mib"]
            )
        record["largest_loss_difference"] = max(
            abs(a - b) for a, b in zip(record["losses"], other["losses"], strict=True)
        )


def print_table(results: list[dict]) -> None:
    table = Table(header_style="bold")
    for name in ("model", "provider"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "speed-up", "peak GiB", "of plain", "beyond states GiB", "loss difference"):
        table.add_column(name, justify="right")
    for r in results:
        if "failure" in r:
            table.add_row(r["model"], r["provider"], r["failure"])
            continue

        def cell(key: str, scale: float = 1, form: str = ".2f", r: dict = r) -> str:
            return format(r[key] / scale, form) if key in r else ""

        table.add_row(
            r["model"],
            r["provider"],
            f"{r['tokens_per_second']:.0f}",
            cell("speedup"),
            cell("peak_mib", 1024, ".1f"),
            cell("memory_ratio"),
            cell("peak_beyond_states_mib", 1024, ".1f"),
            cell("largest_loss_difference", form=".1e"),
        )
    report.out.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--models", **several, choices=MODELS, default=list(MODELS))
    parser.add_argument("--providers", **several, choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=5, help=f"timed, after {WARM_UP_STEPS} that are not")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument(
        "--compile",
        choices=("layers", "model"),
        help="each decoder layer or the model by torch.compile",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also record where the GPU's time goes in one more step, and its clocks and power in "
        f"{CLOCKED_STEPS} others",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="every model shrunk to a toy")
    parser.add_argument(
        "--job-limit", type=float, default=300, metavar="S", help="give up on one after (300)"
    )
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no measurement after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go")
    a = parser.parse_args(argv)
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return a


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    a = parse(argv)
    # A process that has asked the CUDA runtime for its devices can fork none that uses them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded())
    results: list[dict] = []
    document = {
        "environment": report.environment(torch.device(a.device), a.commit),
        "training": {
            "batch": a.batch,
            "length": a.length,
            "dtype": a.dtype,
            "optimizer": "AdamW" + (" (fused)" if a.device == "cuda" else ""),
            "attention": "sdpa",
            "activation_checkpointing": a.checkpointing,
            "compiled": a.compile,
            "steps": a.steps,
            "warm_up_steps": WARM_UP_STEPS,
            "seed": a.seed,
            "tiny": a.tiny,
        },
        "models": {
            name: {
                "title": MODELS[name].title,
                "source": MODELS[name].source,
                "layers": MODELS[name].config["num_hidden_layers"],
            }
            for name in a.models
        },
        "training_results": results,
    }
    path = a.json or report.default_path(document["environment"], "models")
    for model in a.models:
        for provider in a.providers:
            spent = time.perf_counter() - started
            if a.time_limit is not None and spent > a.time_limit:
                results.append({"model": model, "provider": provider, "failure": "no time was left"})
                continue
            job = Job(
                model,
                provider,
                a.batch,
                a.length,
                a.steps,
                a.device,
                a.dtype,
                a.tiny,
                a.layers,
                a.checkpointing,
                a.seed,
                a.kernels,
                a.compile,
            )
            record = in_own_process(job, context, a.job_limit)
            results.append(record)
            outcome = record.get("failure") or f"{record['tokens_per_second']:.0f} tokens/s"
            report.progress.print(f"{model} {provider}: {outcome} ({time.perf_counter() - started:.0f} s)")
        compare(results)
        report.write_json(path, document)
    print_table(results)
    return 0 if all("failure" not in r for r in results if r["provider"].startswith("liger-ops")) else 1


if __name__ == "__main__":
    raise SystemExit(main())
