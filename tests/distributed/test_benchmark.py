"""benchmarks/fsdp.py on the CPU: every part, and a case that does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="benchmarks print through rich")
pytest.importorskip("matplotlib", reason="the plot")

ROOT = Path(__file__).resolve().parents[2]


def launch(processes, path, *options):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", "benchmarks/fsdp.py", "--device", "cpu", "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_two_processes(tmp_path):
    options = ("--providers", "transformers", "ours", "--warm-up", "1", "--steps", "2")
    # The second length of the sweep asks for terabytes.
    lengths = ("--sweep-lengths", "8", str(10**11))
    document = launch(2, tmp_path / "two.json", *options, *lengths)
    rows = document["rows"]
    assert document["processes"] == 2 and len(rows) == 4 + 3 + 4
    for row in rows:
        if row["length"] == 10**11:
            assert row["failure"] == "out of memory"
            continue
        assert "failure" not in row, row
        if row["provider"] != rows[0]["provider"] and "loss_difference" in row:
            assert row["loss_difference"] < 1e-5
    ours = next(r for r in rows if r["group"] == "vocab_parallel" and r["provider"] == "ours")
    gathered = next(r for r in rows if r["group"] == "vocab_parallel" and r["provider"] == "gathered")
    assert ours["gradient_norms"] == pytest.approx(gathered["gradient_norms"], rel=1e-5)

    command = [sys.executable, "-m", "benchmarks.fsdp", "--markdown", str(tmp_path / "two.json")]
    command += ["--plot", str(tmp_path / "plot.png")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "**liger-ops**" in printed and "out of memory" in printed
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_time_limit(tmp_path):
    options = ("--providers", "ours", "--parts", "main", "--time-limit", "0")
    document = launch(1, tmp_path / "one.json", *options)
    assert {row["failure"] for row in document["rows"]} == {"not run: time limit"}
