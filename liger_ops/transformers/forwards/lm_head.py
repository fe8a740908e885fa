"""Whether a language-model head is nothing but ``x @ weightᵀ + bias``, and which weight and bias these are.

The fused loss needs the head's parameters and not its output, so anything else the head would do (an
adapter, a hook, moving an offloaded weight to its device) would be lost. Asked at every step: adapters are
added, merged and switched off after a model was patched. Classes of PEFT and of PyTorch's FSDP are known by
name, so that neither is imported.

FSDP and ZeRO-3 keep a shard of the parameters and put the whole in their place around the head's forward.
There the loss is computed inside that call, in place of the head's own forward. So it is where tensor
parallelism spreads the classes: its hooks bring the hidden states together, and those that would gather
logits are left out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from liger_ops.functional import CrossEntropyOutput

# Where hooks come from that put a module's parameters in place for its forward, and take its output as it is.
_SHARDING_ENGINES = ("torch.distributed.fsdp.", "deepspeed.")
# Where hooks come from that spread a head's input, and what its output becomes.
_TENSOR_PARALLEL = "torch.distributed.tensor."


class LinearHead(NamedTuple):
    """Weight (V, H) and bias (V,) of a plain head, or the reason why there are none.

    Attributes:
        linear: the innermost module; its forward is the linear map. None when the parameters are not its own.
        sharded: whether the parameters are whole, or those of this process, only in a call of the head.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    obstacle: str | None
    linear: nn.Linear | None = None
    sharded: bool = False


def _because(obstacle: str) -> LinearHead:
    return LinearHead(None, None, obstacle)


def _comes_from(hook: Any, *modules: str) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(modules)


def _of_sharding_engine(hook: Any) -> bool:
    return _comes_from(hook, *_SHARDING_ENGINES)


def _tensor_parallel_style(module: nn.Module) -> Any:
    """What transformers' tensor parallelism made of the module's forward, and its device mesh; or None."""
    forward = module.__dict__.get("forward")
    if not _comes_from(forward, "transformers.distributed.tensor_parallel"):
        return None
    code, closure = forward.__code__, forward.__closure__
    variables = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}
    return variables["self"], variables["mesh"]


def _tensor_parallel(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(_comes_from(hook, _TENSOR_PARALLEL) for hook in hooks) or (
        _tensor_parallel_style(module) is not None
    )


def _intercepted(module: nn.Module) -> str | None:
    """What would run around ``module.forward`` in a call, beside a sharding engine, if anything does."""
    if "_hf_hook" in module.__dict__:
        return "has an Accelerate hook (device placement or offloading)"
    if "forward" in module.__dict__ and _tensor_parallel_style(module) is None:
        return "has a forward of its own on the instance"
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        if len(hooks) > 0 and not all(
            _comes_from(hook, *_SHARDING_ENGINES, _TENSOR_PARALLEL) for hook in hooks.values()
        ):
            return "has hooks"
    if len(module._backward_hooks) > 0 or len(module._backward_pre_hooks) > 0:
        return "has hooks"
    return None


def gathers_parameters(module: nn.Module) -> bool:
    """Whether a sharding engine puts parameters in place for a call of this module."""
    return any(map(_of_sharding_engine, module._forward_pre_hooks.values()))


def linear_head(head: nn.Module, later: bool = False) -> LinearHead:
    """Look through wrappers to the weight and bias that ``head(x)`` multiplies by and adds.

    ``later``: asked before the parameters are those of a call: a module above the head gathers them, or the
    model is not initialised.
    """
    obstacle = _intercepted(head)
    if obstacle is not None:
        return _because(obstacle)
    found = _look_through(head, later)
    return _sharded(found) if gathers_parameters(head) else found


def _sharded(found: LinearHead) -> LinearHead:
    if found.obstacle is None and found.linear is None:
        return _because("trains single tokens, and its parameters are sharded")
    return found._replace(sharded=True)


def _look_through(head: nn.Module, later: bool) -> LinearHead:
    kind = type(head)
    # FSDP2 makes a subclass of a module's class that inherits its forward.
    if kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.forward is nn.Linear.forward):
        weight = head.weight
        parallel = type(weight).__name__ == "DTensor" and _tensor_parallel(head)
        shard = type(weight).__name__ == "DTensor" and (later or kind is not nn.Linear)
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor and not (shard or parallel):
            return _because(f"has a weight of type {type(weight).__name__}")
        if parallel and not shard and not serves(weight):
            return _because(f"has a weight with placements {weight.placements}")
        if weight.device.type == "meta" and not later:
            return _because("has its weight on the meta device (offloaded)")
        return LinearHead(weight, head.bias, None, linear=head, sharded=parallel)
    if kind.__name__ == "FullyShardedDataParallel":
        return _sharded(linear_head(head.module, later))
    if kind.__name__ == "ModulesToSaveWrapper":
        return linear_head(_active_copy(head), later)
    if kind.__name__ == "TrainableTokensWrapper":
        base = linear_head(head.original_module, later)
        if base.obstacle is not None or head.disable_adapters or not head.active_adapters:
            return base
        if base.bias is not None:
            return _because("trains single tokens and has a bias, which PEFT's own forward leaves out")
        if base.sharded:
            return _because("trains single tokens, and its parameters are sharded")
        return LinearHead(head.weight, None, None)
    if hasattr(head, "base_layer") and hasattr(head, "disable_adapters"):
        # A tuner layer adds nothing to its base when its adapters are off, or merged into the base's weight.
        if bool(head.merged) != bool(head.disable_adapters):
            return linear_head(head.base_layer, later)
        return _because(f"carries an adapter ({kind.__module__}.{kind.__name__})")
    return _because(f"is a {kind.__name__}, not a torch.nn.Linear")


def serves(weight: Any) -> bool:
    """Whether the loss can be computed from the shard of a DTensor (V, H) that this process has."""
    if weight.device_mesh.ndim != 1:
        return False
    (placement,) = weight.placements
    return placement.is_replicate() or type(placement).__name__ == "Shard" and placement.dim == 0


def _active_copy(wrapper: nn.Module) -> nn.Module:
    """The module that a ``ModulesToSaveWrapper`` calls: the first active adapter's copy, or the original."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, for a while."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def loss_in_call(
    head: nn.Module,
    linear: nn.Linear,
    hidden_states: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], CrossEntropyOutput],
) -> CrossEntropyOutput:
    """``loss(hidden_states, weight, bias)`` inside a call of ``head``, with the parameters of that time.

    Only the hidden states go through the head's hooks, which may cast or gather them. Of the loss, the hooks
    get what has a gradient.
    """
    result = CrossEntropyOutput(None)
    style = _tensor_parallel_style(linear)

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal result
        if style is not None:
            layer, mesh = style
            (x,), _ = layer.transform_inputs_pre_forward(linear, (x,), {}, mesh)
        result = loss(x, linear.weight, linear.bias)
        return result.loss

    hooks = OrderedDict(
        (key, hook) for key, hook in linear._forward_hooks.items() if not _comes_from(hook, _TENSOR_PARALLEL)
    )
    with ExitStack() as stack:
        stack.enter_context(_replaced(linear, "forward", forward))
        if len(hooks) < len(linear._forward_hooks):
            stack.enter_context(_replaced(linear, "_forward_hooks", hooks))
        returned = head(hidden_states)
    # A mixed-precision policy may cast a module's outputs, after the hooks that backward needs. What it is to
    # cast are logits: the loss keeps its precision.
    if returned.dtype == result.loss.dtype:
        result.loss = returned
    return result
