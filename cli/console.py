"""The only file that prints. Data goes to stdout, everything else to stderr.

Text that users or media bring (names, paths, messages) is shown as it is: never read as markup, and control characters
are shown as escapes, so that a file name cannot drive the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from avstore.errors import AvstoreError
    from benchmarks.table import Table

EVERY = 30.0  # seconds between progress lines where stderr is no terminal


def visible(text: Any) -> str:
    """Text for a terminal: control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


class ReaderGone(Exception):
    """Whoever read stdout has stopped (`| head`). Not an OSError: a pipe to a child that breaks is another matter."""


def data(text: str) -> None:
    """A line of data."""
    try:
        print(text, file=sys.stdout)
    except BrokenPipeError as e:
        raise ReaderGone from e


def as_json(value: Any) -> None:
    """One JSON value on a line of its own."""
    data(json.dumps(value, ensure_ascii=True, allow_nan=False, default=str))


def say(text: str = "") -> None:
    """A line for the reader: progress, notes, summaries."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    say(f"\x1b[33m{text}\x1b[0m" if coloured(sys.stderr) else text)


def error(e: AvstoreError) -> None:
    """What, why, what to type next: a line each."""
    what = f"error: {visible(e.what)}"
    say(f"\x1b[31m{what}\x1b[0m" if coloured(sys.stderr) else what)
    if e.why:
        say(f"  why: {visible(e.why)}")
    if e.next:
        say(f"  next: {visible(e.next)}")


def traceback() -> None:
    """The traceback of the exception at hand, for --debug."""
    import traceback as module

    say(module.format_exc().rstrip())


def pairs(rows: Iterable[tuple[str, Any]]) -> None:
    """Name and value, a line each."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        data(f"{name:<{width}}  {visible(value)}")


def columns(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their names: drawn on a terminal, else separated by tabs, for cut, awk and spreadsheets."""
    if is_terminal(sys.stdout):
        _drawn(names, [[visible(v) for v in row] for row in rows])
        return
    data("\t".join(names))
    for row in rows:
        data("\t".join(visible(v) for v in row))


def table(value: Table) -> None:
    """A table of results with its notes, as aligned text: cells are never wrapped, on a terminal either."""
    cells = [[visible(c) for c in row] for row in value.cells()]
    widths = [max(len(r[i]) for r in [list(value.columns), *cells]) for i in range(len(value.columns))]
    data(visible(value.title))
    for row in [list(value.columns), ["-" * w for w in widths], *cells]:
        data("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip())
    for note in value.notes:
        data(visible(note))


def result(tables: Table | Sequence[Table], json: bool, markdown: bool) -> None:
    """What a bench found: one table or several, as JSON (a list of several), as Markdown, or drawn."""
    if json:
        as_json([t.to_json() for t in tables] if isinstance(tables, Sequence) else tables.to_json())
    elif isinstance(tables, Sequence):
        for t in tables:
            data(t.to_markdown()) if markdown else table(t)
    elif markdown:
        data(tables.to_markdown().rstrip())
    else:
        table(tables)


def _drawn(names: Sequence[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console(file=sys.stdout, no_color=not coloured(sys.stdout), highlight=False, markup=False, emoji=False)
    drawn = Drawn(box=SIMPLE_HEAD)
    for name in names:
        drawn.add_column(Text(name), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(c) for c in row))
    console.print(drawn)


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 100:
        return f"{s} s"
    if s < 6000:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Progress:
    """A bar on a terminal, else one plain line every 30 s: done/total, rate, times real time, ETA, failures.

    `media` in `update` is the seconds of media done so far; without it no `x real time` is shown.
    """

    def __init__(
        self, stage: str, unit: str, *, every: float = EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stage, self.unit, self.every, self.clock = stage, unit, every, clock
        self.start = self.last = clock()
        self.first = 0  # what was done before this command
        self.line = ""
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(file=sys.stderr, no_color=not coloured(sys.stderr), markup=False, emoji=False)
            text = TextColumn("{task.description}", markup=False)
            self.bar = Bar(text, BarColumn(bar_width=24), TextColumn("{task.fields[line]}", markup=False),
                           console=console, transient=True)  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=None, line="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage_is(self, stage: str, unit: str | None = None) -> None:
        """Another stage begins: rates start anew."""
        if stage != self.stage:
            self.stage, self.unit, self.first = stage, unit or self.unit, 0
            self.start = self.clock()
            if self.bar is not None:
                self.bar.update(self.task, description=stage, completed=0)

    def show(self, stage: str, done: int, total: int) -> None:
        """How far a bench is: what `progress=` of the benches is given."""
        self.stage_is(stage)
        self.update(done, total)

    def goes_on_from(self, done: int) -> None:
        """So much was there already: rates count from here."""
        self.first, self.start = done, self.clock()

    def update(self, done: int, total: int, *, media: float | None = None, failed: int = 0, extra: str = "") -> None:
        now = self.clock()
        self.line = self.text(done, total, now - self.start, media=media, failed=failed, extra=extra)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total or None, line=self.line)
        elif now - self.last >= self.every:
            self.last = now
            say(f"{time.strftime('%H:%M:%S')} {self.stage} {self.line}")

    def text(
        self, done: int, total: int, wall: float, *, media: float | None = None, failed: int = 0, extra: str = ""
    ) -> str:
        """`12/340 files, 3.1 files/s, 22 x real time, 1 failed, 2 min 10 s to go`."""
        rate = (done - self.first) / wall if wall >= 1 else 0.0
        parts = [f"{done}/{total} {self.unit}"] + ([f"{rate:.3g} {self.unit}/s"] if rate else [])
        if media is not None and wall >= 1:
            parts.append(f"{media / wall:.3g} x real time")
        if extra:
            parts.append(extra)
        if failed:
            parts.append(f"{failed} failed")
        if rate > 0 and done < total:
            parts.append(f"{duration((total - done) / rate)} to go")
        return ", ".join(parts)
