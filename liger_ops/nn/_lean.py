"""Lean activations: what backward can compute again from what it has anyway is not kept for it.

While a lean layer's forward runs, autograd saves through ``_pack`` and ``_unpack``. A tensor that one of our
norms or gated activations returned, a view of it or its copy in another dtype, is replaced by the recipe that
made it, whose inputs that operator saves for its own backward; everything else is saved as always. Backward
runs the recipe once for all who saved its result, and lets go after the last of them.

A recipe is an attribute of its result: it lives as long as that tensor and is never taken for another's. All
this happens on the host for every tensor that a layer saves, so it is written to be quick.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from liger_ops._library import load

load()

_below_autograd = torch._C._AutoDispatchBelowAutograd
_graph_task = torch._C._current_graph_task_id
_hooks_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks


class _Thread(threading.local):
    """The lean layers whose forward runs in this thread, the innermost last, and what has a recipe there."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.results: list[ref[Tensor]] = []


_thread = _Thread()


def rebuildable(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``operator(*arguments)``; in a lean layer, backward computes it again instead of keeping it.

    The operator has to give the same bits each time and to return a new, contiguous tensor.
    """
    if not _in_lean_layer():
        return operator(*arguments)
    recipe = _Recipe(operator, arguments)
    result = operator(*arguments) if recipe.nested else _unhooked(operator, arguments)
    _attach(recipe, result)
    return result


def rebuilt_by(result: Tensor, operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The result, which in a lean layer backward makes by ``operator(*arguments)`` instead of keeping it."""
    if _in_lean_layer():
        _attach(_Recipe(operator, arguments), result)
    return result


def unhooked(operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``, which saves nobody else's result: autograd by itself is quicker."""
    return _unhooked(operator, arguments) if _in_lean_layer() else operator(*arguments)


def _unhooked(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    _pop_hooks()
    try:
        return operator(*arguments)
    finally:
        _push_hooks(_pack, _unpack)


def _attach(recipe: _Recipe, result: Tensor) -> None:
    # Without a gradient the arguments are not kept.
    if result.requires_grad and type(result) is Tensor:
        recipe.dtype = result.dtype
        result._liger_recipe = recipe
        _thread.results.append(ref(result))


def _in_lean_layer() -> bool:
    # Under the hooks of somebody within the layer, a checkpoint's for instance, nothing need be kept.
    return not torch.compiler.is_compiling() and bool(_thread.layers) and _is_ours(_top_hooks(True))


def _is_ours(hooks: tuple[Callable, Callable] | None) -> bool:
    return hooks is not None and hooks[0] is _pack


class _Recipe:
    """How a tensor was made, and what was saved of it.

    It keeps its arguments alive, which are earlier in the graph, but not what was saved, which keeps the
    recipe alive: the cycle would outlive the graph.

    Attributes:
        versions: of the arguments that are tensors; None for the others.
        nested: whether an argument has a recipe itself, which then stands in its place.
        dtype: of the result.
    """

    __slots__ = ("arguments", "dtype", "nested", "operator", "outputs", "versions")

    def __init__(self, operator: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.operator = operator
        self.arguments = list(arguments)
        self.versions: list[int | None] = []
        self.outputs: list[ref[_Output]] = []
        self.nested = False
        for i, argument in enumerate(arguments):
            version = None
            if isinstance(argument, Tensor):
                version = argument._version
                base = argument._base
                if hasattr(argument if base is None else base, "_liger_recipe"):
                    packed = _pack(argument)
                    if type(packed) is _Output:
                        self.arguments[i] = packed
                        version = None
                        self.nested = True
            self.versions.append(version)

    def save(self, tensor: Tensor) -> _Output:
        """What to keep in place of the result, of a view of it, or of its copy in another dtype."""
        geometry = (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())
        for reference in self.outputs:
            output = reference()
            if output is not None and output.geometry == geometry:
                output.uses += 1
                return output
        output = _Output(self, geometry)
        self.outputs.append(ref(output))
        return output

    def make(self, output: _Output) -> Tensor:
        """What the output stands for, from what is there already for another one, or else anew."""
        dtype, size, stride, offset = output.geometry
        result = self._there(dtype)
        if result is None:
            result = self._there(self.dtype)
            if result is None:
                result = self._run()
            if dtype != self.dtype:
                result = result.to(dtype)
        # Results and their copies are contiguous and begin where their memory does.
        return result.as_strided(size, stride, offset)

    def _there(self, dtype: torch.dtype) -> Tensor | None:
        for reference in self.outputs:
            output = reference()
            if output is not None and output.geometry[0] == dtype:
                tensor = output.tensor
                if tensor is not None and output.stream == _stream(tensor):
                    return tensor
        return None

    def _run(self) -> Tensor:
        arguments = []
        for argument, version in zip(self.arguments, self.versions, strict=True):
            if type(argument) is _Output:
                argument = argument.unpack()
            elif version is not None:
                if argument._version != version:
                    raise _written_to(argument, version)
                if argument.is_leaf and not argument.data_ptr() and argument.numel():
                    raise RuntimeError(
                        "a parameter was freed before backward could use it to compute a result again, which "
                        "lean activations do earlier than the module's own backward: shard whole layers, or "
                        "leave lean_activations off"
                    )
            arguments.append(argument)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.operator(*arguments)
        # Past the operator's autograd kernel, which takes its time without a gradient too.
        with _below_autograd():
            return self.operator(*arguments)


class _Output:
    """What autograd keeps in place of a tensor that can be made again, once for all who save the same.

    Attributes:
        geometry: dtype, size, stride and offset of the tensor.
        uses: how often it was saved.
        task, left: the backward pass that asks for it, and how often that may still happen.
        tensor: there from the first who asks in a backward pass to the last, or to the end of the pass, for
            those who ask on the same CUDA stream.
    """

    __slots__ = ("__weakref__", "geometry", "left", "recipe", "stream", "task", "tensor", "uses")

    def __init__(
        self, recipe: _Recipe, geometry: tuple[torch.dtype, torch.Size, tuple[int, ...], int]
    ) -> None:
        self.recipe, self.geometry = recipe, geometry
        self.uses, self.left, self.task = 1, 0, -1
        self.tensor: Tensor | None = None

    def unpack(self) -> Tensor:
        task = _graph_task()
        if self.left <= 0 or self.task != task:
            self.left, self.task = self.uses, task
        self.left -= 1
        tensor = self.tensor
        if tensor is None:
            tensor = self.recipe.make(self)
            if self.left > 0 and task >= 0:
                self.tensor, self.stream = tensor, _stream(tensor)
                _release_after(task, self)
            return tensor
        if self.stream != _stream(tensor):
            tensor = self.recipe.make(self)
        if self.left <= 0:
            self.tensor = None
        return tensor


def _stream(tensor: Tensor) -> tuple[int, int, int] | None:
    return torch._C._cuda_getCurrentStream(tensor.device.index) if tensor.is_cuda else None


# What backward passes hold, by the number of the pass. Weak, so that a pass that fails holds nothing.
_held: dict[int, list[ref[_Output]]] = {}


def _release_after(task: int, output: _Output) -> None:
    held = _held.get(task)
    if held is None:
        # A pass that raised has not called back.
        for old in [number for number, outputs in _held.items() if not any(output() for output in outputs)]:
            del _held[old]
        held = _held[task] = []
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _release(task))
    held.append(ref(output))


def _release(task: int) -> None:
    for reference in _held.pop(task, ()):
        output = reference()
        if output is not None and output.task == task:
            output.tensor, output.left = None, 0


def _node_types(*functions: Callable[[Tensor], Tensor]) -> tuple[type, ...]:
    """The types of the nodes that autograd makes for functions of a matrix."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, 1, device="cpu", requires_grad=True)
        return tuple(type(function(x).grad_fn) for function in functions)


_COPY, _TRANSPOSE = _node_types(Tensor.bfloat16, Tensor.t)
_RESHAPE = _node_types(lambda x: x.view(1), lambda x: torch.ops.aten._unsafe_view(x, (1,)))


def _recipe_of_copied(copy: Tensor) -> _Recipe | None:
    """The recipe of the tensor that this one is a copy of in another dtype, if it has one."""
    if copy._version or not copy.is_contiguous():
        return None
    node, index = copy.grad_fn.next_functions[0]
    while type(node) in _RESHAPE:
        node, index = node.next_functions[0]
    # Of a tensor that is gone nobody knows whether it was written to before it was copied.
    for reference in _thread.results if index == 0 else ():
        source = reference()
        if source is not None and source.grad_fn is node:
            return None if source._version or copy.device != source.device else source._liger_recipe
    return None


def _pack(tensor: Tensor) -> Any:
    base = tensor._base
    whole = tensor if base is None else base
    recipe = getattr(whole, "_liger_recipe", None)
    if recipe is not None:
        if not whole._version and tensor.dtype is whole.dtype:
            return recipe.save(tensor)
    elif whole.is_leaf:
        # A transposed weight is the most frequent of all.
        if base is None or type(tensor.grad_fn) is _TRANSPOSE:
            return tensor, tensor._version
    elif type(whole.grad_fn) is _COPY:
        recipe = _recipe_of_copied(whole)
        if recipe is not None:
            return recipe.save(tensor)
    # Without its node: what a node returns and saves would keep that node alive for ever.
    return tensor.detach(), tensor._version


def _unpack(saved: Any) -> Tensor:
    if type(saved) is _Output:
        return saved.unpack()
    tensor, version = saved
    # Autograd's own check does not reach through hooks.
    if tensor._version != version:
        raise _written_to(tensor, version)
    return tensor


def _written_to(tensor: Tensor, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a "
        f"{tensor.dtype} tensor of shape {list(tensor.shape)}, kept in a layer with lean activations, is at "
        f"version {tensor._version}; expected version {version} instead"
    )


def _enter(layer: nn.Module, args: Any) -> None:
    """Forward pre-hook of a lean layer."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    layers = _thread.layers
    hooks = _top_hooks(True)
    while layers and _is_ours(hooks):
        # A KeyboardInterrupt in a layer's forward passes by its hooks.
        _pop_hooks()
        layers.pop()
        hooks = _top_hooks(True)
    # Of nested hooks only the innermost are called. Whoever is outside, such as a checkpoint around the
    # layer, asked for more than this.
    if hooks is None and _hooks_allowed():
        _push_hooks(_pack, _unpack)
        layers.append(layer)
        _thread.results.clear()


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a lean layer, called after an exception too."""
    if torch.compiler.is_compiling():
        return
    layers = _thread.layers
    if layers and layers[-1] is layer:
        layers.pop()
        _pop_hooks()


def is_lean(layer: nn.Module) -> bool:
    """Whether the layer, or the one it is a copy of, was made lean."""
    return _enter in layer._forward_pre_hooks.values()


def lean_activations(layer: nn.Module) -> Callable[[], None]:
    """Let a layer keep less for backward, which computes the results of norms and gated activations again.

    For layers of one's own, made of the modules of ``liger_ops.nn``; ``liger_ops.transformers.patch`` has an
    option for Hugging Face's models. Gradients are the same, bit by bit. Inside other saved-tensor hooks
    (activation checkpointing, ``save_on_cpu``) and under ``torch.compile`` it does nothing; for the latter
    there is ``lean_contexts``.

    Args:
        layer: hooked before and after its forward, which stays what it is.

    Returns:
        A function that takes the hooks off.
    """
    # The last before the forward and the first after it: what other hooks save is theirs.
    before = layer.register_forward_pre_hook(_enter)
    after = layer.register_forward_hook(_leave, prepend=True, always_call=True)

    def undo() -> None:
        before.remove()
        after.remove()

    return undo


_RECOMPUTED = {
    getattr(torch.ops.liger, name).default
    for name in ("rms_norm", "layer_norm", "swiglu", "swiglu_packed", "geglu", "geglu_packed")
}


def lean_contexts() -> tuple[Any, Any]:
    """Lean activations for ``torch.compile``: the ``context_fn`` of a checkpoint around each layer.

    The compiler then keeps what it would keep without a checkpoint, except for the results of the norms and
    gated activations, which it computes again. With Hugging Face's models::

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lean_contexts})
        model = torch.compile(model)

    Without ``torch.compile`` a checkpoint with these contexts keeps more than none at all.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE if operator in _RECOMPUTED else CheckpointPolicy.PREFER_SAVE
