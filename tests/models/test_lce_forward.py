"""The forwards that frameworks take from ``liger_kernel.transformers.model.<family>`` and put on a class."""

import importlib
import importlib.util

import pytest
from tiny import MODELS, Operators, batch, tiny

from liger_ops.compat import install_liger_kernel_alias, uninstall_liger_kernel_alias
from liger_ops.transformers.families import family_of

if importlib.util.find_spec("liger_kernel") is not None:
    pytest.skip("the real liger-kernel is installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def alias():
    install_liger_kernel_alias()
    yield
    uninstall_liger_kernel_alias()


@pytest.mark.parametrize("name", MODELS)
def test_lce_forward(name, monkeypatch):
    model = tiny(name).train()
    family = family_of(model.config.model_type)
    forward = importlib.import_module(f"liger_kernel.transformers.model.{family.name}").lce_forward
    inputs = batch(family=name)
    expected = model(**inputs).loss.item()
    if type(model).__name__ != forward.__qualname__.split(".")[0]:
        pytest.skip("a family has one lce_forward, of the first of its heads")
    monkeypatch.setattr(type(model), "forward", forward)
    with Operators() as operators:
        output = model(**inputs)
    assert operators.calls["fused_linear_cross_entropy"] == 1 and output.logits is None
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
