"""The Python in README.md runs as it stands, and generated pages are current."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_readme_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        import liger_ops.transformers

        liger_ops.transformers.uninstall()


def test_blocks_were_found():
    assert len(BLOCKS) >= 3


def test_operators_page_is_current():
    generate = runpy.run_path(str(ROOT / "docs" / "generate_operators.py"))
    assert (ROOT / "docs" / "operators.md").read_text() == generate["page"](), "run python docs/generate_operators.py"
