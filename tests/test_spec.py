"""The spec: what is refused, what follows from it, and that two specs differ by name."""

from __future__ import annotations

import dataclasses

import pytest

from avstore.errors import ConflictError, CorruptError, UsageError
from avstore.frontends import FRONT_ENDS
from avstore.spec import Spec, arrays, embedding_array


def test_shards_hold_the_largest_power_of_two_below_128_mib() -> None:
    per_second = 128 * 176 * 3 * 16 / 10
    seconds = Spec().shard_seconds
    assert seconds * per_second < 128 * 2**20 <= 2 * seconds * per_second
    assert Spec(codec="raw").shard_seconds * per_second * 10 < 128 * 2**20
    assert Spec(picture=False).shard_seconds * 48000 < 128 * 2**20


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ({"height": 100}, "multiples of 16"),
        ({"height": 256, "width": 128}, "height <= width"),
        ({"fps": 0}, "fps 0"),
        ({"sample_rate": 1}, "sample rate"),
        ({"codec": "jpg"}, "did you mean jpeg"),
        ({"fit": "shor"}, "did you mean short"),
        ({"front_ends": ("crisscros-mel80",)}, "did you mean crisscross-mel80"),
        ({"shard_seconds": 3}, "power of two"),
        ({"quality": 0}, "quality 0"),
    ],
)
def test_impossible_specs_are_refused_with_the_reason(field: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Spec(**field)  # type: ignore[arg-type]


def test_all_problems_are_told_together() -> None:
    with pytest.raises(UsageError) as e:
        Spec(height=7, fps=0, codec="x")
    assert all(word in str(e.value) for word in ("7x176", "fps 0", "codec"))


def test_round_trip_and_fingerprint() -> None:
    spec = Spec(front_ends=("avid-linear257", "crisscross-mel80"))
    assert Spec.from_json(spec.to_json()) == spec
    assert Spec(front_ends=("crisscross-mel80", "avid-linear257")).fingerprint == spec.fingerprint
    prints = {
        dataclasses.replace(spec, **{k: v}).fingerprint for k, v in (("fps", 25), ("height", 112), ("quality", 80))
    }
    assert len(prints | {spec.fingerprint}) == 4


def test_another_spec_is_named_field_by_field() -> None:
    with pytest.raises(ConflictError, match="fps is 16 here, 25 was asked"):
        Spec().require_same(Spec(fps=25, shard_seconds=1024))
    Spec().require_same(Spec())


def test_unknown_fields_are_refused() -> None:
    value = Spec().to_json()
    with pytest.raises(CorruptError, match="colour"):
        Spec.from_json({**value, "colour": 1})


def test_other_recipes_are_kept_apart() -> None:
    """A store with spectrograms of another recipe keeps its fingerprint and all else; writing to it is refused."""
    value = {**Spec(sample_rate=16000).to_json(), "front_ends": {"crisscross-mel80": "0" * 16, "never-heard-of": "1"}}
    spec = Spec.from_json(value)
    assert spec.front_ends == () and [name for name, _ in spec.foreign] == ["crisscross-mel80", "never-heard-of"]
    assert spec.to_json() == value and Spec.from_json(spec.to_json()) == spec
    assert set(arrays(spec)) == {"frames", "source", "waveform"}
    others = {Spec(sample_rate=16000).fingerprint, Spec(sample_rate=16000, front_ends=()).fingerprint}
    assert spec.fingerprint not in others
    with pytest.raises(ConflictError, match="crisscross-mel80 of this store was computed by another recipe"):
        spec.require_recipes()
    Spec().require_recipes()


def test_metadata_of_frames_is_the_tested_one() -> None:
    spec = Spec()
    value = arrays(spec)["frames"].metadata(spec.shard_seconds, 2 * spec.shard_seconds)
    assert value == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [2048 * 16, 128, 176, 3],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1024 * 16, 128, 176, 3]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, 128, 176, 3],
                    "codecs": [
                        {"name": "imagecodecs_jpeg", "configuration": {"level": 90, "subsampling": "420"}},
                        {"name": "crc32c"},
                    ],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {},
        "dimension_names": ["frame", "y", "x", "rgb"],
        "storage_transformers": [],
    }


def test_dimension_names_differ_where_sizes_differ() -> None:
    spec = Spec(front_ends=tuple(sorted(n for n, r in FRONT_ENDS.items() if r.storable)))
    every = [*arrays(spec).values(), embedding_array("avid", "video", 128), embedding_array("avid", "audio", 128)]
    sizes: dict[str, int] = {}
    for array in every:
        shape = array.metadata(spec.shard_seconds, spec.shard_seconds)["shape"]
        for name, size in zip(array.dimensions, shape, strict=True):
            assert sizes.setdefault(name, size) == size
    assert arrays(Spec(picture=False)).keys() == {"waveform", "spectrograms/crisscross-mel80"}
    assert arrays(spec)["frames"].key(17) == "frames/c.17.0.0.0"
    assert arrays(spec)["source"].key(3) == "source/c.3"
