"""Pages that are made from the sources are current."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_operators_page_is_current():
    generate = runpy.run_path(str(ROOT / "docs" / "generate_operators.py"))
    assert (ROOT / "docs" / "operators.md").read_text() == generate["page"](), (
        "run python docs/generate_operators.py"
    )
