"""Parts of a model whose type has no record, recognised by structure and confirmed by numbers.

A class that looks like an RMSNorm or a gated MLP, and a function that looks like a rotary embedding, runs
beside its replacement on small random tensors: outputs and gradients have to agree, in training mode and in
evaluation. What does not agree, or cannot be compared, is reported and left alone. Parameters, their
gradients and the random state stay as they were.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from liger_ops.transformers.forwards import blocks
from liger_ops.transformers.forwards.loss import causal_lm_loss
from liger_ops.transformers.parts import (
    Forward,
    GatedMLP,
    LayerNorm,
    PackedMLP,
    Part,
    RMSNorm,
    Rotary,
    TokenLoss,
)
from liger_ops.transformers.report import Skipped
from liger_ops.transformers.sites import original

_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
# Gate, up and down; without up, gate and up are one projection.
_PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", None, "down_proj"),
)
_ROTARY_ARGUMENTS = (["q", "k", "cos", "sin"], ["q", "k", "cos", "sin", "unsqueeze_dim"])


@dataclass
class Recognized:
    """The parts to plan, each with the module that defines it, and what was looked at in vain."""

    parts: list[tuple[Part, ModuleType]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def recognize(model: nn.Module) -> Recognized:
    """Everything in ``model`` that provably computes what an operator computes."""
    found = Recognized()
    for cls, modules in _classes(model).items():
        modeling = sys.modules[cls.__module__]
        if vars(modeling).get(cls.__name__) is cls and len(inspect.signature(cls.forward).parameters) == 2:
            candidates = _propose_norm(cls, modules[0]) or _propose_mlp(cls, modules[0])
            if candidates:
                _settle(found, candidates, cls, modules)
    for modeling, name in _rotary_functions(model):
        reason = None
        try:
            _compare_rotary(Rotary(name), original(modeling, name), *_dtype_and_device(model))
        except _Refused as refusal:
            reason = str(refusal)
        _record(found, Rotary(name), modeling, reason, None)
    here = sys.modules[__name__]
    if any(type(module) in (nn.LayerNorm, blocks.PatchableLayerNorm) for module in model.modules()):
        found.parts.append((LayerNorm(), here))
    if _has_stock_loss(model):
        found.parts.append((TokenLoss(type(model).__name__), sys.modules[type(model).__module__]))
    return found


def _classes(model: nn.Module) -> dict[type, list[nn.Module]]:
    """The model's modules under the class that defines their forward, classes of torch left out."""
    classes = defaultdict(list)
    for module in model.modules():
        cls = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        if not cls.__module__.startswith("torch."):
            classes[cls].append(module)
    return classes


def _settle(found: Recognized, candidates: list[Forward], cls: type, modules: list[nn.Module]) -> None:
    """Take the candidate that agrees best with every module of the class, or say why there is none."""
    stock = original(cls, "forward")
    different = {_fingerprint(module): module for module in modules}.values()
    best, least, reason = candidates[0], float("inf"), None
    for candidate in candidates:
        try:
            distance = max(_distance_of(candidate, stock, module) for module in different)
        except _Refused as refusal:
            if reason is None or refusal.close:
                reason = str(refusal)
            continue
        if distance < least:
            best, least = candidate, distance
    _record(found, best, sys.modules[cls.__module__], None if least < float("inf") else reason, len(modules))


def _record(
    found: Recognized, part: Part, modeling: ModuleType, reason: str | None, count: int | None
) -> None:
    if reason is None:
        found.parts.append((part, modeling))
    else:
        found.skipped.append(Skipped(part.option, part.target, count, reason))


class _Refused(Exception):
    """Why a candidate is not taken, and whether it came as far as its gradients."""

    def __init__(self, reason: str, close: bool = False) -> None:
        super().__init__(reason)
        self.close = close


def _fingerprint(module: nn.Module) -> tuple:
    """What modules of one class may differ in, as far as it can change what they compute."""
    plain = (bool, int, float, str, type(None))
    values = tuple((name, value) for name, value in vars(module).items() if isinstance(value, plain))
    children = tuple((name, type(child)) for name, child in module.named_children())
    parameters = tuple((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters())
    return type(module), values, children, parameters


def _propose_norm(cls: type, module: nn.Module) -> list[Part]:
    parameters = dict(module.named_parameters())
    eps = next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1 or list(module.children()):
        return []
    if eps is None:
        return []
    return [
        RMSNorm(cls.__name__, eps=eps, offset=offset, casting_mode=casting_mode)
        for offset in (0.0, 1.0)
        for casting_mode in ("llama", "gemma")
    ]


def _propose_mlp(cls: type, module: nn.Module) -> list[Part]:
    act = next((name for name in _ACTIVATIONS if isinstance(getattr(module, name, None), nn.Module)), None)
    if act is None:
        return []
    gate = blocks.gate_of(getattr(module, act))
    option = "swiglu" if gate is None else gate.operator.removeprefix("liger::")
    for gate_name, up, down in _PROJECTIONS:
        names = [name for name in (gate_name, up, down) if name is not None]
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            if up is None:
                return [PackedMLP(cls.__name__, option, gate=gate_name, down=down, act=act)]
            return [GatedMLP(cls.__name__, option, gate=gate_name, up=up, down=down, act=act)]
    return []


def _distance_of(candidate: Forward, stock: Callable, module: nn.Module) -> float:
    """How far the candidate's results are from the module's, where that is no more than rounding.

    Raises _Refused where it is more, and where it cannot be found out.
    """
    obstacle = candidate.obstacle(module)
    if obstacle is not None:
        raise _Refused(obstacle)
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        raise _Refused("it has parameters on the meta device: patch after loading")
    compare = _compare_norm if isinstance(candidate, RMSNorm) else _compare_mlp
    with _refusing_errors():
        return compare(candidate, stock, module)


@contextlib.contextmanager
def _refusing_errors() -> Iterator[None]:
    """Whatever a stranger's forward raises on our input, it is left alone."""
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"it cannot be compared: {type(error).__name__}: {error}") from error


def _compare_norm(candidate: RMSNorm, stock: Callable, module: nn.Module) -> float:
    ours = candidate.build(stock)
    distance = 0.0
    for dtype in dict.fromkeys((module.weight.dtype, torch.float32, torch.bfloat16)):
        # The weights of a new norm are all equal, which would hide what becomes of them.
        norm = copy.deepcopy(module).to(dtype)
        size = norm.weight.shape[0]
        random = _Random(dtype, norm.weight.device)
        norm.weight.data = random(size)
        # Rows so small that the epsilon counts, usual ones, and large ones.
        x = torch.cat([scale * random(2, size) for scale in (1e-3, 1.0, 30.0)]).requires_grad_()
        call = functools.partial(_call_module, norm, x)
        distance += _distance(call, stock, ours, (x, norm.weight), random)
    return distance


def _compare_mlp(candidate: GatedMLP, stock: Callable, module: nn.Module) -> float:
    ours = candidate.build(stock)
    gate = getattr(module, candidate.gate)
    weight = next(gate.parameters())
    random = _Random(weight.dtype, weight.device)
    x = random(4, gate.in_features)
    with torch.no_grad(), _modes(module, False):
        spread = gate(x).float().std()
    # Into the range where activations bend and where, if there is a limit to them, they reach it.
    x = (x * (4 / spread.clamp(min=1e-6)).to(x.dtype)).requires_grad_()
    distance = 0.0
    for training in (True, False):
        with _modes(module, training):
            call = functools.partial(_call_module, module, x)
            distance += _distance(call, stock, ours, (x,), random)
    return distance


def _call_module(module: nn.Module, x: torch.Tensor, forward: Callable) -> torch.Tensor:
    return forward(module, x)


def _compare_rotary(candidate: Rotary, stock: Callable, dtype: torch.dtype, device: torch.device) -> None:
    ours = candidate.build(stock)
    if device.type == "meta":
        raise _Refused("the model is on the meta device: patch after loading")
    with _refusing_errors():
        for one in dict.fromkeys((dtype, torch.float32, torch.bfloat16)):
            random = _Random(one, device)
            q, k = random(2, 4, 3, 8).requires_grad_(), random(2, 2, 3, 8).requires_grad_()
            angle = random(1, 3, 4).repeat(1, 1, 2)
            call = functools.partial(_call_rotary, q, k, angle.cos(), angle.sin())
            _distance(call, stock, ours, (q, k), random)


def _call_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: Callable
) -> torch.Tensor:
    return torch.cat([rotated.flatten() for rotated in rotary(q, k, cos, sin)])


class _Random:
    """Normal random numbers of one dtype on one device, from a generator of their own."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def seed_default(self) -> None:
        """Seed the generators that a forward on this device may use; ``torch.manual_seed`` seeds all."""
        torch.random.default_generator.manual_seed(0)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(0)


def _distance(
    call: Callable[[Callable], torch.Tensor],
    stock: Callable,
    ours: Callable,
    leaves: tuple[torch.Tensor, ...],
    random: _Random,
) -> float:
    """The relative difference of both functions' results.

    Raises _Refused when it, or that of the gradients, is more than rounding.
    """
    results: list[list[torch.Tensor]] = []
    devices = [random.device] if random.device.type == "cuda" else []
    upstream = None
    for function in (stock, ours):
        # Both meet the same random state, so that equal dropout is equal.
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autocast(random.device.type, enabled=False),
        ):
            random.seed_default()
            result = call(function)
            if upstream is None:
                upstream = random(*result.shape).to(result.dtype)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            results.append([result.detach(), *torch.autograd.grad(result, wanted, upstream)])
    # 16-bit results are rounded from better ones. In float32 and float64 the order of sums shows, and
    # gradients sum more.
    unit = torch.finfo(random.dtype).eps * (1 if random.dtype in blocks.SIXTEEN_BIT else 8)
    differences = []
    for what, expected, actual in zip(["results", *["gradients"] * len(leaves)], *results, strict=False):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            raise _Refused(f"it returns {expected.dtype} {tuple(expected.shape)} where the operator does not")
        size = expected.double().norm().item()
        if not 0 < size < float("inf"):
            raise _Refused(f"its {what} on random input are zero or not finite, which proves nothing")
        differences.append((actual.double() - expected.double()).norm().item() / size)
        if not differences[-1] <= (1 if what == "results" else 4) * unit:
            reason = f"it looks like one, but its {what} on random input differ by {differences[-1]:.1e}"
            raise _Refused(reason, close=what == "gradients")
    return differences[0]


@contextlib.contextmanager
def _modes(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while."""
    modes = [(one, one.training) for one in module.modules()]
    for one, _ in modes:
        one.training = training
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def _rotary_functions(model: nn.Module) -> Iterator[tuple[ModuleType, str]]:
    """The functions of (q, k, cos, sin) that forwards of the model call by a global name."""
    seen = set()
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        modeling = sys.modules.get(type(module).__module__)
        for name in () if code is None or modeling is None else code.co_names:
            if (id(modeling), name) in seen or name not in vars(modeling):
                continue
            seen.add((id(modeling), name))
            function = original(modeling, name)
            if not callable(function) or isinstance(function, type):
                continue
            with contextlib.suppress(ValueError):  # built-in functions need not have a signature
                if list(inspect.signature(function).parameters) in _ROTARY_ARGUMENTS:
                    yield modeling, name


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.dtype, parameter.device


def _has_stock_loss(model: Any) -> bool:
    """Whether the model's forward takes labels to transformers' next-token loss, or ours in its place."""
    if getattr(model, "loss_function", None) not in (ForCausalLMLoss, causal_lm_loss):
        return False
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names and "labels" in code.co_varnames
