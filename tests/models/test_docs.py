"""The page about models is made from the table of families."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_models_page_is_current():
    generate = runpy.run_path(str(DOCS / "generate_models.py"))
    assert (DOCS / "models.md").read_text() == generate["page"](), "run python docs/generate_models.py"
