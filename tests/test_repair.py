"""Damage anywhere in a store: verify finds it, the reader never shows it, repair makes the same bytes again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ingest_media import Here, digest, made_once, write_wav
from test_ingest import fail_at

import avstore
from avstore.derive import derive
from avstore.errors import AvstoreError, ConflictError, CorruptError, MachineError, NotFoundError
from avstore.ingest import ingest
from avstore.lock import StoreLock
from avstore.records import read_plans, record_path
from avstore.repair import Remade, repair
from avstore.verify import verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, tiny_media)[0]


@pytest.fixture(scope="module")
def whole(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, tiny_media)[1]


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding in this process: where only the parent is tested."""
    monkeypatch.setattr("avstore.crew.Pool", Here)


def flip(file: Path, at: int, by: int = 0x10) -> bytes:
    """Changes a byte; returns what the file was."""
    before = file.read_bytes()
    data = bytearray(before)
    data[at] ^= by
    file.write_bytes(data)
    return before


def places(file: Path, rng: random.Random, n: int) -> list[int]:
    """Byte positions of a file: both ends, what surrounds the index of a shard, and `n` others."""
    size = file.stat().st_size
    fixed = {0, size - 1} if n > 2 else set()
    return sorted(fixed | {rng.randrange(size) for _ in range(n)})


def everything(path: Path) -> dict[str, np.ndarray]:
    """All that a store gives: pictures, their source frames and the sound of each video."""
    out = {}
    with avstore.open(path) as store:
        for video in store:
            if video.frames:
                clip = store.clip(video.number, 0, n=video.frames, fps=store.spec.fps)
                assert clip.frames is not None and clip.source is not None
                out[f"{video.key} frames"], out[f"{video.key} source"] = clip.frames, clip.source
            if video.has_sound:
                out[f"{video.key} waveform"] = store.waveform(video.number)[0]
    return out


def damaged_everywhere(store: Path, whole: Path, n: int, seed: int) -> int:
    """Flips `n` bytes of each file, one at a time: each is found, the shard's by video and second, and reading gives
    either the right values or an error. How many it were."""
    rng, count, want = random.Random(seed), 0, everything(whole)
    for name in sorted(digest(store)):
        for at in places(store / name, rng, n):
            by = 1 << rng.randrange(8)
            before = flip(store / name, at, by)
            count += 1
            what = f"{name}, byte {at} of {len(before)}, bits {by:#x}"
            try:
                report = verify(store)
                assert not report.ok, what
                assert name in {f.file for f in report.faults}, what
                if re.search(r"/c\.\d", name):
                    assert all(f.video is not None and f.key and f.second is not None for f in report.faults), what
            except ConflictError:
                assert name == "zarr.json", what  # another version of the format, or of a recipe
            except NotFoundError:
                assert name == "zarr.json", what
            try:
                have = everything(store)
                assert have.keys() == want.keys(), what
                for key, values in want.items():
                    assert np.array_equal(have[key], values), what
            except (AvstoreError, ValueError, KeyError, TypeError):
                pass  # told, not shown
            (store / name).write_bytes(before)
    assert verify(store).ok
    return count


def test_some_bytes_of_every_file(store: Path, whole: Path) -> None:
    assert damaged_everywhere(store, whole, 1, seed=3) > 30


@pytest.mark.slow
def test_many_bytes_of_every_file(store: Path, whole: Path) -> None:
    assert damaged_everywhere(store, whole, 20, seed=4) > 600


def test_a_damaged_shard_is_made_again_byte_for_byte(store: Path, whole: Path) -> None:
    """With real children: one frame of one video; only this video is decoded, only this file written."""
    want, before = digest(whole), {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    name = next(n for n in want if n.startswith("frames/c."))
    flip(store / name, 2000)
    (store / "waveform" / "c.0.tmp.77").write_bytes(b"left by a killed run")
    seen = []
    out = repair(store, workers=1, on_event=seen.append)
    assert out.ok and len(out.tasks) == 1 and out.files == [name] and out.swept == ["waveform/c.0.tmp.77"]
    assert len(out.found.faults) == 1 and [e.why for e in seen if isinstance(e, Remade)] == [None]
    assert digest(store) == want
    changed = {p for p, t in before.items() if p.stat().st_mtime_ns != t} - {store / "lock"}
    assert changed == {store / name}
    json.dumps(out.to_json())


def each_file(store: Path, whole: Path, source: Path, names: list[str]) -> None:
    want = digest(whole)
    rng = random.Random(5)
    for name in names:
        how = rng.choice(["flip", "cut", "gone"]) if "/c." in name or name.startswith("commits") else "flip"
        if how == "flip":
            flip(store / name, rng.randrange((store / name).stat().st_size))
        elif how == "cut" or name.startswith("commits"):  # a record that is gone is a task that is not done
            (store / name).write_bytes((store / name).read_bytes()[:-7])
        else:
            (store / name).unlink()
        out = repair(store)
        if name.startswith("plans/"):
            assert not out.ok and "slots cannot be guessed" in out.left[0][1] and not out.files
            shutil.copyfile(whole / name, store / name)
        else:
            assert out.ok and name in out.files, (name, how, out.left)
        assert digest(store) == want, (name, how)


def test_one_file_of_each_kind(store: Path, whole: Path, source: Path, here: None) -> None:
    names = sorted(digest(store))
    kinds = {re.sub(r"\d+(\.0)*", "n", n): n for n in names}
    assert {"frames/c.n", "source/c.n", "waveform/c.n", "commits/n.json", "plans/n.json", "zarr.json"} <= set(kinds)
    each_file(store, whole, source, list(kinds.values()))


@pytest.mark.slow
def test_every_file(store: Path, whole: Path, source: Path, here: None) -> None:
    each_file(store, whole, source, sorted(digest(store)))


def test_everything_at_once(store: Path, whole: Path, here: None) -> None:
    for name in digest(store):
        if not name.startswith("plans/") and name != "zarr.json":  # it needs the arrays' metadata, and these need it
            flip(store / name, (store / name).stat().st_size // 2)
    out = repair(store)
    assert out.ok and digest(store) == digest(whole)
    assert len(out.files) == len(digest(whole)) - 3  # two plans


def test_a_file_that_should_not_be_there(store: Path, whole: Path, here: None) -> None:
    plan = read_plans(store)[0]
    i = plan.key.index("long.wav")
    (task,) = (t for t in plan.tasks if plan.first_video + i in t.videos)  # sound alone: no frames
    shutil.copyfile(next((store / "frames").glob("c.*")), store / f"frames/c.{task.shard}.0.0.0")
    assert not verify(store).ok
    assert repair(store).ok and digest(store) == digest(whole)


@pytest.mark.parametrize("how", ["missing", "changed", "same size"])
def test_sources_that_are_not_as_they_were(store: Path, source: Path, tmp_path: Path, here: None, how: str) -> None:
    """The task whose source has changed stays as it is, and is told; another is repaired."""
    folder = Path(shutil.copytree(source, tmp_path / "media"))
    plan = read_plans(store)[0]
    i = plan.key.index("short.wav")
    (task,) = (t for t in plan.tasks if plan.first_video + i in t.videos)
    shard = f"waveform/c.{task.shard}"
    record = record_path(store, task.number)
    record.write_bytes(record.read_bytes()[:-9])  # so that every video of the task must be decoded
    other = next(t for t in plan.tasks if t.number != task.number and (store / f"source/c.{t.shard}").exists())
    flip(store / f"source/c.{other.shard}", 9)
    if how == "missing":
        (folder / "short.wav").unlink()
    else:
        write_wav(folder / "short.wav", 1.5 if how == "same size" else 1.75, seed=99)
    before = digest(store)
    out = repair(store, folder)
    assert out.tasks == [other.number] and [what for what, _ in out.left] == [f"task {task.number}"]
    why = out.left[0][1]
    assert {"missing": "no such file", "changed": "bytes now", "same size": "a source has changed"}[how] in why
    after = digest(store)
    assert after[shard] == before[shard] and {n for n in after if after[n] != before[n]} == {f"source/c.{other.shard}"}
    out = repair(store, source)
    assert out.ok and out.tasks == [task.number]


def test_without_the_source_folder(store: Path, tmp_path: Path, here: None) -> None:
    (store / "logs" / "source").write_text(json.dumps({"folder": str(tmp_path / "away")}))
    record = record_path(store, 0)
    good = record.read_bytes()
    record.write_bytes(b"{}")
    flip(store / "waveform" / "zarr.json", 40)
    out = repair(store)
    assert out.files == ["waveform/zarr.json"] and out.left == [
        ("task 0", "the source folder is away: name it with --source FOLDER")
    ]
    assert record.read_bytes() == b"{}"
    record.write_bytes(good)
    assert verify(store).ok
    with pytest.raises(NotFoundError, match="nowhere"):
        repair(store, tmp_path / "nowhere")


@pytest.mark.parametrize("call", ["rename", pytest.param("fsync", marks=pytest.mark.slow), "write"])
def test_a_repair_that_fails_leaves_what_was_whole(
    store: Path, whole: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The n-th `call` fails, for every n: what was whole still is, and a repeat finishes."""
    want, n, failed = digest(whole), 0, True
    damaged = ["commits/000000.json", "waveform/c.0", "frames/zarr.json"]
    while failed:
        n += 1
        for name in damaged:
            flip(store / name, 30)
        with monkeypatch.context() as patch:
            fail_at(patch, call, n, 28, store)
            try:
                repair(store)
                failed = False
            except MachineError as e:
                assert "No space left" in str(e)
        have = digest(store)
        assert {k for k in want if have.get(k) != want[k]} <= set(damaged)
        assert repair(store).ok and digest(store) == want
        assert not list(store.rglob("*.tmp.*"))
    assert n > 3


def test_a_whole_store_is_left_alone(store: Path, here: None) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file() and p.name != "lock"}
    out = repair(store)
    assert out.ok and out.found.ok and not out.files and not out.tasks
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_what_is_refused(store: Path, tmp_path: Path, here: None) -> None:
    with pytest.raises(NotFoundError):
        repair(tmp_path / "nothing.zarr")
    assert not (tmp_path / "nothing.zarr").exists()
    with StoreLock(store) as lock:
        lock.exclusive()
        with pytest.raises(ConflictError, match=str(os.getpid())):
            repair(store)


def test_a_lost_spec_is_found_again_only_if_it_is_certain(store: Path, whole: Path, here: None) -> None:
    file = store / "zarr.json"
    for data in (b"", b"{", file.read_bytes().replace(b'"quality":90', b'"quality":91')):
        file.write_bytes(data)
        assert repair(store).ok and digest(store) == digest(whole)
    file.write_bytes(b"")
    frames = store / "frames" / "zarr.json"
    frames.write_bytes(frames.read_bytes().replace(b'"level":90', b'"level":70'))  # now no spec has the fingerprint
    with pytest.raises(CorruptError, match="fingerprint of the plans"):
        repair(store)
    assert file.read_bytes() == b""


def test_derived_spectrograms_are_derived_again(tmp_path: Path, here: None) -> None:
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", 2, 16000)
    store = tmp_path / "s.zarr"
    ingest(tmp_path / "in", store, sample_rate=16000, front_ends=())
    derive(store, "l2l-mel40", workers=1)
    want = digest(store)
    (name,) = (n for n in want if n.startswith("spectrograms/l2l-mel40/c."))
    flip(store / name, 100)
    out = repair(store)
    assert out.ok and out.files == [name] and digest(store) == want


def test_temporaries_of_a_killed_repair_are_swept(store: Path, whole: Path, source: Path, here: None) -> None:
    left = store / ".repair.tmp.4242" / "frames"
    left.mkdir(parents=True)
    (left / "c.0.0.0.0").write_bytes(b"half")
    ingest(source, store)
    assert digest(store) == digest(whole)


def test_the_command(store: Path, whole: Path, tmp_path: Path) -> None:
    """From outside, with real children: what is left is told with exit 1, what is repaired with 0."""

    def run(*more: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "verify", str(store), *more],
            capture_output=True, text=True, timeout=240, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    name = next(n for n in digest(whole) if n.startswith("frames/c."))
    flip(store / name, 2000)
    (tmp_path / "empty").mkdir()
    code, out, err = run("--repair", "--source", str(tmp_path / "empty"))
    assert code == 1 and "at second" in out and "sources are missing or changed" in err, err
    code, out, _ = run("--repair", "--json")
    assert code == 0 and json.loads(out)["files"] == [name] and digest(store) == digest(whole)
    assert run("--repair", "--quick")[0] == 2
