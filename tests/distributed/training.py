"""What the checks of every engine share: the batches, one process's training, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import batch, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from liger_ops.transformers import patch

STEPS = 10
# Larger ones make float32's rounding in one process, against float64, grow beyond 1e-5 in ten steps.
LEARNING_RATE = 0.01


def parts(seed: int) -> list[dict[str, torch.Tensor]]:
    """One step's batch, a part for each process."""
    return [batch(seed=1000 * seed + rank) for rank in range(dist.get_world_size())]


def mine(seed: int) -> dict[str, torch.Tensor]:
    return parts(seed)[dist.get_rank()]


def assert_saved_whole(path: Path) -> None:
    """A checkpoint holds every weight at its full size, whatever the processes had spread."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(parameter.isfinite().all() and parameter.numel() for parameter in model.parameters())


def targets(inputs: Iterable[dict[str, torch.Tensor]]) -> int:
    return sum(int((part["labels"][:, 1:] != -100).sum()) for part in inputs)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam: it divides gradients by their size, so that rounding of small ones shows in full.
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


def alone(patched: bool = True, steps: int = STEPS, **changes: Any) -> tuple[list[float], nn.Module]:
    """Losses and model of one process that trains on all parts of each batch."""
    model = tiny(**changes)
    if patched:
        patch(model, strict=True)
    optimizer = optimizer_of(model)
    losses = []
    for seed in range(steps):
        inputs = parts(seed)
        together = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
        loss = model(**together).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def train(model: nn.Module, steps: int = STEPS, forward: Callable[..., Any] | None = None) -> list[float]:
    """Losses of this process's parts, added up over the processes.

    Each is divided by the targets of the whole batch and multiplied by the number of processes, because data
    parallel engines average gradients.
    """
    optimizer = optimizer_of(model)
    losses = []
    for seed in range(steps):
        count = targets(parts(seed))
        loss = (forward or model)(**mine(seed), num_items_in_batch=count).loss * dist.get_world_size()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss))
    return losses


def mean_over_processes(value: torch.Tensor) -> float:
    total = value.detach().clone().float()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_training(
    losses: list[float], model: nn.Module, expected: tuple[list[float], nn.Module], rtol: float = 1e-5
) -> None:
    """Every loss within ``rtol``, and every parameter within ``rtol`` of its norm."""
    expected_losses, expected_model = expected
    torch.testing.assert_close(losses, expected_losses, rtol=rtol, atol=0)
    parameters = {name.removeprefix("module."): full(p.detach()) for name, p in model.named_parameters()}
    assert_same_parameters(parameters, expected_model, rtol)


def assert_same_parameters(
    parameters: dict[str, torch.Tensor], expected_model: nn.Module, rtol: float = 1e-5
) -> None:
    expected = dict(expected_model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in expected.items():
        difference = (parameters[name].double() - parameter.detach().double()).norm()
        assert difference <= rtol * parameter.detach().double().norm(), (name, difference)


def examples(rows: int = 96) -> list[dict[str, torch.Tensor]]:
    """Samples with a different number of targets each, so that means of means differ from the mean."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for row in range(rows):
        ids = torch.randint(3, 100, (12,), generator=generator)
        labels = ids.clone()
        labels[: 1 + row % 7] = -100
        samples.append(dict(input_ids=ids, labels=labels))
    return samples


def whole_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of every parameter, whatever holds them."""
    return {name.removeprefix("module."): full(p.detach()) for name, p in model.named_parameters()}


def trainer(path: str, model: nn.Module, **options: Any) -> Any:
    """A Trainer of ten steps on `examples`, in Accelerate's state as a new process has it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments = TrainingArguments(
        output_dir=path,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=examples())


def logged_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
