"""The site of the documentation: built without a warning, whole by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("mkdocs", "material", "latex2mathml"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    options = dict(cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): path.read_text() for path in sorted(site.rglob("*.html"))}


def test_pages(pages):
    assert {"index.html", "install.html", "troubleshooting.html", "notebooks/trainer.html"} <= pages.keys()
    assert "source/benchmarks/results/ops_h100.json.html" in pages


def test_nothing_comes_from_elsewhere(site, pages):
    """Links lead away; scripts, styles, fonts and pictures do not come from there."""
    loading = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//""")
    styles = re.compile(
        r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*href=["']?(?:https?:)?//"""
    )
    for name, text in pages.items():
        assert not loading.search(text) and not styles.search(text), name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text()), path


def test_links_and_pictures_exist(site, pages):
    for name, text in pages.items():
        if name == "404.html":
            continue
        for target in re.findall(r"""(?:href|src)=["']([^"'#?]+)""", text):
            if not re.match(r"\w+:|//", target):
                assert (site / Path(name).parent / target).resolve().exists(), f"{name} -> {target}"


def test_anchors_exist(site, pages):
    for name, text in pages.items():
        for target, anchor in re.findall(r"""href=["']([^"'#?:]*)#([^"']+)""", text):
            if name == "404.html":
                continue
            page = (site / Path(name).parent / target).resolve() if target else site / name
            if page.suffix == ".html" and page.exists():
                ids = re.findall(
                    r"""\bid=["']?([^"'\s>]+)""", pages[page.relative_to(site.resolve()).as_posix()]
                )
                assert anchor in ids, f"{name} -> {target}#{anchor}"


def test_formulae_are_drawn(pages):
    assert "<math" in pages["operators.html"]
    assert "arithmatex" not in pages["operators.html"] and "\\frac" not in pages["operators.html"]
