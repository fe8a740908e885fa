"""Loading: what a user reads when the compiled library is missing or was built for another torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liger_ops
from liger_ops import _library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """The loader as a fresh process finds it, looking into an empty folder."""
    monkeypatch.setattr(_library, "_BUILD_INFO", {})
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    return tmp_path


def test_missing_library(unloaded):
    with pytest.raises(ImportError, match=r"expected one compiled library in .*, found none\..*`make build`"):
        _library.load()


def test_two_libraries(unloaded):
    for name in ("_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so"):
        (unloaded / name).touch()
    with pytest.raises(ImportError, match=r"found \['_C.abi3.so', '_C.cpython-311"):
        _library.load()


def test_other_torch(unloaded):
    (unloaded / "_C.abi3.so").touch()
    (unloaded / "_build_info.json").write_text(json.dumps({"torch": "2.3.1+cu121"}))
    with pytest.raises(
        ImportError, match=r"built for torch 2\.3, but torch .* is installed. Rebuild it: `pip"
    ):
        _library.load()


def test_loading_twice_is_harmless():
    _library.load()
    assert liger_ops.build_info()["torch"] == torch.__version__


def test_every_operator_has_every_key():
    keys = ["CPU", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"]
    if liger_ops.build_info()["cuda"]:
        keys.append("CUDA")
    names = liger_ops.operators()
    assert {"rms_norm", "rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy"} <= set(names)
    for name in names:
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"liger::{name}", key), (name, key)


def test_no_python_symbols():
    """One binary for every Python: the library must not need libpython or libtorch_python."""
    library = liger_ops.build_info()["library"]
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in needed and "libtorch_python" not in needed
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert " Py" not in symbols and " _Py" not in symbols


CAPABILITY_CHECK = """
import torch, liger_ops.functional as LF
torch.manual_seed(0)
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, w, u = torch.randn(5, 83, dtype=dtype), torch.randn(83, dtype=dtype), torch.randn(5, 83, dtype=dtype)
    q, (cos, sin) = torch.randn(1, 2, 5, 38, dtype=dtype), torch.randn(2, 1, 5, 38, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, u, q)]
    head, target = torch.randn(97, 83, dtype=dtype, requires_grad=True), torch.randint(97, (5,))
    results = [LF.rms_norm(x, w), LF.swiglu(x, u), LF.rope(q, q, cos, sin)[0]]
    results += [LF.cross_entropy(x, target % 83), LF.fused_linear_cross_entropy(x, head, target)]
    gradients = torch.autograd.grad([r.sum() for r in results], [*leaves, head])
    for t in (*results, *gradients):
        wide = t.detach().double().flatten()
        weights = torch.linspace(-1, 1, wide.numel(), dtype=torch.float64)
        print(dtype, wide.sum().item(), (wide * weights).sum().item())
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="one instruction set only")
def test_every_instruction_set_computes_the_same():
    """Each vectorised variant that this processor can run, against the unvectorised one."""
    best = torch.backends.cpu.get_cpu_capability()
    capabilities = ["default", "avx2", *(["avx512"] if best.startswith("AVX512") else [])]
    outputs = {}
    for capability in capabilities:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
        outputs[capability] = subprocess.run(
            [sys.executable, "-c", CAPABILITY_CHECK],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    for capability in capabilities[1:]:
        for a, b in zip(outputs["default"], outputs[capability], strict=True):
            dtype, *numbers = a.split()
            other, *others = b.split()
            assert dtype == other
            tolerance = 100 * torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps
            for x, y in zip(map(float, numbers), map(float, others), strict=True):
                assert x == pytest.approx(y, rel=tolerance, abs=tolerance), f"{capability}: {a} against {b}"
