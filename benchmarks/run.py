"""`python -m liger_ops bench`: the operators beside their peers, on the CPU or on CUDA.

Every provider is checked against the reference before it is timed; one that is wrong is reported, not timed.
The table goes to stdout, progress to stderr, and everything, with versions, device and command, to a JSON
file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from . import measure, memory, report
from .claims import as_json, judge, judge_host
from .ops import HEAD, LOSSES, OPS, ROWS, Case, Problem, reference
from .providers import PROVIDERS, Functions, Unavailable, within
from .shapes import SHAPES

DESCRIPTION = """\
Times the operators beside their peers, after checking that each computes the right thing, and writes a
table and a JSON file.

  python -m liger_ops bench                        all operators, on this machine's GPU if it has one
  python -m liger_ops bench --device cpu --ops rms_norm swiglu --providers torch ours
  python -m liger_ops bench --quick --ops rms_norm layer_norm --width 1024 8192 --tokens 512 2048
  python -m liger_ops bench --quick --ops cross_entropy --vocab 32000 256000 --dtype bfloat16 float32
  python -m liger_ops bench --host                 host time per call on a tiny input

Several shapes, numbers of tokens, dtypes, widths or vocabularies are measured in every combination that an
operator knows the difference of.
"""

MODES = ("fwd", "bwd", "full")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Processes of their own measure memory on the CPU, seconds each: only where memory is what the operator is
# about.
CPU_MEMORY_OPS = LOSSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    several = {"nargs": "+", "metavar": "NAME"}
    numbers = {"nargs": "+", "type": int, "metavar": "N"}
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", **several, default=list(OPS), help=f"of: {', '.join(OPS)}")
    parser.add_argument("--providers", **several, default=list(PROVIDERS), help=f"of: {', '.join(PROVIDERS)}")
    parser.add_argument(
        "--mode", **several, help="of: fwd (no gradients wanted), bwd, full; cpu: full, cuda: all"
    )
    parser.add_argument(
        "--shape", **several, help=f"cpu: llama-h512, cuda: llama-3.1-8b; of: {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokens", **numbers, help="cpu: 2048, cuda: 8192")
    parser.add_argument("--dtype", **several, help=f"cpu: float32, cuda: bfloat16; of: {', '.join(DTYPES)}")
    parser.add_argument(
        "--width", **numbers, help="of the rows of norms and gated units, in place of the shape's"
    )
    parser.add_argument("--vocab", **numbers, help="classes of the losses, in place of the shape's")
    parser.add_argument(
        "--workspace",
        **numbers,
        help="MiB that our fused linear cross entropy may take, each limit a row; "
        "cuda: 512 and 128, cpu: what it takes by itself",
    )
    parser.add_argument(
        "--batch", type=int, default=2, help="sequences the tokens are split into, for rope (2)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument(
        "--budget", type=float, metavar="MS", help="time per measurement; cpu: 1500, cuda: 100"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a fifth of the time per measurement and at most 25 samples, for many sizes",
    )
    parser.add_argument(
        "--loss-gradient", type=float, default=1.0, help="upstream gradient of scalar losses (1)"
    )
    parser.add_argument(
        "--queue-ahead",
        type=float,
        metavar="US",
        help="keep the GPU busy this long before each timed call; by default for as long as the host needs "
        "to enqueue it, so that the time is the GPU's alone. 0 leaves the host's time in",
    )
    parser.add_argument(
        "--host", action="store_true", help="measure host time per call on a tiny input instead"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a claim of claims.py fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where results go (a new file in benchmarks/results, or here where there is no checkout)",
    )
    parser.set_defaults(usage_error=parser.error)


def complete(a: argparse.Namespace) -> None:
    """Checks what was asked for, and fills in what was not."""
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = a.device == "cuda"
    if cuda and not torch.cuda.is_available():
        a.usage_error("--device cuda: torch sees no CUDA device")
    a.shape = a.shape or ["llama-3.1-8b" if cuda else "llama-h512"]
    a.tokens = a.tokens or [8192 if cuda else 2048]
    a.dtype = a.dtype or ["bfloat16" if cuda else "float32"]
    a.budget = a.budget or (100.0 if cuda else 1500.0)
    a.samples = 200
    if a.quick:
        a.budget, a.samples = a.budget / 5, 25
    a.mode = a.mode or (list(MODES) if cuda else ["full"])
    # The first limit is the row that is called ours; 0 stands for the operator's own limit.
    a.workspace = a.workspace or ([512, 128] if cuda else [0])
    known_names = {
        "ops": OPS,
        "providers": PROVIDERS,
        "mode": MODES,
        "shape": SHAPES,
        "dtype": DTYPES,
    }
    for option, known in known_names.items():
        names = [name for value in getattr(a, option) for name in value.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            a.usage_error(f"--{option}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(a, option, names)
    for option in ("tokens", "width", "vocab"):
        if any(number < 1 for number in getattr(a, option) or ()):
            a.usage_error(f"--{option}: numbers must be positive")
    if any(number < 0 for number in a.workspace):
        a.usage_error("--workspace: numbers must not be negative")
    if any(tokens % a.batch for tokens in a.tokens):
        a.usage_error(f"--tokens must be multiples of --batch {a.batch}")


@dataclass(frozen=True)
class Job:
    """An operator at one size."""

    op: str
    problem: Problem
    # None where a width or a vocabulary was chosen in place of the model's.
    shape: str | None

    def record(self) -> dict:
        p = self.problem
        return {
            "op": self.op,
            "shape": self.shape,
            "tokens": p.tokens,
            "batch": p.batch,
            "dtype": str(p.dtype).removeprefix("torch."),
        }


def jobs(a: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    for op in a.ops:
        widths = (op in ROWS and a.width) or [None]
        vocabularies = (op in LOSSES and a.vocab) or [None]
        for shape, dtype, tokens, width, vocab in itertools.product(
            a.shape, a.dtype, a.tokens, widths, vocabularies
        ):
            changed = {"hidden": width, "intermediate": width, "vocab": vocab}
            changed = {name: size for name, size in changed.items() if size}
            sizes = replace(SHAPES[shape], **changed)
            problem = Problem(sizes, tokens, a.batch, DTYPES[dtype], device, a.loss_gradient, a.seed)
            yield Job(op, problem, None if changed else shape)


def load_providers(names: list[str], device: torch.device) -> tuple[dict[str, Functions], dict[str, str]]:
    functions, missing = {}, {}
    for name in names:
        try:
            functions[name] = PROVIDERS[name](device)
        except Unavailable as reason:
            missing[name] = str(reason)
            report.progress.print(f"without {name}: {reason}")
    return functions, missing


def checked_subjects(
    case: Case, op: str, providers: dict[str, Functions], workspaces: list[int]
) -> list[measure.Subject]:
    subjects = []
    for name, functions in providers.items():
        if case.function not in functions:
            continue
        function = functions[case.function]
        if name == "ours" and case.function == HEAD:
            for number, limit in enumerate(workspaces):
                label = f"ours-{limit}MiB" if number else name
                subjects.append(measure.Subject(label, within(function, limit), limit or None))
        else:
            subjects.append(measure.Subject(name, function))
    expected = reference(case)
    for subject in subjects:
        try:
            measure.check(subject, case, expected)
        # Whatever a peer raises (out of memory, a compiler that is missing) is a result of this benchmark.
        except Exception as error:
            subject.failure = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if subject.failure:
            report.progress.print(f"  {op} {subject.provider}: {subject.failure}")
        release()
    return subjects


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def head_products(
    a: argparse.Namespace, p: Problem, limit: int | None, clock: measure.Clock, done: list[dict]
) -> dict:
    """The time of a head's products by the chunks of our own within this workspace; measured once."""
    rows = measure.chunk_rows(p, limit * measure.MEBI) if clock.cuda and limit else p.tokens
    dtype = str(p.dtype).removeprefix("torch.")
    sizes = {"tokens": p.tokens, "hidden": p.shape.hidden, "classes": p.shape.vocab, "dtype": dtype}
    key = {**sizes, "chunk_rows": rows}
    for found in done:
        if key.items() <= found.items():
            return found
    times = measure.head_products(p, rows, a.mode, clock, 2 * a.budget if clock.cuda else 200)
    release()
    flops = 2 * p.tokens * p.shape.hidden * p.shape.vocab
    rates = {
        f"{mode}_flops_per_s": 1e3 * (3 if mode == "full" else 1) * flops / ms for mode, ms in times.items()
    }
    done.append({**key, **{f"{mode}_ms": ms for mode, ms in times.items()}, **rates})
    return done[-1]


def measure_op(
    job: Job,
    a: argparse.Namespace,
    providers: dict[str, Functions],
    clock: measure.Clock,
    rates: dict,
    case: Case,
) -> list[dict]:
    op, problem, cuda = job.op, job.problem, clock.cuda
    # Shapes are static, so graphs of the previous operator would only use up the recompilation limit.
    torch._dynamo.reset()
    products = {}
    if op == HEAD:
        for limit in a.workspace:
            products[limit or None] = head_products(a, problem, limit, clock, rates["head_products"])
    default = next(iter(products), None)
    subjects = checked_subjects(case, op, providers, a.workspace)
    sound = [s for s in subjects if not s.failure]
    results = []
    for mode in a.mode:
        timings = measure.time_subjects(sound, case, mode, clock, a.budget, a.samples) if sound else {}
        floor = case.floor(mode)
        for subject in subjects:
            row: dict = {**job.record(), "sizes": case.sizes, "mode": mode, "provider": subject.provider}
            results.append(row)
            if subject.workspace_mib:
                row["workspace_mib"] = subject.workspace_mib
            if subject.failure:
                row["failure"] = subject.failure
                continue
            times = asdict(timings[subject.provider])
            host_us, waits = times.pop("host_us"), times.pop("waits")
            row["ms"] = times
            if cuda:
                row |= {"host_us": host_us, "waits_for_gpu": waits}
            row["floor_ms"] = row["share_of_floor"] = None
            if floor:
                floor_ms = measure.copy_milliseconds(rates["copies"], floor.moved)
                if products:
                    # A peer is compared with the products of our own chunks, the larger ones.
                    chunks = products.get(subject.workspace_mib, products[default])
                    floor_ms += chunks[f"{mode}_ms"]
                    row["chunk_rows"] = chunks["chunk_rows"]
                row |= {"floor_ms": floor_ms, "share_of_floor": floor_ms / times["median"]}
                row |= {"least_bytes": floor.moved, "least_flops": floor.flops}
            if "torch" in timings:
                row["speedup_vs_torch"] = timings["torch"].median / times["median"]
            row |= {"errors": subject.errors, "overwrites": subject.overwrites}
            if not a.no_memory:
                if cuda:
                    row["memory"] = measure.cuda_memory(subject, case, mode)
                elif mode == "full" and op in CPU_MEMORY_OPS:
                    name = subject.provider.split("-")[0]
                    row["memory"] = memory.in_subprocess(op, name, subject.workspace_mib, problem)
            counts = f"{times['samples']} samples, {times['disturbed']} disturbed"
            what = f"{op} {report.size_of(row)} {mode} {subject.provider}"
            report.progress.print(f"  {what}: {report.digits(times['median'])} ms ({counts})")
    return results


def measure_speed(
    a: argparse.Namespace, device: torch.device, providers: dict[str, Functions], document: dict
) -> bool:
    clock = measure.Clock(device, a.queue_ahead)
    report.progress.print("measuring this machine's copy and product rates")
    copies = measure.copies(device, clock)
    dtype = DTYPES[a.dtype[0]]
    rates = {
        "copies": copies,
        "copy_bytes_per_s": copies[-1]["bytes_per_s"],
        "product_flops_per_s": measure.product_rate(device, dtype, clock),
        "head_products": [],
    }
    release()
    results: list[dict] = []
    settings = {"loss_gradient": a.loss_gradient, "seed": a.seed, "quick": a.quick, "budget_ms": a.budget}
    settings["queue_ahead_us"] = "host time" if a.queue_ahead is None else a.queue_ahead
    document |= {"settings": settings, "rates": rates, "results": results}
    known: set[str] = set()
    todo = list(jobs(a, device))
    with report.progress_bar(len(todo)) as step:
        for job in todo:
            step(job.op)
            case = None
            try:
                case = OPS[job.op](job.problem)
                # Two shapes can be the same to an operator.
                key = f"{job.op} {case.sizes} {job.problem.dtype}"
                if key not in known:
                    report.progress.print(f"{key}: checking, then timing")
                    results += measure_op(job, a, providers, clock, rates, case)
                known.add(key)
            except torch.OutOfMemoryError as error:
                failure = f"out of memory: {str(error).splitlines()[0]}"
                report.progress.print(f"  {job.op}: {failure}")
                row = {**job.record(), "sizes": case.sizes if case else {}, "mode": "all", "provider": "all"}
                results.append({**row, "failure": failure})
            case = None
            release()
            # What is measured is kept, whatever becomes of the rest.
            report.write_json(a.json, document, quiet=True)
    machine = report.processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    title = (
        f"{machine}: copy {copies[-1]['bytes_per_s'] / 1e9:.0f} GB/s, "
        f"large product {rates['product_flops_per_s'] / 1e12:.3g} TFLOP/s"
    )
    report.print_results(results, title)
    verdicts = judge(results, device.type)
    report.print_verdicts(verdicts)
    document["claims"] = as_json(verdicts)
    # A peer that fails is a result; this package failing is an error.
    ok = not any("failure" in r for r in results if r["provider"].startswith("ours"))
    return ok and (not a.strict or all(v.holds for v in verdicts))


def measure_host(
    a: argparse.Namespace, device: torch.device, providers: dict[str, Functions], document: dict
) -> bool:
    """Host time, beside `F.layer_norm`: an operator of PyTorch itself, without Python on its way."""
    cuda = device.type == "cuda"
    problem = Problem(SHAPES["host"], 8, 1, DTYPES[a.dtype[0]], device, a.loss_gradient, a.seed)
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
    with report.progress_bar(len(a.ops)) as step:
        for op in a.ops:
            step(op)
            case = OPS[op](problem)
            torch._dynamo.reset()
            for subject in checked_subjects(case, op, providers, a.workspace[:1]):
                if subject.failure:
                    continue
                # The inputs are not refreshed between calls: that would be host time too. In-place peers go
                # on with what they left behind, which changes values but not the work.
                arguments = [
                    t.clone().requires_grad_(d)
                    for t, d in zip(case.arguments, case.differentiable, strict=True)
                ]
                wanted = [t for t in arguments if t.requires_grad]
                gradients = [
                    g.to(dtype) for g, dtype in zip(case.output_gradients, subject.output_dtypes, strict=True)
                ]
                plain = [t.detach() for t in arguments]

                def forward(f=subject.function, plain=plain) -> object:
                    return f(*plain)

                def full(
                    f=subject.function, arguments=arguments, wanted=wanted, gradients=gradients
                ) -> object:
                    return torch.autograd.grad(f(*arguments), wanted, gradients)

                rows.append(row(op, subject.provider, forward, full))
    report.print_host(rows)
    verdicts = judge_host(rows)
    report.print_verdicts(verdicts)
    document |= {"host": rows, "claims": as_json(verdicts)}
    return not a.strict or all(v.holds for v in verdicts)


def run(a: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    complete(a)
    started = time.perf_counter()
    # On inputs this small a second thread costs more than it does, and would be timed as host time.
    torch.set_num_threads(1 if a.host else a.threads)
    device = torch.device(a.device)
    providers, missing = load_providers(a.providers, device)
    if (load := os.getloadavg()[0]) > 0.5 and device.type == "cpu":
        report.progress.print(f"others keep this machine busy (load {load:.1f}): CPU times will be noisy")
    document = {"environment": report.environment(device, a.commit), "missing_providers": missing}
    a.json = a.json or report.default_path(document["environment"], "host" if a.host else "ops")
    ok = (measure_host if a.host else measure_speed)(a, device, providers, document)
    report.write_json(a.json, document)
    report.progress.print(f"done in {time.perf_counter() - started:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit("the benchmark is a command of the package: python -m liger_ops bench")
