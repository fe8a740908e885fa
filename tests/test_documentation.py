"""Every block of code in the documentation runs as it stands.

A page's Python blocks run in order in one namespace, its shell blocks in a shell. A block that cannot run has
a comment on the line before it, `<!-- not run: reason -->`, and is checked for syntax alone; the report of
pytest lists the reasons. On generated pages of signatures the comment is `<!-- no block is run: reason -->`.
"""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"<!-- not run: ([^\n]+?) -->\s*\Z")
PAGE_MARKER = re.compile(r"<!-- no block is run: ([^\n]+?) -->")
COMMANDS = ("accelerate ", "make ", "pip ", "python ", "swift ", "torchrun ")


@dataclass
class Block:
    page: Path
    line: int
    language: str
    code: str
    # Why it does not run, or None.
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    whole = PAGE_MARKER.search(text)
    found = []
    for match in FENCE.finditer(text):
        marker = MARKER.search(text[: match.start()]) or whole
        line = text.count("\n", 0, match.start()) + 1
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(page, line, match["language"], code, marker and marker[1]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def skipping(blocks: list[Block]):
    return [
        pytest.param(
            block, id=str(block), marks=[pytest.mark.skip(reason=block.reason)] if block.reason else []
        )
        for block in blocks
    ]


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """A folder to write into, and everything that a page installs taken back."""
    monkeypatch.chdir(tmp_path)
    yield
    from liger_ops.compat import uninstall_liger_kernel_alias

    uninstall_liger_kernel_alias()
    if "liger_ops.transformers.trainer" in sys.modules:
        sys.modules["liger_ops.transformers.trainer"].uninstall()


PYTHON_PAGES = [page for page in PAGES if any(b.page == page and b.reason is None for b in of("python"))]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python(page, quiet):
    if page.name != "how-it-works.md":
        pytest.importorskip("transformers")
    namespace = {"__name__": "documentation"}
    for block in of("python"):
        if block.page == page and block.reason is None:
            # Lines of a traceback are those of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("block", skipping(of("bash", "sh")))
def test_shell(block, tmp_path):
    variables = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_syntax(block):
    if block.language == "python":
        signature = PAGE_MARKER.search(block.page.read_text())
        ast.parse(f"def {block.code.rstrip()}: ..." if signature else block.code)
    elif block.language in ("bash", "sh"):
        checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    elif block.language == "json":
        json.loads(block.code)
    elif block.language in ("yaml", "yml"):
        pytest.importorskip("yaml").safe_load(block.code)
    elif block.language == "":
        assert not block.code.startswith(COMMANDS), f"{block}: commands are in blocks of the language bash"


def test_documented_modules_can_be_run():
    """`python -m name` in a block that is not run names a module that there is, of ours."""
    import importlib.util

    for block in of("bash", "sh"):
        for name in re.findall(r"python -m ([\w.]+)", block.code):
            if name.split(".")[0] in ("liger_ops", "benchmarks"):
                assert importlib.util.find_spec(name), f"{block}: {name}"


def test_documented_files_exist():
    for block in of("bash", "sh"):
        for name in re.findall(r"\b(?:examples|docs|notebooks|tests)/[\w/]+\.(?:py|ipynb)\b", block.code):
            assert (ROOT / name).exists(), f"{block}: {name}"


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in of("bash", "sh"):
        for name in re.findall(r"^make ([\w-]+)", block.code, re.MULTILINE):
            assert name in targets, f"{block}: make {name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "notes.md"], ids=lambda page: page.name)
def test_tables_are_whole(page):
    """Every table has its ruler below its first row, and as many cells in each of its rows."""
    text = FENCE.sub("", page.read_text())
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = table.splitlines()
        assert len(rows) > 2 and re.fullmatch(r"\|(:?-+:?\|)+", rows[1].replace(" ", "")), rows[0]
        cells = len(re.findall(r"(?<!\\)\|", rows[0]))
        for row in rows:
            assert len(re.findall(r"(?<!\\)\|", row)) == cells, row


def test_blocks_were_found():
    assert len(of("python")) > 20 and len(of("bash")) > 10
    assert sum(block.reason is None for block in of("python")) >= 10
