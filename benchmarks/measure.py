"""How things are measured: correctness first, then time, peak memory and host overhead.

Every timed call gets fresh copies of its inputs, made before the clock starts, because some peers overwrite
what they are given (gradients over logits, over gate and up, over the upstream gradient). Caches are flushed
before each call. On CUDA the GPU is kept busy until the call is enqueued: its time is that of the kernels,
and how long the host took to enqueue them is a number of its own.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .ops import Case, Problem, Tensors, as_list

MEBI = 2**20

# Largest relative L2 error that counts as correct. Wide enough for every rounding that some peer makes (Liger
# rounds its bf16 weight gradient once per chunk, 32 times at 8192 tokens), far below a wrong formula's.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


LONG_CALL_MS = 100.0


# Most that a call is queued ahead. Nobody enqueues for longer; a call that does waits for the GPU.
MOST_AHEAD_US = 20_000.0
# What a call that waits for the GPU is queued ahead: it hides the host's work before the first wait.
WAITING_AHEAD_US = 1_000.0


@dataclass
class Subject:
    """One provider's function for one case, and what the correctness check learnt about it."""

    provider: str
    function: Callable
    # The limit of its workspace, for a head's loss that takes one.
    workspace_mib: int | None = None
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
    """The unit of `torch.cuda._sleep`, found by trying: the most, since an idle GPU starts at low clocks."""
    cycles, found = 10_000_000, []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        found.append(cycles / (1e3 * begin.elapsed_time(end)))
    return max(found)


class Clock:
    """Times one call with cold caches, in milliseconds.

    `disturbed` tells of the last call, on the CPU: the kernel took a core from one of its threads meanwhile.
    The others then wait for that one at their next barrier: a call can take twenty times as long. On CUDA:
    the GPU was not kept busy until all of the call was enqueued, so its time contains some of the host's.

    Args:
        device: where the calls run.
        queue_ahead_us: how long the GPU is kept busy before each call; None for as long as the host needs.
    """

    disturbed = False
    host_us = 0.0

    def __init__(self, device: torch.device, queue_ahead_us: float | None = None) -> None:
        self.cuda = device.type == "cuda"
        # Larger than the last-level cache of the machines in use: 60 MB of L2 on an H200, 32 MB of L3 per CPU
        # complex.
        self.flush = torch.empty((256 if self.cuda else 128) * MEBI, dtype=torch.uint8, device=device)
        self.queue_ahead_us = queue_ahead_us
        self.cycles_per_us = cycles_per_microsecond() if self.cuda else 0.0

    def __call__(self, call: Callable[[], object], ahead_us: float = 0.0) -> float:
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
        if ahead_us:
            torch.cuda._sleep(int(ahead_us * self.cycles_per_us))
        begin.record()
        start = time.perf_counter()
        result = call()
        self.host_us = 1e6 * (time.perf_counter() - start)
        end.record()
        # Where the GPU has come to the call by now, it may have waited for the rest of it.
        self.disturbed = begin.query()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Queue:
    """How a call is enqueued: how long the GPU is kept busy before, what the host needs, and whether it waits
    for the GPU in between, as every read of a result on the host does."""

    ahead_us: float
    host_us: float
    waits: bool


def queue_of(make: Callable[[], Callable[[], object]], clock: Clock) -> Queue:
    """Finds out by trying, after calls that compile and fill the allocator's cache."""
    for _ in range(2):
        clock(make())
    times = []
    for _ in range(3):
        clock(make())
        times.append(clock.host_us)
    host_us = statistics.median(times)
    if clock.queue_ahead_us is not None:
        return Queue(clock.queue_ahead_us, host_us, waits=False)
    ahead_us = min(1.5 * max(times) + 20, MOST_AHEAD_US)
    for factor in (1, 2, 4):
        clock(make(), factor * ahead_us)
        if not clock.disturbed:
            return Queue(factor * ahead_us, host_us, waits=False)
    # Waiting for the GPU, the host takes as much longer as the GPU is kept busy.
    if clock.host_us > host_us + 0.5 * factor * ahead_us:
        return Queue(min(ahead_us, WAITING_AHEAD_US), host_us, waits=True)
    return Queue(factor * ahead_us, host_us, waits=False)


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
    # On CUDA; the time on the GPU is in it where the call waits for the GPU.
    host_us: float | None = None
    waits: bool = False

    @classmethod
    def of(cls, samples: list[tuple[float, bool]], quiet: bool, queue: Queue | None) -> Timing:
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
            host_us=queue.host_us if queue else None,
            waits=queue.waits if queue else False,
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

    Where samples are disturbed, it goes on, up to three times as long, until each entry has `least` others.
    Where one entry does not get them, all samples of all entries count: leaving the disturbed ones out for
    some only would flatter those.
    """
    queues = {name: queue_of(make, clock) for name, make in calls.items()} if clock.cuda else {}
    ahead = {name: queue.ahead_us for name, queue in queues.items()}
    # What waits, or was asked to have its host time measured, is not disturbed by it.
    exposed = {name for name, queue in queues.items() if queue.waits or clock.queue_ahead_us is not None}
    for _ in range(1 if clock.cuda else warm_up):
        estimates = {name: clock(make(), ahead.get(name, 0.0)) for name, make in calls.items()}
    counts = {name: max(least, min(most, int(budget_ms / t) + 1)) for name, t in estimates.items()}
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in calls}

    def lacks_quiet(name: str) -> bool:
        return sum(not disturbed for _, disturbed in samples[name]) < least

    rounds = max(counts.values())
    for turn in range(3 * rounds):
        for name, make in calls.items():
            if turn < counts[name] or (turn >= rounds and lacks_quiet(name)):
                ms = clock(make(), ahead.get(name, 0.0))
                samples[name].append((ms, clock.disturbed and name not in exposed))
        if turn + 1 >= rounds and not any(map(lacks_quiet, calls)):
            break
        # A call as long as this is never undisturbed on a busy machine, and averages over it.
        if turn + 1 >= rounds and min(estimates.values()) > LONG_CALL_MS:
            break
    quiet = not any(map(lacks_quiet, calls))
    return {name: Timing.of(values, quiet, queues.get(name)) for name, values in samples.items()}


def time_subjects(
    subjects: list[Subject], case: Case, mode: str, clock: Clock, budget_ms: float, most: int
) -> dict[str, Timing]:
    def maker(subject: Subject) -> Callable[[], Callable[[], object]]:
        return lambda: prepare(subject, case, mode)[0]

    # Warm-up rounds cost seconds where a call does, and change little there.
    return interleaved({s.provider: maker(s) for s in subjects}, clock, budget_ms, most, warm_up=1)


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


def copies(device: torch.device, clock: Clock) -> list[dict[str, float]]:
    """Copies of several sizes: bytes read and written together, and the milliseconds that they take."""
    if clock.cuda:
        free, _ = torch.cuda.mem_get_info(device)
        footprints = [mebi * MEBI for mebi in (1, 4, 16, 64, 256, 1024, 4096) if mebi * MEBI < free / 2]
    else:
        footprints = [512 * MEBI]
    measured = []
    for footprint in footprints:
        source = torch.randint(256, (footprint // 2,), dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        calls = {"copy": lambda source=source, target=target: lambda: target.copy_(source)}
        seconds = capability(interleaved(calls, clock, budget_ms=100, least=10)["copy"], clock)
        measured.append({"bytes": footprint, "ms": 1e3 * seconds, "bytes_per_s": footprint / seconds})
    return measured


def copy_milliseconds(measured: list[dict[str, float]], moved: int) -> float:
    """The time of a copy that reads and writes `moved` bytes, between those that were measured."""
    for smaller, larger in zip(measured, measured[1:], strict=False):
        if smaller["bytes"] <= moved <= larger["bytes"]:
            share = (moved - smaller["bytes"]) / (larger["bytes"] - smaller["bytes"])
            return smaller["ms"] + share * (larger["ms"] - smaller["ms"])
    nearest = measured[0] if moved < measured[0]["bytes"] else measured[-1]
    return 1e3 * moved / nearest["bytes_per_s"]


def product_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Flops per second of one large square product."""
    n = 8192 if clock.cuda else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timing = interleaved({"product": lambda: lambda: a @ b}, clock, budget_ms=100)["product"]
    return 2 * n**3 / capability(timing, clock)


def chunk_rows(p: Problem, workspace_bytes: int) -> int:
    """Rows of logits that our fused linear cross entropy takes at a time on CUDA within this workspace."""
    tile, statistics_bytes = 128, 16 * p.tokens
    step = 128 // p.dtype.itemsize
    row_bytes = -(-p.shape.vocab // step) * step * p.dtype.itemsize
    most = max(1, min(p.tokens, (workspace_bytes - statistics_bytes) // row_bytes))
    even = -(-p.tokens // -(-p.tokens // most))
    return min(most, -(-even // tile) * tile)


def head_products(
    p: Problem, rows: int, modes: list[str], clock: Clock, budget_ms: float
) -> dict[str, float]:
    """Milliseconds of a linear head's matrix products by chunks of rows, with a loss's real gradient.

    A softmax's gradient is nearly zero almost everywhere, so a GPU clocks higher than on random data;
    back-to-back products run slower than a lone one: only the real thing is a fair floor.

    Args:
        p: tokens, hidden size and vocabulary.
        rows: of logits that are computed at a time. The gradient of the weight is added up over the chunks.
        modes: `fwd` for the one product of a loss alone, `full` for all three.
    """
    g = p.generator()
    x = p.normal(p.tokens, p.shape.hidden, generator=g)
    weight = p.normal(p.shape.vocab, p.shape.hidden, generator=g, scale=p.shape.hidden**-0.5)
    # Rows of whole cache lines, as a workspace has them whatever the vocabulary.
    width = -(-p.shape.vocab // 64) * 64
    logits = p.empty(min(rows, p.tokens), width)[:, : p.shape.vocab]
    dlogits = p.empty(p.tokens, width)[:, : p.shape.vocab]
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    starts = range(0, p.tokens, rows)
    for i in starts:
        dlogits[i : i + rows] = (x[i : i + rows] @ weight.t()).softmax(dim=-1)
    if p.dtype != torch.float16:  # would underflow; ours divides later there
        dlogits.div_(p.tokens)

    def products(gradients: bool) -> None:
        for i in starts:
            part = x[i : i + rows]
            torch.mm(part, weight.t(), out=logits[: len(part)])
            if gradients:
                torch.mm(dlogits[i : i + rows], weight, out=dx[i : i + rows])
                dweight.addmm_(dlogits[i : i + rows].t(), part, beta=1 if i else 0)

    calls = {
        mode: lambda mode=mode: lambda: products(gradients=mode == "full")
        for mode in ("fwd", "full")
        if mode in modes
    }
    timings = interleaved(calls, clock, budget_ms, least=3, warm_up=1) if calls else {}
    return {mode: 1e3 * capability(timing, clock) for mode, timing in timings.items()}


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
