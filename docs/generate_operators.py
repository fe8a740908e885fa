"""Writes docs/operators.md from the operators' schemas and the docstrings of `liger_ops.functional`.

    python docs/generate_operators.py

`tests/test_docs.py` fails when the page is not what this prints.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import torch

import liger_ops.functional as LF
from liger_ops import _library
from liger_ops.cli.info import KEYS

WIDTH = 100
PAGE = Path(__file__).resolve().parent / "operators.md"

INTRODUCTION = f"""\
# Operators

<!-- no block is run: signatures and schemas, which tests/test_docs.py compares with the sources -->

Every operator is `torch.ops.liger.<name>` and, with the tensors a model wants and nothing else, a function of
`liger_ops.functional`. Written by `python docs/generate_operators.py` from the schemas and docstrings.

What holds for all of them:

- Kernels for {", ".join(KEYS)}; float64, float32,
  bfloat16 and float16; any number of rows, any width and alignment. `torch.compile(fullgraph=True)`,
  `torch.export` and CUDA graphs go through them.
- Results are freshly allocated. They alias neither an input nor each other, and no input is modified
  (operators whose name ends in `_` are the exception that the schema declares).
- Sums run in float32 (float64 for float64) in an order that depends on shapes and device alone, without
  atomics: results are bitwise the same from run to run, and `torch.use_deterministic_algorithms(True)`
  changes nothing.
- Nothing is read back to the host, and nothing waits for the device.
- Arguments are checked before anything runs, by one function for all devices. `TypeError` for a dtype,
  `ValueError` for a shape, a device or an option, `NotImplementedError` for a derivative that does not exist.
  Running out of memory raises `torch.OutOfMemoryError` and leaves the process usable.
- The backward operators have no derivative: a second derivative raises. Of `torch.func`, the transforms of reverse
  mode work (`grad`, `vjp`, `jacrev`), and those of forward mode raise.
- Under autocast, operators keep the dtypes they are given, except for the products of fused linear cross
  entropy.
"""

# Functions in the order of the module; their operators have the same name.
FUNCTIONS = [
    function
    for name, function in vars(LF).items()
    if inspect.isfunction(function) and function.__module__ == LF.__name__ and not name.startswith("_")
]
SECTIONS = ("Args", "Returns", "Raises", "Rounding", "Saves", "Moves")


def call(head: str, arguments: list[str], results: str) -> str:
    """`head(arguments) -> results`, broken between arguments where it does not fit a line."""
    text = f"{head}({', '.join(arguments)}) -> {results}"
    if len(text) <= WIDTH:
        return text
    if len(results) > WIDTH - 5 and results.startswith("("):
        results = "\n".join(["(", *wrapped(results[1:-1].split(", ")), ")"])
    return "\n".join([f"{head}(", *wrapped(arguments), f") -> {results}"])


def wrapped(arguments: list[str]) -> list[str]:
    unbroken = ", ".join(argument.replace(" ", "\0") for argument in arguments)
    lines = textwrap.wrap(unbroken, WIDTH - 4, break_on_hyphens=False, break_long_words=False)
    return [f"    {line}".replace("\0", " ") for line in lines]


def schema(name: str) -> str:
    text = str(getattr(torch.ops.liger, name).default._schema).replace("liger::", "", 1)
    # All seventeen digits of a default are more than it was given with.
    text = re.sub(r"=(\d+\.\d*(?:e-\d+)?)", lambda m: f"={float(m[1])!r}", text)
    arguments, results = text.split(") -> ", 1)
    head, arguments = arguments.split("(", 1)
    return call(head, arguments.split(", "), results)


def signature(function) -> str:
    found = inspect.signature(function)
    arguments = [str(parameter).replace("torch.", "") for parameter in found.parameters.values()]
    keyword_only = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in found.parameters.values()]
    if any(keyword_only):
        arguments.insert(keyword_only.index(True), "*")
    # Annotations are kept as text, and print with quotes.
    arguments = [re.sub(r": '([^']*)'", r": \1", argument) for argument in arguments]
    return call(function.__name__, arguments, str(found.return_annotation).replace("torch.", ""))


def belongs_to(operator: str) -> list[str]:
    """The operators that make up a public one: itself, its backward, and what runs between them."""
    names = [function.__name__ for function in FUNCTIONS]
    owner = {
        name: max((n for n in names if name == n or name.startswith(f"{n}_")), key=len)
        for name in _library.operators()
    }
    return sorted((name for name, public in owner.items() if public == operator), key=lambda n: (len(n), n))


def split(docstring: str) -> tuple[str, dict[str, str]]:
    """The description, and the sections by name."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    sections = {
        name: textwrap.dedent(body).strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return parts[0].strip(), sections


def markdown_math(text: str) -> str:
    """`.. math::` blocks as dollar blocks."""

    def block(match: re.Match) -> str:
        return f"$$\n{textwrap.dedent(match[1]).strip()}\n$$\n"

    return re.sub(r"^\.\. math::\s*((?:.*\n?)(?:^[ \t]+.*\n?)*)", block, text, flags=re.MULTILINE)


def entries(section: str) -> list[str]:
    """`name: text` entries as list items."""
    items: list[str] = []
    for line in section.splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    return [re.sub(r"^([\w, ]+): ", lambda m: f"- `{m[1].replace(', ', '`, `')}`: ", item) for item in items]


def operator(function) -> str:
    name = function.__name__
    description, sections = split(function.__doc__)
    lines = [f"## {name}", "", markdown_math(description).strip(), ""]
    lines += ["```python", signature(function), "```", ""]
    lines += entries(sections["Args"])
    lines += ["", f"Returns {sections['Returns'][0].lower() + sections['Returns'][1:]}", ""]
    lines += ["Raises", "", *entries(sections["Raises"]), ""]
    for title, key in (
        ("Rounding", "Rounding"),
        ("Saved for backward", "Saves"),
        ("Memory traffic", "Moves"),
    ):
        lines += [f"**{title}.** {sections[key]}", ""]
    lines += ["```text", *(schema(part) for part in belongs_to(name)), "```", ""]
    return "\n".join(lines)


def page() -> str:
    return "\n".join([INTRODUCTION, *(operator(function) for function in FUNCTIONS)])


if __name__ == "__main__":
    PAGE.write_text(page())
