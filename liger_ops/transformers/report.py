"""What a patch changed, what it left alone and why, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Patched:
    """One class or function that runs an operator now.

    Attributes:
        option: the option of ``patch`` that asked for it.
        target: name of the class or function.
        count: how many modules of the model run it; None for a class-wide patch.
        operator: what they run.
        already: whether an earlier patch had done it.
    """

    option: str
    target: str
    count: int | None
    operator: str
    already: bool = False


@dataclass(frozen=True)
class Skipped:
    """Something that was asked for and not done. ``count`` is the number of modules, where that applies."""

    option: str
    target: str
    count: int | None
    reason: str


@dataclass(repr=False)
class PatchReport:
    """The result of ``patch``. Prints as a table; ``undo()`` takes the patch back.

    Attributes:
        model: class name of the patched model, or None for a class-wide patch.
        model_type: the configuration's model type.
        patched, skipped: rows of the table.
        notes: sentences about effects beyond the model itself.
    """

    model: str | None
    model_type: str | None
    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _reverts: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore every forward, function and attribute that this patch replaced. A second call does nothing.

        What another report patched stays patched. Copies of the model made after the patch return to the
        stock forwards as well, unless they were patched themselves.
        """
        while self._reverts:
            self._reverts.pop()()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "patched": [asdict(row) for row in self.patched],
            "skipped": [asdict(row) for row in self.skipped],
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """The report in one line, for a log."""
        patched = [f"{row.option} ({row.target}{_times(row.count)})" for row in self.patched]
        skipped = [f"{row.option} ({row.target}{_times(row.count)}: {row.reason})" for row in self.skipped]
        line = f"{self._title()}: {', '.join(patched) or 'nothing was patched'}"
        return line + (f"; skipped {', '.join(skipped)}" if skipped else "")

    def _title(self) -> str:
        return f"liger_ops on {self.model or 'every model'} (model type {self.model_type})"

    def __str__(self) -> str:
        lines = [self._title()]
        rows = [
            (
                row.option,
                row.target,
                _count(row.count),
                row.operator + (" (patched before)" if row.already else ""),
            )
            for row in self.patched
        ]
        rows += [
            (row.option, row.target, _count(row.count), f"skipped: {row.reason}") for row in self.skipped
        ]
        if not rows:
            lines.append("  nothing was patched")
        else:
            header = ("option", "where", "modules", "runs")
            widths = [max(len(row[column]) for row in [header, *rows]) for column in range(3)]
            for option, target, count, runs in [header, *rows]:
                lines.append(f"  {option:<{widths[0]}}  {target:<{widths[1]}}  {count:>{widths[2]}}  {runs}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    # What a notebook or the interactive prompt shows.
    __repr__ = __str__


def _times(count: int | None) -> str:
    return "" if count is None else f" x{count}"


def _count(count: int | None) -> str:
    return "-" if count is None else str(count)
