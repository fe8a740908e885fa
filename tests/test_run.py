"""``python -m liger_ops run``: scripts that know nothing of liger_ops run on its operators."""

import importlib.util
import subprocess
import sys
from multiprocessing import spawn

import pytest
import torch

from liger_ops.cli import main
from liger_ops.compat import uninstall_liger_kernel_alias

if importlib.util.find_spec("liger_kernel") is not None:
    pytest.skip("the real liger-kernel is installed", allow_module_level=True)

needs_trainer = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "accelerate"))), reason="needs the Trainer"
)


def run(*arguments, launcher=(sys.executable, "-m", "liger_ops", "run"), **options):
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture
def in_process(monkeypatch):
    """``main`` may change what a process of its own would: everything is put back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    yield
    uninstall_liger_kernel_alias()
    sys.modules.pop("liger_kernel", None)
    if "liger_ops.transformers.trainer" in sys.modules:
        sys.modules["liger_ops.transformers.trainer"].uninstall()


SHOW = """\
import os, sys
print(__name__, os.path.realpath(__file__), sys.modules["__main__"].__dict__ is globals())
print(sys.argv)
print(sys.path[0], os.getcwd())
import neighbour
"""


@pytest.fixture
def folder(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "neighbour.py").write_text("print('neighbour')")
    (scripts / "show.py").write_text(SHOW)
    return scripts


@pytest.mark.parametrize("script", ["link.py", pytest.param("scripts/show.py", marks=pytest.mark.slow)])
def test_as_python_runs_a_script(folder, script):
    cwd = folder.parent
    (cwd / "link.py").symlink_to(folder / "show.py")
    arguments = (script, "--json", "-m", "x", "--", "-h")
    done = run(*arguments, cwd=cwd)
    plain = run(*arguments, launcher=[sys.executable], cwd=cwd)
    assert plain.returncode == 0 and "neighbour" in plain.stdout
    assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr


def test_as_python_runs_a_folder(folder):
    (folder / "show.py").rename(folder / "__main__.py")
    done, plain = run(folder, "a"), run(folder, "a", launcher=[sys.executable])
    lines, expected = done.stdout.splitlines(), plain.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[1:] == expected[1:]


def test_as_python_runs_a_module(folder):
    arguments = ("-m", "show", "--json", "-m", "x")
    done = run(*arguments, cwd=folder)
    plain = run(*arguments, launcher=[sys.executable], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    "code, status, error",
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit()", None, ""),
        ("import sys; sys.exit('gone wrong')", "gone wrong", ""),
        ("raise ValueError('gone wrong')", 1, "ValueError"),
        ("print(", 1, "SyntaxError"),
    ],
)
def test_exit_status(tmp_path, in_process, code, status, error):
    script = tmp_path / "script.py"
    script.write_text(code)
    with pytest.raises(BaseException) as raised:
        main(["run", str(script)])
    # What the interpreter makes of it: an integer is the status, anything else is printed, with status 1.
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == status
    else:
        assert status == 1 and type(raised.value).__name__ == error


def test_no_exit_is_success(tmp_path, in_process):
    script = tmp_path / "script.py"
    script.write_text("pass")
    assert main(["run", str(script)]) == 0


def test_nothing_to_run(tmp_path, in_process, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["run"])
    assert raised.value.code == 2 and "a script or -m module is required" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="none.py"):
        main(["run", str(tmp_path / "none.py")])
    with pytest.raises(SystemExit):
        main(["run", "-h"])
    assert "torchrun --nproc-per-node 8 -m liger_ops run script.py" in capsys.readouterr().out


def test_real_package_wins_unless_asked_otherwise(tmp_path, in_process, capsys):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import liger_kernel; print(liger_kernel.__spec__.origin)")
    main(["run", str(script)])
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "liger_kernel" / "__init__.py")
    assert "liger-kernel is installed" in printed.err and "--override" in printed.err
    main(["run", "--override", str(script)])
    printed = capsys.readouterr()
    assert printed.out.strip() == "liger_ops" and not printed.err


# What a user of Liger Kernel has, and a count of the operators that ran.
COUNT = """
import collections, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Count(TorchDispatchMode):
    calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "liger":
            self.calls[func.overloadpacket.__name__.removesuffix("_forward")] += 1
        return func(*args, **(kwargs or {}))

def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))

def report(count):
    import sys
    assert {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"} <= set(count.calls), count.calls
    print("operators ran")
"""

MONKEY_PATCH = f"""{COUNT}
from liger_kernel.transformers import apply_liger_kernel_to_llama
apply_liger_kernel_to_llama()
ids = torch.arange(12).view(2, 6)
with Count() as count:
    tiny_model().train()(input_ids=ids, labels=ids).loss.backward()
report(count)
"""

CLASSES = f"""{COUNT}
import torch.nn as nn
from types import SimpleNamespace
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerRMSNorm, LigerSwiGLUMLP
from liger_kernel.transformers.rope import liger_rotary_pos_emb

config = SimpleNamespace(hidden_size=16, intermediate_size=32, hidden_act="silu")
norm, mlp, head = LigerRMSNorm(16), LigerSwiGLUMLP(config), nn.Linear(16, 64, bias=False)
x = torch.randn(2, 2, 6, 16)
cos = sin = torch.ones(1, 6, 16)
with Count() as count:
    q, k = liger_rotary_pos_emb(x, x, cos, sin)
    loss = LigerFusedLinearCrossEntropyLoss()(head.weight, mlp(norm(q + k)).view(-1, 16), torch.arange(24))
    loss.backward()
report(count)
"""

TRAINER = f"""{COUNT}
import sys
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=2, use_liger_kernel=True, use_cpu=True, report_to=[],
    save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
rows = [dict(input_ids=torch.arange(6), labels=torch.arange(6)) for _ in range(8)]
trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
with Count() as count:
    trainer.train()
report(count)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

# One model: as transformers' own integration patches it, and loaded by the class of Liger.
ONE_MODEL = f"""{COUNT}
import sys
from transformers.utils import is_liger_kernel_available
from liger_kernel.transformers import AutoLigerKernelForCausalLM, _apply_liger_kernel_to_instance
assert is_liger_kernel_available()
first = tiny_model().train()
first.save_pretrained(sys.argv[1])
_apply_liger_kernel_to_instance(model=first, rope=True)
second = AutoLigerKernelForCausalLM.from_pretrained(sys.argv[1], swiglu=True).train()
ids = torch.arange(12).view(2, 6)
for model in first, second:
    with Count() as count:
        model(input_ids=ids, labels=ids).loss.backward()
    report(count)
    count.calls.clear()
"""

# The way of frameworks that set a class's forward themselves.
LCE_FORWARD = f"""{COUNT}
from transformers.models.llama import modeling_llama
from liger_kernel.transformers.model.llama import lce_forward
model = tiny_model().train()
ids = torch.arange(12).view(2, 6)
stock = model(input_ids=ids, labels=ids).loss
modeling_llama.LlamaForCausalLM.forward = lce_forward
with Count() as count:
    output = model(input_ids=ids, labels=ids)
assert output.logits is None and abs(output.loss - stock) < 1e-5
assert set(count.calls) == {{"fused_linear_cross_entropy"}}
print("operators ran")
"""


SPAWN = """
import sys
import torch
from liger_kernel.transformers import LigerRMSNorm
from liger_kernel.ops import LigerSiLUMulFunction

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return LigerRMSNorm(4)(torch.full((4,), 2.0 + index)).detach()

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context=sys.argv[1])
    print([batch.mean().round().item() for batch in loader])
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_processes_started_anew(tmp_path, method):
    script = tmp_path / "train.py"
    script.write_text(SPAWN)
    done = run(script, method)
    assert done.returncode == 0 and done.stdout.strip() == "[1.0, 1.0]", done.stderr


def test_script_with_classes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(CLASSES)
    done = run(script)
    assert "operators ran" in done.stdout, done.stderr


@needs_trainer
@pytest.mark.parametrize(
    "code",
    [MONKEY_PATCH, TRAINER, ONE_MODEL, LCE_FORWARD],
    ids=["monkey_patch", "trainer", "one_model", "lce_forward"],
)
def test_script(tmp_path, code):
    script = tmp_path / "train.py"
    script.write_text(code)
    done = run(script, tmp_path / "out")
    assert "operators ran" in done.stdout, done.stderr


@needs_trainer
def test_verbose(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    done = run("--verbose", script, tmp_path / "out")
    assert "swiglu (LlamaMLP x1)" in done.stderr, done.stderr


@pytest.mark.slow
@needs_trainer
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(script, tmp_path / "out", launcher=[*torchrun, "-m", "liger_ops", "run"])
    assert done.returncode == 0 and done.stdout.count("operators ran") == 2, done.stderr
