"""What `make docs` does beside MkDocs: files from outside `docs/`, and formulae.

README.md, CONTRIBUTING.md, CHANGELOG.md, benchmarks/README.md and the notebooks become pages. Links to other
files of the repository lead to pages that show them, so that the site is whole without a network. Formulae
become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import base64
import html
import json
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

# Page by file of the repository.
INCLUDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        f"notebooks/{path.name}": f"notebooks/{path.stem}.md"
        for path in sorted(ROOT.glob("notebooks/*.ipynb"))
    },
}
ORIGINS = {page: origin for origin, page in INCLUDED.items()}
# In Markdown, and in HTML within it.
LINKS = (
    re.compile(r"(?<!`)(\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(\))"),
    re.compile(r"""(<[^>]*\b(?:href|src|srcset)=")(?!\w+:|#|/)([^"\s#]+)(#[^"\s]*)?(")"""),
)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LANGUAGES = {
    ".py": "python",
    ".json": "json",
    ".cpp": "c++",
    ".h": "c++",
    ".cu": "c++",
    ".cuh": "c++",
    ".toml": "toml",
}


def on_files(files, config):
    shown: set[str] = set()
    for origin, page in INCLUDED.items():
        markdown, targets = relinked(text_of(origin), origin, page)
        shown |= targets
        files.append(File.generated(config, page, content=markdown))
    for file in files.documentation_pages():
        if file.src_uri not in ORIGINS:
            shown |= relinked(file.content_string, f"docs/{file.src_uri}", file.src_uri)[1]
    for target in sorted(shown):
        files.append(File.generated(config, page_of(target), content=showing(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri in ORIGINS or uri.startswith("source/"):
        return markdown
    return relinked(markdown, f"docs/{uri}", uri)[0]


def on_page_content(content, page, config, files):
    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return re.sub(
        r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', formula, content, flags=re.DOTALL
    )


def relinked(markdown: str, origin: str, page: str) -> tuple[str, set[str]]:
    """The text of a file of the repository with links that fit its place on the site, and what they show."""
    shown: set[str] = set()

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        if target.startswith("..") or not (ROOT / target).exists():
            return match[0]
        if target in INCLUDED:
            place = INCLUDED[target]
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        else:
            shown.add(target)
            place = page_of(target)
        return (
            f"{match[1]}{posixpath.relpath(place, posixpath.dirname(page) or '.')}{match[3] or ''}{match[4]}"
        )

    def relink(text: str) -> str:
        for pattern in LINKS:
            text = pattern.sub(link, text)
        return text

    pieces, last = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [relink(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*pieces, relink(markdown[last:])]), shown


def page_of(target: str) -> str:
    return f"source/{target}.md"


def showing(target: str) -> str:
    """A page with the text of a file, or the files of a folder."""
    path = ROOT / target
    lines = ["---", "search:", "  exclude: true", "---", "", f"# {target}", ""]
    if path.is_dir():
        return "\n".join(
            [*lines, *(f"- `{entry.name}`" for entry in sorted(path.iterdir()) if entry.is_file())]
        )
    language = LANGUAGES.get(path.suffix, "text")
    return "\n".join([*lines, f"````{language}", path.read_text().rstrip(), "````", ""])


def text_of(origin: str) -> str:
    path = ROOT / origin
    return notebook(json.loads(path.read_text())) if path.suffix == ".ipynb" else path.read_text()


def notebook(content: dict) -> str:
    """Cells and their outputs as Markdown."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += map(output, cell["outputs"])
    return "\n\n".join(parts) + "\n"


def output(found: dict) -> str:
    if found["output_type"] == "stream":
        return printed("".join(found["text"]))
    if found["output_type"] == "error":
        raise ValueError(f"a cell failed: {found['ename']}: {found['evalue']}")
    data = found["data"]
    if "image/png" in data:
        picture = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f'<img alt="output of the cell above" src="data:image/png;base64,{picture}">'
    return printed("".join(data["text/plain"]))


def printed(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f'<div class="output" markdown>\n\n```text\n{text}\n```\n\n</div>' if text else ""


assert os.sep == "/", "paths of the site are made with posixpath"
