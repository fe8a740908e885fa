"""The example and the benchmark of Medusa heads run from end to end, plain and fused with the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "accelerate", "tokenizers", "matplotlib", "rich"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(output, *options):
    printed = run("examples/medusa/train.py", "--quick", "--device", "cpu", "--output", str(output), *options)
    return json.loads((output / "results.json").read_text()), printed


def test_example_learns_to_propose(tmp_path):
    results, printed = example(
        tmp_path, "--base-steps", "120", "--stage-1-steps", "60", "--stage-2-steps", "8"
    )
    before, after = (results[name]["acceptance_length"] for name in ("heads added", "stage 1"))
    assert after > before + 0.1
    for name in ("heads added", "stage 1", "stage 2"):
        assert results[name]["outputs_equal_to_the_base"] == results[name]["prompts"] > 0
    assert "tokens per forward" in printed
    assert (tmp_path / "heads" / "model.safetensors").exists()
    assert (tmp_path / "stage_2" / "medusa_config.json").exists()


def test_example_plain_and_fused_train_alike(tmp_path):
    options = ("--base-steps", "0", "--stage-1-steps", "8", "--stage-2-steps", "8", "--new-tokens", "2")
    options += ("--batch", "2", "--lora")
    pytest.importorskip("peft")
    fused, _ = example(tmp_path / "fused", *options)
    plain, _ = example(tmp_path / "plain", *options, "--plain")
    for stage in ("stage 1", "stage 2"):
        assert fused[stage]["losses"] == pytest.approx(plain[stage]["losses"], rel=1e-4)
        assert len(fused[stage]["losses"]) == 8


def test_benchmark(tmp_path):
    target = tmp_path / "medusa.json"
    options = (
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--threads",
        "1",
        "--layers",
        "2",
        "--stage-2-layers",
        "1",
    )
    options += ("--heads", "2", "--lengths", "16", "--warm-up", "1", "--steps", "1", "--optimizer", "sgd")
    run("-m", "benchmarks.medusa", *options, "--json", str(target))
    document = json.loads(target.read_text())
    assert document["environment"]["command"].startswith("python -m benchmarks.medusa --device cpu")
    rows = {(r["stage"], r["implementation"]): r for r in document["results"]}
    names = ("stacked", "plain", "ours")
    assert rows.keys() == {(stage, name) for stage in (1, 2) for name in names}
    for (stage, name), result in rows.items():
        assert result["loss"] == pytest.approx(rows[stage, "plain"]["loss"], rel=1e-5), name
        assert result["tokens_per_second"] > 0
        assert "failure" not in result


def row(implementation, **values):
    fixed = dict(stage=1, heads=3, length=1024, layers=32, implementation=implementation)
    return fixed | dict(tokens_per_second=2000.0, peak_memory_gib=40.0, loss=12.0) | values


DOCUMENT = {
    "environment": {
        "device": "GPU",
        "command": "python -m benchmarks.medusa",
        "date": "2026-01-01T00:00:00",
        "versions": {"torch": "2", "transformers": "5"},
    },
    "sizes": dict(shape="llama-3.1-8b", batch=1, dtype="bfloat16", optimizer="adamw", head_layers=1),
    "results": [
        row("stacked", tokens_per_second=1500.0, peak_memory_gib=80.0, step_memory_gib=62.5),
        row("plain"),
        row("ours", tokens_per_second=3000.0, peak_memory_gib=20.0, step_memory_gib=2.5),
        row("plain", length=2048, tokens_per_second=None, peak_memory_gib=None, failure="out of memory"),
        row("ours", length=2048),
    ],
}


def test_results_become_a_page_and_a_picture(tmp_path, monkeypatch):
    from benchmarks import document, medusa

    monkeypatch.setattr(document, "IMAGES", tmp_path)
    page = document.medusa_section("medusa_gpu.json", DOCUMENT)
    assert "| 1 | 32 | 3 | 1024 | 1,500 | 2,000 | 3,000 | 2.00 | 1.50 |" in page
    assert "| 1 | 32 | 3 | 1024 | 80.0 | 40.0 | 20.0 | 0.25 | 0.50 |" in page
    assert "| 1 | 32 | 3 | 1024 | 62.5 |  | 2.5 | 0.04 |  |" in page
    assert "| 1 | 32 | 3 | 2048 |  | out of memory | 40.0 |  |  |" in page
    medusa.draw(DOCUMENT, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_is_a_result(monkeypatch):
    import torch

    from benchmarks import medusa

    def starve(name, model, ids, a):
        if name != "ours":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_second": 1.0, "peak_memory_gib": 1.0, "loss": 1.0}

    monkeypatch.setattr(medusa, "measure", starve)
    a = medusa.parse(["--device", "cpu", "--shape", "tiny", "--layers", "1", "--stages", "1", "--heads", "1"])
    results, stopped = medusa.run(a, torch.device("cpu"))
    assert not stopped
    assert [r["tokens_per_second"] for r in results] == [None, None, 1.0] * 4
    assert results[0]["failure"] == "out of memory" and "failure" not in results[2]
    a.time_limit = 0.0
    results, stopped = medusa.run(a, torch.device("cpu"))
    assert stopped and results == []
