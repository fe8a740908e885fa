"""How things are measured: correctness first, then time, peak memory and host overhead.

Every timed call gets fresh copies of its inputs, made before the clock starts, because some peers overwrite
what they are given (gradients over logits, over gate and up, over the upstream gradient). Caches are flushed
before each call. On CUDA the host waits for the preparation to finish, so that nobody's host time hides
behind it; the flush itself gives every provider the same short head start.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .ops import Case, Problem, Tensors, as_list

MEBI = 2**20

# Largest relative L2 error that counts as correct. Wide enough for every rounding that some peer makes (Liger
# rounds its bf16 weight gradient once per chunk, 32 times at 8192 tokens), far below a wrong formula's.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


LONG_CALL_MS = 100.0


@dataclass
class Subject:
    """One provider's function for one case, and what the correctness check learnt about it."""

    provider: str
    function: Callable
    output_dtypes: list[torch.dtype] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    overwrites: list[str] = field(default_factory=list)
    failure: str | None = None


def prepare(subject: Subject, case: Case, mode: str) -> tuple[Callable[[], Tensors], Tensors]:
    """The call to measure, bound to fresh copies of its inputs, and these: arguments, then gradients."""
    training = mode != "fwd"
    arguments = [
        a.clone().requires_grad_(wanted and training)
        for a, wanted in zip(case.arguments, case.differentiable, strict=True)
    ]
    upstream = [g.clone() for g in case.output_gradients]
    # A 16-bit loss takes a 16-bit upstream gradient; converting it is not the provider's work.
    if subject.output_dtypes:
        upstream = [g.to(dtype) for g, dtype in zip(upstream, subject.output_dtypes, strict=True)]
    wanted = [a for a in arguments if a.requires_grad]

    def forward() -> Tensors:
        with torch.no_grad():
            return as_list(subject.function(*arguments))

    def full() -> Tensors:
        outputs = as_list(subject.function(*arguments))
        return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]

    if mode == "fwd":
        return forward, arguments
    if mode == "full":
        return full, [*arguments, *upstream]
    outputs = as_list(subject.function(*arguments))
    return lambda: list(torch.autograd.grad(outputs, wanted, upstream)), [*arguments, *upstream]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.to(expected.dtype) - expected)
    return (difference / torch.linalg.vector_norm(expected)).item()


def check(subject: Subject, case: Case, expected: tuple[Tensors, Tensors]) -> None:
    """Compares outputs and gradients with the reference; a wrong provider gets a failure and is not timed."""
    training_outputs, gradients = expected
    with torch.no_grad():
        probe = as_list(subject.function(*[a.clone() for a in case.arguments]))
    subject.output_dtypes = [o.dtype for o in probe]
    call, given = prepare(subject, case, "full")
    before = [tensor.clone() for tensor in given]
    results = call()
    names = [f"output{i}" for i in range(len(probe))]
    names += [f"gradient{i}" for i, wanted in enumerate(case.differentiable) if wanted]
    for name, actual, reference in zip(names, results, [*training_outputs, *gradients], strict=True):
        if actual.shape != reference.shape:
            subject.failure = f"{name} has shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
            return
        subject.errors[name] = relative_error(actual.detach(), reference)
    given_names = [f"argument{i}" for i in range(len(case.arguments))]
    given_names += [f"upstream gradient{i}" for i in range(len(case.output_gradients))]
    for name, old, new in zip(given_names, before, given, strict=True):
        if not torch.equal(old, new):
            subject.overwrites.append(name)
    limit = TOLERANCE[case.arguments[0].dtype]
    wrong = [f"{name} {error:.1e}" for name, error in subject.errors.items() if not error <= limit]
    if wrong:
        subject.failure = f"wrong result, relative error above {limit:.0e}: {', '.join(wrong)}"


def cycles_per_microsecond() -> float:
    """The unit of `torch.cuda._sleep`, found by trying."""
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (1e3 * begin.elapsed_time(end))


class Clock:
    """Times one call with cold caches, in milliseconds.

    `disturbed` tells whether, during the last call on the CPU, the kernel took a core from one of its
    threads. The others then wait for that one at their next barrier: a call can take twenty times as long.
    """

    disturbed = False

    def __init__(self, device: torch.device, queue_ahead_us: float = 0.0) -> None:
        self.cuda = device.type == "cuda"
        # Larger than the last-level cache of the machines in use: 60 MB of L2 on an H200, 32 MB of L3 per CPU
        # complex.
        self.flush = torch.empty((256 if self.cuda else 128) * MEBI, dtype=torch.uint8, device=device)
        self.queue_ahead_cycles = 0
        if self.cuda and queue_ahead_us:
            self.queue_ahead_cycles = int(queue_ahead_us * cycles_per_microsecond())

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            self.flush.zero_()
            preemptions = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result
            self.disturbed = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > preemptions
            return 1e3 * elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        if self.queue_ahead_cycles:
            torch.cuda._sleep(self.queue_ahead_cycles)
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call. `disturbed` samples are among them only if `quiet` is false."""

    median: float
    p20: float
    p80: float
    best: float
    samples: int
    disturbed: int
    quiet: bool

    @classmethod
    def of(cls, samples: list[tuple[float, bool]], quiet: bool) -> Timing:
        ordered = sorted(ms for ms, disturbed in samples if not (quiet and disturbed))
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            p20=ordered[round(0.2 * last)],
            p80=ordered[round(0.8 * last)],
            best=ordered[0],
            samples=len(ordered),
            disturbed=sum(disturbed for _, disturbed in samples),
            quiet=quiet,
        )


def interleaved(
    calls: dict[str, Callable[[], Callable[[], object]]],
    clock: Clock,
    budget_ms: float,
    most: int = 200,
    least: int = 5,
    warm_up: int = 3,
) -> dict[str, Timing]:
    """Times each entry for at least `budget_ms`, one call of each in turn: drifting clocks hit all alike.

    On a busy machine it goes on, up to three times as long, until each entry has `least` samples that nothing
    disturbed. Where one entry does not get them, all samples of all entries count: leaving the disturbed ones
    out for some only would flatter those.
    """
    for _ in range(warm_up):
        estimates = {name: clock(make()) for name, make in calls.items()}
    counts = {name: max(least, min(most, int(budget_ms / t) + 1)) for name, t in estimates.items()}
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in calls}

    def lacks_quiet(name: str) -> bool:
        return sum(not disturbed for _, disturbed in samples[name]) < least

    rounds = max(counts.values())
    for turn in range(3 * rounds):
        for name, make in calls.items():
            if turn < counts[name] or (turn >= rounds and lacks_quiet(name)):
                samples[name].append((clock(make()), clock.disturbed))
        if turn + 1 >= rounds and not any(map(lacks_quiet, calls)):
            break
        # A call as long as this is never undisturbed on a busy machine, and averages over it.
        if turn + 1 >= rounds and min(estimates.values()) > LONG_CALL_MS:
            break
    quiet = not any(map(lacks_quiet, calls))
    return {name: Timing.of(values, quiet) for name, values in samples.items()}


def time_subjects(
    subjects: list[Subject], case: Case, mode: str, clock: Clock, budget_ms: float
) -> dict[str, Timing]:
    def maker(subject: Subject) -> Callable[[], Callable[[], object]]:
        return lambda: prepare(subject, case, mode)[0]

    # Warm-up rounds cost seconds where a call does, and change little there.
    warm_up = 3 if clock.cuda else 1
    return interleaved({s.provider: maker(s) for s in subjects}, clock, budget_ms, warm_up=warm_up)


def bytes_of_results(results: Tensors, given: Tensors) -> int:
    """Memory that the results own: what shares its storage with an input was there before."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in given}
    storages = {r.untyped_storage().data_ptr(): r.untyped_storage().nbytes() for r in results}
    return sum(size for pointer, size in storages.items() if pointer not in inputs)


def cuda_memory(subject: Subject, case: Case, mode: str) -> dict[str, float]:
    """Peak allocation during one call, above what was allocated before it."""
    gc.collect()
    call, given = prepare(subject, case, mode)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return memory_record(extra, bytes_of_results(results, given))


def memory_record(extra: int, results: int) -> dict[str, float]:
    return {"peak_extra_mib": extra / MEBI, "beyond_results_mib": max(0, extra - results) / MEBI}


def capability(timing: Timing, clock: Clock) -> float:
    """Seconds that the machine needs at its normal speed.

    On the CPU its fastest: neighbours only ever slow it down. On CUDA the median: a GPU's first products run
    at clocks that its power limit then takes back.
    """
    return 1e-3 * (timing.median if clock.cuda else timing.best)


def copy_rate(device: torch.device, clock: Clock) -> float:
    """Bytes read and written per second by a large copy."""
    size = (1024 if clock.cuda else 256) * MEBI
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: lambda: target.copy_(source)}, clock, budget_ms=100, least=10)[
        "copy"
    ]
    return 2 * size / capability(timing, clock)


def product_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Flops per second of one large square product."""
    n = 8192 if clock.cuda else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timing = interleaved({"product": lambda: lambda: a @ b}, clock, budget_ms=100)["product"]
    return 2 * n**3 / capability(timing, clock)


def head_products_rate(p: Problem, clock: Clock) -> float:
    """Flops per second of a linear head's three products, each over all tokens, with a loss's real gradient.

    A softmax's gradient is nearly zero almost everywhere, so a GPU clocks higher than on random data;
    back-to-back products run slower than a lone one: only the real thing is a fair floor.
    """
    g = p.generator()
    x = p.normal(p.tokens, p.shape.hidden, generator=g)
    weight = p.normal(p.shape.vocab, p.shape.hidden, generator=g, scale=p.shape.hidden**-0.5)
    logits_gradient = (F.linear(x, weight).softmax(dim=-1) / p.tokens).to(p.dtype)

    def products() -> Tensors:
        return [F.linear(x, weight), logits_gradient @ weight, logits_gradient.T @ x]

    timing = interleaved({"head": lambda: products}, clock, budget_ms=200, least=3, warm_up=1)["head"]
    return 6 * p.tokens * p.shape.hidden * p.shape.vocab / capability(timing, clock)


def host_microseconds(call: Callable[[], object], cuda: bool, calls: int = 50, loops: int = 20) -> float:
    """Host time of one call: the best of several tight loops, without waiting for the device inside them.

    The best, because whatever else the host does can only add to it.
    """

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(calls):
        call()
    best = float("inf")
    for _ in range(loops):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    wait()
    return 1e6 * best / calls
