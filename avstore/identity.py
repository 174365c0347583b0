"""Which media these are: a digest of videos of a store, for results that are kept and must not serve another store.

    identity(store, numbers)            # "5f0c..": the same wherever the store lies, and however it grows

Two stores of one spec have one fingerprint, and may have the same numbers and keys for other media. Here go in: what
plan and record say of each video (key, segment, size of the file, lengths), and the stored bytes of one second of sound
and one picture of a sample of them, for files of equal length and size, as uncompressed sound is. Of 240,000 videos
it takes a quarter of a second. It is no checksum of a store: that is `avstore verify`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from avstore.cut import fetch

if TYPE_CHECKING:
    from avstore.store import Store

SAMPLE = 64  # videos of which stored bytes are read


def identity(store: Store, numbers: np.ndarray) -> str:
    """16 hex digits of these videos (ok ones, int64 (n,)) in this order. CorruptError where the store is damaged."""
    numbers = np.asarray(numbers, np.int64)
    h = hashlib.sha256(store.fingerprint.encode())
    sizes = np.concatenate([np.zeros(0, np.int64), *(p.integers("bytes") for p in store.plans)])
    for x in (numbers, sizes[numbers], store.frames[numbers], store.samples[numbers], store.sound[numbers]):
        h.update(np.ascontiguousarray(x, "<i8").tobytes())
    for first in range(0, len(numbers), 1 << 14):
        keys = "\n".join(store.keys[n] for n in numbers[first : first + (1 << 14)].tolist())
        h.update(f"{keys}\n".encode("utf-8", "surrogateescape"))
    at = np.unique(np.linspace(0, len(numbers) - 1, SAMPLE).astype(np.int64))
    for number in numbers[at].tolist() if len(numbers) else ():
        h.update(_stored(store, number))
    return h.hexdigest()[:16]


def _stored(store: Store, number: int) -> bytes:
    """The bytes that lie in the middle of a video: a second of sound and a picture, each with its checksum."""
    spec, place, out = store.spec, int(store.places[number]), b""
    if store.has_sound[number]:
        heard = int(store.sound[number].sum() // 2 // spec.sample_rate)
        out += _chunk(store, "waveform", place + heard, spec.shard_seconds)
    if store.has_picture[number]:
        row = place * spec.fps + int(store.frames[number]) // 2
        out += _chunk(store, "frames", row, spec.shard_seconds * spec.fps)
    return out


def _chunk(store: Store, array: str, chunk: int, per_shard: int) -> bytes:
    (data,) = fetch(store.reader, store.arrays[array], per_shard, chunk // per_shard, [chunk])
    return b"" if data is None else data.tobytes()
