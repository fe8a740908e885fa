"""Tiny models of every family, and what the tests do with them."""

from __future__ import annotations

import collections
import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

BATCH, LENGTH = 2, 12

TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

MODELS = {"llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**TEXT | changes))}


def tiny(
    family: str = "llama",
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    lm_head_bias: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A model with the same random weights each time. ``changes`` go to its configuration."""
    torch.manual_seed(0)
    model = MODELS[family](**changes)
    if lm_head_bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    for name, parameter in model.named_parameters():
        # Norm weights are ones and biases zeros in a new model, which would hide that one is left out.
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.to(device=device, dtype=dtype)


def batch(device: Any = "cpu", seed: int = 1, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, the first three labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TEXT["vocab_size"], (BATCH, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def step(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one forward, and the gradient of every parameter that got one."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def train(
    model: PreTrainedModel, steps: int, forward: Any = None, device: Any = "cpu", **inputs: Any
) -> list[float]:
    """Losses of AdamW steps over as many batches. ``forward`` is called instead of the model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for seed in range(steps):
        loss = (model if forward is None else forward)(**batch(device, seed=seed), **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """An unpatched model with the same weights."""
    return copy.deepcopy(model)


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 1e-4
) -> None:
    """Same parameters, and each difference at most ``share`` of the expected gradient's norm."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (actual[name].double() - gradient.double()).norm().item()
        budget = share * gradient.double().norm().item()
        assert difference <= budget, (
            f"{name}: difference {difference:.3g}, {difference / budget:.2f} of the budget"
        )


class Operators(TorchDispatchMode):
    """Counts the calls of liger operators, by public name, inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "liger":
            # A forward that keeps statistics for its backward may be an operator of its own.
            name = func._schema.name.removeprefix("liger::").removesuffix("_forward")
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
