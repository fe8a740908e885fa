"""The examples run from end to end. `finetune.py` with `use_liger=True` really executes the operators."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "accelerate", "tokenizers", "matplotlib", "rich"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune.py"
OPERATORS = {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"}


def finetune(output, *options):
    command = [sys.executable, str(EXAMPLE), "--quick", "--device", "cpu", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    done = finetune(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, json.loads((folder / "results.json").read_text())


def test_both_runs_train_alike(quick_run):
    _, _, results = quick_run
    plain, liger = results["runs"]["plain"], results["runs"]["liger"]
    assert len(plain["losses"]) == len(liger["losses"]) == results["settings"]["steps"]
    assert plain["losses"][-1] < plain["losses"][0]
    for a, b in zip(plain["losses"], liger["losses"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert results["comparison"]["largest_loss_difference"] < 1e-3


def test_only_the_liger_run_executes_operators(quick_run):
    _, _, results = quick_run
    assert results["runs"]["plain"]["liger_operator_calls_per_step"] == {}
    calls = results["runs"]["liger"]["liger_operator_calls_per_step"]
    for op in OPERATORS:
        # The fused loss may compute its gradients in forward, under a name of its own.
        assert any(name.startswith(op) for name in calls), op
    assert calls["rms_norm_backward"] == calls["rms_norm"]
    layers = results["settings"]["config"]["num_hidden_layers"]
    assert calls["rms_norm"] == 2 * layers + 1
    assert calls["rope"] == calls["swiglu"] == layers


def test_what_is_shown_and_written(quick_run):
    folder, printed, results = quick_run
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for variant, run in results["runs"].items():
        assert run["tokens_per_second"] > 0, variant
        assert run["peak_memory_mib"] > 0, variant
    assert results["environment"]["versions"]["torch"]
    for words in ("tokens/s", "peak memory", "loss, last step", "largest loss difference"):
        assert words in printed


def test_a_local_model_and_text(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        from _text import END_OF_TEXT, train_tokenizer
    finally:
        sys.path.remove(str(EXAMPLE.parent))
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    (text / "b.bin").write_bytes(b"\xff\xfe not UTF-8 \xff")
    model = tmp_path / "model"
    tokenizer = train_tokenizer([(text / "a.txt").read_text()], 300, tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(model)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=300,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    done = finetune(tmp_path / "out", "--model", str(model), "--dataset", str(text), "--length", "16")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["model"] == str(model)
    assert results["runs"]["liger"]["liger_operator_calls_per_step"]["rms_norm"] == 3


def test_hub_names_without_datasets_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    from _text import load_documents

    with pytest.raises(SystemExit, match="pip install datasets"):
        load_documents("no-such-owner/no-such-text", "text", 1000)


@pytest.mark.parametrize(
    "packages, script",
    [
        (["accelerate"], ["accelerate_loop.py", "--batch", "16"]),
        (["lightning"], ["lightning_module.py", "--batch", "16", "--accelerator", "cpu"]),
        (["trl", "datasets"], ["trl_sft.py", "--steps", "5", "--batch", "4", "--cpu"]),
        (["trl", "datasets"], ["trl_sft.py", "--steps", "5", "--batch", "4", "--cpu", "--head", "liger"]),
    ],
    ids=["accelerate", "lightning", "trl", "trl, our head"],
)
def test_small_examples(packages, script, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    command = [sys.executable, str(EXAMPLE.parent / script[0]), *script[1:], "--output", str(tmp_path)]
    # A GPU would make a difference only where the example has no option for it.
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rms_norm +LlamaRMSNorm +5 +liger::rms_norm", done.stdout)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 2000


def run_example(script, *arguments):
    command = [sys.executable, str(EXAMPLE.parent / script), *map(str, arguments)]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)


def test_custom_model(tmp_path):
    done = run_example("custom_model.py", "--epochs", "1", "--batch", "16", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "model.pt").exists()


def test_custom_model_computes_what_plain_pytorch_does(monkeypatch):
    import importlib
    from types import SimpleNamespace

    import torch

    names = ("add_rms_norm", "rope", "swiglu", "fused_linear_cross_entropy")
    modules = [importlib.import_module(f"tests.reference.{name}") for name in names]
    plain = SimpleNamespace(**{name: f for module in modules for name, f in vars(module).items()})
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import custom_model

    torch.manual_seed(0)
    model, ids = custom_model.Decoder(), torch.randint(custom_model.VOCABULARY, (2, 16))
    results = []
    for functions in (custom_model.LF, plain):
        monkeypatch.setattr(custom_model, "LF", functions)
        loss = model.loss(ids)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_compiled_graph():
    done = run_example("compiled_graph.py", "--graph")
    assert done.returncode == 0, done.stderr
    for line in (
        r"forward:\n.*fused_linear_cross_entropy_forward.default  x1\n  liger.rms_norm.default  x1",
        r"backward:\n(.*\n)*  liger.swiglu_backward.default  x1",
        r"torch.export:\n  liger.fused_linear_cross_entropy.default  x1",
        r"torch.ops.liger.swiglu.default\(",
    ):
        assert re.search(line, done.stdout), line
