"""The benchmark programs run, check every provider, and write what they measured."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import document as pages
from benchmarks import measure
from benchmarks.claims import judge
from benchmarks.ops import OPS, Problem, reference
from benchmarks.shapes import SHAPES

pytest.importorskip("transformers", reason="the eager provider is transformers' own code")
pytest.importorskip("rich", reason="benchmarks print through rich")

ROOT = Path(__file__).resolve().parents[1]


def run_benchmark(tmp_path, *options):
    target = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--device",
        "cpu",
        "--budget",
        "1",
        "--json",
        str(target),
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


@pytest.fixture
def problem():
    return Problem(SHAPES["tiny"], 32, 2, torch.float32, torch.device("cpu"), loss_gradient=0.5, seed=0)


def test_every_operator_and_mode(tmp_path):
    options = (
        "--shape",
        "tiny",
        "--tokens",
        "32",
        "--providers",
        "torch,ours",
        "--mode",
        "fwd",
        "bwd",
        "full",
    )
    document, printed = run_benchmark(tmp_path, *options, "--no-memory")
    measured = {(r["op"], r["mode"], r["provider"]) for r in document["results"]}
    assert measured == {
        (op, mode, p) for op in OPS for mode in ("fwd", "bwd", "full") for p in ("torch", "ours")
    }
    for row in document["results"]:
        assert "failure" not in row
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert max(row["errors"].values()) < measure.TOLERANCE[torch.float32]
        assert row["overwrites"] == []
        assert row["op"] in printed
    assert document["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert document["rates"]["copy_bytes_per_s"] > 0


def test_peak_memory_on_the_cpu(tmp_path):
    options = (
        "--shape",
        "tiny",
        "--tokens",
        "32",
        "--providers",
        "ours",
        "--ops",
        "fused_linear_cross_entropy",
    )
    document, _ = run_benchmark(tmp_path, *options)
    (row,) = document["results"]
    if Path("/proc/self/clear_refs").exists():
        assert row["memory"]["peak_extra_mib"] >= row["memory"]["beyond_results_mib"] >= 0
    else:
        assert row["memory"] is None


def test_host_time(tmp_path):
    document, _ = run_benchmark(tmp_path, "--host", "--providers", "ours", "--ops", "rms_norm")
    assert [r["op"] for r in document["host"]] == ["F.layer_norm", "rms_norm"]
    assert all(r["forward_us"] > 0 and r["full_us"] > 0 for r in document["host"])


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_provider_is_caught(op, problem):
    case = OPS[op](problem)

    def wrong(*arguments):
        outputs = sound(*arguments)
        return outputs * 1.01 if isinstance(outputs, torch.Tensor) else tuple(o * 1.01 for o in outputs)

    import liger_ops.functional

    sound = getattr(liger_ops.functional, op)
    if op.endswith("_norm"):
        sound = functools.partial(sound, eps=1e-5)
    expected = reference(case)
    good, bad = measure.Subject("good", sound), measure.Subject("bad", wrong)
    measure.check(good, case, expected)
    measure.check(bad, case, expected)
    assert good.failure is None
    assert "wrong result" in bad.failure


def test_overwritten_inputs_are_reported_and_do_not_reach_others(problem):
    case = OPS["swiglu"](problem)
    before = [a.clone() for a in case.arguments]

    def careless(gate, up):
        out = torch.nn.functional.silu(gate) * up.clone()
        up.data.neg_()
        return out

    subject = measure.Subject("careless", careless)
    measure.check(subject, case, reference(case))
    assert subject.overwrites == ["argument1"]
    assert all(torch.equal(a, b) for a, b in zip(case.arguments, before, strict=True))


def test_training_steps_of_whole_models(tmp_path, monkeypatch):
    target = tmp_path / "models_test.json"
    options = "--device cpu --tiny --dtype float32 --steps 2 --length 32 --models llama-3.1-8b mixtral-8x7b"
    command = [sys.executable, "-m", "benchmarks.models", *options.split(), "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    results = {(r["model"], r["provider"]): r for r in document["training_results"]}
    assert len(results) == 8
    for model, provider in results:
        if not provider.startswith("liger-ops"):
            continue
        ours = results[model, provider]
        assert ours["layers"] == 2
        assert ours["speedup"] > 0
        # Same weights, same tokens, four steps.
        assert ours["largest_loss_difference"] < 1e-5
        assert len(set(ours["losses"])) == 4
    assert document["environment"]["command"].startswith("python -m benchmarks.models --device cpu")

    monkeypatch.setattr(pages, "IMAGES", tmp_path)
    text = pages.training_section({target.name: document})
    assert "| Mixtral 8x7B | 2 of 32 | **liger-ops** |" in text
    assert (tmp_path / "models_test.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_needs_too_much_memory_is_a_result(monkeypatch):
    from benchmarks import models

    def build(job):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(models, "build", build)
    job = models.Job("llama-3.1-8b", "liger-ops", 1, 8, 1, "cpu", "float32", True, None, False, 0)
    assert models.run(job) == {"model": job.model, "provider": job.provider, "failure": "out of memory"}


@pytest.mark.parametrize(
    "misbehave, failure",
    [
        (lambda: time.sleep(60), "no result after 1 s"),
        (lambda: os._exit(3), "the process died"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["hangs", "crashes", "raises"],
)
def test_a_peer_that_misbehaves_is_a_result(monkeypatch, misbehave, failure):
    from benchmarks import models

    monkeypatch.setattr(models, "run", lambda job: misbehave())
    job = models.Job("llama-3.1-8b", "liger-kernel", 1, 8, 1, "cpu", "float32", True, None, False, 0)
    record = models.in_own_process(job, multiprocessing.get_context("fork"), 1)
    assert record == {"model": job.model, "provider": job.provider, "failure": failure}


def test_claims():
    def row(op, provider, median):
        return {"op": op, "mode": "full", "provider": provider, "ms": {"median": median}}

    results = [row("rms_norm", "torch", 2.0), row("rms_norm", "ours", 1.0), row("rope", "torch", 1.0)]
    (verdict,) = judge(
        [*results, {"op": "rope", "mode": "full", "provider": "ours", "failure": "x"}], "cpu", 2048
    )
    assert verdict.holds and verdict.measured == "2.00x torch"
    assert not judge([row("rms_norm", "torch", 1.0), row("rms_norm", "ours", 2.0)], "cpu", 2048)[0].holds
    assert judge(results, "cpu", 64) == []


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("lean", ["--shape", "tiny", "--layers", "2", "--length", "16", "--rounds", "1", "--steps", "1"]),
        ("activations", ["--shape", "tiny", "--length", "16"]),
    ],
)
def test_lean_activations(program, options, tmp_path, capsys):
    """What is kept shrinks by what the formulas say, and the result can be drawn again."""
    from benchmarks import activations, lean

    target, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    main = {"lean": lean.main, "activations": activations.main}[program]
    assert main(["--device", "cpu", "--dtype", "float32", "--json", str(target), *options]) == 0
    document = json.loads(target.read_text())
    assert document["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    plain, less = document["results"]
    shape = SHAPES["tiny"]
    saved = 4 * (2 * shape.hidden + shape.intermediate)
    if program == "lean":
        tokens = 2 * 16 * document["sizes"]["layers"]
        assert plain["kept_for_backward_mib"] - less["kept_for_backward_mib"] == saved * tokens / 2**20
        assert plain["losses"][0] == pytest.approx(less["losses"][0], rel=1e-2)
        assert document["host"]["lean_us"] > 0
    else:
        assert plain["bytes_per_token"] - less["bytes_per_token"] == saved
        pytest.importorskip("matplotlib")
        assert main(["--from", str(target), "--picture", str(picture)]) == 0
        assert "swiglu" in picture.read_text()
        assert "computed again" in capsys.readouterr().out
