"""The ``lce_forward`` of each model family, as Liger's ``transformers.model.<family>`` modules name it."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

from liger_ops.transformers.families import FAMILIES
from liger_ops.transformers.sites import dispatcher, site


def __getattr__(name: str) -> SimpleNamespace:
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    head = next(part for part in family.parts if part.option == "fused_linear_cross_entropy")
    cls = getattr(importlib.import_module(family.modeling), head.target)
    # Not the class's present forward, which may be a replacement.
    original = site(cls, "forward", lambda stock: dispatcher(stock, head.build(stock))).original
    forward = head.build(original)

    @functools.wraps(original)
    def lce_forward(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return SimpleNamespace(lce_forward=lce_forward)
