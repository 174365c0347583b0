"""Cutting: any rows from any shards, mapped or read, checked or not, are the pixels that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import avstore
from avstore.cut import cut_frames
from avstore.errors import CorruptError
from avstore.shard import LocalReader
from tests.tiny_store import Tiny, default_spec, make_store, picture

VIDEOS = [Tiny(5.0), Tiny(40.0), Tiny(3.0), Tiny(7.0)]  # shards of 16 s


class Plain:
    """A reader of two methods, as another place for shards would be."""

    def __init__(self, root: Path) -> None:
        self.inside = LocalReader(root)

    def entries(self, key: str, first: int, n: int, chunks: int) -> tuple[int, ...]:
        return self.inside.entries(key, first, n, chunks)

    def read(self, key: str, offset: int, out: np.ndarray) -> None:
        self.inside.read(key, offset, out)


READERS: dict[str, Any] = {
    "read": LocalReader,
    "mapped": lambda root: LocalReader(root, max_open=2, maps=True),
    "two methods": Plain,
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("raw") / "s.zarr", VIDEOS)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), check=st.booleans())
@pytest.mark.parametrize("kind", READERS)
def test_any_rows_are_the_pixels_written(raw: Path, kind: str, data: st.DataObject, check: bool) -> None:
    with avstore.open(raw) as store:
        array, per = store.arrays["frames"], store.spec.shard_seconds * 16
        where = [(v.number, k, v.place * 16 + k) for v in store for k in range(v.frames)]
        start = data.draw(st.integers(0, len(where) - 1))
        step, n = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 20))
        picks = data.draw(st.one_of(
            st.just([where[min(start + i * step, len(where) - 1)] for i in range(n)]),
            st.lists(st.sampled_from(where), min_size=1, max_size=12),
        ))  # fmt: skip
        out = np.full((len(picks), *array.row), 7, np.uint8)
        cut_frames(READERS[kind](raw), array, per, np.array([p[2] for p in picks]), out, check=check)
        for (video, k, _), frame in zip(picks, out, strict=True):
            assert np.array_equal(frame, picture(video, k, *array.row[:2]))


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(2.0)], default_spec(height=16, width=16))
    with avstore.open(path) as store:
        array, per = store.arrays["frames"], store.spec.shard_seconds * 16
        rows, out = np.arange(3, 9), np.zeros((6, *array.row), np.uint8)
        file = path / array.key(0)
        whole = file.read_bytes()

        def cut(check: bool, data: bytes | None = None) -> None:
            if data is not None:
                file.unlink()  # a new file: what is mapped elsewhere keeps its bytes
                file.write_bytes(data)
            cut_frames(READERS[kind](path), array, per, rows, out, check=check)

        size = 16 * 16 * 3 + 4
        hurt = bytearray(whole)
        hurt[5 * size + 9] ^= 1
        cut(False, bytes(hurt))
        assert out[2].reshape(-1)[9] ^ picture(0, 5, 16, 16).reshape(-1)[9] == 1
        with pytest.raises(CorruptError, match=r"row 5\) is damaged\nthe checksum differs"):
            cut(True)
        hole = bytearray(whole)
        at = len(whole) - 4 - 16 * per + 16 * 7
        hole[at : at + 16] = b"\xff" * 16
        with pytest.raises(CorruptError, match=r"row 7\) is damaged\nthe frame is missing"):
            cut(False, bytes(hole))
        wrong = bytearray(whole)
        wrong[at + 8 : at + 16] = (size - 1).to_bytes(8, "little")
        with pytest.raises(CorruptError, match=r"row 7\) is damaged\na frame has the wrong length"):
            cut(False, bytes(wrong))
        wrong[at : at + 8] = len(whole).to_bytes(8, "little")
        with pytest.raises(CorruptError, match="an entry points outside the file"):
            cut(False, bytes(wrong))
        with pytest.raises(CorruptError, match="is cut short"):
            cut(False, whole[:40])
        cut(True, whole)
        assert np.array_equal(out[5], picture(0, 8, 16, 16))
