"""Lean activations: what backward can compute again from what it has anyway is not kept for it.

After a lean layer's forward the library goes through the graph that the layer has made, and drops what its
nodes have saved of the results of our norms and gated activations, of views of them and of their copies in
another dtype (``csrc/ops/lean.cpp``). Backward computes each of them again, once for all who saved it, from
what the operator has saved for its own backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from liger_ops._library import load

load()

_drop_results = torch.ops.liger_ops.drop_results.default
_recipe_of = torch.ops.liger_ops.recipe_of.default
_next_sequence_number = torch._C._autograd._get_sequence_nr


class _Thread(threading.local):
    """The lean layers whose forward runs in this thread, each with the number of the next node to be made."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, int]] = []


_thread = _Thread()


def _enter(layer: nn.Module, args: Any) -> None:
    """Forward pre-hook of a lean layer."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    layers = _thread.layers
    # A KeyboardInterrupt in a layer's forward passes by its hooks.
    for depth, (running, _) in enumerate(layers):
        if running is layer:
            del layers[depth:]
            break
    layers.append((layer, _next_sequence_number()))


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a lean layer, called after an exception too."""
    if torch.compiler.is_compiling():
        return
    layers = _thread.layers
    if not layers or layers[-1][0] is not layer:
        return
    _, since = layers.pop()
    if isinstance(output, Tensor):
        outputs = [output]
    else:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    for made_in_python in _drop_results(outputs, since):
        for saved in made_in_python.grad_fn._raw_saved_tensors:
            recipe = None if saved.data is None else _recipe_of(saved.data)
            if recipe is not None:
                saved.register_hooks(lambda _, recipe=recipe: recipe, _result)


def _result(recipe: Any) -> Tensor:
    return recipe.tensor()


def make_again(result: Tensor, source: Tensor, operator: Callable[..., Tensor], *arguments: Any) -> None:
    """In a lean layer, the node of the result makes its first argument by ``operator(source, *arguments)``
    when backward asks, instead of keeping it.

    Nobody else must have seen that argument, and the operator has to give the same bits each time.
    """
    if torch.compiler.is_compiling() or not _thread.layers or not result.requires_grad:
        return
    node = result.grad_fn
    saved = node._raw_saved_tensors[0] if hasattr(node, "_raw_saved_tensors") else node._raw_saved_self
    # Under hooks of somebody else there is none, and without a gradient the product does not take it.
    if saved.data is None or not source.requires_grad:
        return
    recipe = _recipe_of(source)
    if recipe is None:
        kept, version = source.detach(), source._version

    def make(_: None) -> Tensor:
        if recipe is not None:
            tensor = recipe.tensor()
        elif kept._version == version:
            tensor = kept
        else:
            raise _written_to(kept, version)
        with torch.no_grad():
            return operator(tensor, *arguments)

    saved.register_hooks(lambda _: None, make)


def _written_to(tensor: Tensor, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a "
        f"{tensor.dtype} tensor of shape {list(tensor.shape)}, kept in a layer with lean activations, is at "
        f"version {tensor._version}; expected version {version} instead"
    )


def is_lean(layer: nn.Module) -> bool:
    """Whether the layer, or the one it is a copy of, was made lean."""
    return _enter in layer._forward_pre_hooks.values()


def lean_activations(layer: nn.Module) -> Callable[[], None]:
    """Let a layer keep less for backward, which computes the results of norms and gated activations again.

    For layers of one's own, made of the modules of ``liger_ops.nn``; ``liger_ops.transformers.patch`` has an
    option for Hugging Face's models. Gradients are the same, bit by bit. What other saved-tensor hooks
    (activation checkpointing, ``save_on_cpu``) keep stays theirs, and under ``torch.compile`` it does
    nothing: there is ``lean_contexts`` for that.

    Args:
        layer: hooked before and after its forward, which stays what it is.

    Returns:
        A function that takes the hooks off.
    """
    # The last before the forward and the first after it: what other hooks compute is theirs.
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
