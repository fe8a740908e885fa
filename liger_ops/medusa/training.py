"""Training Medusa heads with the Hugging Face Trainer: learning rates, the schedule, logged losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from liger_ops.medusa.model import MedusaModel
from liger_ops.transformers.patching import unwrap


def parameter_groups(
    model: MedusaModel,
    learning_rate: float,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a learning rate of their own for the heads.

    ``Trainer(model, ..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-5)), None))``; the Trainer
    makes the learning-rate schedule, which multiplies every group's rate.

    Args:
        learning_rate: of the base's parameters.
        head_learning_rate: of the heads'; None is four times the base's, as in the paper's stage 2.
        weight_decay: of matrices; vectors (biases, norms) have none.

    Returns:
        Groups ``base`` and ``heads``, each in two where decay differs; only parameters that require
        gradients, and no empty group.
    """
    if head_learning_rate is None:
        head_learning_rate = 4 * learning_rate
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            where = "heads" if name.startswith("heads.") else "base"
            groups.setdefault((where, parameter.dim() > 1), []).append(parameter)
    rates = {"base": learning_rate, "heads": head_learning_rate}
    return [
        {
            "name": where if decays else f"{where}_vectors",
            "params": parameters,
            "lr": rates[where],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (where, decays), parameters in groups.items()
    ]


class MedusaCallback(TrainerCallback):
    """Moves the heads' schedule on with the Trainer's steps, and logs every head's loss.

    The losses are summed on the device, and read when the Trainer logs its own: no step waits for them. They
    join the entry of ``trainer.state.log_history``, and what callbacks after this one report, as
    ``base_loss``, ``head_1_loss``, …
    """

    def __init__(self) -> None:
        self._hook: Any = None
        self._sums: dict[str, torch.Tensor] = {}
        self._forwards = self._steps = 0
        self._shared = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._release()
        self._hook = unwrap(model).register_forward_hook(self._collect, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        unwrap(model).set_step(state.global_step, state.max_steps)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps += 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or not self._sums:
            return
        # Losses that were divided by the step's number of tokens are parts of a sum, all others of a mean.
        count = self._steps if self._shared else self._forwards
        factor = 1.0
        if self._shared and getattr(args, "average_tokens_across_devices", False):
            factor = float(args.world_size)
        entry = {}
        for name, total in self._sums.items():
            values = (total * factor / max(1, count)).tolist()
            if name == "base_loss":
                entry[name] = values[0]
            else:
                entry |= {f"head_{k}_loss": value for k, value in enumerate(values, start=1)}
        logs |= entry
        if state.log_history:
            state.log_history[-1] |= entry
        self._sums, self._forwards, self._steps = {}, 0, 0

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._release()

    def _collect(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        self._shared = kwargs.get("num_items_in_batch") is not None
        self._forwards += 1
        for name in ("base_loss", "head_losses"):
            losses = output.get(name) if hasattr(output, "get") else None
            if losses is not None:
                self._sums[name] = losses + self._sums[name] if name in self._sums else losses

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._sums, self._forwards, self._steps = {}, 0, 0
