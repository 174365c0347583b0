"""What a bench has finished, kept in a folder so that repeating the command goes on where it stopped.

    kept = Kept(Path("work"))
    x = kept.arrays({"weights": "9f..", "block": "conv5x"}, lambda: {"v": expensive()})     # computed once
    v = kept.value({...}, lambda: {"accuracy": .5})

A key says everything that decides the value; its hash names the file (.npz or .json), the key itself lies beside it
in keys.jsonl for people to read. Written whole or not at all. Kept(None) keeps nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from avstore.durable import canonical_json, machine_errors, read_json, write_atomic
from avstore.errors import CorruptError


class Kept:
    """Arrays and JSON values by key. One process at a time writes, or several write the same."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            with machine_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def arrays(self, key: Mapping[str, Any], make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays kept under `key`, else make()'s, kept from now on. CorruptError where their file is damaged."""
        if self.folder is None:
            return dict(make())
        file = self._file(key, "npz")
        if file.is_file():
            try:
                with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
                    return {name: found[name] for name in found.files}
            except (ValueError, EOFError, OSError, zipfile.BadZipFile) as e:
                raise CorruptError(f"{file} is damaged", str(e), "remove it: it is then done again") from e
        x = dict(make())
        data = io.BytesIO()
        np.savez(data, **x)  # type: ignore[arg-type]
        self._keep(file, key, data.getvalue())
        return x

    def value(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The JSON value kept under `key`, else make()'s, kept from now on."""
        if self.folder is None:
            return make()
        file = self._file(key, "json")
        if file.is_file():
            return read_json(file)
        x = json.loads(canonical_json(make()))
        self._keep(file, key, canonical_json(x))
        return x

    def _file(self, key: Mapping[str, Any], suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(canonical_json(dict(key))).hexdigest()[:24]}.{suffix}"

    def _keep(self, file: Path, key: Mapping[str, Any], data: bytes) -> None:
        write_atomic(file, data)
        assert self.folder is not None
        with machine_errors(self.folder), (self.folder / "keys.jsonl").open("ab") as f:
            f.write(canonical_json({"file": file.name, **key}))
