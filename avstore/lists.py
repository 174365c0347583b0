"""Lists as a source: CSV, TSV, JSONL or plain text with a `path` per row, and the official lists of public sets.

A list names videos (or segments of them) and gives them columns; all columns are kept as text. What a list names and
what lies under the root are matched here, and what is missing is reported. No media file is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.official_lists import JOINED, KINDS, TWICE, Name, Row, detect, read_classes
from avstore.plain_lists import Find, plain
from avstore.records import FIELDS, fraction, video_key
from avstore.sources import Entry, Listing, decode_path, encode_path, folder_columns, read_source

if TYPE_CHECKING:
    from avstore.catalogue import Catalogue

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
_PLAIN = re.compile(r"[\w /()&!.-]+", re.ASCII)  # names that `encode_path` leaves as they are
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}\Z")
# Columns that every store has: one of a list that is called so is kept as `list_<name>`.
RESERVED = frozenset({"number", "key", "path", "slot_seconds", "place", "seconds", "has_sound", "has_picture", *FIELDS})


@dataclass
class ListReport:
    """How a list was read: kind, rows (blank lines aside), videos that were found, names of those that were not,
    equal rows that came again, columns that got another name (old -> new); for a store: `unlisted`, the keys of its
    ok videos that no row names."""

    kind: str
    rows: int = 0
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    duplicates: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.kind} list: {self.rows} rows, {self.matched} videos found, {len(self.missing)} missing"]
        if self.duplicates:
            parts.append(f"{self.duplicates} rows came again")
        if self.renamed:
            parts.append("renamed " + ", ".join(f"{a} to {b}" for a, b in sorted(self.renamed.items())))
        if self.unlisted:
            parts.append(f"{len(self.unlisted)} videos of the store are not in it")
        return "; ".join(parts)


def is_list(path: Path) -> bool:
    """Whether a source is a list by its name: a file that ends in one of SUFFIXES."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read_list(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, kind: str | None = None
) -> tuple[Listing, ListReport]:
    """The videos that a list names and that lie under `root` (default: the folder of the list), and a report.

    `path`: a list file, or the folder of an official set's list files (UCF101, HMDB51, AVE, ...), whose columns are
    put together. `kind`: `plain` or a key of `official_lists.KINDS`; by default found from the content. Plain paths
    are relative to the root (absolute ones inside it serve too), and `start`/`end` in seconds cut a segment; official
    names are looked up anywhere under the root. Sets with several splits give split1, split2, ...; `split` is then the
    first that there is. Equal rows count once.

    Raises NotFoundError (no list, no root, or nothing of the list is there), UsageError naming the line (not of the
    form, rows that differ only in columns, a path outside the root, two files that a name may mean).
    """
    path = Path(path)
    base = Path(root) if root is not None else (path if path.is_dir() else path.parent)
    if not base.is_dir():
        raise NotFoundError(f"there is no folder {base}", "it should hold the files of the list", "--root FOLDER")
    exact = _Exact(base)
    base = Path(os.path.realpath(base))
    rows, kind = _rows(path, kind, exact)
    report = ListReport(kind)
    if kind == "plain":
        listing = Listing(base, [], [], False)
        find: Find = exact
    else:
        listing = read_source(base)
        find = _Index((e.path for e in listing.entries), base)
    found: dict[str, tuple[Row, str, Name]] = {}
    for key, row, file, name in _resolve(rows, find, None, report):
        found[key] = row, file, name
    if not found:
        example = report.missing[0] if report.missing else "no row"
        raise NotFoundError(
            f"nothing of the list {path} lies under {base}",
            f"{report.rows} rows, e.g. {example}" if report.rows else "it has no rows",
            "name the folder of the media: --root FOLDER",
        )
    sizes = {e.path: e.size for e in listing.entries}
    entries = []
    for key, (row, file, (_, start, end)) in found.items():
        size = sizes[file] if file in sizes else os.stat(os.path.join(base, decode_path(file))).st_size
        columns = _columns(row, report)
        if kind == "plain":
            columns = {**folder_columns(file), **columns}
        text = None if start is None else str(start), None if end is None else str(end)
        entries.append(Entry(key, file, size, text[0], text[1], columns))
    report.matched = len(entries)
    skipped = [(name, f"in the list, but not under {base.name}") for name in sorted(report.missing)]
    return Listing(base, sorted(entries, key=lambda e: e.key), skipped, False), report


def columns_from_list(
    store: Catalogue, path: str | os.PathLike[str], kind: str | None = None
) -> tuple[dict[str, list[str | None]], ListReport]:
    """The columns of a list for the videos of a store that was ingested without it (official splits over a folder).

    Names are looked up among the files of the store, segments must agree in start and end. Returns column ->
    values by video number (store.total of them; None: no row, or no value), and a report whose `missing` are rows
    without a video, `unlisted` ok videos without a row. Raises as `read_list`.
    """
    numbers: dict[str, list[int]] = {}
    for number, key in enumerate(store.keys):
        numbers.setdefault(key, []).append(number)
    segments = {p: set[tuple[Fraction | None, Fraction | None]]() for p in store.paths}
    for plan in store.plans:
        for p, start, end in zip(plan.path, plan.start, plan.end, strict=True):
            segments[p].add((fraction(start), fraction(end)))
    find = _Index(segments, store.path)
    rows, kind = _rows(Path(path), kind, find)
    report = ListReport(kind)
    columns: dict[str, list[str | None]] = {}
    listed: set[str] = set()
    for key, row, _, _ in _resolve(rows, find, segments, report):
        listed.add(key)
        for name, value in _columns(row, report).items():
            values = columns.setdefault(name, [None] * store.total)
            for number in numbers[key]:
                values[number] = value
    if not listed:
        raise NotFoundError(
            f"no video of {store.path} is in the list {path}",
            f"the list names e.g. {report.missing[0] if report.missing else 'nothing'}",
            f"the store holds e.g. {store.keys[0] if store.keys else 'nothing'}",
        )
    report.matched = len(listed)
    report.unlisted = sorted(store.key(int(n)) for n in store.numbers if store.key(int(n)) not in listed)
    return columns, report


# Matching


class _Exact:
    """Finds the files of a plain list: by path, relative to the root or absolute inside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.roots = [os.fsencode(os.path.abspath(root)), os.fsencode(os.path.realpath(root))]

    def __call__(self, name: str, where: str) -> str | None:
        raw = os.path.normpath(os.fsencode(name))
        for root in self.roots:
            if raw.startswith(root + b"/"):
                raw = os.path.relpath(raw, root)
        if raw == b".." or raw.startswith((b"../", b"/")):
            raise UsageError(
                f"{where}: {name!r} lies outside {self.root}",
                "the files of a list lie under one root",
                "name a folder that holds them all: --root FOLDER",
            )
        try:
            there = os.path.isfile(os.path.join(os.fsencode(self.root), raw))
        except ValueError:  # a NUL in the name
            there = False
        return encode_path(raw) if there else None


class _Index:
    """Finds files by name in any folder and with any suffix; the folder decides where a name is there twice."""

    def __init__(self, paths: Iterable[str], where: Path) -> None:
        self.where = where
        self.paths = set(paths)
        self.by_stem: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            self.by_stem.setdefault(_stem(path), []).append(path)

    def __call__(self, name: str, where: str) -> str | None:
        if not _PLAIN.fullmatch(name) or "./" in name:
            name = encode_path(os.fsencode(os.path.normpath(name)))
        if name in self.paths:
            return name
        base = name.rsplit("/", 1)[-1]
        found = self.by_stem.get(_stem(name)) or self.by_stem.get(base)
        if not found:
            return None
        for narrower in (
            lambda p: p.endswith("/" + name),
            lambda p: p.split("/")[-2:-1] == name.split("/")[-2:-1],
            lambda p: p.rsplit("/", 1)[-1] == base,
        ):
            if len(found) > 1:
                found = [p for p in found if narrower(p)] or found
        if len(found) > 1:
            raise UsageError(
                f"{where}: {name} may be {found[0]} or {found[1]}",
                f"both lie in {self.where}",
                "name the folder that holds one of them only: --root FOLDER",
            )
        return found[0]


def _stem(path: str) -> str:
    """The last part of a path without what looks like a media suffix."""
    return _SUFFIX.sub("", path.rsplit("/", 1)[-1])


def _resolve(
    rows: Iterable[Row],
    find: Find,
    segments: dict[str, set[tuple[Fraction | None, Fraction | None]]] | None,
    report: ListReport,
) -> list[tuple[str, Row, str, Name]]:
    """(key, row, file, name) of each video that is there, rows of the same video put together; fills the report.

    `segments`: of a store, the segments that each file was cut into; None: any can be cut.
    """
    found: dict[str, tuple[str, Row, str, Name]] = {}
    missing: dict[str, Row] = {}
    for row in rows:
        report.rows += 1
        for name in row.names:
            file = find(name[0], row.where)
            if file is not None and (segments is None or name[1:] in segments[file]):
                key = video_key(file, name[1], name[2])
                before = found[key][1] if key in found else None
                found[key] = key, _merge(before, row, key, report), file, name
                break
        else:
            key = video_key(*row.names[0])
            missing[key] = _merge(missing.get(key), row, key, report)
    report.missing = list(missing)
    return list(found.values())


def _merge(before: Row | None, row: Row, key: str, report: ListReport) -> Row:
    """Two rows of one video: equal ones count once; files of one set add columns; AVE's annotations are joined."""
    if before is None:
        return row
    if before.columns == row.columns:
        report.duplicates += 1
        return before
    differing = [c for c, v in row.columns.items() if before.columns.get(c, v) != v]
    same_file = before.where.rsplit(":", 1)[0] == row.where.rsplit(":", 1)[0]
    if report.kind in JOINED and same_file:
        return Row(row.where, before.names, {c: _join(before.columns.get(c), v) for c, v in row.columns.items()})
    if report.kind in TWICE and not same_file:
        if report.kind in JOINED:  # a split file repeats the annotation
            differing = [c for c in differing if (row.columns[c] or "") not in (before.columns[c] or "").split(";")]
        if not differing:
            return Row(row.where, before.names, {**row.columns, **before.columns})
    names = differing or sorted(set(before.columns) ^ set(row.columns))
    raise UsageError(
        f"{before.where} and {row.where} name the same video {key}",
        f"they differ in {', '.join(names)}",
        "keep one of the rows, or give them different start and end",
    )


def _join(a: str | None, b: str | None) -> str | None:
    return a if b is None or b in (a or "").split(";") else b if a is None else f"{a};{b}"


def _columns(row: Row, report: ListReport) -> dict[str, str | None]:
    """The row's columns under the names that they have in a store."""
    out: dict[str, str | None] = {}
    for name, value in row.columns.items():
        if name in RESERVED:
            report.renamed[name] = f"list_{name}"
        out[report.renamed.get(name, name)] = value
    splits = [c for c in out if re.fullmatch(r"split\d+", c)]
    if splits and "split" not in out:
        out["split"] = out[min(splits, key=lambda c: int(c[5:]))]
    return out


# Reading


def _rows(path: Path, kind: str | None, find: Find) -> tuple[Iterable[Row], str]:
    """The rows of a list and its kind."""
    if kind is not None and kind != "plain" and kind not in KINDS:
        kinds = ["plain", *KINDS]
        raise UsageError(
            f"no kind of list is called {kind!r}", did_you_mean(kind, kinds), f"--list-kind {' | '.join(kinds)}"
        )
    if not path.exists():
        raise NotFoundError(f"there is no list {path}", "", "check its name")
    if kind is None:
        kind = detect(path)
        if kind is None and path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.is_dir() and detect(p)]
            raise UsageError(
                f"no list files that avstore knows are in the folder {path}",
                f"it reads those of {', '.join(KINDS)}",
                f"there are some in {inside[0]}: name that folder" if inside else "name one list file",
            )
        kind = kind or "plain"
    if kind == "plain":
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "a plain list is one file", "name one list file")
        return plain(path, find), kind
    read, pattern = KINDS[kind]
    files = sorted(p for p in path.iterdir() if re.fullmatch(pattern, p.name)) if path.is_dir() else [path]
    if not files:
        raise NotFoundError(
            f"no list files of {kind} in {path}", f"they are called like {pattern}", "name another folder"
        )
    if any(not file.stat().st_size for file in files):
        raise UsageError(f"a list in {path} is empty", "", "download it again")
    return [row for file in files for row in read(file)], kind


__all__ = ["KINDS", "ListReport", "columns_from_list", "is_list", "read_classes", "read_list"]
