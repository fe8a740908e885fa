"""What a forward pass leaves allocated for its backward pass, tensor by tensor, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Allocation:
    """Memory that an operator allocated in the forward of the module of this name."""

    module: str
    operator: str
    shape: tuple[int, ...]
    bytes: int
    storage: StorageWeakRef

    @property
    def alive(self) -> bool:
        return not self.storage.expired()


class Allocations(TorchDispatchMode):
    """Records, inside a ``with`` block, the memory that operators allocate, and keeps none of it alive.

    Args:
        model: whose modules are named in the records, the innermost whose forward runs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.records: list[Allocation] = []
        self._names: list[str] = [""]
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Allocations:
        for name, module in self._model.named_modules():
            if name:
                self._handles += [
                    module.register_forward_pre_hook(lambda *_, name=name: self._names.append(name)),
                    module.register_forward_hook(lambda *_: self._names.pop() and None, always_call=True),
                ]
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    given.add(storage._cdata)
                    self.records.append(
                        Allocation(
                            self._names[-1],
                            func._schema.name,
                            tuple(tensor.shape),
                            storage.nbytes(),
                            StorageWeakRef(storage),
                        )
                    )
        return out

    def kept(self) -> list[Allocation]:
        """What is still allocated."""
        return [record for record in self.records if record.alive]

    def kept_bytes(self) -> int:
        return sum(record.bytes for record in self.kept())
