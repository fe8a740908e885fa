"""Benchmarks the operators beside their peers, on the CPU or on CUDA.

Every provider is checked against the reference before it is timed; one that is wrong is reported, not timed.
The table goes to stdout, progress to stderr, and everything, with versions, device and command, to a JSON
file.

    python -m benchmarks.run                          all operators, this machine's GPU if it has one
    python -m benchmarks.run --device cpu --ops rms_norm swiglu --providers torch ours
    python -m benchmarks.run --host                   host time per call instead of speed
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from . import measure, memory, report
from .claims import as_json, judge
from .ops import OPS, Case, Problem, reference
from .providers import PROVIDERS, Functions, Unavailable
from .shapes import SHAPES

MODES = ("fwd", "bwd", "full")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Processes of their own measure memory on the CPU, seconds each: only where memory is what the operator is
# about.
CPU_MEMORY_OPS = ("cross_entropy", "fused_linear_cross_entropy")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", **several, default=list(OPS), help=f"of: {', '.join(OPS)}")
    parser.add_argument("--providers", **several, default=list(PROVIDERS), help=f"of: {', '.join(PROVIDERS)}")
    parser.add_argument(
        "--mode", **several, help="of: fwd (no gradients wanted), bwd, full; cpu: full, cuda: all"
    )
    parser.add_argument("--shape", choices=SHAPES, help="cpu: llama-h512, cuda: llama-3.1-8b")
    parser.add_argument("--tokens", type=int, help="cpu: 2048, cuda: 8192")
    parser.add_argument(
        "--batch", type=int, default=2, help="sequences the tokens are split into, for rope (2)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="cpu: float32, cuda: bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument(
        "--budget", type=float, metavar="MS", help="time per measurement; cpu: 1500, cuda: 100"
    )
    parser.add_argument(
        "--loss-gradient", type=float, default=1.0, help="upstream gradient of scalar losses (1)"
    )
    parser.add_argument(
        "--queue-ahead",
        type=float,
        default=0.0,
        metavar="US",
        help="keep the GPU busy this long before each timed call, to hide host time (0)",
    )
    parser.add_argument(
        "--host", action="store_true", help="measure host time per call on a tiny input instead"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a claim of claims.py fails")
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
    a.tokens = a.tokens or (8192 if cuda else 2048)
    a.dtype = a.dtype or ("bfloat16" if cuda else "float32")
    a.budget = a.budget or (100.0 if cuda else 1500.0)
    a.mode = a.mode or (list(MODES) if cuda else ["full"])
    for option, known in (("ops", OPS), ("providers", PROVIDERS), ("mode", MODES)):
        names = [name for value in getattr(a, option) for name in value.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(a, option, names)
    if a.tokens % a.batch:
        parser.error(f"--tokens {a.tokens} must be a multiple of --batch {a.batch}")
    return a


def load_providers(names: list[str], device: torch.device) -> tuple[dict[str, Functions], dict[str, str]]:
    functions, missing = {}, {}
    for name in names:
        try:
            functions[name] = PROVIDERS[name](device)
        except Unavailable as reason:
            missing[name] = str(reason)
            report.progress.print(f"without {name}: {reason}")
    return functions, missing


def checked_subjects(case: Case, providers: dict[str, Functions]) -> list[measure.Subject]:
    subjects = [
        measure.Subject(name, functions[case.op])
        for name, functions in providers.items()
        if case.op in functions
    ]
    expected = reference(case)
    for subject in subjects:
        try:
            measure.check(subject, case, expected)
        # Whatever a peer raises (out of memory, a compiler that is missing) is a result of this benchmark.
        except Exception as error:
            subject.failure = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if subject.failure:
            report.progress.print(f"  {case.op} {subject.provider}: {subject.failure}")
        release()
    return subjects


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_op(
    op: str,
    a: argparse.Namespace,
    problem: Problem,
    providers: dict[str, Functions],
    clock: measure.Clock,
    rates: dict,
) -> list[dict]:
    cuda = problem.device.type == "cuda"
    # Shapes are static, so graphs of the previous operator would only use up the recompilation limit.
    torch._dynamo.reset()
    case = OPS[op](problem)
    subjects = checked_subjects(case, providers)
    sound = [s for s in subjects if not s.failure]
    results = []
    for mode in a.mode:
        timings = measure.time_subjects(sound, case, mode, clock, a.budget) if sound else {}
        floor = case.floor(mode)
        floor_ms = (
            floor.milliseconds(rates["copy_bytes_per_s"], rates["floor_flops_per_s"]) if floor else None
        )
        for subject in subjects:
            row: dict = {"op": op, "mode": mode, "provider": subject.provider}
            results.append(row)
            if subject.failure:
                row["failure"] = subject.failure
                continue
            timing = timings[subject.provider]
            row |= {"ms": asdict(timing), "floor_ms": floor_ms}
            row["share_of_floor"] = floor_ms / timing.median if floor_ms else None
            if "torch" in timings:
                row["speedup_vs_torch"] = timings["torch"].median / timing.median
            row |= {"errors": subject.errors, "overwrites": subject.overwrites}
            if not a.no_memory:
                if cuda:
                    row["memory"] = measure.cuda_memory(subject, case, mode)
                elif mode == "full" and op in CPU_MEMORY_OPS:
                    row["memory"] = memory.in_subprocess(op, subject.provider, a.shape, problem)
            taken = (
                f"{report.digits(timing.median)} ms ({timing.samples} samples, {timing.disturbed} disturbed)"
            )
            report.progress.print(f"  {op} {mode} {subject.provider}: {taken}")
    del case, subjects, sound
    release()
    return results


def measure_speed(
    a: argparse.Namespace, device: torch.device, providers: dict[str, Functions]
) -> tuple[dict, bool]:
    problem = Problem(SHAPES[a.shape], a.tokens, a.batch, DTYPES[a.dtype], device, a.loss_gradient, a.seed)
    clock = measure.Clock(device, a.queue_ahead)
    report.progress.print("measuring this machine's copy and product rates")
    rates = {
        "copy_bytes_per_s": measure.copy_rate(device, clock),
        "product_flops_per_s": measure.product_rate(device, problem.dtype, clock),
    }
    rates["floor_flops_per_s"] = rates["product_flops_per_s"]
    if "fused_linear_cross_entropy" in a.ops:
        release()
        rates["floor_flops_per_s"] = measure.head_products_rate(problem, clock)
        release()
    results: list[dict] = []
    for number, op in enumerate(a.ops, start=1):
        report.progress.print(f"[{number}/{len(a.ops)}] {op}: checking, then timing")
        results += measure_op(op, a, problem, providers, clock, rates)
    machine = report.processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    title = (
        f"{a.shape}, {a.tokens} tokens, {a.dtype}, {machine}\n"
        f"copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"large product {rates['product_flops_per_s'] / 1e12:.3g} TFLOP/s, "
        f"products in the floor {rates['floor_flops_per_s'] / 1e12:.3g} TFLOP/s"
    )
    report.print_results(results, title)
    verdicts = judge(results, device.type, a.tokens)
    report.print_verdicts(verdicts)
    sizes = {
        "shape": a.shape,
        **asdict(problem.shape),
        "tokens": a.tokens,
        "batch": a.batch,
        "dtype": a.dtype,
    }
    sizes |= {"loss_gradient": a.loss_gradient, "queue_ahead_us": a.queue_ahead, "seed": a.seed}
    # A peer that fails is a result; this package failing is an error.
    ok = not any("failure" in r for r in results if r["provider"] == "ours")
    ok &= not a.strict or all(v.holds for v in verdicts)
    return {"sizes": sizes, "rates": rates, "results": results, "claims": as_json(verdicts)}, ok


def measure_host(
    a: argparse.Namespace, device: torch.device, providers: dict[str, Functions]
) -> tuple[dict, bool]:
    """Host time, beside `F.layer_norm`: an operator of PyTorch itself, without Python on its way."""
    cuda = device.type == "cuda"
    problem = Problem(SHAPES["host"], 8, 1, DTYPES[a.dtype], device, a.loss_gradient, a.seed)
    x, weight, bias = (
        torch.randn(s, device=device, dtype=problem.dtype) for s in ((8, 1024), (1024,), (1024,))
    )
    upstream = torch.randn_like(x)
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

    def yardstick() -> torch.Tensor:
        return F.layer_norm(x, (1024,), weight, bias)

    def row(op: str, provider: str, forward, full) -> dict:
        with torch.no_grad():
            forward_us = measure.host_microseconds(forward, cuda)
        result = {"op": op, "provider": provider, "forward_us": forward_us}
        result["full_us"] = measure.host_microseconds(full, cuda)
        report.progress.print(
            f"  {op} {provider}: {forward_us:.1f} µs forward, {result['full_us']:.1f} µs full"
        )
        return result

    rows = [
        row(
            "F.layer_norm",
            "torch",
            yardstick,
            lambda: torch.autograd.grad(yardstick(), (x, weight, bias), upstream),
        )
    ]
    for op in a.ops:
        case = OPS[op](problem)
        torch._dynamo.reset()
        for subject in checked_subjects(case, providers):
            if subject.failure:
                continue
            # The inputs are not refreshed between calls: that would be host time too. In-place peers go on
            # with what they left behind, which changes values but not the work.
            arguments = [
                t.clone().requires_grad_(d) for t, d in zip(case.arguments, case.differentiable, strict=True)
            ]
            wanted = [t for t in arguments if t.requires_grad]
            gradients = [
                g.to(dtype) for g, dtype in zip(case.output_gradients, subject.output_dtypes, strict=True)
            ]
            plain = [t.detach() for t in arguments]

            def forward(f=subject.function, plain=plain) -> object:
                return f(*plain)

            def full(f=subject.function, arguments=arguments, wanted=wanted, gradients=gradients) -> object:
                return torch.autograd.grad(f(*arguments), wanted, gradients)

            rows.append(row(op, subject.provider, forward, full))
    report.print_host(rows)
    return {"host": rows}, True


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    started = time.perf_counter()
    # On inputs this small a second thread costs more than it does, and would be timed as host time.
    torch.set_num_threads(1 if a.host else a.threads)
    device = torch.device(a.device)
    providers, missing = load_providers(a.providers, device)
    if (load := os.getloadavg()[0]) > 0.5 and device.type == "cpu":
        report.progress.print(f"others keep this machine busy (load {load:.1f}): CPU times will be noisy")
    document = {"environment": report.environment(device, a.commit), "missing_providers": missing}
    measured, ok = (measure_host if a.host else measure_speed)(a, device, providers)
    document |= measured
    path = a.json or report.default_path(document["environment"], "host" if a.host else "ops")
    report.write_json(path, document)
    report.progress.print(f"done in {time.perf_counter() - started:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
