"""The archive: what benches printed about a store, as JSON in its logs, for the report.

    archive(store, table, "linear", runs=["avid"], asked={"modality": "v"})     # STORE/logs/benches/linear-...json
    archived(store, ["avid"])                                                   # files of these runs, oldest first

One file for each (bench, runs, what was asked): the same command again replaces it. Logs are no part of a store's
bytes: removing the folder loses nothing else. Not here: reading them into a page (`report.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.durable import canonical_json, machine_errors, read_json, write_atomic
from avstore.errors import CorruptError, UsageError
from benchmarks.table import Table

if TYPE_CHECKING:
    from avstore.store import Store


def archive(store: Store, table: Table, bench: str, runs: Sequence[str], asked: Mapping[str, Any]) -> Path:
    """Writes a table into the store's logs and returns the file. asked: the options that make another table of it.
    MachineError where it cannot be written, UsageError for a bench whose name has other signs than letters."""
    if not bench.isalpha() or not bench.isascii():
        raise UsageError(f"no bench {bench!r}", "a name of letters, such as linear")
    head = {"bench": bench, "runs": list(runs), "asked": _plain(dict(asked))}
    digest = hashlib.sha256(canonical_json(head)).hexdigest()[:12]
    file = store.path / "logs" / "benches" / f"{bench}-{digest}.json"
    with machine_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, canonical_json({**head, **_plain(table.to_json())}))
    return file


def archived(store: Store, runs: Sequence[str] | None = None) -> list[Path]:
    """The files of tables in which one of `runs` is (default: all), oldest first. A file that says nothing of its runs
    is among them: whoever reads it says that it is damaged."""
    folder = store.path / "logs" / "benches"
    files = sorted(folder.glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name)) if folder.is_dir() else []
    if runs is None:
        return files
    out = []
    for file in files:
        try:
            value = read_json(file)
        except CorruptError:
            value = None
        if not isinstance(value, dict) or set(runs) & set(value.get("runs") or ()):
            out.append(file)
    return out


def _plain(value: Any) -> Any:
    """As JSON holds it: keys as text, paths as text, numbers that are not finite as null, NumPy's as Python's."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
