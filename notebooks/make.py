"""Runs the notebooks and keeps what they print.

    python notebooks/make.py                 # run all in place
    python notebooks/make.py trainer.ipynb   # or some

Each runs in its folder, on the CPU, with the sources of this checkout. `tests/test_notebooks.py` runs them
again and fails when one raises.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent

# One setting everywhere, so that outputs are the same again.
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
}


def execute(path: Path, timeout: int = 120) -> nbformat.NotebookNode:
    """The notebook with new outputs. Raises CellExecutionError where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(VARIABLES)
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for cell in notebook.cells:
        # Times, which differ from run to run.
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not is_noise(output)]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def is_noise(output: nbformat.NotebookNode) -> bool:
    """Empty lines of progress bars, and tqdm's wish for another package."""
    text = output.get("text", "-")
    return not text.strip() or "TqdmWarning" in text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args()
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
