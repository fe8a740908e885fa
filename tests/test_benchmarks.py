"""The benchmark programs run, check every provider, and write what they measured."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import claims, kernels, measure
from benchmarks import document as pages
from benchmarks.ops import OPS, Problem, reference
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import SHAPES
from liger_ops import _library
from liger_ops.cli import main as cli

pytest.importorskip("transformers", reason="the eager provider is transformers' own code")
pytest.importorskip("rich", reason="benchmarks print through rich")

ROOT = Path(__file__).resolve().parents[1]


QUICK = ("--device", "cpu", "--budget", "1")
TINY = ("--shape", "tiny", "--tokens", "32", "--providers", "torch,ours", "--no-memory")


def run_benchmark(tmp_path, *options, **process):
    """The command as a user runs it; returns what it wrote and what it printed."""
    target = tmp_path / "result.json"
    command = [sys.executable, "-m", "liger_ops", "bench", *QUICK, "--json", str(target), *options]
    process = {"cwd": ROOT, **process}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **process)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


@pytest.fixture
def problem():
    return Problem(SHAPES["tiny"], 32, 2, torch.float32, torch.device("cpu"), loss_gradient=0.5, seed=0)


def test_every_operator_and_mode(tmp_path):
    document, printed = run_benchmark(tmp_path, *TINY, "--mode", "fwd", "bwd", "full")
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
        is_loss = row["op"].endswith("cross_entropy")
        assert (row["floor_ms"] is None) == (is_loss and row["mode"] == "bwd")
        # Host time is told apart from the device's only where there are two of them.
        assert "host_us" not in row
    assert document["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert document["environment"]["command"].startswith("python -m liger_ops bench --device cpu")
    (copy,) = document["rates"]["copies"]
    assert copy["bytes_per_s"] == pytest.approx(1e3 * copy["bytes"] / copy["ms"])
    (products,) = document["rates"]["head_products"]
    assert products["chunk_rows"] == 32 and products["fwd_ms"] > 0 and products["full_ms"] > 0


def test_sweep(tmp_path):
    """Every combination of the sizes that an operator knows, once each."""
    options = ("--width", "32", "48", "--vocab", "70", "--tokens", "8", "16", "--quick")
    options += ("--dtype", "float32", "float64", "--shape", "tiny", "host", "--batch", "4")
    options += ("--ops", "layer_norm", "geglu_packed", "qk_norm", "cross_entropy")
    document, printed = run_benchmark(tmp_path, *options, "--providers", "ours", "--no-memory")
    found = {}
    for row in document["results"]:
        found.setdefault(row["op"], []).append((*row["sizes"].values(), row["dtype"]))
    both = ("float32", "float64")
    rows = [(tokens, width, dtype) for tokens in (8, 16) for width in (32, 48) for dtype in both]
    assert sorted(found["layer_norm"]) == sorted(found["geglu_packed"]) == sorted(rows)
    assert sorted(found["cross_entropy"]) == sorted((t, 70, dtype) for t in (8, 16) for dtype in both)
    # Rows of heads: tokens * heads of them.
    assert sorted(found["qk_norm"]) == sorted(
        (t * heads, width, dtype) for t in (8, 16) for heads, width in ((4, 16), (8, 128)) for dtype in both
    )
    assert all(row["shape"] is None for row in document["results"] if row["op"] != "qk_norm")
    assert "16 x 48" in printed


@pytest.mark.parametrize(
    "options, message",
    [
        ("--ops rms_norm,foo", "--ops: unknown foo; known are rms_norm"),
        ("--shape gpt", "--shape: unknown gpt; known are tiny"),
        ("--tokens 7", "--tokens must be multiples of --batch 2"),
        ("--width 0", "--width: numbers must be positive"),
        ("--device gpu", "invalid choice: 'gpu'"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli(["bench", "--device", "cpu", *options.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_from_a_wheel(tmp_path):
    """What a wheel contains, unpacked away from the checkout, has the benchmark and what it checks with."""
    site = tmp_path / "site-packages"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=environment)
    built = Path(_library.build_info()["library"])
    for path in (built, built.parent / "_build_info.json"):
        (site / "liger_ops" / path.name).unlink(missing_ok=True)
        (site / "liger_ops" / path.name).symlink_to(path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = (*TINY, "--ops", "mrope", "fused_linear_cross_entropy")
    environment["PYTHONPATH"] = str(site)
    document, _ = run_benchmark(tmp_path, *options, cwd=elsewhere, env=environment)
    assert {r["op"] for r in document["results"]} == {"mrope", "fused_linear_cross_entropy"}
    assert not any("failure" in r for r in document["results"])
    # A wheel lies in no checkout, even where site-packages does.
    assert document["environment"]["commit"] is None


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
    assert [claim["claim"].split(":")[0] for claim in document["claims"]] == [
        "rms_norm forward",
        "rms_norm forward and backward",
    ]


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_provider_is_caught(op, problem):
    case = OPS[op](problem)

    def wrong(*arguments):
        outputs = sound(*arguments)
        return outputs * 1.01 if isinstance(outputs, torch.Tensor) else tuple(o * 1.01 for o in outputs)

    sound = PROVIDERS["ours"](problem.device)[case.function]
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
    ours["kernel_times"] = {"attention": {"ms": 1.25}, "matrix products": {"ms": 2.5}, "idle": {"ms": 1.2}}
    row = f"{ours['provider']} | 1.2 | 2.5 | 0.0 | 0.0 | 0.0 | 1.2 | 5.0 |"
    assert f"{row}  |  |  |" in pages.training_section({target.name: document})
    limits = {"max_sm_mhz": 1980.0, "max_watts": 700.0}
    ours["clocks"] = {"sm_mhz": 1500.0, "watts": 690.5, "power_capped": 0.9, "samples": 7, **limits}
    text = pages.training_section({target.name: document})
    assert f"{row} 1500 of 1980 | 690 of 700 | 90% |" in text
    assert "| Mixtral 8x7B | 2 of 32 | **liger-ops** |" in text
    assert (tmp_path / "models_test.png").read_bytes().startswith(b"\x89PNG")


def test_clocks(monkeypatch, tmp_path):
    """Of what nvidia-smi prints while something runs; an answer that is no number is no sample."""
    from benchmarks import clocks

    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in *loop-ms*)\n'
        "  echo '1500, 690.5, Active'; echo '[N/A], [N/A], [N/A]'; echo '1980, 300.5, Not Active'\n"
        "  echo '1600, 700.1, Active'; exec sleep 60;;\n"
        "*) echo '1980, 700.00';;\n"
        "esac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert clocks.sampled(lambda: time.sleep(1), "GPU-0") == {
        "sm_mhz": 1600.0,
        "max_sm_mhz": 1980.0,
        "watts": 690.5,
        "max_watts": 700.0,
        "power_capped": pytest.approx(2 / 3),
        "samples": 3,
    }
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert clocks.sampled(lambda: None, "GPU-0") is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert clocks.sampled(lambda: None, "GPU-0") is None


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


def row(op, mode, provider, median, sizes, **more):
    return {"op": op, "mode": mode, "provider": provider, "ms": {"median": median}, **sizes, **more}


def test_claims_on_the_cpu():
    memory = {"memory": {"peak_extra_mib": 10.0}}
    results = [
        row("rms_norm", "full", "torch", 2.0, claims.CPU_SIZES),
        row("rms_norm", "full", "compile", 0.9, claims.CPU_SIZES),
        row("rms_norm", "full", "ours", 1.0, claims.CPU_SIZES),
        row("rope", "full", "torch", 1.4, claims.CPU_SIZES),
        row("rope", "full", "ours", 1.0, claims.CPU_SIZES),
        row(claims.HEAD, "full", "torch", 1.0, claims.CPU_SIZES, memory={"peak_extra_mib": 50.0}),
        row(claims.HEAD, "full", "ours", 1.0, claims.CPU_SIZES, **memory),
    ]
    failure = {**results[0], "op": "swiglu", "provider": "ours", "failure": "x"}
    del failure["ms"]
    verdicts = {v.claim: v for v in claims.judge([*results, failure], "cpu")}
    assert {claim: v.holds for claim, v in verdicts.items()} == {
        "rms_norm: at least 1.5x transformers' eager code": True,
        "rms_norm: no slower than torch.compile": False,
        "rope: at least 1.5x transformers' eager code": False,
        f"{claims.HEAD}: at least 1.0x transformers' eager code": True,
        f"{claims.HEAD}: peak memory under a quarter of eager's": True,
    }
    assert verdicts["rope: at least 1.5x transformers' eager code"].measured == "1.40x torch"
    # At other sizes nothing is promised.
    assert claims.judge([{**r, "tokens": 64} for r in results], "cpu") == []


def test_claims_on_cuda():
    def head(mode, provider, median, share, beyond, **more):
        memory = {"memory": {"beyond_results_mib": beyond}, "share_of_floor": share}
        return row(claims.HEAD, mode, provider, median, claims.CUDA_SIZES, **memory, **more)

    results = [
        row("rms_norm", "fwd", "ours", 1.0, claims.CUDA_SIZES, share_of_floor=0.93),
        row("rms_norm", "bwd", "ours", 1.0, claims.CUDA_SIZES, share_of_floor=0.84),
        head("full", "liger", 14.0, 0.7, 60),
        head("full", "ours", 9.0, 0.97, 501, workspace_mib=512),
        head("full", "ours-128MiB", 10.0, 0.95, 129, workspace_mib=128),
    ]
    assert {v.claim: (v.measured, v.holds) for v in claims.judge(results, "cuda")} == {
        "rms_norm fwd: at least 92 % of the floor": ("93.0 %", True),
        "rms_norm bwd: at least 85 % of the floor": ("84.0 %", False),
        f"{claims.HEAD} full: at most 1.04 times its products and cross entropy's floor": ("1.031", True),
        f"{claims.HEAD}: at most 512 MiB beyond gradients": ("501 MiB", True),
        f"{claims.HEAD}: at most 128 MiB beyond gradients": ("129 MiB", False),
        f"{claims.HEAD}: at least 1.4x Liger with 128 MiB": ("1.40x liger", True),
    }


class ScriptedClock:
    """A GPU and a host in numbers: calls are (host µs, GPU µs, whether the host waits for the GPU)."""

    cuda, queue_ahead_us = True, None

    def __init__(self):
        self.ahead = []

    def __call__(self, call, ahead_us=0.0):
        host_us, gpu_us, waits = call
        self.ahead.append(ahead_us)
        self.host_us = host_us + (ahead_us + gpu_us if waits else 0)
        self.disturbed = self.host_us > ahead_us
        exposed = max(0.0, host_us - ahead_us)
        return (exposed + gpu_us) / 1e3


def test_queue_ahead_hides_the_host():
    clock = ScriptedClock()
    calls = {
        "native": lambda: (20.0, 50.0, False),
        "jit": lambda: (500.0, 50.0, False),
        "waits": lambda: (30.0, 4000.0, True),
    }
    timings = measure.interleaved(calls, clock, budget_ms=1.0)
    assert timings["native"].median == timings["jit"].median == pytest.approx(0.05)
    assert timings["native"].host_us == 20 and timings["jit"].host_us == 500
    assert not timings["jit"].waits and timings["waits"].waits
    # Its time on the GPU is part of what its caller waits for.
    assert timings["waits"].host_us == 4030 and timings["waits"].median == pytest.approx(4.0)
    assert all(timing.quiet and timing.disturbed == 0 for timing in timings.values())
    assert max(clock.ahead) <= measure.MOST_AHEAD_US * 4


def test_a_host_that_stumbles_is_disturbed():
    hosts = iter([20.0] * 7 + [20.0, 900.0] * 100)
    timing = measure.interleaved({"call": lambda: (next(hosts), 50.0, False)}, ScriptedClock(), 0.3)["call"]
    assert timing.quiet and timing.disturbed > 0 and timing.median == pytest.approx(0.05)


def test_a_slow_host_is_not_taken_for_one_that_waits():
    class Slow(ScriptedClock):
        """Keeps the GPU busy for a tenth of what it was asked."""

        def __call__(self, call, ahead_us=0.0):
            return super().__call__(call, ahead_us / 10)

    timing = measure.interleaved({"call": lambda: (500.0, 50.0, False)}, Slow(), 0.3)["call"]
    assert not timing.waits and not timing.quiet and timing.disturbed == timing.samples


def test_a_fixed_queue_leaves_the_rest_of_the_host_time_in():
    clock = ScriptedClock()
    clock.queue_ahead_us = 0.0
    timing = measure.interleaved({"call": lambda: (500.0, 50.0, False)}, clock, 1.0)["call"]
    assert timing.median == pytest.approx(0.55) and timing.host_us == 500 and timing.disturbed == 0


def test_copies_of_other_sizes():
    measured = [
        {"bytes": 100, "ms": 2.0, "bytes_per_s": 5e4},
        {"bytes": 300, "ms": 4.0, "bytes_per_s": 7.5e4},
    ]
    assert measure.copy_milliseconds(measured, 100) == 2
    assert measure.copy_milliseconds(measured, 150) == pytest.approx(2.5)
    assert measure.copy_milliseconds(measured, 600) == pytest.approx(8)
    assert measure.copy_milliseconds(measured, 50) == pytest.approx(1)


@pytest.mark.parametrize("tokens, workspace", [(1000, 2**20), (700, 300_000), (64, 2**30), (513, 150_000)])
def test_chunks_are_those_of_the_operator(tokens, workspace):
    """The products of the floor are taken in the chunks that the operator takes, seen in its own products."""
    problem = Problem(SHAPES["tiny"], tokens, 1, torch.float32, torch.device("cpu"), 1.0, 0)
    problem = replace(problem, shape=replace(problem.shape, vocab=512))
    case = OPS["fused_linear_cross_entropy"](problem)
    function = PROVIDERS["ours"](problem.device)[case.function]
    with torch.profiler.profile(record_shapes=True) as profile:
        function(*case.arguments, workspace_bytes=workspace)
    products = [e for e in profile.events() if e.name == "aten::mm" and e.input_shapes[0][1:] == [64]]
    rows = [e.input_shapes[0][0] for e in products]
    expected = measure.chunk_rows(problem, workspace)
    assert rows[0] == expected and sum(rows) == tokens
    assert all(n == expected for n in rows[:-1]) and 0 < rows[-1] <= expected


def operators_document(rows, quick, device="GPU"):
    return {
        "environment": {
            "device": device,
            "command": "python -m liger_ops bench",
            "date": "2026-01-01T00:00:00",
            "threads": 2,
            "commit": "0123456789",
            "versions": {"torch": "2.11.0"},
        },
        "missing_providers": {"trl": "needs trl"},
        "settings": {"quick": quick, "queue_ahead_us": "host time"},
        "rates": {
            "copies": [{"bytes": 2**30, "ms": 0.25, "bytes_per_s": 4.29e12}],
            "product_flops_per_s": 7e14,
            "head_products": [],
        },
        "results": rows,
        "claims": [{"claim": "fast", "measured": "1.00x", "holds": False}],
    }


def measured_row(op, mode, provider, ms, sizes, share, **more):
    return {
        "op": op,
        "shape": None,
        "tokens": 2048,
        "dtype": "bfloat16",
        "sizes": sizes,
        "mode": mode,
        "provider": provider,
        "ms": {"median": ms, "quiet": True},
        "host_us": 10 * ms,
        "waits_for_gpu": provider == "liger",
        "floor_ms": share and ms * share,
        "share_of_floor": share,
        "least_bytes": 1_000_000,
        "least_flops": 0,
        **more,
    }


def test_performance_page(tmp_path, monkeypatch):
    """Sweeps, cases in which a peer is faster, and what is said of them."""
    monkeypatch.setattr(pages, "IMAGES", tmp_path)
    width = {width: {"rows": 2048, "width": width} for width in (1024, 4096)}
    classes = {"rows": 2048, "classes": 32000}
    sweep = [
        measured_row("rms_norm", "fwd", "ours", 1.0, width[1024], 0.5),
        measured_row("rms_norm", "fwd", "liger", 0.5, width[1024], 1.0),
        measured_row("rms_norm", "fwd", "ours", 1.0, width[4096], 0.9),
        measured_row("rms_norm", "fwd", "liger", 0.98, width[4096], 0.95),
        measured_row("rms_norm", "fwd", "torch", 3.0, width[4096], 0.3),
    ]
    memory = {"memory": {"peak_extra_mib": 600.0, "beyond_results_mib": 500.0}}
    main = [
        measured_row("cross_entropy", "bwd", "ours", 2.0, classes, None, **memory),
        measured_row("cross_entropy", "bwd", "liger", 1.0, classes, None, **memory),
        measured_row("cross_entropy", "full", "ours", 2.0, classes, 0.9, **memory),
        {**measured_row("cross_entropy", "full", "liger", 9.0, classes, 0.2), "failure": "wrong result"},
    ]
    del main[-1]["ms"]
    documents = {
        "sweep.json": operators_document(sweep, quick=True),
        "ops.json": operators_document(main, quick=False),
    }
    text = pages.performance_page(documents)
    sizes = "| GPU | 2048 x 1024 | bfloat16 | forward |"
    assert f"{sizes} 1 | 50 % | 10 | liger | 0.5000 | 0.50 | 5 w |" in text
    slower = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    lines = [line for line in slower.splitlines() if line.startswith("| GPU")]
    assert len(lines) == 2
    assert lines[0].startswith(
        "| GPU | `rms_norm` | 2048 x 1024 bfloat16 | forward | 1 | liger 0.5000 | 2.00 |"
    )
    assert "compute the gradient in forward" in lines[1]
    assert "| ops | fast | 1.00x | **fails** |" in text
    assert "[sweep.json](../benchmarks/results/sweep.json)" in text and "without trl" in text
    for picture in ("sweep_rms_norm.png", "ops.png", "ops_memory.png"):
        assert picture in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "sweep.png").exists()


def test_reasons_are_of_the_closest_case():
    reasons = {"rope forward": "a", "rope forward 512": "b", "rope forward 5": "c"}
    assert pages.reason(reasons, "rope forward 512 bfloat16") == "b"
    assert pages.reason(reasons, "rope forward 2048 bfloat16") == "a"
    assert pages.reason(reasons, "rope backward 512 bfloat16") == ""


def test_every_operator_has_its_notes():
    introduction, texts, reasons = pages.notes()
    assert introduction.startswith("# Performance") and set(texts) == set(OPS)
    passes = tuple(pages.MODES.values())
    for case in reasons:
        op, _, rest = case.partition(" ")
        assert op in OPS and rest.startswith(passes), case


@pytest.mark.parametrize(
    "threads, registers, shared, blocks",
    [
        (128, 48, 32, 10),  # 65536 registers hold 42 warps of 48 registers, in fours
        (256, 32, 0, 8),  # threads
        (64, 16, 0, 32),  # blocks
        (1024, 64, 0, 1),
        (1024, 65, 0, 0),  # cannot run
        (256, 32, 100 * 1024, 2),  # shared memory, with a KiB that is the driver's
    ],
)
def test_occupancy(threads, registers, shared, blocks):
    assert kernels.blocks_per_multiprocessor("sm_90", threads, registers, shared) == blocks


def test_registers_of_the_library(tmp_path):
    if "sm_90" not in str(_library.build_info()["arch_list"]).replace("9.0", "sm_90"):
        pytest.skip("the library has no kernels for sm_90")
    try:
        kernels.tool("cuobjdump")
    except SystemExit as reason:
        pytest.skip(str(reason))
    target = tmp_path / "kernels.json"
    assert kernels.main(["--no-launches", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    names = {k["kernel"] for k in document["kernels"]}
    for op in ("rms_norm_forward", "layer_norm_backward", "rope", "glu_forward", "cross_entropy_forward"):
        assert any(name.startswith(f"liger::cuda::{op}_kernel<") for name in names), op
    for kernel in document["kernels"]:
        assert 0 < kernel["registers"] <= 255 and kernel["stack_bytes"] == 0, kernel
        assert 0 < kernel["occupancy"] <= 1 and kernel["threads"] <= 1024, kernel
    assert "| `rope_kernel<bfloat16, bfloat16, 8" in pages.kernels_section({"k.json": document})


@pytest.mark.gpu
def test_launched_kernels():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the occupancy is computed for sm_90")
    found = kernels.launches("tiny", 64, ["rms_norm", "cross_entropy"])
    assert {(k["op"], k["mode"]) for k in found} == {
        ("rms_norm", "fwd"),
        ("rms_norm", "bwd"),
        ("cross_entropy", "fwd"),
        ("cross_entropy", "full"),
    }
    rows = kernels.measured(Path(_library.build_info()["library"]), "sm_90", found)
    assert rows and all(0 < row["occupancy"] <= 1 for row in rows)


@pytest.mark.gpu
def test_host_time_is_hidden_on_cuda():
    """A host that dawdles before each of its launches makes no kernel slower, and is seen in host_us."""
    x = torch.ones(2**20, device="cuda")

    def dawdling():
        for _ in range(4):
            time.sleep(2e-4)
            x.mul_(1.0)

    def quick():
        for _ in range(4):
            x.mul_(1.0)

    def waiting():
        return x.sum().item()

    clock = measure.Clock(x.device)
    calls = {f.__name__: lambda f=f: f for f in (dawdling, quick, waiting)}
    timings = measure.interleaved(calls, clock, budget_ms=2.0)
    assert timings["dawdling"].median == pytest.approx(timings["quick"].median, rel=0.5)
    assert timings["dawdling"].median < 0.2 and timings["dawdling"].host_us > 800
    assert timings["waiting"].waits and not timings["dawdling"].waits and not timings["quick"].waits


@pytest.mark.gpu
def test_bench_on_cuda(tmp_path):
    options = ("--device", "cuda", "--providers", "torch", "ours", "--shape", "tiny", "--tokens", "64")
    document, _ = run_benchmark(tmp_path, *options, "--workspace", "2", "1")
    assert not any("failure" in r for r in document["results"])
    heads = [r for r in document["results"] if r["op"] == "fused_linear_cross_entropy"]
    assert {r["provider"] for r in heads} == {"torch", "ours", "ours-1MiB"}
    for row in document["results"]:
        assert row["host_us"] > 0
        if row["floor_ms"]:
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"]["median"])
    assert len(document["rates"]["copies"]) >= 5


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
