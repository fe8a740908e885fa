"""``python -m liger_ops``."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import liger_ops.functional as LF
from liger_ops import _library
from liger_ops.cli import doctor, info, main


def test_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", "liger_ops", "info"], capture_output=True, text=True, check=True
    )
    assert "liger::rms_norm" in finished.stdout


def test_bench_says_what_it_needs(monkeypatch):
    # The benchmark's modules may be there from other tests.
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match="pip install rich"):
        main(["bench"])


def test_other_commands_do_not_load_the_benchmark():
    code = "import sys; from liger_ops.cli import main; main(['info']); sys.exit('benchmarks' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_info_table(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(line for line in lines if line.split()[:1] == ["operator"])
    assert heading.split() == ["operator", "CPU", "CUDA", "Meta", "Autograd", "Autocast", "AutocastCPU"]
    for name in _library.operators():
        row = next(line for line in lines if line.split()[:1] == [f"liger::{name}"])
        assert len(row.split()) == 7
        # Each entry starts under its heading.
        for column in info.KEYS:
            assert row[heading.index(f" {column}") :].startswith((" yes", " -"))
        assert row.split()[1] == "yes"


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["operators"]) == set(_library.operators())
    assert found["versions"]["torch"] == torch.__version__
    assert found["operators"]["rms_norm"]["CPU"] is True
    assert found["build"]["version"]


def test_kernels_come_from_the_dispatcher():
    library = torch.library.Library("liger", "FRAGMENT")
    library.define("only_for_this_test(Tensor x) -> Tensor")
    library.impl("only_for_this_test", lambda x: x, "Meta")
    assert info.kernels("only_for_this_test") == {column: column == "Meta" for column in info.KEYS}
    library._destroy()


def test_doctor_passes(capsys):
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [check for check in found["checks"] if not check["ok"]] == []
    assert status == 0 and found["ok"] is True
    assert {case.operator for case in doctor.CASES} <= {check["check"] for check in found["checks"]}


def case_of(operator):
    return next(case for case in doctor.CASES if case.operator == operator)


def test_doctor_notices_wrong_numbers(capsys, monkeypatch):
    wrong = doctor.Case(
        "swiglu", lambda gate, up: LF.swiglu(up, gate), case_of("swiglu").reference, ((3, 4), (3, 4))
    )
    monkeypatch.setattr(doctor, "CASES", (wrong,))
    monkeypatch.setattr(doctor, "_check_compile", lambda device: "")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "swiglu on cpu: RuntimeError: relative error" in out


def test_doctor_notices_wrong_gradients_and_nan(monkeypatch):
    swiglu = case_of("swiglu")
    frozen = doctor.Case(
        "swiglu", lambda gate, up: LF.swiglu(gate.detach(), up) + 0 * gate, swiglu.reference, swiglu.shapes
    )
    nan = doctor.Case(
        "swiglu", lambda gate, up: LF.swiglu(gate, up) * float("nan"), swiglu.reference, swiglu.shapes
    )
    for case in (frozen, nan):
        with pytest.raises(RuntimeError, match="relative error"):
            doctor._check_numbers(case, "cpu")


def test_doctor_notices_graph_breaks(monkeypatch):
    def swiglu(gate, up):
        torch._dynamo.graph_break()
        return gate * up

    monkeypatch.setattr(LF, "swiglu", swiglu)
    torch.compiler.reset()
    result = doctor._timed("compile", "cpu", lambda: doctor._check_compile("cpu"))
    assert not result.ok and "graph_break" in result.detail


def test_doctor_notices_missing_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "kernels", lambda name: {column: column != "Meta" for column in info.KEYS})
    with pytest.raises(RuntimeError, match=r"no kernel for liger::.* \(Meta\)"):
        doctor._check_kernels()


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["nonesuch"])
    assert exit_status.value.code == 2
    assert "info" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [False, True])
def test_accuracy(capsys, monkeypatch, wrong):
    """Ours passes beside transformers' code; a larger error is named, and fails the command."""
    from liger_ops.cli import accuracy

    swiglu = next(case for case in accuracy.cases() if case.operator == "swiglu")
    if wrong:
        off = replace(swiglu, ours=lambda gate, up: LF.swiglu(gate, up) * 1.01)
        monkeypatch.setattr(accuracy, "cases", lambda: [off])
    else:
        monkeypatch.setattr(accuracy, "cases", lambda: [swiglu])
    assert main(["doctor", "--accuracy", "--json"]) == int(wrong)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is not wrong and found["versions"]["torch"] == torch.__version__
    assert {line["result"] for line in found["lines"]} == {"out", "dgate", "dup"}
    assert all(line["passed"] for line in found["lines"]) is not wrong
    assert main(["doctor", "--accuracy"]) == int(wrong)
    assert ("LARGER" in capsys.readouterr().out) is wrong
