"""Ingest end to end on real encoded media: what the store holds, that repeating it changes nothing, what is refused."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest
import zarr
from ingest_media import SPEC, Here, digest, made_once, write_wav

from avstore.codecs import decode_jpeg_into, encode_jpeg
from avstore.decode_pyav import decode
from avstore.errors import AvstoreError, ConflictError, InterruptedRun, MachineError, NotFoundError, UsageError
from avstore.events import ChildDied, Event, Started, TaskDone, VideoDone
from avstore.ingest import ingest
from avstore.lock import StoreLock
from avstore.records import read_plans
from avstore.spec import Spec
from avstore.store import open as open_store
from avstore.tasks import sweep


@pytest.fixture(scope="module")
def source(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, tiny_media)[0]


@pytest.fixture(scope="module")
def made(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `source`. Read only."""
    return made_once(tmp_path_factory, tiny_media)[1]


class Recorder:
    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.ordinals: list[int] = []
        self.samples: list[np.ndarray] = []

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None:
        self.rows += [picture.copy()] * repeat
        self.ordinals += [source] * repeat

    def sound(self, samples: np.ndarray) -> None:
        self.samples.append(np.array(samples))


def test_the_store_holds_what_the_decoder_gives(source: Path, made: Path) -> None:
    group = zarr.open_group(made, mode="r", use_consolidated=False)
    frames, waveform, ordinals = (np.asarray(group[n]) for n in ("frames", "waveform", "source"))  # type: ignore[arg-type]
    used = np.zeros(len(frames), bool)
    with open_store(made) as store:
        assert len(store) == 9
        for video in store:
            seen = Recorder()
            spec = Spec.from_json(json.loads((made / "zarr.json").read_text())["attributes"]["avstore"]["spec"])
            facts = decode(source / video.path, spec, seen, start=None, end=None, slot_seconds=video.slot_seconds)
            assert {**facts.to_record(), "status": "ok"} == video.facts
            row, n = video.place * 8, video.frames
            assert n == len(seen.rows) and ordinals[row : row + n].tolist() == seen.ordinals
            used[row : row + n] = True
            for got, picture in zip(frames[row : row + n : 5], seen.rows[::5], strict=True):
                again = np.empty_like(got)
                decode_jpeg_into(encode_jpeg(np.ascontiguousarray(picture), 90), again)
                assert np.array_equal(got, again)
            first = video.place * 8000
            sound = np.concatenate(seen.samples) if seen.samples else np.zeros(0, np.int16)
            assert np.array_equal(waveform[first : first + len(sound)], sound) and len(sound) == video.samples
            assert not waveform[first + len(sound) : first + video.slot_seconds * 8000].any()
    assert not frames[~used].any() and (ordinals[~used] == -1).all()


def test_every_input_is_accounted_for(made: Path, source: Path) -> None:
    summary = ingest(source, made, **SPEC)
    assert summary.exit_code == 3 and summary.done == summary.new == 0
    assert {k: r for k, r, _ in summary.failures} == {"empty.mp4": "unreadable", "junk.mkv": "unreadable"}
    assert summary.skipped == [("notes.txt", "not media")] and summary.reasons == {"unreadable": 2}
    with open_store(made) as store:
        by_key = {v.key: v for v in store}
        assert {v.columns["split"] for v in store if v.key.startswith("t")} <= {"train", "test"}
        assert by_key["short.wav"].columns == {"label": None, "split": None}  # others have them
        assert by_key["short.wav"].samples == 12000 and by_key["long.wav"].samples == 160000
        assert by_key["liar.mp4"].seconds == 6.0


def test_a_longer_video_is_planned_again_in_the_same_command(made: Path) -> None:
    plans = read_plans(made)
    assert [len(p) for p in plans] == [11, 1] and plans[1].key == ["liar.mp4"]
    first, second = (p.seconds[p.key.index("liar.mp4")] for p in plans)
    assert (first, second) == (2, 7) and plans[1].first_shard == plans[0].shards
    record = json.loads((made / "commits" / "000000.json").read_text())
    assert set(record["versions"]) >= {"av", "avstore", "numpy", "simplejpeg"}


def test_a_video_longer_than_a_shard_has_a_task_of_its_own(made: Path) -> None:
    (plan, _) = read_plans(made)
    i = plan.key.index("long.wav")
    (task,) = (t for t in plan.tasks if plan.first_video + i in t.videos)
    assert task.count == 1 and task.shards == 3 and plan.seconds[i] == 21
    shards = {int(p.name.split(".")[1]) for p in (made / "waveform").glob("c.*")}
    assert set(range(task.shard, task.shard + 3)) <= shards


def test_repeating_a_finished_ingest_touches_nothing(made: Path, source: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file() and p.parent.name != "logs"}
    seen: list[Event] = []
    ingest(source, made, on_event=seen.append)  # without any option: those of the store
    assert not [e for e in seen if isinstance(e, Started | TaskDone)]
    after = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file() and p.parent.name != "logs"}
    del before[made / "lock"], after[made / "lock"]
    assert after == before


def test_same_bytes_for_two_workers_and_nothing_of_the_outside(made: Path, source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another name"
    shutil.copytree(source, elsewhere)
    ingest(elsewhere, tmp_path / "two.zarr", workers=2, **SPEC)
    assert digest(tmp_path / "two.zarr") == digest(made)
    for name in digest(made):
        if name.endswith(".json"):
            assert str(source.parent).encode() not in (made / name).read_bytes()


def test_spectrograms_are_stored_by_the_second_and_end_in_nan(tiny_media: Path, tmp_path: Path) -> None:
    from avstore.frontends import spectrogram_rows

    (tmp_path / "in").mkdir()
    samples = write_wav(tmp_path / "in" / "a.wav", 1.5, 16000)
    shutil.copyfile(min(tiny_media.rglob("*.mp4")), tmp_path / "in" / "b.mp4")
    options = {**SPEC, "sample_rate": 16000, "front_ends": ["crisscross-mel80"]}
    ingest(tmp_path / "in", tmp_path / "s.zarr", **options)
    stored = np.asarray(zarr.open_array(tmp_path / "s.zarr" / "spectrograms" / "crisscross-mel80", mode="r"))
    with open_store(tmp_path / "s.zarr") as store:
        video = next(v for v in store if v.key == "a.wav")
        assert "torch" in store.lineage["versions"]
    rows = stored[video.place * 100 : (video.place + video.slot_seconds) * 100]
    assert np.array_equal(rows[:150], spectrogram_rows(samples, "crisscross-mel80", 16000))
    assert np.isnan(rows[150:]).all()


def test_sound_alone_makes_an_audio_store(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", 1)
    summary = ingest(tmp_path / "in", tmp_path / "s.zarr", sample_rate=8000, front_ends=())
    assert summary.note is not None and "audio store" in summary.note
    assert sorted(p.name for p in (tmp_path / "s.zarr").iterdir() if p.is_dir()) == [
        "commits", "embeddings", "logs", "plans", "spectrograms", "waveform",
    ]  # fmt: skip
    with open_store(tmp_path / "s.zarr") as store:
        assert not store.spec.picture and [v.samples for v in store] == [8000]


def test_one_file_is_a_source_too(tiny_media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(min(tiny_media.rglob("*.mp4")), tmp_path / "a clip.mp4")
    summary = ingest("a clip.mp4", **SPEC)
    assert summary.ok == 1 and summary.store == tmp_path / "a clip.zarr"


def test_new_files_are_appended_and_old_ones_stay_where_they_are(source: Path, made: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    shutil.copytree(source, folder)
    shutil.copytree(made, store)
    before = digest(store)
    write_wav(folder / "new.wav", 2)
    (folder / "short.wav").unlink()
    write_wav(folder / "long.wav", 21)
    summary = ingest(folder, store, moved=True, **SPEC)
    assert (summary.new, summary.ok) == (1, 10)
    assert summary.removed == ["short.wav"] and summary.changed == ["long.wav"]
    after = digest(store)
    assert {n for n in before if after[n] != before[n]} == {
        "frames/zarr.json",
        "source/zarr.json",
        "waveform/zarr.json",
    }  # fmt: skip  (shapes grew)
    summary = ingest(folder, store, changed=True)
    assert summary.new == 1 and summary.changed == [] and summary.ok == 10
    with open_store(store) as opened:
        assert {v.key: v.samples for v in opened}["long.wav"] == 168000


def test_failed_files_are_tried_again_when_asked(source: Path, made: Path, tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    shutil.copytree(source, folder)
    shutil.copytree(made, store)
    shutil.copyfile(folder / "short.wav", folder / "empty.mp4")
    assert ingest(folder, store, moved=True).new == 0
    summary = ingest(folder, store, retry_failed=True)
    assert (summary.new, summary.ok, summary.failed) == (2, 10, 1)


def test_another_spec_is_refused_naming_the_field(source: Path, made: Path) -> None:
    before = digest(made)
    with pytest.raises(ConflictError, match="fps is 8 here, 16 was asked"):
        ingest(source, made, fps=16)
    with pytest.raises(ConflictError, match="height"):
        ingest(source, made, profile="224")
    assert digest(made) == before


def test_another_source_folder_is_refused_unless_it_moved(source: Path, made: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(made, store)
    shutil.copytree(source, tmp_path / "there")
    with pytest.raises(ConflictError, match="--moved"):
        ingest(tmp_path / "there", store)
    assert ingest(tmp_path / "there", store, moved=True).new == 0
    with pytest.raises(ConflictError, match="there"):
        ingest(source, store)


def test_a_second_ingest_is_refused(source: Path, made: Path) -> None:
    with StoreLock(made) as lock:
        lock.exclusive()
        with pytest.raises(ConflictError, match=str(os.getpid())):
            ingest(source, made)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"source": "nowhere"}, NotFoundError),
        ({"fpss": 3}, UsageError),
        ({"profile": "113"}, UsageError),
        ({"size": (100, 100)}, UsageError),
        ({"front_ends": ["crisscross-mel8"]}, UsageError),
        ({"workers": 0}, UsageError),
        ({"shard": (2, 2)}, UsageError),
        ({"source": "bare"}, UsageError),
        ({"store": "full"}, ConflictError),
        ({"store": "in/a.wav"}, ConflictError),
        ({"source": "full/in.zarr/sub", "store": "full/in.zarr"}, UsageError),
    ],
)
def test_bad_calls_are_told_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], error: type[AvstoreError]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "bare", "full/in.zarr/sub"):
        Path(folder).mkdir(parents=True)
    write_wav(Path("in/a.wav"), 1)
    Path("full/x").write_text("mine")
    before = sorted(Path().rglob("*"))
    with pytest.raises(error) as e:
        ingest(how.pop("source", "in"), how.pop("store", None), **how)
    assert e.value.why or e.value.next
    assert sorted(Path().rglob("*")) == before


def test_a_file_that_crashes_the_decoder_costs_one_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.install(tmp_path / "site", monkeypatch)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "segv", "b", "once-killed"):
        write_wav(folder / f"{name}.wav", 1)
    seen: list[Event] = []
    summary = ingest(folder, tmp_path / "s.zarr", sample_rate=8000, front_ends=(), on_event=seen.append)
    assert summary.failures == [("segv.wav", "crashed", "the decoder ended with SIGSEGV")] and summary.ok == 3
    deaths = sorted(e.path for e in seen if isinstance(e, ChildDied))
    assert deaths == ["once-killed.wav", "segv.wav", "segv.wav"]


def test_a_failing_disk_stops_with_nothing_committed_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    write_wav(folder / "a.wav", 1)
    write_wav(folder / "bad-disk.wav", 1)
    options: dict[str, Any] = {"sample_rate": 8000, "front_ends": ()}
    with monkeypatch.context() as patch:
        faulty.install(tmp_path / "site", patch)
        with pytest.raises(MachineError, match="Input/output"):
            ingest(folder, store, **options)
    assert not list(store.glob("plans/*")) and not list(store.glob("commits/*"))
    assert ingest(folder, store, **options).ok == 2


def test_stop_leaves_what_is_committed_and_a_repeat_finishes(source: Path, made: Path, tmp_path: Path) -> None:
    store, stop = tmp_path / "s.zarr", threading.Event()

    def once(event: Event) -> None:
        if isinstance(event, TaskDone):
            stop.set()

    with pytest.raises(InterruptedRun, match="repeat the same command") as e:
        ingest(source, store, stop=stop, on_event=once, **SPEC)
    assert e.value.exit_code == 130 and len(list((store / "commits").iterdir())) == 1
    assert not list(store.rglob("*.tmp.*"))
    ingest(source, store, **SPEC)
    assert digest(store) == digest(made)


def test_ctrl_c_is_told_the_same_way(source: Path, made: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"

    def interrupt(event: Event) -> None:
        if isinstance(event, VideoDone) and event.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        ingest(source, store, on_event=interrupt, **SPEC)
    assert not list(store.rglob("*.tmp.*"))
    ingest(source, store, **SPEC)
    assert digest(store) == digest(made)


def test_shards_of_the_work_together_make_the_same_store(source: Path, made: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    first = ingest(source, store, shard=(0, 2), **SPEC)
    assert first.pending > 0
    second = ingest(source, store, shard=(1, 2), **SPEC)
    assert second.pending == 0 and second.ok == 9
    assert digest(store) == digest(made)


def test_the_sweep_takes_unfinished_files_only(made: Path, source: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(made, store)
    left = [store / n for n in ("frames/c.0.0.0.0.tmp.77", "waveform/video-3.tmp.1", "commits/000009.json.tmp.5")]
    for path in left:
        path.write_bytes(b"half")
    assert sorted(sweep(store)) == sorted(left)
    assert digest(store) == digest(made)


def test_a_store_made_anew_by_an_older_interrupted_begin_is_clean(tmp_path: Path) -> None:
    """Pictures were found, the run died before its plan, the pictures were removed: no trace of `frames` may stay."""
    folder, store = tmp_path / "in", tmp_path / "s.zarr"
    folder.mkdir()
    write_wav(folder / "a.wav", 1)
    ingest(folder, tmp_path / "fresh.zarr", sample_rate=8000, front_ends=())
    from avstore import groups

    store.mkdir()
    groups.write_metadata(store, Spec(sample_rate=16000), 3)
    ingest(folder, store, sample_rate=8000, front_ends=())
    assert digest(store) == digest(tmp_path / "fresh.zarr")


CALLS = ("open", "fsync", "rename", "link", "mkdir", "ftruncate", "create", "write")


@pytest.mark.parametrize(
    ("call", "code"),
    [
        *((c, errno.ENOSPC) for c in CALLS),
        *(pytest.param(c, errno.EIO, marks=pytest.mark.slow) for c in CALLS),
    ],
)
def test_every_failing_call_leaves_a_store_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """The n-th `call` on a file of the store fails, for every n: the run stops with a MachineError that names the
    disk, committed tasks are whole, and a repeat makes the same bytes as an undisturbed run."""
    monkeypatch.setattr("avstore.crew.Pool", Here)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        write_wav(folder / f"{i}.wav", 6, seed=i)
    options: dict[str, Any] = {"sample_rate": 8000, "front_ends": (), "shard_seconds": 8, "workers": 1}
    ingest(folder, tmp_path / "whole.zarr", **options)
    want = digest(tmp_path / "whole.zarr")
    store, n, failed = tmp_path / "s.zarr", 0, True
    while failed:
        n += 1
        shutil.rmtree(store, ignore_errors=True)
        with monkeypatch.context() as patch:
            fail_at(patch, call, n, code, store)
            try:
                ingest(folder, store, **options)
                failed = False
            except MachineError as e:
                assert str(store) in str(e) and os.strerror(code) in str(e)
        have = digest(store)
        for record in sorted(store.glob("commits/*.json")):  # what says it is committed is right
            shard = f"waveform/c.{int(record.stem)}"
            assert have[shard] == want[shard]
        ingest(folder, store, **options)
        assert digest(store) == want and not list(store.rglob("*.tmp.*"))
    least = {"open": 10, "fsync": 10, "rename": 4, "link": 3, "mkdir": 5, "ftruncate": 1, "create": 8, "write": 8}
    assert n > least[call]


def test_bytes_before_names_and_names_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a store is synced before it gets its name, its folder after that; a record gets its name only when
    all of its shards have theirs, and its plan and metadata before them."""
    monkeypatch.setattr("avstore.crew.Pool", Here)
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_wav(tmp_path / "in" / f"{i}.wav", 6, seed=i)
    store, calls = tmp_path / "s.zarr", list[tuple[str, str]]()

    def inside(path: Any) -> str:
        return os.path.relpath(path, store)

    real = {name: getattr(os, name) for name in ("fsync", "rename", "link")}
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (calls.append(("sync", inside(os.readlink(f"/proc/self/fd/{fd}")))), real["fsync"](fd))[1],
    )
    for name in ("rename", "link"):
        monkeypatch.setattr(
            os, name, lambda a, b, name=name: (calls.append(("name", inside(b))), real[name](a, b))[1]
        )  # fmt: skip
    ingest(tmp_path / "in", store, sample_rate=8000, front_ends=(), shard_seconds=8, workers=1)
    named = [path for what, path in calls if what == "name" and ".tmp." not in path]
    assert {*digest(store), "logs/source"} == set(named)
    for path in named:
        at = calls.index(("name", path))
        assert calls[at - 1][0] == "sync" and calls[at - 1][1].startswith(f"{path}.tmp."), path
        later = calls[at + 1 :]
        assert ("sync", os.path.dirname(path) or ".") in later, path
    records = [p for p in named if p.startswith("commits/")]
    assert records == ["commits/000000.json", "commits/000001.json"]
    for i, record in enumerate(records):
        before = calls[: calls.index(("name", record))]
        shard = before.index(("name", f"waveform/c.{i}"))
        assert ("sync", "waveform") in before[shard:]
        plan = before.index(("name", "plans/0001.json"))
        assert ("sync", "plans") in before[plan:shard]
        assert ("name", "waveform/zarr.json") in before[:plan]


def fail_at(patch: pytest.MonkeyPatch, call: str, n: int, code: int, store: Path) -> None:
    """The n-th `call` (of `os`; `create`: `open` for writing; `write`: to a file that it opened) raises an OSError; a
    write does half before."""
    count = 0

    def due() -> bool:
        nonlocal count
        count += 1
        return count == n

    if call in ("create", "write"):
        opened = builtins.open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            ours = mode[0] in "wax" and str(file).startswith(str(store))
            if ours and call == "create" and due():
                raise OSError(code, os.strerror(code))
            out = opened(file, mode, *args, **kwargs)
            if not ours or call == "create":
                return out
            write = out.write

            def half(data: Any) -> int:
                if due():
                    write(data[: len(data) // 2])
                    raise OSError(code, os.strerror(code))
                return write(data)

            return Writing(out, half)

        patch.setattr(builtins, "open", opening)
        return
    real: Callable[..., Any] = getattr(os, call)

    def flaky(*args: Any, **kwargs: Any) -> Any:
        # descriptors count as the store's: nothing else here is synced or truncated
        ours = isinstance(args[0], int) or str(args[0]).startswith(str(store))
        if ours and due():
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    patch.setattr(os, call, flaky)


class Writing:
    """A file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
