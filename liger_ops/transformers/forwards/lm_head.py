"""Whether a language-model head is nothing but ``x @ weightᵀ + bias``, and which weight and bias these are.

The fused loss reads the head's weight and never calls the head, so anything else the head would do (an
adapter, a hook, moving an offloaded weight to its device) would be lost. Asked at every step: adapters are
added, merged and switched off after a model was patched. Classes of PEFT are known by name, so that PEFT is
not imported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class LinearHead(NamedTuple):
    """Weight (V, H) and bias (V,) of a plain head, or the reason why there are none."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    obstacle: str | None


def _because(obstacle: str) -> LinearHead:
    return LinearHead(None, None, obstacle)


def _intercepted(module: nn.Module) -> str | None:
    """What would run around ``module.forward`` in a normal call, if anything does."""
    if "_hf_hook" in module.__dict__:
        return "has an Accelerate hook (device placement or offloading)"
    if "forward" in module.__dict__:
        return "has a forward of its own on the instance"
    if (
        len(module._forward_hooks) > 0
        or len(module._forward_pre_hooks) > 0
        or len(module._backward_hooks) > 0
        or len(module._backward_pre_hooks) > 0
    ):
        return "has hooks"
    return None


def linear_head(head: nn.Module) -> LinearHead:
    """Look through PEFT's wrappers to the weight and bias that ``head(x)`` multiplies by and adds."""
    obstacle = _intercepted(head)
    if obstacle is not None:
        return _because(obstacle)
    kind = type(head)
    if kind is nn.Linear:
        weight = head.weight
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
            return _because(f"has a weight of type {type(weight).__name__}")
        if weight.device.type == "meta":
            return _because("has its weight on the meta device (offloaded)")
        return LinearHead(weight, head.bias, None)
    if kind.__name__ == "ModulesToSaveWrapper":
        return linear_head(_active_copy(head))
    if kind.__name__ == "TrainableTokensWrapper":
        base = linear_head(head.original_module)
        if base.obstacle is not None or head.disable_adapters or not head.active_adapters:
            return base
        if base.bias is not None:
            return _because("trains single tokens and has a bias, which PEFT's own forward leaves out")
        return LinearHead(head.weight, None, None)
    if hasattr(head, "base_layer") and hasattr(head, "disable_adapters"):
        # A tuner layer adds nothing to its base when its adapters are off, or merged into the base's weight.
        if bool(head.merged) != bool(head.disable_adapters):
            return linear_head(head.base_layer)
        return _because(f"carries an adapter ({kind.__module__}.{kind.__name__})")
    return _because(f"is a {kind.__name__}, not a torch.nn.Linear")


def _active_copy(wrapper: nn.Module) -> nn.Module:
    """The module that a ``ModulesToSaveWrapper`` calls: the first active adapter's copy, or the original."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]
