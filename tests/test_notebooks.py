"""The notebooks run from end to end, and what they print was kept."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> bool:
    return bool(cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    make = runpy.run_path(str(FOLDER / "make.py"))
    for name in make["VARIABLES"]:
        # Restored afterwards; `execute` sets them for the kernel.
        monkeypatch.setenv(name, "")
    kept = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in code(kept)), f"run python notebooks/make.py {path.name}"
    again = make["execute"](path)
    for before, after in zip(code(kept), code(again), strict=True):
        assert printed(before) == printed(after), f"run python notebooks/make.py {path.name}"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3
