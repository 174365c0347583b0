"""The Zarr metadata of a store: its root group, the two groups inside, and the arrays that ingest writes.

All of it follows from the spec and the number of planned shards, so that writing it anew is always safe.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from avstore.catalogue import read_attributes
from avstore.durable import canonical_json, machine_errors, read_json, sync_folder, write_atomic
from avstore.errors import ConflictError
from avstore.spec import FORMAT, Spec, arrays

FOLDERS = ("plans", "commits", "logs", "spectrograms", "embeddings")


def group(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def is_store(root: Path) -> bool:
    """Whether `root` holds an avstore store that has a plan; before that nothing in it binds."""
    return (root / "zarr.json").is_file() and any((root / "plans").glob("[0-9]*.json"))


def read_spec(root: Path) -> Spec:
    """The spec of a store that is to be written to; errors as in `catalogue.read_attributes`, `Spec.from_json` and
    `Spec.require_recipes`."""
    spec = Spec.from_json(read_attributes(root)["spec"])
    spec.require_recipes()
    return spec


def require_free(root: Path) -> None:
    """ConflictError where `root` holds something else than a store or the beginnings of one."""
    if not root.exists():
        return
    if not root.is_dir():
        lists = root.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
        words = "one list at a time: put the rows of both into one file" if lists else "name another STORE"
        raise ConflictError(f"{root} is a file", "a store is a folder", words)
    ours = {"zarr.json", "lock", "frames", "source", "waveform", *FOLDERS}
    if (root / "zarr.json").is_file():
        read_attributes(root)  # another Zarr group: says so
    foreign = sorted(name for name in os.listdir(root) if name not in ours and ".tmp." not in name)
    if foreign:
        raise ConflictError(f"{root} is not empty and no store", f"it holds {foreign[0]}", "name another STORE")


def make_folders(root: Path, spec: Spec) -> None:
    """The folders of a store, synced into their parents."""
    for name in (*FOLDERS, *arrays(spec)):
        folder = root / name
        if not folder.is_dir():
            with machine_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)


def drop_beginnings(root: Path, spec: Spec) -> None:
    """Removes arrays that an interrupted ingest began before its first plan and that `spec` has not. They are empty."""
    wanted = {root / path for path in arrays(spec)}
    for folder in (root / "frames", root / "source", *(root / "spectrograms").glob("*/")):
        if folder.is_dir() and folder not in wanted:
            with machine_errors(folder):
                (folder / "zarr.json").unlink(missing_ok=True)
                folder.rmdir()


def write_metadata(root: Path, spec: Spec, shards: int) -> None:
    """Brings every zarr.json that follows from the spec to a tape of `shards`; files that say so already stay."""
    make_folders(root, spec)
    seconds = shards * spec.shard_seconds
    attributes = {"avstore": {"format": FORMAT, "spec": spec.to_json(), "fingerprint": spec.fingerprint}}
    wanted = {"zarr.json": group(attributes)}
    for name in ("spectrograms", "embeddings"):
        wanted[f"{name}/zarr.json"] = group()
    for path, array in arrays(spec).items():
        wanted[f"{path}/zarr.json"] = array.metadata(spec.shard_seconds, seconds)
    for name, value in wanted.items():
        _replace(root / name, canonical_json(value))


def _replace(path: Path, data: bytes) -> None:
    with machine_errors(path):
        if path.is_file() and path.read_bytes() == data:
            return
    write_atomic(path, data)


def source_of(root: Path) -> str | None:
    """The source folder that a store was made from, from its logs; None where the logs are gone."""
    file = root / "logs" / "source"
    if not file.is_file():
        return None
    found = read_json(file)
    return str(found["folder"]) if isinstance(found, dict) and "folder" in found else None


def write_source(root: Path, folder: str) -> None:
    """Notes the source folder (text, see `sources.encode_path`) in the logs."""
    _replace(root / "logs" / "source", canonical_json({"folder": folder}))
