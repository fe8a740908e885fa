"""The kinds of things that can be patched in a model family. Records in ``families.py`` are made of these.

A part plans: it looks at a model (or, for a class-wide patch, at the family's modeling module) and says what
it would change, what it cannot and why. Nothing is changed until the plan of all parts is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakSet, ref

from torch import nn
from transformers.activations import SiLUActivation

import liger_ops.functional as LF
from liger_ops.transformers.forwards import blocks
from liger_ops.transformers.report import Patched, Skipped
from liger_ops.transformers.sites import FLAG, Site, dispatcher, foreign, site

Undo = Callable[[], None]


@dataclass
class Plan:
    """What one part would do: ``apply`` makes the change and returns its undo."""

    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    apply: list[Callable[[], Undo]] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One class or function of the modeling module, replaced when ``option`` is on."""

    target: str
    option: str = ""
    operator: str = ""

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        raise NotImplementedError

    def _skip(self, reason: str, count: int | None = None) -> Skipped:
        return Skipped(self.option, self.target, count, reason)


@dataclass(frozen=True)
class Forward(Part):
    """A class whose ``forward`` is replaced for the modules of one model, or for all."""

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of the stock forward."""
        raise NotImplementedError

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this module keeps its stock forward, if it does."""
        return None

    def remark(self, module: nn.Module) -> str | None:
        """Why this module, although patched, does not run ``operator`` in its present state."""
        return None

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        cls = getattr(modeling, self.target, None)
        if not isinstance(cls, type):
            return Plan(skipped=[self._skip(f"{modeling.__name__} has no class {self.target}")])
        stranger = foreign(cls.forward) or foreign(cls)
        if stranger is not None:
            return Plan(skipped=[self._skip(f"replaced by {stranger} already")])
        place = site(cls, "forward", lambda original: dispatcher(original, self.build(original)))
        if model is None:
            return Plan(
                patched=[Patched(self.option, self.target, None, self.operator, already=place.class_wide)],
                apply=[] if place.class_wide else [lambda: _acquire(place, None)],
            )
        return self._plan_modules([m for m in model.modules() if isinstance(m, cls)], cls, place)

    def _plan_modules(self, modules: list[nn.Module], cls: type, place: Site) -> Plan:
        plan = Plan()
        if not modules:
            plan.skipped.append(self._skip("the model has no such module"))
        new, old, obstacles, remarks = [], [], [], []
        for module in modules:
            if place.serves(module):
                old.append(module)
            else:
                obstacle = self.obstacle(module) or unreachable(module, cls, place)
                if obstacle is not None:
                    obstacles.append(obstacle)
                    continue
                new.append(module)
            remarks.append(self.remark(module))
        for group, already in ((new, False), (old, True)):
            if group:
                plan.patched.append(Patched(self.option, self.target, len(group), self.operator, already))
        for reasons in (obstacles, [remark for remark in remarks if remark is not None]):
            for reason in dict.fromkeys(reasons):
                plan.skipped.append(self._skip(reason, reasons.count(reason)))
        if new:
            plan.apply.append(lambda: _attach(place, new))
        return plan


def unreachable(module: nn.Module, cls: type, place: Site) -> str | None:
    """Why a dispatcher on ``cls`` would not be reached by calling this module, if it would not."""
    if inspect.getattr_static(type(module), "forward") is not vars(cls)["forward"]:
        return f"{type(module).__name__} overrides forward"
    if "forward" not in module.__dict__:
        return None
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        inner = getattr(module._old_forward, "__func__", None)
        if inner is place.original or inner is place.replacement:
            return None
        return "an Accelerate hook calls a forward that is not the class's own"
    if "_original_forward" in module.__dict__:
        return "prepared by Accelerate already: patch before Accelerator.prepare"
    return f"the instance has a forward of its own ({foreign(module.forward) or 'set by transformers'})"


def _acquire(place: Site, users: list[nn.Module] | None) -> Undo:
    place.acquire(users)
    if users is None:
        return lambda: place.release(None)
    # A report must not keep the model alive.
    weak = WeakSet(users)
    return lambda: place.release(list(weak))


def _attach(place: Site, modules: list[nn.Module]) -> Undo:
    """Flag these modules, after putting the dispatcher on their class."""
    release = _acquire(place, modules)
    weak, hooked = WeakSet(modules), WeakSet()

    def undo() -> None:
        for module in weak:
            module.__dict__.pop(FLAG, None)
        for module in hooked:
            if getattr(module.__dict__.get("_old_forward"), "__func__", None) is place.replacement:
                module._old_forward = place.original.__get__(module)
        release()

    try:
        for module in modules:
            module.__dict__[FLAG] = True
            # An Accelerate hook holds the bound method of the time when it was added.
            if getattr(module.__dict__.get("_old_forward"), "__func__", None) is place.original:
                module._old_forward = place.replacement.__get__(module)
                hooked.add(module)
    except BaseException:
        undo()
        raise
    return undo


@dataclass(frozen=True)
class RMSNorm(Forward):
    """An RMSNorm class: the attribute with its epsilon, the offset of its weight, and where it rounds."""

    eps: str = "variance_epsilon"
    offset: float = 0.0
    casting_mode: str = "llama"
    option: str = "rms_norm"
    operator: str = "liger::rms_norm"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.rms_norm(self.eps, self.offset, self.casting_mode)(original)


def is_silu(activation: Any) -> bool:
    """Whether this activation module computes ``x · sigmoid(x)``."""
    return type(activation) is nn.SiLU or type(activation) is SiLUActivation


@dataclass(frozen=True)
class SwiGLU(Forward):
    """An MLP class with ``gate_proj``, ``up_proj``, ``down_proj`` and its activation module under ``act``."""

    act: str = "act_fn"
    option: str = "swiglu"
    operator: str = "liger::swiglu"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.gated_mlp(self.act, is_silu, LF.swiglu)(original)

    def obstacle(self, module: nn.Module) -> str | None:
        activation = getattr(module, self.act)
        return None if is_silu(activation) else f"the activation is {type(activation).__name__}, not SiLU"


@dataclass(frozen=True)
class Rotary(Part):
    """A rotary function of the modeling module, a global that every attention of the family calls."""

    option: str = "rope"
    operator: str = "liger::rope"

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        function = getattr(modeling, self.target, None)
        if function is None:
            return Plan(skipped=[self._skip(f"{modeling.__name__} has no function {self.target}")])
        stranger = foreign(function)
        if stranger is not None:
            return Plan(skipped=[self._skip(f"replaced by {stranger} already")])
        place = site(modeling, self.target, blocks.rotary)
        if model is None:
            already, users, callers = place.class_wide, None, None
        else:
            already = place.serves(model)
            users, callers = [model], sum(self._calls(type(module), modeling) for module in model.modules())
            if not callers:
                return Plan(skipped=[self._skip("no module of the model calls it")])
        plan = Plan(patched=[Patched(self.option, self.target, callers, self.operator, already)])
        if model is not None:
            plan.notes.append(
                f"{self.target} is a function of {modeling.__name__}: "
                "until undo(), all models built from that module run the replacement"
            )
        if not already:
            plan.apply.append(lambda: _acquire(place, users))
        return plan

    def _calls(self, cls: type, modeling: ModuleType) -> bool:
        forward = inspect.unwrap(cls.forward)
        code = getattr(forward, "__code__", None)
        return code is not None and self.target in code.co_names and forward.__globals__ is vars(modeling)


@dataclass(frozen=True)
class CausalLMHead(Forward):
    """A ``…ForCausalLM`` class with the text-only signature, a backbone ``model`` and a head ``lm_head``."""

    option: str = "fused_linear_cross_entropy"
    operator: str = "liger::fused_linear_cross_entropy"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from liger_ops.transformers.forwards import causal_lm

        return causal_lm.forward

    def obstacle(self, module: nn.Module) -> str | None:
        from liger_ops.transformers.forwards.loss import causal_lm_loss

        if module.__dict__.get("_loss_function") is causal_lm_loss:
            return "the model was patched with cross_entropy; undo that first"
        return None

    def remark(self, module: nn.Module) -> str | None:
        from liger_ops.transformers.forwards.causal_lm import uses_stock_loss
        from liger_ops.transformers.forwards.lm_head import linear_head

        if not uses_stock_loss(module):
            name = getattr(module.loss_function, "__name__", repr(module.loss_function))
            return f"loss_function is {name}: it is called, with logits"
        obstacle = linear_head(module.lm_head).obstacle
        return None if obstacle is None else f"lm_head {obstacle}: logits, then liger::cross_entropy"


@dataclass(frozen=True)
class TokenLoss(Part):
    """The loss function of a ``…ForCausalLM`` class, replaced on the model itself; its forward stays."""

    option: str = "cross_entropy"
    operator: str = "liger::cross_entropy"

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        from transformers.loss.loss_utils import ForCausalLMLoss

        from liger_ops.transformers.forwards.loss import causal_lm_loss

        cls = getattr(modeling, self.target, None)
        if not isinstance(cls, type):
            return Plan(skipped=[self._skip(f"{modeling.__name__} has no class {self.target}")])
        if model is None:
            # A class attribute: instances without a loss function of their own find it in their place.
            return self._plan_attribute(
                cls, vars(cls).get("_loss_function"), staticmethod(causal_lm_loss), None
            )
        if not isinstance(model, cls):
            return Plan(skipped=[self._skip(f"{type(model).__name__} has no next-token loss")])
        if getattr(model, FLAG, False):
            return Plan(
                skipped=[self._skip("the model was patched with fused_linear_cross_entropy; undo that first")]
            )
        current = model.loss_function
        if current is not ForCausalLMLoss and current is not causal_lm_loss:
            name = getattr(current, "__name__", repr(current))
            return Plan(skipped=[self._skip(f"loss_function is {name}, not transformers' next-token loss")])
        return self._plan_attribute(model, model.__dict__.get("_loss_function"), causal_lm_loss, 1)

    def _plan_attribute(self, owner: Any, previous: Any, loss: Any, count: int | None) -> Plan:
        already = getattr(previous, "__func__", previous) is getattr(loss, "__func__", loss)
        plan = Plan(patched=[Patched(self.option, self.target, count, self.operator, already)])
        if already:
            return plan
        # A report must not keep the model alive.
        reference = ref(owner)

        def undo() -> None:
            owner = reference()
            if owner is None or vars(owner).get("_loss_function") is not loss:
                return
            if previous is None:
                del owner._loss_function
            else:
                owner._loss_function = previous

        def apply() -> Undo:
            reference()._loss_function = loss
            return undo

        plan.apply.append(apply)
        return plan
