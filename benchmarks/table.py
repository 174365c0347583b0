"""A table of results: columns, rows of plain values, notes. It becomes JSON or Markdown here; only the command line
prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows are dicts; a column that a row lacks is empty. Numbers stay numbers until they are shown. spreads: columns
    in which two numbers are a mean and its spread; elsewhere two numbers are two values (of two splits, say)."""

    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    spreads: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The rows as text, in the order of the columns."""
        return [[shown(row.get(c), c in self.spreads) for c in self.columns] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """`Table(**value)` with tuples for lists; `spreads` only where there are some."""
        out = {"title": self.title, "columns": list(self.columns), "rows": self.rows, "notes": list(self.notes)}
        return {**out, "spreads": list(self.spreads)} if self.spreads else out

    def to_markdown(self) -> str:
        """A GitHub table with its notes, for docs/results.md."""
        lines = [_line(self.columns), _line("---" for _ in self.columns), *(_line(r) for r in self.cells())]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", *self.notes] if self.notes else [])]) + "\n"


def shown(value: Any, spread: bool = False) -> str:
    """A value as a cell: fractions with three decimals, several with commas; spread: two as `mean ± spread`."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if spread and isinstance(value, tuple | list) and len(value) == 2:
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    if isinstance(value, tuple | list):
        return ", ".join(shown(v) for v in value)
    return str(value)


def _line(cells: Sequence[str] | Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
