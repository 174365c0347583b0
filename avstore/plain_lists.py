"""Plain lists: CSV, TSV, JSONL or text with a path per row, turned into rows; every further column is kept as text.

Reads only the list file; which file a row means is `avstore.lists`' matter.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from avstore.errors import UsageError
from avstore.official_lists import Row, read_lines, read_text, time_of

Find = Callable[[str, str], str | None]  # (name, file:line) -> the file under the root, encoded, or None
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "video", "video_path")


def plain(path: Path, find: Find) -> Iterator[Row]:
    """Rows of a CSV, TSV, JSONL or text file; where no header names a path column, one path a line, or `path label`,
    whichever makes the first line a file that `find` knows."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _jsonl(path)
        return
    lines = read_lines(path)
    if not lines:
        raise UsageError(f"the list {path} is empty", "", "it needs a header with `path`, then one row per video")
    delimiters = ["\t"] if path.suffix.lower() == ".tsv" else [",", "\t", ";", "|"]
    for delimiter in delimiters:
        try:
            header = [c.strip() for c in next(csv.reader([lines[0][1].rstrip("\r")], delimiter=delimiter), [])]
        except csv.Error:
            continue
        column = _path_column(path, header)
        if column is not None:
            if "" in header or len(set(header)) != len(header):
                raise UsageError(f"{path.name}: a column has no name, or two have one", str(header), "name each once")
            yield from _table(path, delimiter, header, column)
            return
    where = f"{path.name}:{lines[0][0]}"
    for pattern in (r"(.+)", r"([^,]+),([^,]+)", r"([^\t]+)\t([^\t]+)", r"(.+?)\s+(\S+)"):
        found = re.fullmatch(pattern, lines[0][1].strip())
        if found and find(found[1], where) is not None:
            for n, line in lines:
                cells = re.fullmatch(pattern, line.strip())
                if cells is None:
                    raise UsageError(f"{path.name}:{n} is not like the first line", repr(line[:120]), "give a header")
                columns: dict[str, str | None] = {"label": cells[2]} if cells.lastindex == 2 else {}
                yield Row(f"{path.name}:{n}", ((cells[1], None, None),), columns)
            return
    raise UsageError(
        f"{path} names no column `path`",
        f"its first line is {lines[0][1].strip()[:120]!r}, which is no file here either",
        "begin it with a header such as path,label,split; or name the folder of the media: --root FOLDER",
    )


def _path_column(path: Path, header: list[str]) -> str | None:
    if "path" in header:
        return "path"
    found = [c for c in header if c.lower() in PATH_NAMES]
    if len(found) > 1:
        raise UsageError(f"{path.name} has several columns of paths: {', '.join(found)}", "", "call one of them `path`")
    return found[0] if found else None


def _table(path: Path, delimiter: str, header: list[str], column: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    begun = False
    try:
        for cells in reader:
            where = f"{path.name}:{reader.line_num}"
            if not any(c.strip() for c in cells):
                continue
            if not begun:
                begun = True
                continue
            if len(cells) != len(header):
                raise UsageError(
                    f"{where} has {len(cells)} cells, the header {len(header)}",
                    f"{delimiter.join(cells)[:120]!r}",
                    'put cells that hold the delimiter into "quotes"',
                )
            yield _row(where, {c: v.strip() or None for c, v in zip(header, cells, strict=True)}, column)
    except csv.Error as e:
        raise UsageError(f"{path.name}:{reader.line_num} is no CSV", str(e), "quotes come in pairs") from e


def _jsonl(path: Path) -> Iterator[Row]:
    for n, line in read_lines(path):
        where = f"{path.name}:{n}"
        try:
            value = json.loads(line, parse_float=str, parse_int=str)
        except ValueError as e:
            raise UsageError(
                f"{where} is no JSON", str(e), 'one object a line: {"path": "a.mp4", "label": "dog"}'
            ) from e
        if not isinstance(value, dict):
            raise UsageError(f"{where} is no object", line.strip()[:120], '{"path": "a.mp4", "label": "dog"}')
        column = _path_column(path, list(value))
        if column is None:
            raise UsageError(f"{where} has no `path`", f"it has {', '.join(value) or 'nothing'}", '{"path": "a.mp4"}')
        yield _row(where, {str(k): _text(v) for k, v in value.items()}, column)


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row(where: str, cells: dict[str, str | None], column: str) -> Row:
    name = cells.pop(column)
    if name is None:
        raise UsageError(f"{where} has no path", f"column `{column}` is empty", "name a file, or drop the row")
    times = cells.pop("start", None), cells.pop("end", None)
    start, end = (None if text is None else time_of(where, text) for text in times)
    if end is not None and end <= (start or 0):
        raise UsageError(f"{where} ends at {end} s", f"it starts at {start or 0} s", "`end` is in seconds of the file")
    return Row(where, ((name, start, end),), cells)
