"""The messages that the sources raise, warn and log, as text with ``{}`` where a value goes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CHECK = re.compile(r"\bTORCH_CHECK[A-Z_]*\(|\bC10_THROW_ERROR\(|\bAT_ERROR\(")
_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')


def of_sources() -> dict[str, str]:
    """Message by place, ``file:line``."""
    found = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}:
            found |= {f"{path.relative_to(ROOT)}:{line}": text for line, text in _of_cpp(path.read_text())}
    for path in [ROOT / "setup.py", *sorted((ROOT / "liger_ops").rglob("*.py"))]:
        found |= {f"{path.relative_to(ROOT)}:{line}": text for line, text in _of_python(path.read_text())}
    return found


def _of_cpp(source: str) -> Iterator[tuple[int, str]]:
    for match in _CHECK.finditer(source):
        end = _closing(source, match.end())
        # Without the condition, which has literals of its own.
        arguments = source[match.end() : end]
        message = arguments[_first_comma(arguments) :]
        pieces, last = [], 0
        for literal in _LITERAL.finditer(message):
            between = message[last : literal.start()].strip(" \n,")
            pieces.append(("{}" if between else "") + literal[1].replace('\\"', '"'))
            last = literal.end()
        yield source.count("\n", 0, match.start()) + 1, "".join(pieces)


def _closing(source: str, start: int) -> int:
    depth, index = 1, start
    while depth:
        literal = _LITERAL.match(source, index)
        if literal:
            index = literal.end()
            continue
        depth += {"(": 1, ")": -1}.get(source[index], 0)
        index += 1
    return index - 1


def _first_comma(arguments: str) -> int:
    depth, index = 0, 0
    while index < len(arguments):
        literal = _LITERAL.match(arguments, index)
        if literal:
            index = literal.end()
            continue
        character = arguments[index]
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            return index
        index += 1
    return 0


def _of_python(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    indirect = False
    for node in ast.walk(tree):
        message = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "warnings.warn",
            "logger.warning",
            "sys.exit",
        }:
            message = node.args[0] if node.args else None
        if message is None:
            continue
        text = _text(message)
        if text.replace("{}", "").strip():
            yield node.lineno, text
        else:
            indirect = True
    if indirect:
        # The text comes from a function of the module that returns it.
        for node in ast.walk(tree):
            if isinstance(node, ast.Return) and node.value is not None:
                text = _text(node.value)
                if len(text.replace("{}", "").split()) > 3:
                    yield node.lineno, text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}"
    return "{}"


def of_reports() -> dict[str, str]:
    """Why the patching engine leaves something alone, by place."""
    found = {}
    folder = ROOT / "liger_ops" / "transformers"
    for path in [folder / "parts.py", folder / "recognize.py", *sorted((folder / "forwards").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            texts = []
            if isinstance(node, ast.Return) and node.value is not None:
                texts = [node.value]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"_because", "self._skip"}:
                texts = node.args[:1]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                texts = [node.value]
            for text in map(_text, texts):
                if len(text.replace("{}", "").split()) > 1:
                    found[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return found
