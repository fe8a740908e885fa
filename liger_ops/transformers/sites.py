"""Attributes of classes and modules that are replaced for as long as somebody needs the replacement.

A forward is attached at class level: the class gets a dispatcher that runs the replacement for instances
carrying a flag and the original for all others. A flag in an instance's ``__dict__`` survives deepcopy,
pickle, DataParallel replicas and compilation, which a method bound to one instance does not.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

FLAG = "_liger_ops"

_lock = threading.RLock()
_sites: dict[tuple[int, str], Site] = {}


def dispatcher(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the original's signature that runs ``forward`` for flagged instances."""

    @functools.wraps(original)
    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, FLAG, False):
            return forward(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return dispatch


class Site:
    """One replaced attribute of a class or module, and who relies on it.

    Args:
        owner: a class or a Python module that defines the attribute itself.
        name: of the attribute, a function.
        build: makes the replacement from the original.
    """

    def __init__(self, owner: Any, name: str, build: Callable[[Callable], Callable]) -> None:
        self.owner = owner
        self.name = name
        self.original = vars(owner)[name]
        self.replacement = build(self.original)
        self.users: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.class_wide = False

    def acquire(self, users: Iterable[nn.Module] | None) -> None:
        """Put the replacement in place for these modules, or, with None, for everyone."""
        with _lock:
            if not self._in_use():
                _sites[id(self.owner), self.name] = self
                # Left in place when all users were garbage collected, perhaps under somebody else's wrapper.
                if vars(self.owner)[self.name] is self.original:
                    setattr(self.owner, self.name, self.replacement)
            if users is None:
                self.class_wide = True
            else:
                self.users.update(users)
            self._set_class_flag()

    def release(self, users: Iterable[nn.Module] | None) -> None:
        """Give up what ``acquire`` was called with; the last one out restores the original."""
        with _lock:
            if users is None:
                self.class_wide = False
            else:
                self.users.difference_update(users)
            self._set_class_flag()
            if self._in_use() or _sites.pop((id(self.owner), self.name), None) is None:
                return
            if vars(self.owner).get(self.name) is self.replacement:
                setattr(self.owner, self.name, self.original)
            else:
                logger.warning(
                    "%s.%s was replaced by other code after liger_ops patched it, and is left as it is",
                    self.owner.__name__,
                    self.name,
                )

    def serves(self, user: nn.Module) -> bool:
        """Whether this module runs the replacement on its own account, not as one of all."""
        return user in self.users

    def _in_use(self) -> bool:
        return self.class_wide or len(self.users) > 0

    def _set_class_flag(self) -> None:
        """Give the class a default flag while the dispatcher is there, so that looking one up never fails."""
        if not isinstance(self.owner, type):
            return
        if self._in_use():
            setattr(self.owner, FLAG, self.class_wide)
        elif FLAG in vars(self.owner):
            delattr(self.owner, FLAG)


def site(owner: Any, name: str, build: Callable[[Callable], Callable]) -> Site:
    """The site of this attribute: the one in use, or a new one that changes nothing until it is acquired."""
    with _lock:
        return _sites.get((id(owner), name)) or Site(owner, name, build)


def original(owner: Any, name: str) -> Any:
    """What a class or Python module itself defines under this name, whether it is replaced or not."""
    with _lock:
        place = _sites.get((id(owner), name))
    return vars(owner)[name] if place is None else place.original


def foreign(function: Callable[..., Any], modeling: ModuleType | None = None) -> str | None:
    """The full name of a function that neither the modeling module, transformers nor we defined, or None.

    Other kernel packages replace the same attributes. Replacing theirs would lose what their user asked for.
    """
    function = inspect.unwrap(function)
    module = getattr(function, "__module__", None) or ""
    if module.split(".")[0] in ("transformers", "kernels", "liger_ops", ""):
        return None
    if modeling is not None and module == modeling.__name__:
        return None
    return f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"
