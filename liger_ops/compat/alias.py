"""``liger_kernel`` as an import name for liger_ops.

A finder on ``sys.meta_path`` answers for ``liger_kernel`` and its submodules. Where the names of a module
come from follows from its path (``_sources``): ``liger_kernel.transformers.<op>`` and
``liger_kernel.ops.<op>`` exist for every operator with a function ``liger_<op>``,
``liger_kernel.transformers.model.<family>`` for every family that can be patched, and the others mirror the
modules of liger_ops that hold the same names. Names are looked up when they are asked for, so that nothing
is imported before it is needed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

ALIAS = "liger_kernel"

# transformers, TRL and others ask for at least some version of Liger Kernel. This is the one whose signatures
# are reproduced.
VERSION = "0.8.5"

_NAMES = ("liger_ops.transformers", "liger_ops.transformers.functional", "liger_ops.nn")


def install_liger_kernel_alias(override: bool = False) -> None:
    """Make ``import liger_kernel`` and its submodules resolve to liger_ops in this process.

    What liger_ops does not have raises ImportError, which says so by name. Calling it again changes nothing.

    Args:
        override: take the name even if the real liger-kernel is installed or imported. Objects that were
            imported from it before stay what they are.

    Raises:
        ImportError: when the real liger-kernel is there and ``override`` is False.
    """
    if _finder in sys.meta_path:
        return
    if not override:
        real = _real_package()
        if real is not None:
            raise ImportError(
                f"liger-kernel is installed ({real}), and `import {ALIAS}` means that package; "
                "pass override=True (`run --override` on the command line) to make it mean liger_ops"
            )
    _finder.displaced = _take_modules()
    # First, because a mere folder called liger_kernel on the path would pass for a namespace package.
    sys.meta_path.insert(0, _finder)
    _forget_availability()


def uninstall_liger_kernel_alias() -> None:
    """Undo ``install_liger_kernel_alias()``, if it was called: ``sys.modules`` is left as it was found.

    Objects imported through the alias go on working.
    """
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    _take_modules()
    sys.modules.update(_finder.displaced)
    _finder.displaced = {}
    _forget_availability()


class _Alias(types.ModuleType):
    """A module whose names are those of other modules."""

    __version__: str
    _liger_ops_sources: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        # Asked for by the import system and by introspection on every module.
        if not (name.startswith("__") and name.endswith("__")):
            for source in self._liger_ops_sources:
                value = getattr(pkgutil.resolve_name(source), name, _MISSING)
                if value is not _MISSING:
                    self.__dict__[name] = value
                    return value
        raise AttributeError(_missing(f"{self.__name__}.{name}"), name=name, obj=self)

    def __dir__(self) -> list[str]:
        names = {name for source in self._liger_ops_sources for name in _public(source)}
        return sorted({*self.__dict__, *names})


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of ``liger-kernel``: frameworks look its version up first."""

    _files = {
        "METADATA": f"Metadata-Version: 2.1\nName: liger-kernel\nVersion: {VERSION}\n",
        "top_level.txt": f"{ALIAS}\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: {ALIAS} is an alias of liger_ops and has no files")


class _Finder:
    """Finds and loads the alias modules. The methods are those of the import and metadata protocols."""

    # Modules of the real package, put aside while the alias has their name.
    displaced: dict[str, types.ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, *rest = fullname.split(".")
        if top != ALIAS:
            return None
        if _sources(tuple(rest)) is None:
            # Without a `name`: for `from package import name`, Python drops the error of a missing submodule
            # that bears the name, and its own would not say why there is none.
            raise ModuleNotFoundError(_missing(fullname))
        # Every module counts as a package, so that a missing name in any of them gets that error.
        return importlib.machinery.ModuleSpec(fullname, self, origin="liger_ops", is_package=True)

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or re.sub(r"[-_.]+", "_", wanted).lower() == ALIAS:
            yield _Distribution()

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Alias(spec.name)
        module._liger_ops_sources = _sources(tuple(spec.name.split(".")[1:])) or ()
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == ALIAS:
            module.__version__ = VERSION
        module.__all__ = sorted({name for source in module._liger_ops_sources for name in _public(source)})


_finder = _Finder()
_MISSING = object()


def _sources(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where in liger_ops the names are of ``liger_kernel.<path>``; None when that is out of scope."""
    match path:
        case ():
            return ()
        case ("transformers",):
            return (*_NAMES, "liger_ops.compat.utils")
        case ("transformers", "functional" | "auto_model" as name):
            return (f"liger_ops.transformers.{name}",)
        case ("transformers", "monkey_patch" | "trainer_integration"):
            return ("liger_ops.transformers.apply", *_NAMES)
        case ("transformers", "model"):
            return ()
        case ("transformers", "model", "loss_utils"):
            return ("liger_ops.compat.loss_utils",)
        case ("transformers", "model", "output_classes"):
            return ("liger_ops.transformers.forwards.outputs",)
        case ("transformers", "model", family) if _is_family(family):
            return (f"liger_ops.compat.model:{family}",)
        case ("transformers", op) if _is_operator(op):
            return _NAMES
        case ("ops",):
            return ("liger_ops.compat.ops",)
        case ("ops", op) if _is_operator(op) or op == "fused_moe":
            return ("liger_ops.compat.ops",)
        case ("utils" | "env_report" as name,):
            return (f"liger_ops.compat.{name}",)
    return None


def _is_operator(name: str) -> bool:
    from liger_ops.transformers import functional

    return hasattr(functional, f"liger_{name}")


def _is_family(name: str) -> bool:
    from liger_ops.transformers.families import FAMILIES

    return any(family.name == name for family in FAMILIES)


def _public(source: str) -> list[str]:
    found = pkgutil.resolve_name(source)
    return getattr(found, "__all__", None) or [name for name in vars(found) if not name.startswith("_")]


def _missing(name: str) -> str:
    return (
        f"{name} is not available: {ALIAS} is an alias of liger_ops here, which has no such thing "
        "(docs/migrating.md lists what it has)"
    )


def _real_package() -> str | None:
    """Where the real liger-kernel is, if it is installed or imported."""
    if ALIAS in sys.modules:
        return getattr(sys.modules[ALIAS], "__file__", None) or "imported already"
    spec = importlib.util.find_spec(ALIAS)
    # A folder of that name without an __init__.py has no origin.
    return None if spec is None else spec.origin


def _take_modules() -> dict[str, types.ModuleType]:
    """Remove ``liger_kernel`` and its submodules from ``sys.modules``, and return them."""
    names = [name for name in sys.modules if name == ALIAS or name.startswith(f"{ALIAS}.")]
    return {name: sys.modules.pop(name) for name in names}


def _forget_availability() -> None:
    """Make transformers ask again whether there is a ``liger_kernel``; it remembers the answer."""
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is not None:
        utils.is_liger_kernel_available.cache_clear()
