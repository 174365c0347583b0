"""Shard files: what is appended comes back, damage is told, descriptors stay bounded, nothing half-written is seen."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avstore.codecs import MISSING, check_crc, decode_source, encode_jpeg, encode_rows, encode_source, with_crc
from avstore.errors import CorruptError, MachineError, NotFoundError
from avstore.shard import LocalReader, ShardWriter


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.integers(0, 19), st.binary(min_size=1, max_size=50), min_size=1))
def test_payloads_come_back_in_order_without_gaps(
    tmp_path_factory: pytest.TempPathFactory, chunks: dict[int, bytes]
) -> None:
    root = tmp_path_factory.mktemp("shard")
    writer = ShardWriter(root / "c.0", 20)
    for chunk in sorted(chunks):
        writer.append(chunk, chunks[chunk])
    writer.close()
    reader = LocalReader(root)
    table = reader.index("c.0", 0, 20, 20)
    position = 0
    for chunk in range(20):
        if chunk not in chunks:
            assert (table[chunk] == MISSING).all()
            continue
        assert tuple(table[chunk]) == (position, len(chunks[chunk]))
        out = np.empty(len(chunks[chunk]), np.uint8)
        reader.read("c.0", position, out)
        assert out.tobytes() == chunks[chunk]
        position += len(chunks[chunk])
    data = (root / "c.0").read_bytes()
    assert len(data) == position + 20 * 16 + 4
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[position:-4])
    assert (reader.index("c.0", 7, 5, 20) == table[7:12]).all()
    reader.close()


def test_a_shard_without_chunks_makes_no_file(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "c.0", 4).close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_close_and_nothing_left_after_abort(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c.0", 4)
    writer.append(1, b"x")
    assert not (tmp_path / "c.0").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_chunks_must_rise(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c.0", 4)
    writer.append(1, b"x")
    for chunk in (1, 0, 4):
        with pytest.raises(ValueError, match="after 1 of 4"):
            writer.append(chunk, b"y")
    writer.abort()


def test_sync_comes_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b))[1])
    writer = ShardWriter(tmp_path / "c.0", 1)
    writer.append(0, b"x")
    writer.close()
    assert calls == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_failing_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = ShardWriter(tmp_path / "c.0", 1)
    writer.append(0, b"x")
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(MachineError, match=str(tmp_path)):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_cut_short_and_wrong_indices_are_told(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c.0", 3)
    for i in range(3):
        writer.append(i, b"abcd")
    writer.close()
    data = (tmp_path / "c.0").read_bytes()
    (tmp_path / "short").write_bytes(data[:20])
    with pytest.raises(CorruptError, match="cut short"):
        LocalReader(tmp_path).index("short", 0, 3, 3)
    bad = bytearray(data)
    bad[12 + 7] = 0x7F  # the offset of chunk 0 points far beyond the file
    (tmp_path / "bad").write_bytes(bad)
    with pytest.raises(CorruptError, match="outside the file"):
        LocalReader(tmp_path).index("bad", 0, 3, 3)
    with pytest.raises(NotFoundError, match="missing"):
        LocalReader(tmp_path).index("gone", 0, 3, 3)


def test_descriptors_are_bounded_and_never_closed_while_read(tmp_path: Path) -> None:
    for i in range(40):
        writer = ShardWriter(tmp_path / f"c.{i}", 1)
        writer.append(0, bytes([i]) * 100)
        writer.close()
    reader = LocalReader(tmp_path, max_open=4)
    before = len(os.listdir("/proc/self/fd"))
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        out = np.empty(100, np.uint8)
        for i in rng.integers(0, 40, 300).tolist():
            reader.read(f"c.{i}", 0, out)
            if not (out == i).all():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(reader.open) <= 4
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_scatter_fills_buffers_in_order(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(200)))
    parts = [np.empty(3, np.uint8), np.empty(5, np.uint8), np.empty(2, np.uint8)]
    views = [memoryview(p) for p in parts]
    LocalReader(tmp_path).scatter("f", 10, views)
    assert np.concatenate(parts).tolist() == list(range(10, 20))
    with pytest.raises(CorruptError, match="cut short"):
        LocalReader(tmp_path).scatter("f", 195, views)


def test_mapped_shards_are_few_and_stay_valid(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"f{i}").write_bytes(bytes([i]) * 5000)
    (tmp_path / "empty").write_bytes(b"")
    reader = LocalReader(tmp_path, max_open=2, maps=True)
    views = [reader.mapped(f"f{i}") for i in range(5)]
    assert len(reader.views) == 2 and reader.mapped("f4") is views[4] and reader.mapped("empty") is None
    assert all(v is not None and v.tolist() == [i] * 5000 and not v.flags.writeable for i, v in enumerate(views))
    with pytest.raises(NotFoundError, match="shard g is missing"):
        reader.mapped("g")
    reader.close()
    assert views[0] is not None and views[0][0] == 0 and not reader.views
    assert LocalReader(tmp_path).mapped("f1") is None


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.data())
def test_every_single_bit_flip_is_seen(payload: bytes, data: st.DataObject) -> None:
    chunk = bytearray(with_crc(payload))
    assert check_crc(np.frombuffer(bytes(chunk), np.uint8), "x").tobytes() == payload
    bit = data.draw(st.integers(0, len(chunk) * 8 - 1))
    chunk[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptError, match="damaged bytes in second 3"):
        check_crc(np.frombuffer(bytes(chunk), np.uint8), "second 3")


def test_rows_and_source_are_little_endian_and_checked() -> None:
    rows = np.arange(5, dtype=">i2")
    assert np.frombuffer(encode_rows(rows)[:-4], "<i2").tolist() == [0, 1, 2, 3, 4]
    source = np.array([-1, 0, 0, 7], np.int32)
    data = encode_source(source)
    assert decode_source(data, 4, "x").tolist() == source.tolist()
    with pytest.raises(CorruptError, match="4 rows instead of 5"):
        decode_source(data, 5, "x")


def test_jpeg_of_a_smooth_frame_is_close() -> None:
    y, x = np.mgrid[:32, :48]
    frame = np.stack([y * 4, x * 4, y * 2 + x * 2], -1).astype(np.uint8)
    from avstore.codecs import decode_jpeg_into

    out = np.empty_like(frame)
    decode_jpeg_into(encode_jpeg(frame, 90), out)
    assert np.abs(out.astype(int) - frame).mean() < 3
    half = np.empty((16, 24, 3), np.uint8)
    decode_jpeg_into(encode_jpeg(frame, 90), half)
    assert np.abs(half.astype(int) - frame[::2, ::2]).mean() < 6
