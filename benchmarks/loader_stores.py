"""The raw stores of `bench loader`: the pixels of its jpeg store, a frame or a second to an inner chunk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from avstore import open as open_store
from avstore.codecs import MISSING, with_crc
from avstore.cut import cut_frames
from avstore.durable import canonical_json, read_json, write_atomic
from avstore.records import Record, plan_path, record_path
from avstore.shard import ShardWriter
from avstore.spec import arrays


def write_raw(source: Path, target: Path, inner: int) -> None:
    """A copy of a store whose frames are raw, `inner` to an inner chunk (0: a second): the same pixels for everybody.
    With chunks of one frame it is a store of avstore; its arrays but `frames` are those of the source."""
    if target.exists():
        shutil.rmtree(target)
    with open_store(source) as store:
        jpeg = store.arrays["frames"]
        spec = dataclasses.replace(store.spec, codec="raw")
        inner = inner or spec.fps
        array = dataclasses.replace(arrays(spec)["frames"], inner_rows=inner)
        shutil.copytree(source, target, ignore=lambda folder, names: {"frames", "zarr.json"} & set(names)
                        if Path(folder) == source else set())  # fmt: skip
        (target / "frames").mkdir()
        per = spec.shard_seconds * spec.fps
        for shard in range(store.tape_seconds // spec.shard_seconds):
            if not (source / jpeg.key(shard)).is_file():
                continue
            there = store.reader.index(jpeg.key(shard), 0, per, per)[:, 0] != MISSING
            writer = ShardWriter(target / array.key(shard), per // inner)
            for chunk in np.unique(np.flatnonzero(there) // inner).tolist():
                rows = chunk * inner + np.flatnonzero(there[chunk * inner : (chunk + 1) * inner])
                buffer, part = np.zeros((inner, *array.row), np.uint8), np.empty((len(rows), *array.row), np.uint8)
                cut_frames(store.reader, jpeg, per, rows + shard * per, part)
                buffer[rows - chunk * inner] = part
                writer.append(chunk, with_crc(buffer.tobytes()))
            writer.close()
        metadata = array.metadata(spec.shard_seconds, store.tape_seconds)
        write_atomic(target / "frames" / "zarr.json", canonical_json(metadata))
        for plan in store.plans:
            plan.fingerprint = spec.fingerprint
            write_atomic(plan_path(target, plan.number), plan.to_bytes())
            for task in plan.tasks:
                if record_path(target, task.number).is_file():
                    record = Record.read(record_path(target, task.number))
                    record.fingerprint = spec.fingerprint
                    write_atomic(record_path(target, task.number), record.to_bytes())
    root = read_json(source / "zarr.json")
    root["attributes"]["avstore"] |= {"spec": spec.to_json(), "fingerprint": spec.fingerprint}
    write_atomic(target / "zarr.json", canonical_json(root))
