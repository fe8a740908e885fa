"""The kinds of things that can be patched in a model family. Records in ``families.py`` are made of these.

A part plans: it looks at a model (or, for a class-wide patch, at the family's modeling module) and says what
it would change, what it cannot and why. Nothing is changed until the plan of all parts is known.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakSet, ref

from torch import nn

from liger_ops.nn._lean import is_lean, lean_activations
from liger_ops.transformers.forwards import blocks
from liger_ops.transformers.report import Patched, Skipped
from liger_ops.transformers.sites import FLAG, Site, dispatcher, foreign, site

Undo = Callable[[], None]


@dataclass
class Plan:
    """What one part would do: ``apply`` makes the change and returns its undo.

    ``runs`` are the modules that then run the replacement of a part.
    """

    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    apply: list[Callable[[], Undo]] = field(default_factory=list)
    runs: dict[nn.Module, Forward] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One class or function of the modeling module, replaced when ``option`` is on.

    Attributes:
        target: name of the class or function.
        option, operator: the option of ``patch``, and what runs in place of the stock code.
        model_types: the ``config.model_type`` of the family's models that have it; empty for all.
    """

    target: str
    option: str = ""
    operator: str = ""
    model_types: tuple[str, ...] = ()

    def fits(self, model: nn.Module | None, model_type: str | None) -> bool:
        """Whether models of this type have the part; without a model, some of the family's do."""
        return model is None or not self.model_types or model_type in self.model_types

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        """What patching the model, or, without one, the modeling module would change."""
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
        """Why this module, although patched, does not run its operator in its present state."""
        return None

    def operator_of(self, module: nn.Module) -> str:
        """What this module runs when it is patched."""
        return self.operator

    def rebuilt(self, module: nn.Module) -> int:
        """How many numbers per token a lean layer need not keep of what this module computes."""
        return 0

    def attach(self, place: Site, modules: list[nn.Module]) -> Undo:
        """Make these modules run the replacement."""
        return _attach(place, modules)

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        cls = getattr(modeling, self.target, None)
        if not isinstance(cls, type):
            return Plan(skipped=[self._skip(f"{modeling.__name__} has no class {self.target}")])
        stranger = foreign(cls.forward, modeling) or foreign(cls, modeling)
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
            operators = [self.operator_of(module) for module in group]
            for operator in dict.fromkeys(operators):
                count = operators.count(operator)
                plan.patched.append(Patched(self.option, self.target, count, operator, already))
        for reasons in (obstacles, [remark for remark in remarks if remark is not None]):
            for reason in dict.fromkeys(reasons):
                plan.skipped.append(self._skip(reason, reasons.count(reason)))
        if new:
            plan.apply.append(lambda: self.attach(place, new))
        plan.runs = dict.fromkeys(new + old, self)
        return plan


def unreachable(module: nn.Module, cls: type, place: Site) -> str | None:
    """Why a dispatcher on ``cls`` would not be reached by calling this module, if it would not."""
    found = inspect.getattr_static(type(module), "forward")
    if found is not vars(cls)["forward"] and found is not place.original:
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

    def rebuilt(self, module: nn.Module) -> int:
        return module.weight.numel()


@dataclass(frozen=True)
class LayerNorm(Forward):
    """The ``torch.nn.LayerNorm`` instances of a model, whatever the modeling module calls the class.

    The class belongs to torch and to every model of the process, so it is not touched: instances of the
    patched model get a subclass of ours. For models that are yet to be built that takes a modeling module
    with a name of its own for the class, which is then rebound.
    """

    target: str = "LayerNorm"
    option: str = "layer_norm"
    operator: str = "liger::layer_norm"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.layer_norm(original)

    def rebuilt(self, module: nn.Module) -> int:
        return module.normalized_shape[0]

    def attach(self, place: Site, modules: list[nn.Module]) -> Undo:
        detach = _attach(place, modules)
        weak = WeakSet(module for module in modules if type(module) is nn.LayerNorm)
        for module in weak:
            module.__class__ = blocks.PatchableLayerNorm

        def undo() -> None:
            detach()
            for module in weak:
                if type(module) is blocks.PatchableLayerNorm:
                    module.__class__ = nn.LayerNorm

        return undo

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        cls = blocks.PatchableLayerNorm
        place = site(cls, "forward", lambda original: dispatcher(original, self.build(original)))
        if model is not None:
            kinds = (nn.LayerNorm, cls)
            return self._plan_modules([m for m in model.modules() if type(m) in kinds], cls, place)
        if vars(modeling).get(self.target) not in (nn.LayerNorm, cls):
            reason = f"{modeling.__name__} uses torch.nn.LayerNorm, which belongs to all: pass the model"
            return Plan(skipped=[self._skip(reason)])
        name = site(modeling, self.target, lambda original: cls)
        already = name.class_wide and place.class_wide
        plan = Plan(patched=[Patched(self.option, self.target, None, self.operator, already)])
        plan.notes.append(f"{self.option} reaches models that are built from now on: pass those built before")
        if not already:
            plan.apply += [lambda: _acquire(place, None), lambda: _acquire(name, None)]
        return plan


@dataclass(frozen=True)
class GatedMLP(Forward):
    """An MLP class computing ``down(act(gate(x)) · up(x))``, with the names of its submodules.

    With SiLU it is a SwiGLU, with GELU a GeGLU; ``option`` is the name that the family's users know.
    """

    option: str = "swiglu"
    operator: str = "liger::swiglu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.gated_mlp(self.gate, self.up, self.down, self.act)(original)

    def rebuilt(self, module: nn.Module) -> int:
        return getattr(getattr(module, self.down), "in_features", 0)

    def obstacle(self, module: nn.Module) -> str | None:
        activation = getattr(module, self.act)
        if blocks.gate_of(activation) is not None:
            return None
        return f"the activation is {type(activation).__name__}, not SiLU or GELU"

    def operator_of(self, module: nn.Module) -> str:
        gate = blocks.gate_of(getattr(module, self.act))
        return self.operator if gate is None else gate.operator


@dataclass(frozen=True)
class PackedMLP(GatedMLP):
    """As ``GatedMLP``, with one projection for gate and up, in this order."""

    operator: str = "liger::swiglu_packed"
    gate: str = "gate_up_proj"
    up: str = ""

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.packed_mlp(self.gate, self.down, self.act)(original)

    def operator_of(self, module: nn.Module) -> str:
        return super().operator_of(module).removesuffix("_packed") + "_packed"


@dataclass(frozen=True)
class Experts(Forward):
    """A class of transformers' experts interface: all experts of a layer, in stacked parameters."""

    option: str = "swiglu"
    operator: str = "liger::swiglu_packed"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.experts(original)

    def obstacle(self, module: nn.Module) -> str | None:
        return blocks.experts_obstacle(module)

    def rebuilt(self, module: nn.Module) -> int:
        return module.config.num_experts_per_tok * (module.hidden_dim + module.intermediate_dim)


@dataclass(frozen=True)
class Rotary(Part):
    """A rotary function of the modeling module, a global that every attention of the family calls."""

    option: str = "rope"
    operator: str = "liger::rope"

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of the stock function."""
        return blocks.rotary(original)

    def plan(self, model: nn.Module | None, modeling: ModuleType) -> Plan:
        function = getattr(modeling, self.target, None)
        if function is None:
            return Plan(skipped=[self._skip(f"{modeling.__name__} has no function {self.target}")])
        stranger = foreign(function, modeling)
        if stranger is not None:
            return Plan(skipped=[self._skip(f"replaced by {stranger} already")])
        place = site(modeling, self.target, self.build)
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
class VisionRotary(Rotary):
    """A rotary function for the patches of all images in one sequence, without batch."""

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return blocks.vision_rotary(original)


@dataclass(frozen=True)
class CausalLMHead(Forward):
    """A class with a next-token loss, a backbone ``model`` and a head ``lm_head``, for text or with images.

    Attributes:
        softcap: name of the configuration's soft-capping of the logits.
        router_loss: name of the modeling module's function for the load-balancing loss of experts.
        float_logits: whether the stock forward returns the logits in float32.
    """

    option: str = "fused_linear_cross_entropy"
    operator: str = "liger::fused_linear_cross_entropy"
    softcap: str | None = None
    router_loss: str | None = None
    float_logits: bool = False

    def build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from liger_ops.transformers.forwards import causal_lm

        return causal_lm.build(original, self.softcap, self.router_loss, self.float_logits)

    def obstacle(self, module: nn.Module) -> str | None:
        from liger_ops.transformers.forwards.loss import causal_lm_loss

        if module.__dict__.get("_loss_function") is causal_lm_loss:
            return "the model was patched with cross_entropy; undo that first"
        return None

    def remark(self, module: nn.Module) -> str | None:
        from liger_ops.transformers.forwards.causal_lm import uses_stock_loss
        from liger_ops.transformers.forwards.lm_head import gathers_parameters, linear_head

        if not uses_stock_loss(module):
            name = getattr(module.loss_function, "__name__", repr(module.loss_function))
            return f"loss_function is {name}: it is called, with logits"
        # Gathered for a call, or of a model whose weights are yet to be made.
        later = gathers_parameters(module) or all(parameter.is_meta for parameter in module.parameters())
        obstacle = linear_head(module.lm_head, later=later).obstacle
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


@dataclass(frozen=True)
class LeanActivations(Part):
    """The layers of a model, which then keep less for backward. What they compute, and how, stays.

    Plans after the other parts, because what can be computed again is what those replace.
    """

    target: str = "-"
    option: str = "lean_activations"

    def plan_layers(self, model: nn.Module | None, plans: list[Plan]) -> Plan:
        """What making the model's layers lean would change, when the other parts' plans are carried out."""
        if model is None:
            return Plan(skipped=[self._skip("it hooks the layers of a model: pass the model")])
        parts = {module: part for plan in plans for module, part in plan.runs.items()}
        layers = {layer: _numbers_per_token(layer, parts) for layer in _layers(model)}
        layers = {layer: numbers for layer, numbers in layers.items() if numbers}
        if not layers:
            reason = "no layer runs an operator whose result could be computed again"
            return Plan(skipped=[self._skip(reason)])
        plan = Plan()
        width = next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
        rows = [(type(layer).__name__, width * n, is_lean(layer)) for layer, n in layers.items()]
        for row in dict.fromkeys(rows):
            name, size, already = row
            operator = f"keeps {size} bytes per token less, computed again in backward"
            plan.patched.append(Patched(self.option, name, rows.count(row), operator, already))
        if any(not parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            plan.notes.append(f"{self.option}: frozen products keep nothing, so that there is less to gain")
        plan.apply += [functools.partial(lean_activations, layer) for layer in layers if not is_lean(layer)]
        return plan


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the module lists that are in no other one."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield from _layers(module)


def _numbers_per_token(layer: nn.Module, parts: dict[nn.Module, Forward]) -> int:
    """How many numbers per token the layer keeps less for backward, where all its products are trained.

    Norms elsewhere than in the layer itself are of queries and keys, which no product takes. Where norms
    stand before and after a block, what the latter return is only added.
    """
    found = {name: module for name, module in layer.named_modules() if module in parts}
    inner = [module for module in found.values() if module._modules]
    norms = {name: module for name, module in found.items() if not module._modules and "." not in name}
    if any(name.startswith("pre_") for name in norms):
        norms = {name: module for name, module in norms.items() if not name.startswith("post_")}
    return sum(parts[module].rebuilt(module) for module in [*inner, *norms.values()])
