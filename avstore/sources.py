"""Source files: which files of a folder are tried, under which key, with which columns.

Lists only; opens no file. Every regular file that is not hidden, not part of a store and not of a plainly foreign
kind (`NON_MEDIA`) is tried, and what is left out is reported, never dropped in silence.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from avstore.durable import MACHINE_ERRNOS
from avstore.errors import MachineError, NotFoundError, UsageError, did_you_mean
from avstore.split_words import part_of

# Suffixes of what lies beside media: text, tables, subtitles, code, archives, arrays. All else is tried.
_SUFFIXES = """
    .txt .md .rst .pdf .doc .docx .rtf .tex .bib .nfo .log .url .html .htm .css .xml .csv .tsv .json .jsonl .ndjson
    .yaml .yml .toml .ini .cfg .xls .xlsx .parquet .arrow .feather .db .sqlite .sqlite3 .srt .vtt .ass .ssa .sub .sbv
    .lrc .align .textgrid .eaf .lab .py .pyc .ipynb .sh .bat .c .h .cpp .cc .hpp .js .java .m .r .jl .lua .npy
    .npz .mat .h5 .hdf5 .pkl .pickle .pt .pth .ckpt .onnx .safetensors .zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .md5
    .sha1 .sha256 .sig .asc .torrent .lock .bak .exe .dll .so .dylib
    """
NON_MEDIA = frozenset(_SUFFIXES.split())
NON_MEDIA_NAMES = frozenset({"readme", "license", "licence", "copying", "notice", "changelog", "makefile", "authors"})


@dataclass(frozen=True)
class Entry:
    """One video to be: its key, its file relative to the root (text, percent-encoded where it is not UTF-8), the
    segment in seconds (fractions as text; None: the beginning, the end), the size of the file in bytes, columns."""

    key: str
    path: str
    size: int
    start: str | None = None
    end: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """The entries sorted by key, what was left out as (path, why), and whether `root` was read as a whole."""

    root: Path
    entries: list[Entry]
    skipped: list[tuple[str, str]]
    whole: bool


def encode_path(raw: bytes) -> str:
    """A path as text that `decode_path` turns back into the same bytes.

    Bytes that are not UTF-8 become %XX, as does a `%` that would read as an escape and a `#` that would read as the
    segment of a key.
    """
    text = re.sub(rb"%(?=[0-9A-Fa-f]{2})", b"%25", raw).decode("utf-8", "surrogateescape")
    text = re.sub("[\udc80-\udcff]", lambda c: f"%{ord(c[0]) - 0xDC00:02X}", text)
    return re.sub(r"#(?=[0-9/.]*-[0-9/.]*\Z)", "%23", text)


def decode_path(text: str) -> str:
    """The path as `os` functions take it (undecodable bytes as surrogates)."""
    return os.fsdecode(unquote_to_bytes(text))


def folder_columns(path: str) -> dict[str, str | None]:
    """`label` and `split` from the folders of a relative path: a train/val/test folder names the split, the last
    other folder the label; without the key where there is no such folder."""
    folders = path.split("/")[:-1]
    splits = [f.lower() for f in folders if part_of(f)]
    labels = [f for f in folders if not part_of(f)]
    return {**({"label": labels[-1]} if labels else {}), **({"split": splits[0]} if splits else {})}


def read_source(source: Path, exclude: Iterable[Path] = ()) -> Listing:
    """The listing of a folder (recursive) or of one single file; `exclude` names folders to leave out.

    Raises NotFoundError for a path that is not there, UsageError for what is neither file nor folder, MachineError
    where the disk fails while it is read.
    """
    if not source.exists():
        near = did_you_mean(source.name, _names(source.parent))
        raise NotFoundError(f"there is no {source}", near, "avstore ingest FOLDER takes a folder or file that exists")
    if source.is_dir():
        root = Path(os.path.realpath(source))
        found, skipped = _walk(root, {os.path.realpath(p) for p in exclude})
    elif source.is_file():
        root = Path(os.path.realpath(source.parent))
        found, skipped = [os.fsencode(source.name)], []
    else:
        raise UsageError(f"{source} is neither a file nor a folder", "", "avstore ingest FOLDER")
    entries = []
    for raw in found:
        path = encode_path(raw)
        try:
            size = os.stat(os.path.join(os.fsencode(root), raw)).st_size
        except OSError as e:  # a broken link: tried all the same, so that it is accounted for
            _machine(e, root)
            size = 0
        entries.append(Entry(path, path, size, columns=folder_columns(path)))
    return Listing(root, sorted(entries, key=lambda e: e.key), sorted(skipped), source.is_dir())


def require_root(root: Path) -> None:
    """MachineError where the source folder has vanished (gone, or an empty mount point)."""
    try:
        with os.scandir(root) as entries:
            if next(entries, None) is not None:
                return
        why = "it is empty now"
    except OSError as e:
        why = e.strerror or str(e)
    raise MachineError(
        f"the source folder {root} has vanished", why, "mount it again, then repeat the command: it goes on from here"
    )


def _walk(root: Path, exclude: set[str]) -> tuple[list[bytes], list[tuple[str, str]]]:
    """Relative paths of the files to try, and what was left out.

    Every real folder is read once: plain folders first, then linked ones in the order of their names, so that a loop
    of links ends and no file is found by two ways that differ between runs.
    """
    files: list[bytes] = []
    skipped: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    folders: list[bytes] = [b""]
    links: list[bytes] = []
    while folders or links:
        linked = not folders
        if linked:
            links.sort(reverse=True)
        folder = links.pop() if linked else folders.pop()
        full = os.path.join(os.fsencode(root), folder) if folder else os.fsencode(root)
        try:
            at = os.stat(full)
            if (at.st_dev, at.st_ino) in seen:
                skipped.append((encode_path(folder), "a link to a folder that is read already"))
                continue
            seen.add((at.st_dev, at.st_ino))
            if os.fsdecode(os.path.realpath(full)) in exclude or (folder and _is_store(full)):
                skipped.append((encode_path(folder), "a store"))
                continue
            with os.scandir(full) as entries:
                children = sorted(entries, key=lambda e: e.name)
        except OSError as e:
            _machine(e, root)
            if not folder:
                raise NotFoundError(f"cannot read the folder {root}", e.strerror or "", "check its permissions") from e
            skipped.append((encode_path(folder), e.strerror or "unreadable folder"))
            continue
        for child in children:
            path = os.path.join(folder, child.name) if folder else child.name
            if child.name.startswith(b"."):
                skipped.append((encode_path(path), "hidden"))
            elif _is_folder(child):
                (links if child.is_symlink() else folders).append(path)
            elif why := _foreign(child):
                skipped.append((encode_path(path), why))
            else:
                files.append(path)
    return files, skipped


def _is_folder(child: os.DirEntry[bytes]) -> bool:
    try:
        return child.is_dir()
    except OSError:
        return False


def _foreign(child: os.DirEntry[bytes]) -> str | None:
    """Why a directory entry is not tried; None: it is."""
    try:
        mode = child.stat().st_mode
    except OSError:
        return None  # a broken link or a loop: tried, and fails with its reason
    if not stat.S_ISREG(mode):
        return "not a regular file"
    name = os.fsdecode(child.name).lower()
    suffix = os.path.splitext(name)[1]
    return "not media" if suffix in NON_MEDIA or (not suffix and name in NON_MEDIA_NAMES) else None


def _is_store(folder: bytes) -> bool:
    return folder.endswith(b".zarr") or os.path.exists(os.path.join(folder, b"zarr.json"))


def _machine(e: OSError, root: Path) -> None:
    if e.errno in MACHINE_ERRNOS and e.errno != errno.ENODEV:
        raise MachineError(f"cannot read the source folder {root}", e.strerror or str(e), "repeat the command") from e


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
