"""The official list files of public sets, as they are published: UCF101, HMDB51, Kinetics, Kinetics-Sounds, AVE,
VGGSound, AudioSet, ESC. Each reader turns text into rows; which file a row means is `avstore.lists`' matter.

Every row names the files that it may be, the likeliest first: the published name, the names that the usual downloaders
give, and for sets of segments the whole video, to be cut. Reads only the list files.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from avstore.errors import NotFoundError, UsageError

Name = tuple[str, Fraction | None, Fraction | None]  # a file, and the segment of it in seconds (None, None: all of it)
Lines = list[tuple[int, str]]  # number from 1, text without line end; no blank ones

YOUTUBE = r"[A-Za-z0-9_-]{11}"
CLIP = 10  # seconds that a segment of Kinetics-Sounds, VGGSound lasts where the list gives its start only


@dataclass(frozen=True)
class Row:
    """One video of a list: `where` (file:line), the names it may have, its columns (text; None: no value)."""

    where: str
    names: tuple[Name, ...]
    columns: dict[str, str | None] = field(default_factory=dict)


def read_text(path: Path) -> str:
    """A list's text; bytes that are not UTF-8 stay as surrogates, a byte order mark goes. NotFoundError, UsageError."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as e:
        raise NotFoundError(f"the list {path} cannot be read", e.strerror or str(e), "check its name") from e
    if "\0" in text:
        raise UsageError(f"{path} is no list", "it holds NUL bytes", "a list is CSV, TSV, JSONL or plain text in UTF-8")
    return text


def read_lines(path: Path) -> Lines:
    return [(i + 1, line) for i, line in enumerate(read_text(path).split("\n")) if line.strip()]


def youtube(name: str, start: Fraction, end: Fraction) -> tuple[Name, ...]:
    """The names under which a segment of a YouTube video lies, then the whole video to be cut."""
    out: list[str] = []
    if start.denominator == end.denominator == 1:
        s, e = int(start), int(end)
        out = [f"{name}_{s:06d}_{e:06d}", f"{name}_{s:06d}", f"{name}_{s}_{e}", f"{name}_{s}"]
    s, e = int(start * 1000), int(end * 1000)
    out.append(f"{name}_{s}_{e}")  # milliseconds
    return (*((n, None, None) for n in dict.fromkeys(out)), (name, start, end))


def ucf101(path: Path) -> Iterator[Row]:
    """`Class/v_Class_g01_c01.avi 1` of trainlist0N.txt, without the number in testlist0N.txt (then it is taken from the
    classInd.txt beside it). Columns label, group, target and split<N> = train | test."""
    found = re.fullmatch(r"(train|test)list0?(\d+)\.txt", path.name)
    split = found[1] if found else None
    beside = path.parent / "classInd.txt"
    targets = {name: number for number, name in _classes(beside).items()} if beside.is_file() else {}
    for n, line in read_lines(path):
        parts = re.fullmatch(r"(([^/]+)/(.+_(g\d+)_c\d+\.\w+))(?:\s+(\d+))?\s*", line)
        if parts is None:
            raise _odd(path, n, line, "Class/v_Class_g01_c01.avi [class number]")
        columns: dict[str, str | None] = {"label": parts[2], "group": parts[4]}
        target = parts[5] or targets.get(parts[2])
        if target:
            columns["target"] = target
        if found:
            columns[f"split{found[2]}"] = split
        yield Row(f"{path.name}:{n}", ((parts[1], None, None),), columns)


def hmdb51(path: Path) -> Iterator[Row]:
    """`name.avi 1` of <class>_test_split<N>.txt, 1: train, 2: test, 0: unused. Columns label, split<N>."""
    found = re.fullmatch(r"(.+)_test_split(\d+)\.txt", path.name)
    if found is None:
        raise UsageError(f"{path} is no HMDB51 list", "these are called <class>_test_split<N>.txt", "name their folder")
    for n, line in read_lines(path):
        parts = re.fullmatch(r"(.+\.\w+)\s+([012])\s*", line)
        if parts is None:
            raise _odd(path, n, line, "name.avi 0|1|2")
        split = ("unused", "train", "test")[int(parts[2])]
        name = f"{found[1]}/{parts[1]}"
        yield Row(f"{path.name}:{n}", ((name, None, None),), {"label": found[1], f"split{found[2]}": split})


def kinetics(path: Path) -> Iterator[Row]:
    """The published CSV (label, youtube_id, time_start, time_end, split, ...), or the frame lists of TSN's tools
    (`class/<id>_<start>_<end> frames class-number`). Columns label, split, youtube_id and all others."""
    lines = read_lines(path)
    if "youtube_id" not in lines[0][1]:
        for n, line in lines:
            parts = re.fullmatch(rf"(([^/]+)/({YOUTUBE})_(\d+)_(\d+))\s+(\d+)\s+(\d+)\s*", line)
            if parts is None:
                raise _odd(path, n, line, "class/<id>_<start>_<end> frames class-number")
            names = youtube(parts[3], Fraction(parts[4]), Fraction(parts[5]))
            columns = {"label": parts[2], "youtube_id": parts[3], "target": parts[7], **_split_of(path)}
            yield Row(f"{path.name}:{n}", ((parts[1], None, None), *names), columns)
        return
    for where, cells in _csv(path, header=True):
        start, end = _number(where, cells.pop("time_start", "")), _number(where, cells.pop("time_end", ""))
        split = cells.get("split") or _split_of(path).get("split")
        if split in ("val", "validate", "validation"):
            split = "val"
        yield Row(
            where, youtube(cells["youtube_id"] or "", start, end), {**cells, **({"split": split} if split else {})}
        )


def kinetics_sounds(path: Path) -> Iterator[Row]:
    """`<id>_<start>[_<end>],10,target`. The set has class numbers only: label is the number. Column split by the name
    of the file."""
    for n, line in read_lines(path):
        parts = re.fullmatch(rf"(({YOUTUBE})_(\d+)(?:_(\d+))?),(\d+),(\d+)\s*", line)
        if parts is None:
            raise _odd(path, n, line, "<id>_<start>_<end>,seconds,class-number")
        start = Fraction(parts[3])
        end = Fraction(parts[4]) if parts[4] else start + Fraction(parts[5])
        columns = {"label": parts[6], "target": parts[6], "youtube_id": parts[2], **_split_of(path)}
        yield Row(f"{path.name}:{n}", ((parts[1], None, None), *youtube(parts[2], start, end)), columns)


def ave(path: Path) -> Iterator[Row]:
    """`Category&VideoID&Quality&StartTime&EndTime`: the times bound the event inside the 10-s file, they cut nothing.
    45 videos have two annotations: their values come joined by `;` (see `JOINED`). Column split by the file's name."""
    for n, line in read_lines(path):
        parts = line.strip().split("&")
        if n == 1 and parts[:2] == ["Category", "VideoID"]:
            continue
        if len(parts) != 5 or not re.fullmatch(YOUTUBE, parts[1]):
            raise _odd(path, n, line, "category&<id>&quality&start&end")
        columns = {"label": parts[0], "quality": parts[2], "event_start": parts[3], "event_end": parts[4]}
        yield Row(f"{path.name}:{n}", ((parts[1], None, None),), {**columns, "youtube_id": parts[1], **_split_of(path)})


def vggsound(path: Path) -> Iterator[Row]:
    """`<id>_<start>.mp4,label` (test.csv) or `<id>,start,label,split` (vggsound.csv). 10-s segments."""
    for where, cells in _csv(path):
        columns: dict[str, str | None]
        first = cells["0"] or ""
        if len(cells) == 2 and (parts := re.fullmatch(rf"(({YOUTUBE})_(\d+))\.mp4", first)):
            start = Fraction(parts[3])
            names: tuple[Name, ...] = ((parts[1], None, None), *youtube(parts[2], start, start + CLIP))
            columns = {"label": cells["1"], "youtube_id": parts[2], **_split_of(path)}
        elif len(cells) == 4 and re.fullmatch(YOUTUBE, first):
            start = _number(where, cells["1"])
            names = youtube(first, start, start + CLIP)
            columns = {"label": cells["2"], "youtube_id": first, "split": cells["3"]}
        else:
            raise UsageError(f"{where} is no row of VGGSound", str(list(cells.values())), "<id>_<start>.mp4,label")
        yield Row(where, names, columns)


def audioset(path: Path) -> Iterator[Row]:
    """`<id>, start, end, "mid,mid"` with comments by `#`. Column label: the mids, as published."""
    for n, line in read_lines(path):
        if line.startswith("#"):
            continue
        parts = re.fullmatch(rf'({YOUTUBE}), ([\d.]+), ([\d.]+), "([^"]*)"\s*', line)
        if parts is None:
            raise _odd(path, n, line, '<id>, start, end, "mid,mid"')
        columns = {"label": parts[4], "youtube_id": parts[1], **_split_of(path)}
        where = f"{path.name}:{n}"
        yield Row(where, youtube(parts[1], _number(where, parts[2]), _number(where, parts[3])), columns)


def esc(path: Path) -> Iterator[Row]:
    """esc50.csv: filename, fold, target, category, ... `1-100032-A-0.wav` also lies as `1-100032-A.ogg` in ESC-10.
    Columns: all of them, and label = category."""
    for where, cells in _csv(path, header=True):
        name = cells.pop("filename") or ""
        stem = name.rsplit(".", 1)[0]
        names: list[Name] = [(name, None, None)]
        if re.fullmatch(r"\d-\d+-[A-Z]-\d+", stem):
            names.append((stem.rsplit("-", 1)[0], None, None))
        yield Row(where, tuple(names), {"label": cells.get("category"), **cells})


# kind -> (reader of one file, names of its files where a folder is given)
KINDS: dict[str, tuple[Callable[[Path], Iterator[Row]], str]] = {
    "ucf101": (ucf101, r"(train|test)list0?\d+\.txt"),
    "hmdb51": (hmdb51, r".+_test_split\d+\.txt"),
    "kinetics": (kinetics, r"(train|val|validate|test)(_videofolder\.txt|\.csv)"),
    "kinetics-sounds": (kinetics_sounds, r"(my_)?(train|val|test)\.txt"),
    "ave": (ave, r"(Annotations|(train|val|test)Set)\.txt"),
    "vggsound": (vggsound, r"(vggsound|train|test|AStest)\.csv"),
    "audioset": (audioset, r"(balanced_train|unbalanced_train|eval)_segments\.csv"),
    "esc": (esc, r"(esc50|esc10)\.csv"),
}
JOINED = frozenset({"ave"})  # sets that annotate a video more than once
TWICE = frozenset({"ave", "ucf101", "hmdb51", "vggsound"})  # sets whose files add columns to the same videos


def detect(path: Path) -> str | None:
    """The kind of an official list, from its name and first lines; None: it is none of them. UsageError for a file
    that lists classes instead of videos."""
    if path.is_dir():
        for name in ("ucf101", "hmdb51", "ave", "audioset"):
            if any(re.fullmatch(KINDS[name][1], p.name) for p in path.iterdir()):
                return name
        kinds = {k for p in sorted(path.iterdir()) if p.suffix in (".txt", ".csv") and (k := _kind_of_file(p))}
        return kinds.pop() if len(kinds) == 1 else None
    kind = _kind_of_file(path)
    if kind is None and _classes(path):
        raise UsageError(
            f"{path} lists classes, not videos",
            "it has a number and a name in each line",
            "name the file that lists videos; avstore.lists.read_classes reads this one",
        )
    return kind


def _kind_of_file(path: Path) -> str | None:
    for kind in ("ucf101", "hmdb51"):
        if re.fullmatch(KINDS[kind][1], path.name):
            return kind
    head = [line for _, line in read_lines(path)[:8]]
    body = next((line.rstrip() for line in head if not line.startswith("#")), "")
    header = {cell.strip().strip('"').lower() for cell in head[0].split(",")} if head else set()
    if {"youtube_id", "time_start", "time_end"} <= header:
        return "kinetics"
    if {"filename", "fold", "category"} <= header:
        return "esc"
    second = head[1].rstrip() if len(head) > 1 else body  # the first line may be a header
    patterns = {
        "kinetics": rf"[^/]+/{YOUTUBE}_\d+_\d+\s+\d+\s+\d+",
        "kinetics-sounds": rf"{YOUTUBE}_\d+(_\d+)?,\d+,\d+",
        "ave": rf"[^&]+&{YOUTUBE}&[^&]*&[\d.]+&[\d.]+",
        "audioset": rf'{YOUTUBE}, [\d.]+, [\d.]+, "[^"]*"',
        "vggsound": rf"{YOUTUBE}_\d{{6}}\.mp4,.+|{YOUTUBE},\d+,.+,(train|test)",
    }
    for kind, pattern in patterns.items():
        if re.fullmatch(pattern, body) or (kind == "ave" and re.fullmatch(pattern, second)):
            return kind
    return None


def _classes(path: Path) -> dict[str, str]:
    """Number or mid -> name of a file of classes; empty where it is none."""
    lines = [(n, line.rstrip()) for n, line in read_lines(path)]
    if not lines:
        return {}
    if lines[0][1] == "index,mid,display_name":
        return {c["index"] or "": c["display_name"] or "" for _, c in _csv(path, header=True)}
    if all(re.fullmatch(r"\d+ \S.*", line) and not re.search(r"\.\w{2,4}$", line) for _, line in lines):
        return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for _, line in lines}
    if all(re.fullmatch(r'("[^"]+"|[^",]+),\d+,[^,]+', line) for _, line in lines) and not re.match(
        YOUTUBE + r"[_,]", lines[0][1]
    ):
        return {str(i): cells["0"] or "" for i, (_, cells) in enumerate(_csv(path))}  # VGGSound's stat.csv
    if path.stem.lower() == "classind":
        return {str(i): line for i, (_, line) in enumerate(lines)}
    return {}


def read_classes(path: Path) -> dict[str, str]:
    """Class numbers (text, as the set counts them) -> names, of classInd.txt (UCF101 from 1, Kinetics from 0),
    AudioSet's and ESC's class_labels_indices.csv, VGGSound's stat.csv. UsageError for another file."""
    path = Path(path)
    found = _classes(path)
    if not found:
        raise UsageError(f"{path} lists no classes", "expected `number name` in each line", "e.g. classInd.txt")
    return found


def _csv(path: Path, header: bool = False) -> Iterator[tuple[str, dict[str, str | None]]]:
    """(file:line, cells by column) of a comma-separated file; without a header the columns are "0", "1", ..."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not cells or not any(c.strip() for c in cells):
                continue
            where = f"{path.name}:{reader.line_num}"
            if header and names is None:
                names = [c.strip() for c in cells]
                continue
            columns = names or [str(i) for i in range(len(cells))]
            if len(columns) != len(cells):
                raise UsageError(f"{where} has {len(cells)} cells", f"the header has {len(columns)}", "quote commas")
            yield where, {c: v.strip() or None for c, v in zip(columns, cells, strict=True)}
    except csv.Error as e:
        raise UsageError(f"{path.name}:{reader.line_num} is no CSV", str(e), "quotes come in pairs") from e


def _split_of(path: Path) -> dict[str, str | None]:
    """`split` from the name of a list file; nothing where it tells none."""
    found = re.match(r"(?:my_|balanced_|unbalanced_|AS)?(train|val|test|eval)", path.name)
    return {"split": found[1]} if found else {}


def time_of(where: str, text: str) -> Fraction:
    """Seconds, exactly: `12`, `12.5` or `25/2`. UsageError for anything else (an exponent could ask for a number that
    fills the memory)."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,12})?|\.\d{1,12}|\d{1,15}/0*[1-9]\d{0,14}", text) is None:
        why = "it lies before the file" if re.fullmatch(r"-[\d.]+", text) else "seconds, such as 12 or 12.5"
        raise UsageError(f"{where}: {text[:60]!r} is no time", why, "correct the list")
    return Fraction(text)


def _number(where: str, text: str | None) -> Fraction:
    return time_of(where, text or "")


def _odd(path: Path, n: int, line: str, form: str) -> UsageError:
    return UsageError(f"{path.name}:{n} is not of this list's form", f"{line.strip()[:120]!r}", f"expected {form}")
