"""Lean activations: what backward can compute again from what it has anyway is not kept for it.

While a lean layer's forward runs, autograd saves through the two functions at the end of this file. A tensor
that one of our norms or gated activations returned, a view of it or its copy in another dtype, is replaced by
the recipe it was made with, whose inputs that operator saves for its own backward; everything else is saved
as always. Backward runs the recipe once for all who saved its result, and lets go after the last of them.

A recipe is an attribute of its result, so that it lives as long as that tensor and can never be taken for
that of another one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_liger_recipe"

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled
_graph_task = torch._C._current_graph_task_id


class _Thread(threading.local):
    """The lean layers whose forward runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []


_thread = _Thread()


def rebuildable(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``operator(*arguments)``; in a lean layer, backward computes it again instead of keeping it.

    The operator has to give the same bits each time and to return a new, contiguous tensor.
    """
    result = operator(*arguments)
    if torch.compiler.is_compiling() or not _thread.layers:
        return result
    # Without a gradient the inputs are not kept. Under the hooks of somebody within the layer, a checkpoint's
    # for instance, they need not be kept either.
    if result.requires_grad and type(result) is Tensor and _is_ours(_top_hooks(True)):
        setattr(result, _ATTRIBUTE, _Recipe(operator, arguments, result))
        # A copy in another dtype finds its way back to the result over the graph.
        result.grad_fn.metadata[_ATTRIBUTE] = weakref.ref(result)
    return result


def _is_ours(hooks: tuple[Callable, Callable] | None) -> bool:
    return hooks is not None and hooks[0] is _pack


class _Recipe:
    """How a tensor was made, and what backward is asked for, by dtype."""

    __slots__ = ("arguments", "dtype", "operator", "outputs", "size")

    def __init__(self, operator: Callable[..., Tensor], arguments: tuple[Any, ...], result: Tensor) -> None:
        self.operator = operator
        self.arguments = [_pack(a) if isinstance(a, Tensor) else _Constant(a) for a in arguments]
        self.dtype, self.size = result.dtype, result.size()
        self.outputs: dict[torch.dtype, _Output] = {}

    def tensor(self, output: _Output) -> Tensor:
        """The result in one dtype, which stays from the first who asks in a backward pass to the last."""
        task = _graph_task()
        if output.task != task or output.left <= 0:
            output.task, output.left = task, output.uses
        tensor = output.tensor
        if tensor is None:
            tensor = self._make(output.dtype)
        output.left -= 1
        if output.left <= 0 or task < 0:
            output.tensor = None
        elif output.tensor is None:
            output.tensor = tensor
            _release_after(task, output)
        return tensor

    def _make(self, dtype: torch.dtype) -> Tensor:
        own = self.outputs.get(self.dtype)
        result = None if own is None else own.tensor
        if result is None:
            arguments = [_unpack(argument) for argument in self.arguments]
            if torch.is_grad_enabled():
                with torch.no_grad():
                    result = self.operator(*arguments)
            else:
                result = self.operator(*arguments)
        return result if dtype == self.dtype else result.to(dtype)


class _Constant:
    """An argument that is no tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def unpack(self) -> Any:
        return self.value


class _Output:
    """A recipe's result in one dtype: how often it was saved, and for how many of those the running backward
    pass, ``task``, has not yet asked. It does not know its recipe: their cycle would outlive the graph.
    """

    __slots__ = ("__weakref__", "dtype", "left", "task", "tensor", "uses")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.uses = self.left = 0
        self.task = -1
        self.tensor: Tensor | None = None


class _Saved:
    """What autograd gets to keep in place of a recipe's result or a view of it."""

    __slots__ = ("output", "recipe", "view")

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        output = recipe.outputs.get(tensor.dtype)
        if output is None:
            output = recipe.outputs[tensor.dtype] = _Output(tensor.dtype)
        output.uses += 1
        self.recipe, self.output = recipe, output
        # Results are contiguous and begin where their memory does.
        whole = tensor._base is None and tensor.size() == recipe.size
        self.view = None if whole else (tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        tensor = self.recipe.tensor(self.output)
        return tensor if self.view is None else tensor.as_strided(*self.view)


# What backward passes hold, by the number of the pass. Weak, so that a pass that fails holds nothing.
_held: dict[int, list[weakref.ref[_Output]]] = {}


def _release_after(task: int, output: _Output) -> None:
    held = _held.get(task)
    if held is None:
        # A pass that raised has not called back.
        for old in [number for number, outputs in _held.items() if not any(output() for output in outputs)]:
            del _held[old]
        held = _held[task] = []
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _release(task))
    held.append(weakref.ref(output))


def _release(task: int) -> None:
    for reference in _held.pop(task, ()):
        output = reference()
        if output is not None and output.task == task:
            output.tensor, output.left = None, 0


_COPY = type(torch.zeros((), requires_grad=True).to(torch.bfloat16).grad_fn)
_RESHAPE = tuple(
    type(view.grad_fn)
    for x in [torch.zeros(1, requires_grad=True)]
    for view in (x.view(1, 1), torch.ops.aten._unsafe_view(x, (1, 1)))
)


def _recipe_of_copied(copy: Tensor) -> _Recipe | None:
    """The recipe of the tensor that this one is a copy of in another dtype, if it has one."""
    node = copy.grad_fn
    if type(node) is not _COPY or copy._version or not copy.is_contiguous():
        return None
    node, index = node.next_functions[0]
    while type(node) in _RESHAPE:
        node, index = node.next_functions[0]
    if node is None or index != 0:
        return None
    source = node.metadata.get(_ATTRIBUTE)
    source = None if source is None else source()
    # Of a tensor that is gone nobody knows whether it was written to before it was copied.
    if source is None or source._version or copy.device != source.device:
        return None
    return getattr(source, _ATTRIBUTE, None)


def _pack(tensor: Tensor) -> Any:
    base = tensor._base
    whole = tensor if base is None else base
    recipe = getattr(whole, _ATTRIBUTE, None)
    if recipe is None:
        if tensor.is_leaf:
            return tensor, tensor._version
        recipe = _recipe_of_copied(whole)
        if recipe is None:
            # Without its node: what a node returns and saves would keep that node alive for ever.
            return tensor.detach(), tensor._version
    elif whole._version or tensor.dtype != whole.dtype:
        return tensor.detach(), tensor._version
    return _Saved(recipe, tensor)


def _unpack(saved: Any) -> Tensor:
    if type(saved) is not tuple:
        return saved.unpack()
    tensor, version = saved
    # Autograd's own check does not reach through hooks.
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a {tensor.dtype} tensor of shape {list(tensor.shape)}, kept in a layer with lean activations, "
            f"is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


def _enter(layer: nn.Module, args: Any) -> None:
    """Forward pre-hook of a lean layer."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    layers = _thread.layers
    hooks = _top_hooks(True)
    while layers and _is_ours(hooks):
        # A KeyboardInterrupt in a layer's forward passes by its hooks.
        torch._C._autograd._pop_saved_tensors_default_hooks()
        layers.pop()
        hooks = _top_hooks(True)
    # Of nested hooks only the innermost are called. Whoever is outside, such as a checkpoint around the
    # layer, asked for more than this.
    if hooks is None and _hooks_allowed():
        torch._C._autograd._push_saved_tensors_default_hooks(_pack, _unpack)
        layers.append(layer)


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a lean layer, called after an exception too."""
    if torch.compiler.is_compiling():
        return
    layers = _thread.layers
    if layers and layers[-1] is layer:
        layers.pop()
        torch._C._autograd._pop_saved_tensors_default_hooks()


def is_lean(layer: nn.Module) -> bool:
    """Whether the layer, or the one it is a copy of, was made lean."""
    return _enter in layer._forward_pre_hooks.values()


def make_lean(layer: nn.Module) -> Callable[[], None]:
    """Hook a layer, and return what takes that back."""
    # The last before the forward and the first after it: what other hooks save is theirs.
    before = layer.register_forward_pre_hook(_enter)
    after = layer.register_forward_hook(_leave, prepend=True, always_call=True)

    def undo() -> None:
        before.remove()
        after.remove()

    return undo
