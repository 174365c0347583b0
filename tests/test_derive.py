"""Derived spectrograms: the bytes of an ingest, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import avstore
from avstore.derive import DeriveDone, DeriveStarted, coverage, derive, outstanding
from avstore.durable import canonical_json, read_json
from avstore.errors import ConflictError, CorruptError, InterruptedRun, MachineError, NotFoundError, UsageError
from avstore.frontends import FRONT_ENDS, spectrogram_rows
from avstore.ingest import ingest
from avstore.loader import Loader
from avstore.lock import StoreLock
from avstore.sampler import Order
from avstore.verify import verify
from avstore.views import UniformView
from tests.ingest_media import digest, write_wav
from tests.small_stores import SMALL, small_store
from tests.tiny_store import Tiny, default_spec, make_store

NAMES = ("avid-linear257", "crisscross-mel80")


@pytest.fixture
def plain(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> Path:
    """A copy of a real store without spectrograms."""
    return Path(shutil.copytree(small_store(tmp_path_factory, tiny_media), tmp_path / "plain.zarr"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three shards of 16 s: five sounding videos, one of 40 s; a silent one, a failed one."""
    videos = [
        Tiny(3),
        Tiny(2.5, sound=1.2),
        Tiny(6, sound=None),
        Tiny(9, status="failed"),
        Tiny(4),
        Tiny(5, picture=False),
    ]
    return make_store(tmp_path / "tiny.zarr", videos, default_spec(sample_rate=16000))


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "zarr.json"}


def test_the_bytes_of_an_ingest(plain: Path, tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> None:
    both = small_store(tmp_path_factory, tiny_media, front_ends=NAMES)
    before = digest(plain)
    for name in NAMES:
        summary = derive(plain, name, workers=2)
        assert summary.videos == 8 and summary.size == sum(
            len(b) - 8 * 16 - 4 for b in shards(plain / "spectrograms" / name).values())  # fmt: skip
        assert shards(plain / "spectrograms" / name) == shards(both / "spectrograms" / name) != {}
        ours, theirs = (read_json(p / "spectrograms" / name / "zarr.json") for p in (plain, both))
        assert ours.pop("attributes")["recipe"] == FRONT_ENDS[name].hash and theirs.pop("attributes") == {}
        assert ours == theirs
    after = digest(plain)
    assert {k: after[k] for k in before} == before and not list(plain.rglob("*.tmp.*"))
    store, other = avstore.open(plain), avstore.open(both)
    assert store.front_ends == other.front_ends == sorted(NAMES)
    for n in store.numbers.tolist():
        m = int(other.find([store.key(n)])[0])
        rows = store.stored_spectrogram(n, NAMES[0])
        np.testing.assert_array_equal(rows, other.stored_spectrogram(m, NAMES[0]))
        if store.has_sound[n]:
            whole = spectrogram_rows(store.waveform(n)[0], NAMES[0], 24000).astype(np.float32)
            np.testing.assert_array_equal(rows, whole)


def test_repeating_it_changes_nothing(plain: Path) -> None:
    derive(plain, NAMES[0])
    before = digest(plain)
    seen: list[Any] = []
    summary = derive(plain, NAMES[0], on_event=seen.append)
    assert summary.tasks == summary.size == 0 and digest(plain) == before
    assert seen == [DeriveStarted(0, 0, 0.0)]


def test_events_and_the_estimate_agree(plain: Path) -> None:
    expected = outstanding(plain, NAMES[1])
    assert not (plain / "spectrograms" / f".{NAMES[1]}").exists()
    seen: list[Any] = []
    summary = derive(plain, NAMES[1], on_event=seen.append)
    started, done = seen[0], [e for e in seen if isinstance(e, DeriveDone)]
    assert (started.tasks, started.videos, started.seconds) == tuple(
        expected[k] for k in ("tasks", "videos", "seconds")
    )
    assert [e.left for e in done] == list(range(len(done)))[::-1] and len(done) == expected["tasks"] == summary.tasks
    assert sum(e.size for e in done) == summary.size == expected["bytes"]
    assert summary.seconds == pytest.approx(expected["seconds"]) and summary.seconds > 20
    assert outstanding(plain, NAMES[1])["tasks"] == 0


def test_a_new_ingest_is_filled_up(tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    write_wav(folder / "a.wav", 3.2, 24000)
    ingest(folder, store, **SMALL)
    derive(store, NAMES[0])
    before = digest(store)
    write_wav(folder / "b.wav", 11.5, 24000, seed=1)
    ingest(folder, store, **SMALL)
    new = avstore.open(store)
    a, b = new.find(["a.wav", "b.wav"])
    assert coverage(new)[f"spectrograms/{NAMES[0]}"] == {
        "videos": 1, "of": 2, "complete": False, "unfinished": False, "recipe": FRONT_ENDS[NAMES[0]].hash}  # fmt: skip
    assert new.stored_spectrogram(a, NAMES[0]).shape == (320, 257)
    with pytest.raises(NotFoundError, match="not stored for video") as e:
        new.stored_spectrogram(b, NAMES[0])
    assert "avstore derive" in e.value.next
    summary = derive(store, NAMES[0])
    assert (summary.tasks, summary.videos) == (1, 2)
    new = avstore.open(store)
    assert coverage(new)[f"spectrograms/{NAMES[0]}"]["complete"]
    np.testing.assert_array_equal(
        new.stored_spectrogram(b, NAMES[0]), spectrogram_rows(new.waveform(b)[0], NAMES[0], 24000).astype(np.float32)
    )
    after = digest(store)
    assert all(after[k] == v for k, v in before.items() if k.startswith(f"spectrograms/{NAMES[0]}/c"))
    rows = new.tape_seconds * FRONT_ENDS[NAMES[0]].rows_per_second
    assert read_json(store / "spectrograms" / NAMES[0] / "zarr.json")["shape"] == [rows, 257]


def test_silent_failed_and_pending_videos(tiny: Path) -> None:
    summary = derive(tiny, "crisscross-mel80")
    assert summary.videos == 4 and summary.pending == 0
    store = avstore.open(tiny)
    assert np.isnan(store.stored_spectrogram(2, "crisscross-mel80")).all()
    assert store.stored_spectrogram(2, "crisscross-mel80").shape == (600, 80)
    assert store.stored_spectrogram(1, "crisscross-mel80").shape == (120, 80)
    covered = coverage(store)["spectrograms/crisscross-mel80"]
    assert (covered["videos"], covered["of"], covered["complete"], covered["unfinished"]) == (4, 4, True, False)


def test_a_task_without_a_record_waits(tiny: Path) -> None:
    (tiny / "commits" / "000000.json").rename(tiny.parent / "record")
    summary = derive(tiny, "crisscross-mel80")
    assert (summary.videos, summary.pending, summary.tasks) == (0, 1, 0)
    (tiny.parent / "record").rename(tiny / "commits" / "000000.json")
    assert derive(tiny, "crisscross-mel80").videos == 4


def test_interrupted_by_the_caller(plain: Path) -> None:
    stop = threading.Event()
    with pytest.raises(InterruptedRun, match=r"after \d of \d tasks"):
        derive(plain, NAMES[0], workers=1, stop=stop, on_event=lambda e: stop.set())
    assert not (plain / "spectrograms" / NAMES[0]).exists()
    assert avstore.open(plain).front_ends == []
    derive(plain, NAMES[0])
    fresh = Path(shutil.copytree(plain, plain.parent / "fresh.zarr"))
    shutil.rmtree(fresh / "spectrograms" / NAMES[0])
    derive(fresh, NAMES[0])
    assert digest(fresh) == digest(plain)


def run(store: Path, at: int = 0) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("derive_process.py")
    root = str(script.parents[1])
    env = {**os.environ, "DIE_AT": str(at), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run([sys.executable, str(script), str(store), "crisscross-mel80"], env=env, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def killed_at(tiny: Path, instants: list[int], calls: int, reference: dict[str, str]) -> None:
    for at in instants:
        copy = Path(shutil.copytree(tiny, tiny.parent / f"killed{at}.zarr"))
        assert run(copy, at).returncode == -signal.SIGKILL, f"of {calls} calls"
        assert not (copy / "spectrograms" / "crisscross-mel80").exists() or at >= calls - 1  # the last: fsync(folder)
        derive(copy, "crisscross-mel80", workers=1)
        assert digest(copy) == reference, f"killed before call {at} of {calls}"
        shutil.rmtree(copy)


def reference_of(tiny: Path) -> tuple[int, dict[str, str]]:
    copy = Path(shutil.copytree(tiny, tiny.parent / "reference.zarr"))
    done = run(copy)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), digest(copy)


def test_killed_and_repeated(tiny: Path) -> None:
    calls, reference = reference_of(tiny)
    killed_at(tiny, [calls // 2], calls, reference)


@pytest.mark.slow
def test_killed_at_every_call(tiny: Path) -> None:
    calls, reference = reference_of(tiny)
    killed_at(tiny, list(range(1, calls + 1)), calls, reference)


def test_a_full_disk(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"the disk that holds .* is full"):
        derive(plain, NAMES[1], workers=1)
    monkeypatch.undo()
    assert not (plain / "spectrograms" / NAMES[1]).exists() and not list(plain.rglob("*.tmp.*"))
    derive(plain, NAMES[1])
    assert coverage(avstore.open(plain))[f"spectrograms/{NAMES[1]}"]["complete"]


def test_damaged_sound_is_told(tiny: Path) -> None:
    file = tiny / "waveform" / "c.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="waveform at second 0"):
        derive(tiny, "crisscross-mel80")
    assert avstore.open(tiny).front_ends == []


def test_it_needs_the_store_alone(tiny: Path) -> None:
    with StoreLock(tiny) as lock:
        lock.exclusive("ingest")
        with pytest.raises(ConflictError, match="is being written by process"):
            derive(tiny, "crisscross-mel80")


def test_another_recipe_is_not_mixed(tiny: Path) -> None:
    derive(tiny, "crisscross-mel80")
    file = tiny / "spectrograms" / "crisscross-mel80" / "zarr.json"
    value = read_json(file)
    value["attributes"]["recipe"] = "0" * 16
    file.write_bytes(canonical_json(value))
    with pytest.raises(ConflictError, match="another recipe"):
        derive(tiny, "crisscross-mel80")
    with pytest.raises(ConflictError, match="another recipe"):
        avstore.open(tiny).stored_spectrogram(0, "crisscross-mel80")
    folder = tiny / "spectrograms" / "crisscross-mel80"
    folder.rename(folder.with_name(".crisscross-mel80"))  # unfinished, by another recipe: begun anew
    assert coverage(avstore.open(tiny))["spectrograms/crisscross-mel80"]["unfinished"]
    derive(tiny, "crisscross-mel80")
    assert read_json(file)["attributes"]["recipe"] == FRONT_ENDS["crisscross-mel80"].hash


def test_a_store_whose_spectrograms_another_recipe_made(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ingest by another avstore version, whose recipe of a front-end differed: only this spectrogram is refused."""
    made = small_store(tmp_path_factory, tiny_media, front_ends=("crisscross-mel80",))
    path = Path(shutil.copytree(made, tmp_path / "s.zarr"))
    with avstore.open(path) as before:
        clip = before.clip(0, 0, n=8, fps=8)
    monkeypatch.setitem(
        FRONT_ENDS, "crisscross-mel80", dataclasses.replace(FRONT_ENDS["crisscross-mel80"], eps=1e-3)
    )
    with avstore.open(path) as store:
        again = store.clip(0, 0, n=8, fps=8, front_end="crisscross-mel80")  # computed from the waveform, by ours
        assert np.array_equal(again.frames, clip.frames) and np.array_equal(again.waveform, clip.waveform)
        assert again.spectrogram is not None
        with pytest.raises(ConflictError, match="another recipe"):
            store.stored_spectrogram(0, "crisscross-mel80")
        selection = store.select()
        with pytest.raises(ConflictError, match="another recipe"):
            Loader(
                store, selection, UniformView(1), order=Order(len(selection), draws=1, seed=0, batch_size=1),
                frames=0, fps=8, samples=store.spec.sample_rate, front_end="crisscross-mel80", in_process=True,
            )  # fmt: skip
        assert coverage(store)["spectrograms/crisscross-mel80"]["recipe"] != FRONT_ENDS["crisscross-mel80"].hash
    bytes_before = digest(path)
    with pytest.raises(ConflictError, match="front-end crisscross-mel80 of this store was computed by another recipe"):
        ingest(tiny_media, path)
    with pytest.raises(ConflictError, match="another recipe"):
        derive(path, "crisscross-mel80")
    assert digest(path) == bytes_before
    report = verify(path)
    assert report.ok and any("crisscross-mel80 is not checked" in note for note in report.notes)
    derive(path, "avid-linear257")
    with avstore.open(path) as store:
        assert np.isfinite(store.stored_spectrogram(0, "avid-linear257")).all() and verify(path).ok


def test_what_cannot_be_derived(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean crisscross-mel80"):
        derive(tiny, "crisscross-mel8")
    with pytest.raises(UsageError, match="cannot be stored"):
        derive(tiny, "l3-linear257")
    with pytest.raises(UsageError, match="needs sound at 24000 Hz"):
        derive(tiny, "avid-linear257")
    with pytest.raises(UsageError, match="0 workers"):
        derive(tiny, "crisscross-mel80", workers=0)
    with pytest.raises(NotFoundError, match="there is no store"):
        derive(tmp_path / "none.zarr", "crisscross-mel80")


def test_what_the_ingest_writes_is_not_derived(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> None:
    store = small_store(tmp_path_factory, tiny_media, front_ends=NAMES)
    before = digest(store)
    summary = derive(store, NAMES[0])
    assert "the ingest of this store" in (summary.note or "") and summary.videos == 8
    assert digest(store) == before and outstanding(store, NAMES[0])["tasks"] == 0
