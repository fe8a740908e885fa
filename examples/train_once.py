"""One training run of the example: `python train_once.py SETTINGS VARIANT`, started by finetune.py.

A process of its own for each variant, so that neither inherits what the other left in memory. Under torchrun
there are several for each, which train together; the first writes what came of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

MIB = 2**20

# Steps in which caches fill, threads start and the allocator settles; they train, but are not timed.
WARM_UP_STEPS = 3


@dataclass
class Settings:
    """Everything both runs share; written to a file that the two training processes read."""

    output: str
    device: str
    dtype: str
    seed: int
    steps: int
    batch: int
    length: int
    learning_rate: float
    model: str | None = None
    # LlamaConfig's arguments where no --model is given.
    config: dict = field(default_factory=dict)
    threads: int | None = None


class PeakMemory:
    """Memory used from now on, at its highest.

    CUDA: what PyTorch had allocated. CPU: growth of this process's resident memory, from the kernel's own
    high-water mark, which Linux lets a process reset; elsewhere the mark since the process started.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.resettable = Path("/proc/self/clear_refs").exists()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self.meaning = "allocated by PyTorch, weights included"
        elif self.resettable:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
            self.meaning = "growth of resident memory during training, after the model was built"
        else:
            self.meaning = "resident memory of the whole process"

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key + ":")).split()[1])

    def mib(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / MIB
        if self.resettable:
            return (self._status("VmHWM") - self.before) / MIB
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == "darwin" else peak / 1024


def count_liger_operators(step) -> dict[str, int]:
    """Runs `step` and counts the calls of each `torch.ops.liger` operator in it, backward included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls: Counter = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "liger":
                self.calls[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Counting() as counting:
        step()
    return dict(sorted(counting.calls.items()))


def train(settings: Settings, variant: str) -> dict:
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    if settings.threads:
        torch.set_num_threads(settings.threads)
    use_liger = {}
    if variant == "liger":
        # This is all that a training script needs; the plain run does not even import the package.
        import liger_ops.transformers

        liger_ops.transformers.install()
        use_liger = {"use_liger": True}

    cuda = settings.device == "cuda"
    dtype = getattr(torch, settings.dtype)
    set_seed(settings.seed)
    if settings.model:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    else:
        config = LlamaConfig(**settings.config, max_position_embeddings=settings.length)
        model = LlamaForCausalLM(config).to(dtype)
    blocks = torch.load(Path(settings.output) / "blocks.pt", mmap=True)
    dataset = [{"input_ids": block, "labels": block} for block in blocks]

    losses: list[torch.Tensor] = []
    step_ends: list[float] = []

    class RecordingTrainer(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach().clone())
            return loss

    class StepTimer(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            step_ends.append(time.perf_counter())

    trainer = RecordingTrainer(
        model=model,
        train_dataset=dataset,
        callbacks=[StepTimer()],
        args=TrainingArguments(
            output_dir=settings.output,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            seed=settings.seed,
            logging_steps=max(1, settings.steps // 8),
            save_strategy="no",
            report_to="none",
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            **use_liger,
        ),
    )
    memory = PeakMemory(cuda)
    trainer.train()
    peak = memory.mib()

    seconds = [end - begin for begin, end in zip(step_ends, step_ends[1:], strict=False)][WARM_UP_STEPS - 1 :]
    # On a shared machine others only ever slow a step down, often most of them: the median would measure
    # others.
    step_seconds = sorted(seconds)[len(seconds) // 5]
    batch = {
        name: value.to(model.device)
        for name, value in trainer.data_collator(dataset[: settings.batch]).items()
    }
    operators = count_liger_operators(lambda: trainer.model_wrapped(**batch).loss.backward())
    # Each process has the loss of its own sequences, weighed so that their mean is that of all.
    mean_losses = trainer.accelerator.reduce(torch.stack(losses).float(), reduction="mean")
    world = trainer.args.world_size
    return {
        "variant": variant,
        "processes": world,
        "tokens_per_second": world * settings.batch * settings.length / step_seconds,
        "speed_is": f"20th percentile of the steps' times, without the first {WARM_UP_STEPS}",
        "step_seconds": seconds,
        "peak_memory_mib": peak,
        "peak_memory_is": memory.meaning,
        "losses": mean_losses.tolist(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "liger_operator_calls_per_step": operators,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    settings_file, variant = Path(sys.argv[1]), sys.argv[2]
    settings = Settings(**json.loads(settings_file.read_text()))
    record = train(settings, variant)
    if int(os.environ.get("RANK", 0)) == 0:
        (settings_file.parent / f"{variant}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
