"""The examples of examples/distributed, started as their first lines say, in two processes on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import training

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "distributed"


def torchrun(script, *options, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [*command, str(ROOT / "examples" / script), *options],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "liger::fused_linear_cross_entropy" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("options", [(), ("--tensor-parallel", "2")], ids=["fsdp2", "tensor_parallel"])
def test_fsdp2(options, tmp_path):
    torchrun("distributed/fsdp2.py", "--steps", "11", "--output", str(tmp_path), *options)
    assert (tmp_path / "checkpoint" / ".metadata").exists()


def test_finetune(tmp_path):
    """The demo in two processes: both runs, with losses that are the same and those of all processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "finetune.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest loss difference") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["processes"] for run in results["runs"].values()] == [2, 2]
    assert results["comparison"]["largest_loss_difference"] < 1e-4
    liger = results["runs"]["liger"]
    assert liger["losses"][-1] < liger["losses"][0]
    assert liger["liger_operator_calls_per_step"]["rms_norm"] == 5


def test_accelerate(tmp_path):
    """Accelerate's launcher starts several processes only on GPUs; this is what it starts."""
    options = ("--batch", "4", "--output", str(tmp_path))
    torchrun("accelerate_loop.py", *options, ACCELERATE_USE_CPU="true")
    training.assert_saved_whole(tmp_path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_configurations(name):
    """Accelerate's launcher accepts them, and makes its arguments of them."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
    script = str(ROOT / "examples" / "accelerate_loop.py")
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, script])
    )
    assert arguments.use_fsdp == (name == "fsdp2") and arguments.use_deepspeed == (name == "zero3")
    if name == "fsdp2":
        assert int(arguments.fsdp_version) == 2
        assert arguments.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer"
    if name == "zero3":
        assert int(arguments.zero_stage) == 3
