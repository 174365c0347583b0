"""The spec of a store: what every video in it was turned into, and the Zarr metadata that follows from it.

A store has one spec for life. Its fingerprint is in every plan and record; another spec into the same store is
a conflict that names the field.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from avstore.durable import canonical_json
from avstore.errors import ConflictError, CorruptError, UsageError, did_you_mean
from avstore.frontends import FRONT_ENDS, named

FORMAT = 1  # version of the on-disk format, docs/format.md
SHARD_BYTES = 128 * 2**20
PROFILES = {"112": (128, 176, 16), "224": (256, 352, 16)}  # name -> height, width, fps
FITS = ("short", "pad", "stretch")
CODECS = ("jpeg", "raw")


@dataclass(frozen=True)
class Spec:
    """Frame size in pixels (both multiples of 16, height <= width), frames and samples per second of the tape,
    how pictures are fitted and stored, which spectrograms are stored, and the limits of decoding."""

    height: int = 128
    width: int = 176
    fps: int = 16
    sample_rate: int = 24000
    fit: str = "short"
    codec: str = "jpeg"
    quality: int = 90
    picture: bool = True  # False: an audio store, without `frames` and `source`
    front_ends: tuple[str, ...] = ("crisscross-mel80",)
    shard_seconds: int = 0  # 0: the largest power of two whose expected bytes stay under 128 MiB
    max_seconds: int = 12 * 3600  # a longer video is `too_large`
    max_hold: int = 60  # seconds that one source frame may be shown
    max_pixels: int = 64 * 2**20  # of a source frame
    cpu_base: float = 60.0  # CPU seconds that a child may spend on a video: base + per_second * seconds of media
    cpu_per_second: float = 20.0
    # (name, hash) of spectrograms that another recipe than this avstore's made: neither read nor written
    foreign: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        wrong = []
        if self.height % 16 or self.width % 16 or not 16 <= self.height <= self.width <= 8192:
            wrong.append(f"size {self.height}x{self.width}: both sides must be multiples of 16, height <= width")
        if not 1 <= self.fps <= 240:
            wrong.append(f"fps {self.fps}: a whole number from 1 to 240")
        if not 4000 <= self.sample_rate <= 192000:
            wrong.append(f"sample rate {self.sample_rate}: 4000 to 192000 Hz")
        if self.fit not in FITS:
            wrong.append(f"fit {self.fit!r}: {did_you_mean(self.fit, FITS)}")
        if self.codec not in CODECS:
            wrong.append(f"codec {self.codec!r}: {did_you_mean(self.codec, CODECS)}")
        if not 1 <= self.quality <= 100:
            wrong.append(f"quality {self.quality}: 1 to 100")
        for name in self.front_ends:
            if name not in FRONT_ENDS:
                wrong.append(f"front-end {name!r}: {did_you_mean(name, FRONT_ENDS)}")
        if tuple(sorted(set(self.front_ends))) != tuple(self.front_ends):
            object.__setattr__(self, "front_ends", tuple(sorted(set(self.front_ends))))
        if self.shard_seconds < 0 or (self.shard_seconds and self.shard_seconds & (self.shard_seconds - 1)):
            wrong.append(f"shard_seconds {self.shard_seconds}: a power of two")
        if wrong:
            raise UsageError("this store cannot be made", "; ".join(wrong), "avstore ingest --help lists the options")
        if not self.shard_seconds:
            raw = self.height * self.width * 3 * self.fps if self.picture else 0
            per_second = (raw / 10 if self.codec == "jpeg" else raw) if raw else self.sample_rate * 2
            seconds = 1
            while seconds * 2 * per_second < SHARD_BYTES:
                seconds *= 2
            object.__setattr__(self, "shard_seconds", seconds)

    def to_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        del out["foreign"]
        out["front_ends"] = {**{name: FRONT_ENDS[name].hash for name in self.front_ends}, **dict(self.foreign)}
        return out

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Spec:
        """The spec in a store's attributes; CorruptError for fields of another version. Front-ends that this avstore
        does not know, or knows by another recipe, come in `foreign`: all else of such a store can be used."""
        fields = {f.name for f in dataclasses.fields(cls)} - {"foreign"}
        if set(value) != fields:
            raise CorruptError(
                "the spec of this store has other fields than this avstore knows",
                f"unexpected {sorted(set(value) - fields)}, missing {sorted(fields - set(value))}",
                "open it with the avstore that wrote it, or ingest again into a new store",
            )
        ours = {name for name, digest in value["front_ends"].items() if _hash(name) == digest}
        foreign = sorted((name, digest) for name, digest in value["front_ends"].items() if name not in ours)
        return cls(**{**value, "front_ends": tuple(sorted(ours)), "foreign": tuple(foreign)})

    def require_recipes(self) -> None:
        """ConflictError where spectrograms of this store were made by other recipes: what writes them calls this."""
        for name, digest in self.foreign:
            raise ConflictError(
                f"front-end {name} of this store was computed by another recipe",
                f"the store has {digest}, this avstore {_hash(name) or 'no front-end of that name'}",
                "use the avstore version that wrote it, or ingest into a new STORE; reading all else of it works",
            )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all fields and the recipes of the front-ends."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()[:16]

    def require_same(self, asked: Spec) -> None:
        """ConflictError naming each field in which `asked` differs from this store's spec."""
        mine, theirs = self.to_json(), asked.to_json()
        differing = [f"{k} is {mine[k]} here, {theirs[k]} was asked" for k in mine if mine[k] != theirs[k]]
        if differing:
            raise ConflictError(
                "this store has another spec", "; ".join(differing), "leave these options away, or name another STORE"
            )

    @property
    def clock(self) -> str:
        return f"{self.height}x{self.width} at {self.fps} fps, {self.sample_rate} Hz mono"


@dataclass(frozen=True)
class ArraySpec:
    """One array on the tape: rows per second, the shape and dtype of a row, rows per inner chunk.

    `inner_rows` = 0 means that the array is not sharded: one compressed chunk per shard's stretch of the tape.
    """

    path: str
    rate: int
    row: tuple[int, ...]
    dtype: str
    fill: Any
    inner_rows: int
    codecs: tuple[dict[str, Any], ...]
    dimensions: tuple[str, ...]

    def metadata(self, shard_seconds: int, seconds: int, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The array's zarr.json for a tape of `seconds`."""
        rows = shard_seconds * self.rate
        outer = [rows, *self.row]
        codecs: list[dict[str, Any]] = [dict(c) for c in self.codecs]
        if self.inner_rows:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            codecs = [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.inner_rows, *self.row],
                        "codecs": codecs,
                        "index_codecs": index,
                        "index_location": "end",
                    },
                }
            ]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [seconds * self.rate, *self.row],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": attributes or {},
            "dimension_names": list(self.dimensions),
            "storage_transformers": [],
        }

    def key(self, shard: int) -> str:
        """The path of a shard's file inside the store, e.g. `frames/c.17.0.0.0`."""
        return f"{self.path}/c.{shard}" + ".0" * len(self.row)


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
PLAIN = {"name": "bytes"}
CRC = {"name": "crc32c"}
ZSTD = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}


def jpeg_codec(quality: int) -> dict[str, Any]:
    return {"name": "imagecodecs_jpeg", "configuration": {"level": quality, "subsampling": "420"}}


def _hash(name: str) -> str | None:
    return FRONT_ENDS[name].hash if name in FRONT_ENDS else None


def spectrogram_array(name: str) -> ArraySpec:
    """float16 log-spectrogram rows of a front-end; inner chunk 1 s. UsageError for an unknown one."""
    recipe = named(name)
    rate = recipe.rows_per_second
    return ArraySpec(
        f"spectrograms/{name}",
        rate,
        (recipe.bins,),
        "float16",
        "NaN",
        rate,
        (LITTLE, CRC),
        (f"{name}.row", f"{name}.bin"),
    )


def embedding_array(run: str, tower: str, size: int) -> ArraySpec:
    """float16 embeddings, one row per second of the tape; one chunk per shard's stretch."""
    return ArraySpec(
        f"embeddings/{run}/{tower}",
        1,
        (size,),
        "float16",
        "NaN",
        0,
        (LITTLE, CRC),
        (f"{run}.{tower}.second", f"{run}.{tower}.dimension"),
    )


def arrays(spec: Spec) -> dict[str, ArraySpec]:
    """The arrays that ingest writes, by path, in the order in which a task writes them."""
    out: dict[str, ArraySpec] = {}
    if spec.picture:
        frame = (spec.height, spec.width, 3)
        body: tuple[dict[str, Any], ...] = (jpeg_codec(spec.quality), CRC) if spec.codec == "jpeg" else (PLAIN, CRC)
        out["frames"] = ArraySpec("frames", spec.fps, frame, "uint8", 0, 1, body, ("frame", "y", "x", "rgb"))
        out["source"] = ArraySpec("source", spec.fps, (), "int32", -1, 0, (LITTLE, ZSTD, CRC), ("frame",))
    out["waveform"] = ArraySpec(
        "waveform", spec.sample_rate, (), "int16", 0, spec.sample_rate, (LITTLE, CRC), ("sample",)
    )
    for name in spec.front_ends:
        array = spectrogram_array(name)
        out[array.path] = array
    return out
