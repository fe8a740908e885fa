"""The engine: reads a family's record, plans, applies, and can take everything back."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from liger_ops.transformers.families import FAMILIES, Family, family_of, supported_model_types
from liger_ops.transformers.parts import LeanActivations, Part, Plan
from liger_ops.transformers.recognize import recognize as find_parts
from liger_ops.transformers.report import PatchReport, Skipped


def patch(
    model: nn.Module | None = None,
    *,
    model_type: str | None = None,
    strict: bool = False,
    recognize: bool = True,
    **options: bool,
) -> PatchReport:
    """Make a model of Hugging Face transformers run liger_ops' operators.

    Args:
        model: a model of a supported family. Wrappers of PEFT, ``torch.compile``, ``DataParallel`` and
            ``DistributedDataParallel`` are looked through. None patches the classes of the family
            ``model_type`` instead, and with them every model of the process, built before or after;
            ``layer_norm``, whose class is torch's, reaches those built after, or is skipped.
        model_type: the ``config.model_type`` to patch for when ``model`` is None. With a model, its own is
            used, and one that differs is an error.
        strict: raise ValueError, and change nothing, when something asked for cannot be done.
        recognize: for a model whose type has no record: find norms, gated MLPs and rotary embeddings by
            their structure, and replace those that give the same numbers on random input. Its head is
            unknown, so it keeps its logits, and the loss from them is replaced. False leaves such a model
            alone. The Trainer's flag passes False unless told otherwise.
        **options: what to replace; of each family those of its record. ``rope``, ``rms_norm`` and
            ``fused_linear_cross_entropy``, the loss straight from the hidden states, in all families;
            ``swiglu`` or, for Gemma, ``geglu``: the MLP, or the experts; ``layer_norm`` where images are
            seen. These are on. ``cross_entropy``, the loss from logits in its place, is off, and so is
            ``lean_activations``: the layers keep less for backward, which computes the results of norms and
            gated MLPs again (``docs/memory.md``).

    Returns:
        The report of what was replaced and what was skipped, with ``undo()``. Patching twice changes nothing
        more.

    Raises:
        TypeError: for an unknown option, and without a model or model type.
        ValueError: for ``cross_entropy`` together with ``fused_linear_cross_entropy``; in strict mode, for
            anything that would be skipped.

    Warns:
        UserWarning: when the model's type is not supported, or the operators cannot run where its parameters
            are.
    """
    if model is None and model_type is None:
        raise TypeError("patch() needs a model, or a model_type to patch the classes of a whole family")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    base = None if model is None else unwrap(model)
    found = getattr(getattr(base, "config", None), "model_type", None) if base is not None else model_type
    if base is not None and model_type is not None and family_of(found) is not family_of(model_type):
        raise ValueError(f"the model's type is {found!r}, which is not {model_type!r}: call patch(model)")
    family = family_of(found)
    wanted = resolve_options(family, options)
    report = PatchReport(model=None if base is None else type(base).__name__, model_type=found)

    refusal = _unusable_device(base)
    parts: list[tuple[Part, ModuleType]] = []
    if refusal is None:
        if family is not None:
            parts = _parts_of(family, base, found)
            known = {part.option for part, _ in parts} | {LeanActivations.option}
            for option in sorted(set(options) - known):
                report.skipped.append(Skipped(option, "-", None, f"a {found} model has nothing of the kind"))
        elif base is not None and found is not None and recognize:
            recognized = find_parts(base)
            parts, report.skipped = recognized.parts, recognized.skipped
            report.notes.append(f"{found} has no record: parts were recognised and compared on random input")
            # A head that nobody has read keeps its logits.
            wanted["cross_entropy"] |= wanted["fused_linear_cross_entropy"]
        if not parts:
            refusal = _unsupported(base, found)
    if refusal is not None:
        if strict:
            raise ValueError(refusal)
        warnings.warn(f"liger_ops patched nothing: {refusal}", stacklevel=2)
        report.skipped = [Skipped(option, "-", None, refusal) for option, on in wanted.items() if on]
        return report

    plans = [part.plan(base, modeling) for part, modeling in parts if wanted[part.option]]
    if wanted[LeanActivations.option]:
        plans.append(LeanActivations().plan_layers(base, plans))
    for plan in plans:
        report.patched += plan.patched
        report.skipped += plan.skipped
        report.notes += plan.notes
    report.skipped = [row for row in report.skipped if wanted[row.option]]
    if strict and report.skipped:
        reasons = "; ".join(f"{row.option} on {row.target}: {row.reason}" for row in report.skipped)
        raise ValueError(f"not everything can be patched, and strict=True: {reasons}")
    _apply(plans, report)
    return report


def _parts_of(family: Family, model: nn.Module | None, model_type: str) -> list[tuple[Part, ModuleType]]:
    modeling = importlib.import_module(family.modeling)
    return [(part, modeling) for part in family.parts if part.fits(model, model_type)]


@contextlib.contextmanager
def patched(model: nn.Module | None = None, **arguments: Any) -> Iterator[PatchReport]:
    """Patch for the length of a ``with`` block, which gets the report. Arguments as in ``patch``."""
    report = patch(model, **arguments)
    try:
        yield report
    finally:
        report.undo()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, compile and data-parallel wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def resolve_options(family: Family | None, options: dict[str, bool]) -> dict[str, bool]:
    """The family's defaults overridden by ``options``; without a family, those of all families together."""
    families = FAMILIES if family is None else (family,)
    defaults = {option: on for one in families for option, on in one.defaults.items()}
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        whose = "" if family is None else f" of {family.name}"
        raise TypeError(f"unknown option {', '.join(unknown)}; the options{whose} are {', '.join(defaults)}")
    wanted = defaults | options
    if wanted.get("cross_entropy") and wanted.get("fused_linear_cross_entropy"):
        raise ValueError(
            "cross_entropy and fused_linear_cross_entropy are two ways to compute the same loss: "
            "pass cross_entropy=True with fused_linear_cross_entropy=False, or leave cross_entropy out"
        )
    return wanted


def _unsupported(model: nn.Module | None, model_type: str | None) -> str:
    supported = ", ".join(supported_model_types())
    if model is not None and model_type is None:
        name = type(model).__name__
        return f"{name} is no transformers model (no config.model_type); supported are {supported}"
    return f"model type {model_type!r} is not supported; supported are {supported}"


def _unusable_device(model: nn.Module | None) -> str | None:
    """Why the operators cannot run where the model's parameters are, if they cannot."""
    if model is None:
        return None
    for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
        if not _has_kernels(device):
            if device == "cuda":
                return (
                    "the model is on cuda, but liger_ops was built without CUDA: "
                    "see `python -m liger_ops info`"
                )
            return f"the model is on {device}, and the operators run on cpu and cuda"
    return None


def _has_kernels(device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("liger::rms_norm", key)


def _apply(plans: list[Plan], report: PatchReport) -> None:
    """Make all planned changes, or none."""
    try:
        for plan in plans:
            for apply in plan.apply:
                report._reverts.append(apply())
    except BaseException:
        report.undo()
        raise
