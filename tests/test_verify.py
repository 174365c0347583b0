"""verify: a whole store is whole, and every kind of damage is named by file, video and second."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import avstore
from avstore.codecs import MISSING, crc32c
from avstore.durable import canonical_json, sealed_json
from avstore.errors import ConflictError, NotFoundError
from avstore.ingest import ingest
from avstore.shard import INDEX_ROW
from avstore.verify import Checked, Fault, Report, verify
from tests.tiny_store import Tiny, default_spec, make_store

VIDEOS = [
    Tiny(3.2, key="a.mp4"),
    Tiny(2, key="silent.mp4", sound=None),
    Tiny(20.5, key="long.mp4"),  # over two shards
    Tiny(1, key="broken.mp4", status="failed", sound=None, picture=False),
    Tiny(2, key="sound.wav", picture=False),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = default_spec(codec="jpeg", front_ends=("crisscross-mel80",), sample_rate=16000)
    return make_store(tmp_path_factory.mktemp("verify") / "s.zarr", VIDEOS, spec)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def one(report: Report) -> Fault:
    assert len(report.faults) == 1, report.faults
    return report.faults[0]


def place(store: Path, key: str) -> int:
    opened = avstore.open(store)
    return int(opened.places[opened.keys.index(key)])


def payload(store: Path, key: str, chunk: int) -> tuple[int, int]:
    """(offset, length) of a chunk, read from the index at the file's end."""
    data = (store / key).read_bytes()
    size = avstore.open(store).spec.shard_seconds
    per = {"frames": 16, "waveform": 1, "spectrograms": 1}[key.split("/")[0]] * size
    table = np.frombuffer(data[-4 - INDEX_ROW * per : -4], "<u8").reshape(-1, 2)
    assert table[chunk, 0] != MISSING
    return int(table[chunk, 0]), int(table[chunk, 1])


def test_a_whole_store(store: Path) -> None:
    seen: list[object] = []
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    report = verify(store, seen.append)
    assert report.ok and report.videos == 4 and report.failed == 1 and not report.tasks
    assert report.size > sum(p.stat().st_size for p in (store / "frames").glob("c.*"))
    assert isinstance(seen[-1], Checked) and seen[-1].done == seen[-1].total == 1
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before  # it reads only
    json.dumps(report.to_json())


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_a_flipped_byte_of_a_frame_names_video_and_second(codec: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", VIDEOS, default_spec(codec=codec))
    second = place(store, "a.mp4") + 2
    offset, length = payload(store, "frames/c.0.0.0.0", second * 16 + 5)
    flip(store / "frames/c.0.0.0.0", offset + length // 2)
    fault = one(verify(store))
    assert (fault.key, fault.video, fault.task) == ("a.mp4", 0, 0)
    assert fault.second == pytest.approx(2 + 5 / 16, abs=1e-3)
    assert "checksum" in fault.what


@pytest.mark.parametrize("array", ["waveform", "spectrograms/crisscross-mel80"])
def test_a_flipped_byte_of_sound(array: str, store: Path) -> None:
    dimensions = 1 if array == "waveform" else 2
    key = f"{array}/c.1" + ".0" * (dimensions - 1)
    chunk = 3
    offset, _ = payload(store, key, chunk)
    flip(store / key, offset + 100)
    fault = one(verify(store))
    assert fault.key == "long.mp4"
    assert fault.second == 16 + chunk - place(store, "long.mp4")


def test_every_byte_of_the_shards_counts(store: Path) -> None:
    """Any flipped byte of any shard is found: places of each file, the index and its checksum among them."""
    rng = np.random.default_rng(0)
    shards = sorted(p for p in store.rglob("c.*") if p.is_file())
    assert {p.relative_to(store).parts[0] for p in shards} == {"frames", "source", "waveform", "spectrograms"}
    for file in shards:
        size = file.stat().st_size
        data = file.read_bytes()
        places = {0, size - 1, size - 4, size - 5, *rng.integers(0, size, 2).tolist()}
        for at in sorted(places):
            flip(file, at)
            report = verify(store)
            assert not report.ok and all(f.task == 0 for f in report.faults), (file, at)
            assert report.faults[0].file == str(file.relative_to(store))
            file.write_bytes(data)
    assert verify(store).ok


def test_every_byte_of_the_metadata_counts(store: Path) -> None:
    """A flipped byte of a zarr.json is always found: each follows from the spec, and the spec has a fingerprint."""
    for file in sorted(p for p in store.rglob("zarr.json")):
        data = file.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 12)):
            flip(file, at)
            try:
                report = verify(store, payloads=False)
                assert not report.ok, (file, at, file.read_bytes())
            except (NotFoundError, ConflictError):  # no longer calls itself a store of this format
                assert file == store / "zarr.json"
            file.write_bytes(data)


def recounted(store: Path, change: Callable[[dict], None]) -> None:
    file = store / "commits" / "000000.json"
    value = json.loads(file.read_bytes())
    change(value)
    file.write_bytes(sealed_json(value))


def test_a_count_beyond_the_chunks_is_a_hole(store: Path) -> None:
    recounted(store, lambda r: r["frames"].__setitem__(0, r["frames"][0] + 1))
    faults = verify(store).faults
    assert {f.key for f in faults} == {"a.mp4"} and any("hole" in f.what for f in faults)
    assert faults[0].second == pytest.approx(3.1875, abs=1e-3)  # row 51


def test_a_count_short_of_the_chunks(store: Path) -> None:
    recounted(store, lambda r: r["frames"].__setitem__(0, r["frames"][0] - 1))
    assert any("bytes where the record has none" in f.what and f.key == "a.mp4" for f in verify(store).faults)


@pytest.mark.parametrize(
    ("field", "value"),
    [("status", "fine"), ("reason", "unreadable"), ("samples", -1), ("frames", 10**6), ("box", [0, 0, 999, 9]),
     ("sound_end", 10**9), ("silent", None)],
)  # fmt: skip
def test_impossible_facts(field: str, value: object, store: Path) -> None:
    recounted(store, lambda r: r[field].__setitem__(0, value))
    report = verify(store)
    assert report.tasks == [0] and report.damaged == [0]
    assert report.faults[0].file == "commits/000000.json"


def test_a_missing_shard_names_its_first_video(store: Path) -> None:
    (store / "frames/c.1.0.0.0").unlink()
    fault = one(verify(store))
    assert "missing" in fault.what and fault.key == "long.mp4"


def test_a_shard_cut_short_or_extended(store: Path) -> None:
    file = store / "waveform/c.0"
    data = file.read_bytes()
    for size in (10, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        assert not verify(store).ok
    file.write_bytes(data + b"\0")
    assert not verify(store).ok


def test_bytes_that_belong_to_nobody(store: Path) -> None:
    """An index entry removed, with a right checksum again: a hole, and payload bytes without an owner."""
    file = store / "waveform/c.0"
    data = bytearray(file.read_bytes())
    rows = 16 * INDEX_ROW
    table = np.frombuffer(bytes(data[-4 - rows : -4]), "<u8").reshape(-1, 2).copy()
    last = int(np.flatnonzero(table[:, 0] != MISSING)[-1])
    table[last] = MISSING
    data[-4 - rows :] = table.tobytes() + crc32c(table.tobytes()).to_bytes(4, "little")
    file.write_bytes(data)
    whats = {f.what for f in verify(store).faults}
    assert any("hole" in w for w in whats) and any("belong to no chunk" in w for w in whats)


def test_a_damaged_plan_and_record(store: Path) -> None:
    record = store / "commits/000000.json"
    data = record.read_bytes()
    record.write_bytes(data[:-20])
    assert one(verify(store)).task == 0
    record.write_bytes(data.replace(b'":', b'": ', 1))
    assert "digest" in verify(store).faults[0].what
    record.write_bytes(data)
    plan = store / "plans/0001.json"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert verify(store).faults[0].file == "plans/0001.json"
    plan.unlink()
    report = verify(store)  # nothing planned: the record belongs to nobody
    assert [f.file for f in report.faults] == ["commits/000000.json"]


def test_overlapping_slots_are_a_fault(store: Path) -> None:
    file = store / "plans/0001.json"
    value = json.loads(file.read_bytes())
    value["place"][1] = value["place"][0]
    file.write_bytes(sealed_json(value))
    assert "slot of video 1" in verify(store).faults[0].what


def test_pending_tasks_and_leftovers_are_no_damage(store: Path) -> None:
    (store / "commits/000000.json").unlink()
    (store / "frames/c.0.0.0.0.tmp.123").write_bytes(b"half")
    (store / ".derive").mkdir()
    report = verify(store)
    assert report.ok and report.pending == [0]
    assert report.stray == [".derive/", "frames/c.0.0.0.0.tmp.123"]


def test_quick_reads_no_payload_but_finds_a_damaged_index(store: Path) -> None:
    offset, _ = payload(store, "waveform/c.0", 0)
    flip(store / "waveform/c.0", offset)
    report = verify(store, payloads=False)
    assert report.ok and report.size < 100_000
    flip(store / "waveform/c.0", (store / "waveform/c.0").stat().st_size - 8)
    assert "index" in one(verify(store, payloads=False)).what


def test_embeddings(store: Path) -> None:
    from avstore.spec import embedding_array

    spec = avstore.open(store).spec
    array = embedding_array("r", "video", 4)
    folder = store / "embeddings/r/video"
    folder.mkdir(parents=True)
    shards = avstore.open(store).tape_seconds // spec.shard_seconds
    (folder / "zarr.json").write_bytes(
        canonical_json(array.metadata(spec.shard_seconds, shards * spec.shard_seconds, {"run": "r"}))
    )
    rows = np.full((spec.shard_seconds, 4), np.nan, np.float16)
    rows[:3] = 1

    def write() -> None:
        body = rows.astype("<f2").tobytes()
        (store / array.key(0)).write_bytes(body + crc32c(body).to_bytes(4, "little"))

    write()
    assert verify(store).ok
    flip(store / array.key(0), 0)
    assert "checksum" in one(verify(store)).what
    rows[1, 2] = np.inf
    write()
    assert "not finite" in one(verify(store)).what


def test_no_store_and_another_format(store: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify(tmp_path / "nothing")
    file = store / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"format":1', b'"format":9'))
    with pytest.raises(ConflictError, match="format 9"):
        verify(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_shard_that_cannot_be_read(store: Path) -> None:
    (store / "waveform/c.0").chmod(0)
    assert "cannot be read" in one(verify(store)).what


def test_a_store_that_ingest_made(tiny_media: Path, tmp_path: Path) -> None:
    """The counts that verify expects are those that ingest writes: real media, jpeg and sound."""
    (tmp_path / "src").mkdir()
    for i, file in enumerate(sorted(tiny_media.rglob("*.mp4"))[:3]):
        shutil.copy(file, tmp_path / "src" / f"{i}.mp4")
    (tmp_path / "src" / "broken.mp4").write_bytes(b"no media")
    summary = ingest(tmp_path / "src", tmp_path / "s.zarr", workers=1)
    assert (summary.ok, summary.failed) == (3, 1)
    report = verify(tmp_path / "s.zarr")
    assert report.ok and (report.videos, report.failed) == (3, 1) and not report.stray
