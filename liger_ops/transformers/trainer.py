"""Making the Trainer of transformers use these kernels, for scripts that are not to be changed.

After ``install()``, ``TrainingArguments(use_liger_kernel=True)`` patches the model with liger_ops, and
``use_liger=True`` is accepted as another spelling of it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from liger_ops.transformers.patching import patch
from liger_ops.transformers.report import PatchReport

logger = logging.getLogger(__name__)

# The modules that hold `apply_liger_kernel`. Those imported later take it from the first.
_HOLDERS = ("transformers.integrations.liger", "transformers.integrations", "transformers.trainer")

_stock_apply: Callable[..., None] | None = None
_stock_inits: dict[type, Callable[..., None]] = {}
_reports: list[PatchReport] = []


def install() -> None:
    """Route the Trainer's liger flag to liger_ops and accept ``use_liger`` in training arguments.

    Covers ``TrainingArguments`` and the subclasses that exist at the time of the call
    (``Seq2SeqTrainingArguments``, TRL's ``SFTConfig``, …); call it again after defining or importing more. A
    class with a ``use_liger`` of its own keeps it. ``transformers.trainer`` is not imported. ``uninstall()``
    takes everything back.
    """
    global _stock_apply
    from transformers import TrainingArguments
    from transformers.integrations import liger

    if _stock_apply is None:
        _stock_apply = liger.apply_liger_kernel
    for module in _loaded_holders():
        if vars(module).get("apply_liger_kernel") is _stock_apply:
            module.apply_liger_kernel = apply_liger_kernel
    for cls in _with_subclasses(TrainingArguments):
        init = vars(cls).get("__init__")
        if (
            init is not None
            and cls not in _stock_inits
            and "use_liger" not in inspect.signature(init).parameters
        ):
            cls.__init__ = _accepting_use_liger(init)
            _stock_inits[cls] = init


def uninstall() -> None:
    """Undo ``install()``, if it was called, and the patches that the Trainer has applied through it."""
    global _stock_apply
    while _reports:
        _reports.pop().undo()
    for module in _loaded_holders():
        if _stock_apply is not None and vars(module).get("apply_liger_kernel") is apply_liger_kernel:
            module.apply_liger_kernel = _stock_apply
    _stock_apply = None
    while _stock_inits:
        cls, init = _stock_inits.popitem()
        if getattr(cls.__init__, "__wrapped__", None) is init:
            cls.__init__ = init


def reports() -> list[PatchReport]:
    """The reports of the models that the Trainer patched since ``install()``, oldest first."""
    return list(_reports)


def apply_liger_kernel(model: Any, kernel_config: dict[str, Any] | None) -> None:
    """What the Trainer calls in ``train()``: patch ``model``, with ``kernel_config`` as the options.

    A model type without a record is left alone unless ``kernel_config`` has ``recognize=True``. Raises
    TypeError for an unknown option. Logs one line, as a warning when something was skipped.
    """
    report = patch(model, **{"recognize": False} | (kernel_config or {}))
    _reports.append(report)
    logger.log(logging.WARNING if report.skipped else logging.INFO, "%s", report.summary())


def _accepting_use_liger(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, use_liger: bool | None = None, **kwargs: Any) -> None:
        if use_liger is not None:
            if kwargs.get("use_liger_kernel", use_liger) != use_liger:
                raise ValueError(
                    "use_liger and use_liger_kernel are the same option, "
                    f"got {use_liger} and {kwargs['use_liger_kernel']}"
                )
            kwargs["use_liger_kernel"] = bool(use_liger)
        init(self, *args, **kwargs)

    signature = inspect.signature(init)
    added = inspect.Parameter(
        "use_liger", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None"
    )
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    __init__.__signature__ = signature.replace(parameters=[*parameters[:at], added, *parameters[at:]])
    return __init__


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _loaded_holders() -> list[Any]:
    return [sys.modules[name] for name in _HOLDERS if name in sys.modules]
