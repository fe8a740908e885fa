"""The name ``liger_kernel``: what it leads to, what it refuses, and that it can be taken back."""

import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import liger_ops
from liger_ops.compat import install_liger_kernel_alias, uninstall_liger_kernel_alias
from liger_ops.compat.alias import VERSION
from tests.liger_signatures import AUTOGRAD_FUNCTIONS, FUNCTIONS, MODEL_TYPES, MODULES

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)
if importlib.util.find_spec("liger_kernel") is not None:
    pytest.skip("the real liger-kernel is installed", allow_module_level=True)


@pytest.fixture
def alias():
    install_liger_kernel_alias()
    yield
    uninstall_liger_kernel_alias()


def check(function, expected: str):
    """All of Liger's parameters in its order, with its defaults; what liger_ops adds comes after them."""
    wanted = [str(p) for p in inspect.signature(eval(f"lambda {expected}: 0")).parameters.values()]
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    names = [str(p.replace(annotation=p.empty)) for p in found]
    if wanted and wanted[-1].startswith("**"):
        assert wanted.pop() == names.pop()
    assert names[: len(wanted)] == wanted
    for added in found[len(wanted) :]:
        assert added.default is not added.empty or added.kind is added.VAR_KEYWORD


def resolve(path: str):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


@needs_transformers
@pytest.mark.parametrize("path", FUNCTIONS)
def test_function_signature(alias, path):
    check(resolve(path), FUNCTIONS[path])


@pytest.mark.parametrize("path", AUTOGRAD_FUNCTIONS)
def test_autograd_function_signature(alias, path):
    check(resolve(f"ops.{path}").apply, AUTOGRAD_FUNCTIONS[path])
    assert getattr(importlib.import_module("liger_kernel.ops"), path.split(".")[1]) is resolve(f"ops.{path}")


@pytest.mark.parametrize("path", MODULES)
def test_module_signature(alias, path):
    cls = resolve(f"transformers.{path}")
    constructor, forward = MODULES[path]
    check(cls, constructor)
    check(cls.forward, forward)
    assert getattr(importlib.import_module("liger_kernel.transformers"), cls.__name__) is cls
    assert cls.__module__.startswith("liger_ops.")


@needs_transformers
def test_model_types(alias):
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as functions

    assert set(functions) >= MODEL_TYPES


@needs_transformers
def test_same_objects(alias):
    import liger_kernel.transformers
    import liger_kernel.transformers.functional as lf
    from liger_kernel.transformers import (
        AutoLigerKernelForCausalLM,
        LigerRMSNorm,
        apply_liger_kernel_to_llama,
    )
    from liger_kernel.transformers.auto_model import AutoLigerKernelForCausalLM as same

    import liger_ops.transformers

    assert LigerRMSNorm is liger_ops.nn.LigerRMSNorm
    assert lf.liger_rms_norm is liger_ops.transformers.functional.liger_rms_norm
    assert AutoLigerKernelForCausalLM is same is liger_ops.transformers.AutoLigerKernelForCausalLM
    assert apply_liger_kernel_to_llama is liger_ops.transformers.apply_liger_kernel_to_llama
    assert liger_kernel.__version__ == VERSION
    assert "LigerRMSNorm" in dir(liger_kernel.transformers)
    # The modules of liger_ops keep their own identity.
    assert liger_ops.transformers.functional.__spec__.name == "liger_ops.transformers.functional"
    assert pickle.loads(pickle.dumps(LigerRMSNorm)) is LigerRMSNorm
    assert pkgutil.resolve_name("liger_kernel.transformers.rms_norm:LigerRMSNorm") is LigerRMSNorm


def test_star_import(alias):
    names = {}
    exec("from liger_kernel.transformers.functional import *", names)
    assert "liger_rms_norm" in names and "refuse" not in names


@pytest.mark.parametrize(
    "statement, name",
    [
        ("import liger_kernel.chunked_loss", "liger_kernel.chunked_loss"),
        ("from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss", "liger_kernel.chunked_loss"),
        ("import liger_kernel.megatron", "liger_kernel.megatron"),
        ("import liger_kernel.transformers.group_norm", "liger_kernel.transformers.group_norm"),
        ("from liger_kernel.transformers import LigerDyT", "liger_kernel.transformers.LigerDyT"),
        ("from liger_kernel.transformers.rms_norm import rms", "liger_kernel.transformers.rms_norm.rms"),
        ("from liger_kernel.ops import LigerDyTFunction", "liger_kernel.ops.LigerDyTFunction"),
        ("import liger_kernel.ops.group_norm", "liger_kernel.ops.group_norm"),
    ],
)
def test_out_of_scope(alias, statement, name):
    with pytest.raises(ImportError, match=f"{name} is not available: liger_kernel is an alias of liger_ops"):
        exec(statement)


def test_missing_attributes(alias):
    import liger_kernel.transformers

    assert not hasattr(liger_kernel.transformers, "LigerDyT")
    with pytest.raises(AttributeError, match="liger_kernel.transformers.LigerDyT is not available"):
        _ = liger_kernel.transformers.LigerDyT


def loaded() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.startswith("liger_kernel")}


def test_uninstall_leaves_nothing():
    path, before = list(sys.meta_path), loaded()
    uninstall_liger_kernel_alias()
    assert sys.meta_path == path
    install_liger_kernel_alias()
    install_liger_kernel_alias()
    assert len(sys.meta_path) == len(path) + 1
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    assert "liger_kernel.transformers.rms_norm" in loaded()
    uninstall_liger_kernel_alias()
    assert sys.meta_path == path and loaded() == before
    with pytest.raises(ModuleNotFoundError, match="No module named 'liger_kernel'"):
        import liger_kernel  # noqa: F401
    assert LigerRMSNorm(4)(torch.ones(2, 4)).shape == (2, 4)


@pytest.fixture
def real_package(tmp_path, monkeypatch):
    """A package called liger_kernel on the path, imported already."""
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.0.1'")
    (package / "utils.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in loaded():
        del sys.modules[name]


@pytest.mark.parametrize("imported", [False, True])
def test_real_package_wins(real_package, imported):
    if imported:
        import liger_kernel  # noqa: F401
    before = loaded()
    with pytest.raises(ImportError, match="liger-kernel is installed .*override=True"):
        install_liger_kernel_alias()
    assert loaded() == before
    import liger_kernel.utils

    assert liger_kernel.utils.real


def test_override(real_package):
    import liger_kernel.utils

    before = loaded()
    install_liger_kernel_alias(override=True)
    try:
        import liger_kernel.utils

        assert liger_kernel.__version__ == VERSION and not hasattr(liger_kernel.utils, "real")
    finally:
        uninstall_liger_kernel_alias()
    assert loaded() == before
    assert sys.modules["liger_kernel.utils"].real


def test_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    install_liger_kernel_alias()
    try:
        from liger_kernel.transformers import LigerRMSNorm  # noqa: F401
    finally:
        uninstall_liger_kernel_alias()


@needs_transformers
def test_transformers_finds_it():
    from transformers.utils import is_liger_kernel_available

    assert not is_liger_kernel_available()
    install_liger_kernel_alias()
    assert is_liger_kernel_available()
    uninstall_liger_kernel_alias()
    assert not is_liger_kernel_available()


def test_nothing_is_imported_before_it_is_needed():
    code = """
import sys
from liger_ops.compat import install_liger_kernel_alias
install_liger_kernel_alias()
from liger_kernel.transformers import LigerRMSNorm
from liger_kernel.ops import LigerRMSNormFunction
from liger_kernel.transformers.functional import liger_swiglu
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


ROWS, HIDDEN, VOCAB = 6, 16, 40


def same(actual, expected, *inputs, **tolerance):
    """Equal results, and equal gradients of the inputs."""
    torch.testing.assert_close(actual, expected, **tolerance)
    upstream = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    gradients = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


class TestFunctions:
    @pytest.fixture(autouse=True)
    def functions(self, alias):
        self.ops = importlib.import_module("liger_kernel.ops")

    def test_cross_entropy(self):
        logits, target = leaf(ROWS, VOCAB), torch.tensor([1, 5, -100, 39, 0, 7])
        weight = torch.rand(VOCAB)
        values = self.ops.LigerCrossEntropyFunction.apply(
            logits, target, weight, -100, 0.0, 0.1, "sum", None, False
        )
        assert len(values) == 4 and values[1:] == (None, None, None)
        same(values[0], F.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=0.1), logits)

    def test_fused_linear_cross_entropy(self):
        x, head, bias = leaf(ROWS, HIDDEN), leaf(VOCAB, HIDDEN), leaf(VOCAB)
        target = torch.tensor([1, 5, 3, 39, 0, 7])
        values = self.ops.LigerFusedLinearCrossEntropyFunction.apply(
            x, head, target, bias, None, 3, 0.0, 0.1, "mean", None
        )
        assert len(values) == 4 and values[1:] == (None, None, None)
        expected = F.cross_entropy(F.linear(x, head, bias), target, ignore_index=3, label_smoothing=0.1)
        same(values[0], expected, x, head, bias)

    def test_fused_linear_cross_entropy_by_hand(self):
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        x, head, bias = leaf(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN), leaf(VOCAB)
        target = torch.tensor([1, 5, -100, 39, 0, 7])
        loss, z_loss, _, predicted, *gradients = module.fused_linear_cross_entropy_forward(
            x, head, target, bias=bias, lse_square_scale=0.1, return_z_loss=True, return_predicted_tokens=True
        )
        logits = F.linear(x, head, bias)
        expected_z = 0.1 * logits.logsumexp(-1).square()[target != -100].mean()
        expected = F.cross_entropy(logits, target) + expected_z
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(z_loss, expected_z)
        assert predicted[2] == -1 and not loss.requires_grad
        gradients = module.fused_linear_cross_entropy_backward(torch.tensor(2.0), *gradients)
        assert gradients[1] is None
        wanted = torch.autograd.grad(2 * expected, (x, bias))
        torch.testing.assert_close((gradients[0], gradients[2]), wanted)

    @pytest.mark.parametrize("mode", ["llama", 0, "gemma", 1, "none", -1])
    def test_rms_norm(self, mode):
        x, w = leaf(ROWS, HIDDEN), leaf(HIDDEN)
        actual = self.ops.LigerRMSNormFunction.apply(x, w, 1e-5, 1.0, mode, False, None)
        same(actual, F.rms_norm(x, (HIDDEN,), w + 1, 1e-5), x, w)

    def test_fused_add_rms_norm(self):
        x, r, w = leaf(ROWS, HIDDEN), leaf(ROWS, HIDDEN), leaf(HIDDEN)
        y, total = self.ops.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5, 0.0, "llama", False)
        torch.testing.assert_close(total, x + r)
        same(y, F.rms_norm(x + r, (HIDDEN,), w, 1e-5), x, r, w)

    def test_layer_norm(self):
        x, w, b = leaf(ROWS, HIDDEN), leaf(HIDDEN), leaf(HIDDEN)
        same(
            self.ops.LigerLayerNormFunction.apply(x, w, b, 1e-5),
            F.layer_norm(x, (HIDDEN,), w, b, 1e-5),
            x,
            w,
            b,
        )

    def test_rope(self):
        q, k = leaf(2, 4, 5, 8), leaf(2, 2, 5, 8)
        angles = torch.rand(1, 5, 4)
        cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
        for actual, x in zip(self.ops.LigerRopeFunction.apply(q, k, cos, sin, None, 1), (q, k), strict=True):
            first, second = x.chunk(2, -1)
            same(actual, x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None], x)

    def test_mrope(self):
        q, k = leaf(2, 4, 5, 8), leaf(2, 2, 5, 8)
        angles = torch.rand(3, 2, 5, 4)
        cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
        section = [1, 1, 2]
        merged = [
            torch.cat([chunk[i % 3] for i, chunk in enumerate(table.split(section * 2, dim=-1))], -1)[:, None]
            for table in (cos, sin)
        ]
        rotated = self.ops.LigerQwen2VLMRopeFunction.apply(q, k, cos, sin, section)
        for actual, x in zip(rotated, (q, k), strict=True):
            first, second = x.chunk(2, -1)
            same(actual, x * merged[0] + torch.cat((-second, first), -1) * merged[1], x)

    def test_swiglu(self):
        a, b = leaf(ROWS, HIDDEN), leaf(ROWS, HIDDEN)
        same(self.ops.LigerSiLUMulFunction.apply(a, b), F.silu(a) * b, a, b)
        same(self.ops.LigerSiLUMulFunction.apply(a, b, 0.5, 3.0), F.silu(a * 0.5) * b * 3.0, a, b)

    def test_fused_gate_up(self):
        y = leaf(ROWS, 2 * HIDDEN)
        gate, up = y.chunk(2, -1)
        same(self.ops.LigerFusedGateUpSiLUMulFunction.apply(y, True), F.silu(gate) * up, y)

    def test_geglu(self):
        a, b = leaf(ROWS, HIDDEN), leaf(ROWS, HIDDEN)
        same(self.ops.LigerGELUMulFunction.apply(a, b), F.gelu(a, approximate="tanh") * b, a, b)

    def test_fused_moe(self):
        experts, width = 4, 8
        x, w1, w2 = leaf(ROWS, HIDDEN), leaf(experts, 2 * width, HIDDEN), leaf(experts, HIDDEN, width)
        index = torch.randint(experts, (ROWS, 2), dtype=torch.int32)
        gates = leaf(ROWS, 2)
        expected = torch.stack(
            [
                sum(
                    gates[row, k] * w2[e] @ (F.silu(w1[e, :width] @ x[row]) * (w1[e, width:] @ x[row]))
                    for k, e in enumerate(index[row].tolist())
                )
                for row in range(ROWS)
            ]
        )
        actual = self.ops.LigerFusedMoEFunction.apply(x, w1, w2, index, gates)
        same(actual, expected, x, w1, w2, gates, rtol=1e-4, atol=1e-4)


@needs_transformers
def test_loss_of_a_causal_language_model(alias):
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    hidden, head = leaf(2, 5, HIDDEN), leaf(VOCAB, HIDDEN)
    labels = torch.randint(VOCAB, (2, 5))
    labels[0, :2] = -100
    logits = 30 * torch.tanh(F.linear(hidden, head) / 30)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 7
    actual = LigerForCausalLMLoss(hidden, head, labels, HIDDEN, 7, final_logit_softcapping=30.0, unknown=1)
    same(actual, expected, hidden, head)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    same(
        LigerForCausalLMLoss(hidden, head, None, HIDDEN, shift_labels=shifted),
        F.cross_entropy(F.linear(hidden, head).flatten(0, 1), shifted.flatten()),
        hidden,
        head,
    )


def test_utils(alias, capsys):
    from liger_kernel.env_report import print_env_report
    from liger_kernel.utils import infer_comm_backend, infer_device

    assert infer_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert infer_comm_backend() in ("nccl", "gloo")
    print_env_report()
    assert liger_ops.__version__ in capsys.readouterr().out


MIGRATING = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text()
IMPORTS = re.findall(r"^from liger_kernel.*$", MIGRATING, flags=re.MULTILINE)


@needs_transformers
@pytest.mark.parametrize("statement", IMPORTS)
def test_documented_import(alias, statement):
    exec(statement)


def test_documented_names_are_the_ones_that_are_checked():
    """Whatever has a signature in the table is in the page, and the other way round."""
    lists = [line.split("import", 1)[1].split("#")[0] for line in IMPORTS]
    documented = {name.strip() for names in lists for name in names.split(",")}
    checked = {path.rsplit(".", 1)[1] for table in (FUNCTIONS, AUTOGRAD_FUNCTIONS, MODULES) for path in table}
    others = {
        "AutoLigerKernelForCausalLM",
        "LigerCausalLMOutputWithPast",
        "MODEL_TYPE_TO_APPLY_LIGER_FN",
        "lce_forward",
    }
    assert documented == checked | others


def test_documented_refusals(alias):
    for name in ("LigerJSD", "LigerKLDIVLoss", "LigerTVDLoss", "LigerDyT", "LigerGroupNorm", "LigerSoftmax"):
        with pytest.raises(ImportError, match=f"{name} is not available"):
            exec(f"from liger_kernel.transformers import {name}")
