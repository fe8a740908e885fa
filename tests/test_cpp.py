"""C++ programs on the operators: compiled by CMake, run without Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liger_ops

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    # find_package(Torch) of a torch built for CUDA ends with an error where there is no CUDA toolkit.
    pytest.mark.skipif(
        torch.version.cuda is not None and shutil.which("nvcc") is None,
        reason="find_package(Torch) asks for the CUDA toolkit",
    ),
]


def run(*command: object, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    prefixes = f"{torch.utils.cmake_prefix_path};{liger_ops.cmake_prefix_path}"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefixes}")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


def test_training_through_the_dispatcher(programs):
    assert re.fullmatch(r"loss \S+ -> \S+ on (cpu|cuda)\n", run(programs / "train"))


def test_a_packaged_model_scores_as_in_python(programs, tmp_path):
    export = ROOT / "examples" / "cpp" / "export_model.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    exported = run(sys.executable, export, "--output", tmp_path, "--device", "cpu", env=environment)
    loss, predictions = re.search(r"loss (\S+) over (\d+) predictions", exported).groups()

    scored = run(programs / "score", tmp_path / "model.pt2", tmp_path / "tokens.txt")
    got = re.fullmatch(r"loss (\S+) over (\d+) predictions, perplexity \S+\n", scored).groups()
    assert float(got[0]) == pytest.approx(float(loss), rel=1e-5)
    assert got[1] == predictions

    # Another length than the exported one, and a file that holds no two tokens.
    tokens = (tmp_path / "tokens.txt").read_text().split()
    (tmp_path / "few.txt").write_text(" ".join(tokens[:20]))
    assert "over 19 predictions" in run(programs / "score", tmp_path / "model.pt2", tmp_path / "few.txt")
    (tmp_path / "one.txt").write_text(tokens[0])
    failed = subprocess.run(
        [programs / "score", tmp_path / "model.pt2", tmp_path / "one.txt"], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr == f"{tmp_path / 'one.txt'} holds 1 token ids; a prediction needs two\n"
