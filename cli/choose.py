"""What a command works on where it is not said: the store, the selection, folds of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from avstore.store import Store

VARIABLE = "AVSTORE_STORE"


def store_path(given: str | os.PathLike[str] | None) -> Path:
    """The store given, else $AVSTORE_STORE, else the only store in the current folder; else an error with the
    candidates."""
    if given is not None:
        return Path(given)
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    found = stores_in(Path())
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFoundError(
            "there is no store in the current folder",
            f"no STORE was given, ${VARIABLE} is not set, and no *.zarr here is an avstore store",
            "avstore ingest FOLDER makes one; or name it: STORE as the last argument",
        )
    raise UsageError(
        f"there are {len(found)} stores in the current folder",
        f"{', '.join(str(p) for p in found)}",
        f"name one as STORE, or set ${VARIABLE}",
    )


def stores_in(folder: Path) -> list[Path]:
    """Stores named *.zarr in a folder, sorted."""
    import json

    out = []
    for path in sorted(folder.glob("*.zarr")):
        try:
            group = json.loads((path / "zarr.json").read_bytes())
            if "avstore" in group["attributes"]:
                out.append(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return out


def open_store(given: str | os.PathLike[str] | None) -> Store:
    import avstore

    return avstore.open(store_path(given))


def fold_of(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`."""
    i, slash, n = text.partition("/")
    if not slash or not i.strip().isdigit() or not n.strip().isdigit() or not 0 <= int(i) < int(n) or int(n) < 2:
        raise UsageError(f"--fold {text!r}", "i/n with i from 0 to n - 1, n at least 2", "e.g. --fold 0/5")
    return int(i), int(n)


def number_pair(text: str, option: str) -> tuple[int, int]:
    """(i, n) of `--shard i/n`."""
    i, slash, n = text.partition("/")
    if not slash or not i.strip().isdigit() or not n.strip().isdigit():
        raise UsageError(f"{option} {text!r}", "i/n, whole numbers", f"e.g. {option} 0/4")
    return int(i), int(n)


def selection(where: list[str] | None, list_file: Path | None, subset: int | None, seed: int) -> dict[str, Any]:
    """Keyword arguments of `Store.select` from the options that every command shares."""
    out: dict[str, Any] = {}
    if where:
        out["where"] = list(where)
    if list_file is not None:
        out["list"] = list_file
    if subset is not None:
        out.update(subset=subset, seed=seed)
    return out
