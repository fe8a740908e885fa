"""docs/troubleshooting.md explains every message that the sources can produce, and no other."""

import re

import pytest

from tests.messages import ROOT, of_reports, of_sources

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Of PyTorch, about our operators.
FOREIGN = ("'_OpNamespace'", "CUDA error", "derivative for", "target must be in")


def patterns() -> dict[str, re.Pattern]:
    """The messages in headings; under "Reasons in a report", those in the text too."""
    quoted = [text for heading in re.findall(r"^### (.*)$", PAGE, re.MULTILINE) for text in _quoted(heading)]
    reasons = PAGE.split("## Reasons in a report")[1].split("\n## ")[0]
    quoted += [text for text in _quoted(reasons) if text not in quoted and " " in text and text[-1] != "("]
    return {text: re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL) for text in quoted}


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text.replace("\n", " "))


PATTERNS = patterns()
MESSAGES = of_sources() | of_reports()


def test_messages_were_found():
    assert len(MESSAGES) > 90
    assert any("must be 1-D of size" in text for text in MESSAGES.values())
    assert MESSAGES.keys() & {key for key in MESSAGES if key.startswith("setup.py")}


@pytest.mark.parametrize("place", MESSAGES)
def test_message_is_explained(place):
    text = MESSAGES[place]
    # A quoted command ends a quotation in the page.
    text = text.replace("`", "")
    assert any(pattern.search(text) for pattern in PATTERNS.values()), (
        f"{place} says {text!r}: docs/troubleshooting.md needs a heading for it"
    )


@pytest.mark.parametrize("heading", re.findall(r"^### (.*)$", PAGE, re.MULTILINE))
def test_explained_message_exists(heading):
    for quoted in _quoted(heading):
        if not quoted.startswith(FOREIGN):
            assert any(PATTERNS[quoted].search(text.replace("`", "")) for text in MESSAGES.values()), quoted
