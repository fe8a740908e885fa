"""Trains a LLaMA under FSDP2 on one host, beside its peers, and measures the loss of a vocabulary in shards.

    torchrun --nproc-per-node=2 benchmarks/fsdp.py --json two.json      (and =1, for the scaling)
    python -m benchmarks.fsdp --markdown one.json two.json --plot docs/images/fsdp.png

Weights are random, made on the device; parameters, gradients and AdamW's moments are in bfloat16. Every
process of torchrun starts a worker that measures one case after the other. A case in which any worker runs
out of memory, or gets stuck, is recorded as such: the workers are ended and new ones go on with the next.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # torchrun runs the file
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402

PROVIDERS = ("transformers", "liger", "ours")
LOSSES = ("gathered", "loss_parallel", "liger", "ours")
LAYERS = {"llama-3.1-8b": 32, "llama-3.2-1b": 16, "tiny": 2}
LEARNING_RATE = 1e-4
POLL_SECONDS = 0.1
NO_TIME = "not run: time limit"


@dataclass(frozen=True)
class Case:
    """``kind`` "training": a provider's steps on ``batch`` x ``length`` tokens for each process.

    ``kind`` "loss": head and loss of ``length`` tokens with the classes spread over the processes.
    """

    kind: str
    provider: str
    batch: int
    length: int
    checkpointing: bool
    warm_up: int
    steps: int
    group: str  # "main", "sweep" or "vocab_parallel"


def cases(a: argparse.Namespace, world: int) -> list[Case]:
    def training(provider: str, batch: int, length: int, checkpointing: bool, group: str) -> Case:
        case = Case("training", provider, batch, length, checkpointing, a.warm_up, a.steps, group)
        # A step this long says enough.
        return replace(case, warm_up=1, steps=min(2, a.steps)) if batch * length > 2**15 else case

    found = [
        training(provider, a.batch, a.length, checkpointing, "main")
        for checkpointing in (True, False)
        for provider in a.providers
    ]
    if world > 1 and "vocab_parallel" in a.parts:
        found += [
            Case("loss", loss, 1, a.loss_tokens, False, 3, 10, "vocab_parallel")
            for loss in LOSSES
            if loss in ("gathered", "loss_parallel") or loss in a.providers
        ]
    found += [
        training(provider, a.sweep_batch, length, True, "sweep")
        for length in a.sweep_lengths
        for provider in a.providers
    ]
    return [case for case in found if case.group in a.parts]


class Device:
    """What differs between CUDA and the CPU."""

    def __init__(self, kind: str) -> None:
        self.cuda = kind == "cuda"
        self.torch = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.torch)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def start_peak(self) -> int:
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_gib(self, base: int = 0) -> float | None:
        return (torch.cuda.max_memory_allocated() - base) / 2**30 if self.cuda else None


def llama(shape: Shape, layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


@contextmanager
def patched(provider: str, model: torch.nn.Module):
    """The provider's kernels in ``model``, and nowhere once it is left."""
    if provider == "ours":
        from liger_ops.transformers import patch

        applied = patch(model, strict=True)
        yield
        applied.undo()
    elif provider == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        before = dict(vars(modeling_llama))
        apply_liger_kernel_to_llama(model=model)
        yield
        vars(modeling_llama).update(before)
    else:
        yield


def sharded(model: torch.nn.Module, device: Device) -> torch.nn.Module:
    """FSDP2 around every block and the whole, then weights in the shards of this process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.torch.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device.torch)
    # Its buffers are no parameters, and have to be computed.
    with device.torch:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    generator = torch.Generator(device.torch).manual_seed(1234 + dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = parameter.to_local()
            shard.fill_(1.0) if "norm" in name else shard.normal_(std=0.02, generator=generator)
    return model.train()


def train(case: Case, a: argparse.Namespace, device: Device) -> dict[str, Any]:
    model = llama(SHAPES[a.shape], LAYERS[a.shape], getattr(torch, a.dtype))
    with patched(case.provider, model):
        if case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sharded(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        generator = torch.Generator(device.torch).manual_seed(99 + dist.get_rank())
        sizes = (case.warm_up + case.steps, case.batch, case.length)
        ids = torch.randint(SHAPES[a.shape].vocab, sizes, generator=generator, device=device.torch)
        losses, seconds = [], []
        for step, batch in enumerate(ids):
            if step == case.warm_up:
                device.start_peak()
            dist.barrier()
            device.synchronize()
            start = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            device.synchronize()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.detach().float())
        peak = device.peak_gib()
        mean = torch.stack(losses)
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    timed = statistics.median(slowest(seconds[case.warm_up :], device))
    return {
        "seconds_per_step": timed,
        "tokens_per_second_per_process": case.batch * case.length / timed,
        "peak_gib": peak,
        "losses": mean.tolist(),
    }


def slowest(values: list[float], device: Device) -> list[float]:
    """Of each number, the largest of the processes."""
    all_values = torch.tensor(values, dtype=torch.float64, device=device.torch)
    dist.all_reduce(all_values, op=dist.ReduceOp.MAX)
    return all_values.tolist()


def head_losses(provider: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """From a replicated input, the weight's shard and targets to the mean loss."""
    import torch.distributed._functional_collectives as collectives
    import torch.nn.functional as F

    group = dist.group.WORLD

    class SumOfGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return collectives.all_reduce(gradient.contiguous(), "sum", group)

    def gathered(x, weight, target):
        shard = F.linear(SumOfGradients.apply(x), weight)
        parts = GatherColumns.apply(shard)
        return F.cross_entropy(parts.float(), target)

    class GatherColumns(torch.autograd.Function):
        """As transformers' plan "colwise_gather_output": whole logits in every process."""

        @staticmethod
        def forward(ctx, shard):
            ctx.width = shard.shape[1]
            return collectives.wait_tensor(collectives.all_gather_tensor(shard, 1, group))

        @staticmethod
        def backward(ctx, gradient):
            return gradient.narrow(1, dist.get_rank() * ctx.width, ctx.width).contiguous()

    def loss_parallel(x, weight, target):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.parallel import loss_parallel as of_torch

        mesh = init_device_mesh(x.device.type, (dist.get_world_size(),))
        shard = F.linear(SumOfGradients.apply(x), weight).float()
        logits = DTensor.from_local(shard, mesh, [Shard(1)], run_check=False)
        with of_torch():
            loss = F.cross_entropy(logits, target)
            loss.backward()
        return loss.to_local().detach()

    def liger(x, weight, target):
        from liger_kernel.transformers import LigerVocabParallelCrossEntropy

        shard = F.linear(SumOfGradients.apply(x), weight)
        # [sequence, batch, classes], as Megatron has them.
        return LigerVocabParallelCrossEntropy()(shard.unsqueeze(1), target.unsqueeze(1), group).mean()

    def ours(x, weight, target):
        from liger_ops.distributed import vocab_parallel_fused_linear_cross_entropy

        return vocab_parallel_fused_linear_cross_entropy(x, weight, target)

    return {"gathered": gathered, "loss_parallel": loss_parallel, "liger": liger, "ours": ours}[provider]


def measure_loss(case: Case, a: argparse.Namespace, device: Device) -> dict[str, Any]:
    shape, world = SHAPES[a.shape], dist.get_world_size()
    dtype = getattr(torch, a.dtype)
    generator = torch.Generator(device.torch).manual_seed(7)
    x = torch.randn(case.length, shape.hidden, generator=generator, device=device.torch, dtype=dtype)
    target = torch.randint(shape.vocab, (case.length,), generator=generator, device=device.torch)
    generator.manual_seed(70 + dist.get_rank())
    width = shape.vocab // world
    weight = torch.randn(width, shape.hidden, generator=generator, device=device.torch, dtype=dtype)
    weight *= shape.hidden**-0.5
    x.requires_grad_(), weight.requires_grad_()
    function = head_losses(case.provider)
    seconds, peaks, loss = [], [], None
    for _ in range(case.warm_up + case.steps):
        x.grad = weight.grad = None
        base = device.start_peak()
        dist.barrier()
        device.synchronize()
        start = time.perf_counter()
        loss = function(x, weight, target)
        if loss.requires_grad:
            loss.backward()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
        peaks.append(device.peak_gib(base))
    norm = torch.stack([x.grad.float().norm(), weight.grad.float().norm() ** 2])
    dist.all_reduce(norm[1:])
    return {
        "milliseconds": 1e3 * statistics.median(slowest(seconds[case.warm_up :], device)),
        # Above the arguments: gradients, and whatever else there is.
        "peak_gib": peaks[-1],
        "losses": [loss.item()],
        "gradient_norms": [norm[0].item(), norm[1].sqrt().item()],
    }


MEASURE = {"training": train, "loss": measure_loss}


def write(path: Path, content: dict[str, Any]) -> None:
    """All at once: others read it as soon as it is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def work(a: argparse.Namespace) -> None:
    """The worker: the cases from ``a.first`` on. A failure ends it."""
    import datetime

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    index = a.first
    try:
        device = Device(a.device)
        if not device.cuda:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if device.cuda else "gloo",
            timeout=datetime.timedelta(seconds=a.case_limit),
            device_id=device.torch if device.cuda else None,
        )
        for index, case in list(enumerate(cases(a, world)))[a.first :]:
            late = torch.tensor(int(time.time() > a.deadline), device=device.torch)
            dist.broadcast(late, 0)
            result: dict[str, Any] = {"failure": NO_TIME}
            if not late:
                result = MEASURE[case.kind](case, a, device)
            dist.barrier()
            write(a.folder / f"result.{index}.{rank}.json", result)
            if rank == 0:
                shown = {name: value for name, value in result.items() if name != "losses"}
                report.progress.print(f"{case.group} {case.provider} {case.batch} x {case.length}: {shown}")
            device.release()
    except BaseException as error:
        # NCCL and the CPU's allocator have errors of their own.
        texts = ("out of memory", "can't allocate memory")
        out_of_memory = any(text in str(error) for text in texts)
        out_of_memory |= isinstance(error, torch.OutOfMemoryError)
        message = "out of memory" if out_of_memory else f"{type(error).__name__}: {error}".splitlines()[0]
        write(a.folder / f"failed.{a.attempt}.{rank}.json", {"case": index, "failure": message})
        if not out_of_memory:
            report.progress.print(f"rank {rank}, case {index}: {message}")
        sys.stderr.flush()
        # Not through NCCL's or gloo's shutdown, which would wait for the others.
        os._exit(1)
    dist.destroy_process_group()


def controlled(a: argparse.Namespace, rank: int, world: int) -> list[dict[str, Any]]:
    """Starts workers until every case has a result or a failure; returns them."""
    planned = cases(a, world)
    failures: dict[int, str] = {}
    first = 0
    for attempt in range(len(planned)):
        run_workers(a, rank, attempt, first)
        # Every process looks at the same files, once all workers of this attempt are gone.
        (a.folder / f"ended.{attempt}.{rank}").touch()
        wait_for(lambda n=attempt: len(list(a.folder.glob(f"ended.{n}.*"))) == world, a.case_limit + 60)
        failed = [json.loads(p.read_text()) for p in a.folder.glob(f"failed.{attempt}.*.json")]
        done = [
            all((a.folder / f"result.{index}.{r}.json").exists() for r in range(world))
            for index in range(len(planned))
        ]
        first = next((i for i, d in enumerate(done) if not d and i not in failures), len(planned))
        if first == len(planned):
            break
        messages = [f["failure"] for f in failed if f["case"] == first] or [f["failure"] for f in failed]
        failures[first] = min(messages, key=lambda m: m != "out of memory", default="worker ended")
        first += 1
        if first == len(planned):
            break
    rows = []
    for index, case in enumerate(planned):
        row: dict[str, Any] = asdict(case)
        if index in failures:
            rows.append(row | {"failure": failures[index]})
            continue
        ranks = [json.loads((a.folder / f"result.{index}.{r}.json").read_text()) for r in range(world)]
        peaks = [r["peak_gib"] for r in ranks if r.get("peak_gib") is not None]
        rows.append(row | ranks[0] | ({"peak_gib": max(peaks)} if peaks else {}))
    return rows


def wait_for(condition: Callable[[], bool], limit: float) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("another process of this job is gone")
        time.sleep(POLL_SECONDS)


def run_workers(a: argparse.Namespace, rank: int, attempt: int, first: int) -> None:
    """This process's worker, until it ends or another has failed."""
    port = a.folder / f"port.{attempt}"
    if rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            write(port, {"port": s.getsockname()[1]})
    wait_for(port.exists, 60)
    environment = os.environ | {"MASTER_PORT": str(json.loads(port.read_text())["port"])}
    environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    options = ["--worker", str(a.folder), "--first", str(first), "--attempt", str(attempt)]
    options += ["--deadline", str(a.deadline)]
    worker = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *options], env=environment)
    failed = a.folder / f"failed.{attempt}.{rank}.json"
    progress, changed = -1, time.monotonic()
    others_failed = None
    while worker.poll() is None:
        time.sleep(POLL_SECONDS)
        done = len(list(a.folder.glob(f"result.*.{rank}.json")))
        if done != progress:
            progress, changed = done, time.monotonic()
        stuck = time.monotonic() - changed > a.case_limit
        if others_failed is None and any(a.folder.glob(f"failed.{attempt}.*.json")):
            others_failed = time.monotonic()
        # A moment for the others to say what happened to them, which is often the same.
        if stuck or (others_failed is not None and time.monotonic() - others_failed > 2):
            if stuck and not failed.exists():
                write(failed, {"case": -1, "failure": f"stuck for {a.case_limit:.0f} s"})
            worker.kill()
            worker.wait()
    if worker.returncode != 0 and not any(a.folder.glob(f"failed.{attempt}.*.json")):
        write(failed, {"case": -1, "failure": f"a worker died with exit code {worker.returncode}"})


def missing(name: str) -> bool:
    return name == "liger" and report.version("liger-kernel") is None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=LAYERS, help="cpu: tiny, cuda: llama-3.1-8b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="cpu: float32, cuda: bfloat16")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parts = ("main", "vocab_parallel", "sweep")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batch", type=int, default=2, help="sequences for each process (2)")
    parser.add_argument("--length", type=int, help="tokens of a sequence; cpu: 16, cuda: 4096")
    parser.add_argument("--sweep-batch", type=int, default=8)
    parser.add_argument("--sweep-lengths", type=int, nargs="+", help="cpu: 8 16, cuda: 1024 2048 4096 8192")
    parser.add_argument("--loss-tokens", type=int, help="cpu: 64, cuda: 8192")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--time-limit", type=float, default=480, metavar="S", help="start no case after it (480)"
    )
    parser.add_argument(
        "--case-limit", type=float, default=150, metavar="S", help="a case that takes longer is stuck (150)"
    )
    parser.add_argument("--commit", help="commit to record, where this is no git checkout")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where results go (new in benchmarks/results)"
    )
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="FILE", help="only print tables of results"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --markdown: plot them too")
    for name, kind in (("folder", Path), ("first", int), ("attempt", int), ("deadline", float)):
        option = "--worker" if name == "folder" else f"--{name}"
        parser.add_argument(option, dest=name, type=kind, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = a.device == "cuda"
    a.shape = a.shape or ("llama-3.1-8b" if cuda else "tiny")
    a.dtype = a.dtype or ("bfloat16" if cuda else "float32")
    a.length = a.length or (4096 if cuda else 16)
    a.sweep_lengths = a.sweep_lengths or ([1024, 2048, 4096, 8192] if cuda else [8, 16])
    a.loss_tokens = a.loss_tokens or (8192 if cuda else 64)
    a.providers = [name for name in a.providers if not missing(name)]
    return a


def compared(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how far its losses are from the first provider's of the same case."""
    keys = ("group", "batch", "length", "checkpointing")
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in keys) and "losses" in r]
        if "losses" in row and same[0] is not row:
            pairs = zip(row["losses"], same[0]["losses"], strict=True)
            row["loss_difference"] = max(abs(x - y) / abs(y) for x, y in pairs)
            row["compared_with"] = same[0]["provider"]


def markdown(documents: list[dict[str, Any]]) -> str:
    """Tables of one or more runs, those with fewer processes first."""
    documents = sorted(documents, key=lambda d: d["processes"])
    single: dict[tuple, float] = {}
    heads = ("GPUs", "batch x length", "checkpointing", "implementation", "tokens/s per GPU")
    lines = [f"| {' | '.join(heads)} | of one GPU | peak GiB |", "|--:|---|---|---|--:|--:|--:|"]
    for document in documents:
        for r in document["rows"]:
            if r["kind"] != "training":
                continue
            key = tuple(r[k] for k in ("provider", "batch", "length", "checkpointing"))
            cells = [str(document["processes"]), f"{r['batch']} x {r['length']}"]
            cells += ["on" if r["checkpointing"] else "off"]
            cells += ["**liger-ops**" if r["provider"] == "ours" else r["provider"]]
            if "failure" in r:
                cells += [r["failure"], "", ""]
            else:
                rate = r["tokens_per_second_per_process"]
                if document["processes"] == 1:
                    single[key] = rate
                share = f"{100 * rate / single[key]:.0f} %" if key in single else ""
                cells += [f"{rate:,.0f}", share, f"{r['peak_gib']:.1f}" if r.get("peak_gib") else ""]
            lines.append(f"| {' | '.join(cells)} |")
    losses = [(d, r) for d in documents for r in d["rows"] if r["kind"] == "loss"]
    if losses:
        lines += [
            "",
            "| GPUs | tokens | head and loss | ms | peak GiB beside the arguments |",
            "|--:|--:|---|--:|--:|",
        ]
    for document, r in losses:
        name = "**liger-ops, fused**" if r["provider"] == "ours" else r["provider"]
        cells = [str(document["processes"]), str(r["length"]), name]
        if "failure" in r:
            cells += [r["failure"], ""]
        else:
            cells += [report.digits(r["milliseconds"]), f"{r['peak_gib']:.2f}" if r.get("peak_gib") else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def merged(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One document for each number of processes; what a run had no time for is left to the others."""
    found: dict[int, dict[str, Any]] = {}
    for document in documents:
        rows = [r for r in document["rows"] if r.get("failure") != NO_TIME]
        if document["processes"] in found:
            found[document["processes"]]["rows"] += rows
        else:
            found[document["processes"]] = document | {"rows": rows}
    return list(found.values())


def plot(documents: list[dict[str, Any]], path: Path) -> None:
    """Throughput and memory over the sequence length, of the run with the most processes."""
    from benchmarks.plots import COLOURS, TITLES, plt

    document = max(documents, key=lambda d: d["processes"])
    rows = [r for r in document["rows"] if r["group"] == "sweep" and "failure" not in r]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for provider in dict.fromkeys(r["provider"] for r in rows):
        of_provider = [r for r in rows if r["provider"] == provider]
        lengths = [r["length"] for r in of_provider]
        style = dict(color=COLOURS[provider], label=TITLES.get(provider, provider))
        speed.plot(lengths, [r["tokens_per_second_per_process"] for r in of_provider], "o-", **style)
        memory.plot(lengths, [r.get("peak_gib") or 0 for r in of_provider], "o-", **style)
    batch = rows[0]["batch"] if rows else ""
    speed.set(ylabel="tokens/s per GPU", ylim=(0, None))
    memory.set(ylabel="peak GiB per GPU", ylim=(0, None))
    for axis in (speed, memory):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"sequence length, batch {batch}")
        lengths = sorted({r["length"] for r in rows})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.grid(alpha=0.3)
    speed.legend()
    sizes = document["sizes"]
    figure.suptitle(f"{sizes['shape']}, FSDP2, {document['processes']} x {document['environment']['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    if a.markdown:
        documents = merged([json.loads(path.read_text()) for path in a.markdown])
        print(markdown(documents))
        if a.plot:
            plot(documents, a.plot)
        return 0
    if a.folder:
        work(a)
        return 0
    if "RANK" not in os.environ:
        raise SystemExit("run with torchrun --nproc-per-node=N benchmarks/fsdp.py")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    a.deadline = time.time() + a.time_limit
    # The same for all processes of this torchrun.
    run = f"fsdp-{os.getppid()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    a.folder = Path(tempfile.gettempdir()) / run
    a.folder.mkdir(exist_ok=True)
    rows = controlled(a, rank, world)
    (a.folder / f"read.{rank}").touch()
    if rank != 0:
        return 0
    compared(rows)
    environment = report.environment(torch.device(a.device), a.commit)
    command = ["torchrun", f"--nproc-per-node={world}", "benchmarks/fsdp.py", *(argv or sys.argv[1:])]
    environment["command"] = shlex.join(command)
    if a.device == "cuda":
        environment["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    sizes = {"shape": a.shape, "layers": LAYERS[a.shape], **asdict(SHAPES[a.shape]), "dtype": a.dtype}
    document = {"environment": environment, "kind": "fsdp", "processes": world, "sizes": sizes, "rows": rows}
    kind = f"fsdp{world}"
    report.write_json(a.json or report.default_path(environment, kind), document)
    print(markdown([document]))
    wait_for(lambda: len(list(a.folder.glob("read.*"))) == world, 60)
    for path in a.folder.iterdir():
        path.unlink()
    a.folder.rmdir()
    # A peer that fails is a result; this package failing for another reason than memory is an error.
    allowed = ("out of memory", NO_TIME)
    return int(any(r.get("failure", allowed[0]) not in allowed for r in rows if r["provider"] == "ours"))


if __name__ == "__main__":
    raise SystemExit(main())
