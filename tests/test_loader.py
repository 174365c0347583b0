"""Batches: right pixels and sound, the same from either reader, for any threads, ranks and point of resuming."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import avstore
from avstore.batch import Batch
from avstore.errors import CorruptError, MachineError, NotFoundError, UsageError
from avstore.loader import Loader
from avstore.sampler import Order, SequentialOrder
from avstore.views import AvidView, RandomView, Snippets, TwoViews, UniformView
from tests.tiny_store import Tiny, default_spec, make_store, picture, read_picture, tone

VIDEOS = [
    Tiny(3.0),
    Tiny(0.4),  # shorter than every clip below
    Tiny(5.5, sound=None),
    Tiny(40.0),  # over three shards
    Tiny(2.5, sound=1.5, sound_start=0.5),
    Tiny(4.0, picture=False),
    Tiny(6.0, repeat=2),
]
SR = 8000


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("raw") / "s.zarr", VIDEOS)


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = default_spec(codec="jpeg", front_ends=("crisscross-mel80",), sample_rate=16000)
    return make_store(tmp_path_factory.mktemp("jpeg") / "s.zarr", VIDEOS, spec)


def order(batch_size: int = 5, draws: int = 3, **more: int) -> Order:
    return Order(len(VIDEOS), draws, seed=7, batch_size=batch_size, **more)


def loader(path: Path, views=None, o: Order | SequentialOrder | None = None, **more) -> Loader:
    given = {"frames": 8, "fps": 16, "samples": 4000, "in_process": True}
    return Loader(path, None, views or AvidView(2000), order=o or order(), **{**given, **more})


def copies(batches) -> list[dict[str, np.ndarray]]:
    return [{k: v.copy() for k, v in b.arrays().items()} for b in batches]


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> None:
    assert len(a) == len(b) and len(a) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype and np.array_equal(x[name], y[name], equal_nan=False), name


@pytest.mark.parametrize("fps", [16, 8, Fraction(16, 3), "native"])
def test_clips_are_those_of_the_store_and_of_the_pixels_that_were_written(raw: Path, fps) -> None:
    store = avstore.open(raw)
    seen = set()
    with loader(raw, fps=fps, source=True) as clips:
        for b in clips.epoch(0):
            assert len(b) == len(b.row) and b.frames is not None and b.waveform is not None and b.source is not None
            for i, number in enumerate(b.video.tolist()):
                seen.add(number)
                at = Fraction(int(b.offset[i]), SR)
                if b.has_picture[i]:
                    clip = store.clip(number, at, 8, fps, seconds=Fraction(1, 2), sound_offset=at)
                    local = clip.rows - store.places[number] * 16
                    if fps != "native" or clip.valid_frames == b.valid_frames[i]:
                        assert np.array_equal(b.frames[i], clip.frames)
                        assert np.array_equal(b.source[i], clip.source) and b.valid_frames[i] == clip.valid_frames
                        shown = [picture(number, r // VIDEOS[number].repeat, 64, 96) for r in local.tolist()]
                        assert np.array_equal(b.frames[i], np.stack(shown))
                else:
                    assert not b.frames[i].any() and b.valid_frames[i] == 0 and VIDEOS[number].picture is False
                start = int(b.sound_offset[i])
                s = np.arange(start, start + 4000)
                first, last = store.sound[number]
                expected = np.where((s >= first) & (s < last), tone(number, s), 0)
                assert np.array_equal(b.waveform[i], expected)
                assert b.has_sound[i] == expected.any()
                assert b.valid_samples[i] == np.clip(store.samples[number] - start, 0, 4000)
                assert np.array_equal(b.box[i], store.boxes[number])
    assert seen == set(range(len(VIDEOS)))


def test_native_clips_hold_distinct_source_frames_and_move_back_to_find_them(raw: Path) -> None:
    o = SequentialOrder(len(VIDEOS), 4, batch_size=4)
    with loader(raw, UniformView(4), o, fps="native", source=True, frames=16, samples=0) as clips:
        for b in clips.epoch(0):
            assert b.source is not None and b.frames is not None
            for i, number in enumerate(b.video.tolist()):
                have = int(VIDEOS[number].seconds * 16) // VIDEOS[number].repeat if VIDEOS[number].picture else 0
                assert b.valid_frames[i] == min(16, have)
                if have >= 16:
                    assert np.array_equal(np.diff(b.source[i]), np.ones(15))
                    assert [read_picture(f)[1] for f in b.frames[i]] == (b.source[i] % 64).tolist()
                    if b.draw[i] == 3 and VIDEOS[number].repeat == 2:
                        assert b.source[i][-1] == have - 1  # the last clip reaches the video's end, not beyond


def test_jpeg_frames_show_what_was_written_and_half_scale_shows_the_same(jpeg: Path) -> None:
    with loader(jpeg) as full, loader(jpeg, size=(32, 48)) as half:
        for a, b in zip(full.epoch(0), half.epoch(0), strict=True):
            assert a.frames is not None and b.frames is not None and b.frames.shape[2:] == (32, 48, 3)
            for i, number in enumerate(a.video.tolist()):
                if not a.has_picture[i]:
                    continue
                rows = [read_picture(f) for f in a.frames[i]]
                first = int(a.offset[i]) * 16 // 16000
                local = [first + k for k in range(8) if first + k < int(VIDEOS[number].seconds * 16)]
                expected = np.resize(np.array(local) // VIDEOS[number].repeat, 8) % 64
                assert rows == [(number, int(r)) for r in expected]
                assert [read_picture(f) for f in b.frames[i]] == rows
                near = np.abs(a.frames[i, 0].astype(int) - picture(number, local[0] // VIDEOS[number].repeat, 64, 96))
                assert near.mean() < 8
            assert np.array_equal(b.box, a.box // 2)


def test_both_readers_and_any_number_of_threads_give_the_same_bytes(jpeg: Path) -> None:
    more = {"front_end": "crisscross-mel80", "source": True, "samples": 8000}
    with loader(jpeg, threads=1, **more) as clips:
        expected = copies(clips.steps(0, 8))
    with loader(jpeg, threads=3, slots=2, **more) as clips:
        same(copies(clips.steps(0, 8)), expected)
    with loader(jpeg, threads=2, in_process=False, **more) as clips:
        same(copies(clips.steps(0, 8)), expected)
        same(copies(clips.steps(0, 8)), expected)  # a second iteration over the same reader


@pytest.mark.parametrize("in_process", [True, False])
def test_resuming_at_a_step_gives_the_same_remainder(raw: Path, in_process: bool) -> None:
    with loader(raw, in_process=in_process) as clips:
        whole = copies(clips.steps(0, 2 * clips.steps_per_epoch))
        same(copies(clips.steps(3, 2 * clips.steps_per_epoch)), whole[3:])
        same(copies(clips.epoch(1)), whole[clips.steps_per_epoch :])
        same(copies(clips.epoch(1, 2)), whole[clips.steps_per_epoch + 2 :])
        some = clips.steps(0)
        first = [{k: v.copy() for k, v in next(some).arrays().items()} for _ in range(3)]  # read ahead, then left
        same(first, whole[:3])
        same(copies(clips.steps(1, 4)), whole[1:4])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_each_global_batch_without_overlap(raw: Path, world: int) -> None:
    with loader(raw, o=order(8)) as clips:
        whole = copies(clips.steps(0, 6))
    parts = []
    for rank in range(world):
        with loader(raw, o=order(8, world=world, rank=rank)) as clips:
            parts.append(copies(clips.steps(0, 6)))
    for step, expected in enumerate(whole):
        for name in expected:
            assert np.array_equal(np.concatenate([p[step][name] for p in parts]), expected[name]), name


def test_every_pair_once_and_windows_change_with_the_epoch(raw: Path) -> None:
    with loader(raw) as clips:
        epochs = [copies(clips.epoch(e)) for e in range(2)]
    for batches in epochs:
        pairs = sorted((r, d) for b in batches for r, d in zip(b["row"].tolist(), b["draw"].tolist(), strict=True))
        assert pairs == [(r, d) for r in range(len(VIDEOS)) for d in range(3)]
        assert np.array_equal(np.concatenate([b["position"] for b in batches]), np.arange(len(VIDEOS) * 3))
    offsets = [{(int(r), int(d)): int(o) for b in e for r, d, o in zip(b["row"], b["draw"], b["offset"], strict=True)}
               for e in epochs]  # fmt: skip
    assert offsets[0] != offsets[1]


def test_a_video_shorter_than_the_clip_loops_and_its_sound_is_padded(raw: Path) -> None:
    with loader(raw, RandomView(), SequentialOrder(len(VIDEOS), batch_size=2), frames=16, samples=8000) as clips:
        b = next(clips.epoch(0))
        assert b.video.tolist() == [0, 1] and b.frames is not None and b.waveform is not None
        assert b.valid_frames.tolist() == [16, 6] and b.valid_samples.tolist() == [8000, 3200]
        assert [read_picture(f)[1] for f in b.frames[1]] == [0, 1, 2, 3, 4, 5] * 2 + [0, 1, 2, 3]
        assert b.waveform[1, :3200].all() and not b.waveform[1, 3200:].any()


def test_two_views_and_snippets_have_an_axis_of_their_own(raw: Path) -> None:
    with loader(raw, TwoViews("medium")) as clips:
        b = next(clips.steps())
        assert b.frames is not None and b.frames.shape == (5, 2, 8, 64, 96, 3)
        assert b.waveform is not None and b.waveform.shape == (5, 2, 4000) and b.valid_frames.shape == (5, 2)
        for i, number in enumerate(b.video.tolist()):
            for v in range(2):
                if b.has_picture[i, v]:
                    row = int(b.offset[i, v]) * 16 // SR
                    assert read_picture(b.frames[i, v, 0]) == (number, row // VIDEOS[number].repeat % 64)
        assert (b.shrunk == [VIDEOS[n].seconds < 1 for n in b.video.tolist()]).sum() >= 3
    with loader(raw, Snippets(5, 4000)) as clips:
        b = next(clips.steps())
        assert b.frames is not None and b.frames.shape == (5, 5, 8, 64, 96, 3)
        long = ~b.shrunk
        assert long.any() and (np.diff(b.sound_offset[long], axis=1) == 4000).all()


def test_evaluation_takes_evenly_spaced_clips_of_every_video(raw: Path) -> None:
    o = SequentialOrder(len(VIDEOS), 3, batch_size=4)
    with loader(raw, UniformView(3), o) as clips:
        got = [
            (int(v), int(d), int(x)) for b in clips.epoch(0) for v, d, x in zip(b.video, b.draw, b.offset, strict=True)
        ]
    assert [(v, d) for v, d, _ in got] == [(v, d) for v in range(len(VIDEOS)) for d in range(3)]
    assert [x for v, _, x in got if v == 0] == [0, 10000, 20000]  # 3 s less a clip of half a second, in halves
    assert [x for v, _, x in got if v == 1] == [0, 0, 0]
    with pytest.raises(UsageError, match="evenly spaced"), loader(raw, UniformView(2), o) as clips:
        list(clips.epoch(0))


def test_stored_spectrograms_come_along_without_nan(jpeg: Path) -> None:
    from avstore.frontends import FRONT_ENDS

    silence = np.float16(FRONT_ENDS["crisscross-mel80"].floor)
    with loader(jpeg, front_end="crisscross-mel80", samples=16000) as clips:
        for b in clips.epoch(0):
            assert b.spectrogram is not None and b.spectrogram.shape[1:] == (100, 80)
            assert not np.isnan(b.spectrogram).any()
            for i, number in enumerate(b.video.tolist()):
                first = int(b.sound_offset[i]) // 160
                rows = np.arange(first, first + 100)
                inside = (rows < avstore.open(jpeg).samples[number] // 160) & bool(b.has_sound[i])
                expected = np.where(inside, (rows / 64).astype(np.float16), silence)
                assert np.array_equal(b.spectrogram[i, :, 0], expected)


def test_a_batch_stays_until_later_ones_are_asked_for(raw: Path) -> None:
    with loader(raw, slots=3, hold=2) as clips:
        it = clips.steps()
        a = next(it)
        assert a.frames is not None
        before = a.frames.copy()
        next(it)
        time.sleep(0.2)  # the reader fills what it can
        assert np.array_equal(a.frames, before)
        a.release()
        a.release()  # harmless
        assert [next(it).step for _ in range(6)] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("in_process", [True, False])
def test_ready_says_whether_the_next_batch_would_wait(raw: Path, in_process: bool) -> None:
    with loader(raw, in_process=in_process) as clips:
        it = clips.steps(0, 3)
        for step in range(3):
            first = next(it)
            assert first.step == step
            end = time.monotonic() + 20
            while step < 2 and not clips.ready():
                assert time.monotonic() < end
                time.sleep(0.01)
        assert not clips.ready()  # nothing more comes


def test_tensors_are_views_on_a_cpu(raw: Path) -> None:
    torch = pytest.importorskip("torch")
    with loader(raw) as clips:
        b = next(clips.steps())
        t = b.tensors()
        assert t["frames"].dtype == torch.uint8 and t["waveform"].dtype == torch.int16 and t["row"].dtype == torch.int64
        assert b.frames is not None and t["frames"].data_ptr() == b.frames.ctypes.data
        assert set(t) == set(b.arrays()) and "source" not in t


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_a_damaged_byte_reaches_the_trainer_with_video_and_second(tmp_path: Path, codec: str, in_process: bool) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(3.0), Tiny(3.0)], default_spec(codec=codec))
    store = avstore.open(path)
    flat = store.reader.entries("frames/c.0.0.0.0", int(store.places[1]) * 16 + 20, 1, 16 * 16)
    with open(path / "frames/c.0.0.0.0", "r+b") as f:
        f.seek(flat[0] + 50)
        byte = f.read(1)[0]
        f.seek(flat[0] + 50)
        f.write(bytes([byte ^ 1]))
    o = SequentialOrder(2, 4, batch_size=1)
    with loader(path, UniformView(4), o, in_process=in_process, check=True) as clips:
        got = []
        with pytest.raises(CorruptError, match=r"video 1 \(train/0001.mp4\) is damaged at second 1\.25"):
            for b in clips.epoch(0):
                got.append((int(b.video[0]), int(b.draw[0])))
        assert got == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]  # all that come before, in order
        assert [int(b.draw[0]) for b in clips.epoch(0, 6)] == [2, 3]  # and the loader still works
    with loader(path, UniformView(4), o, in_process=in_process, check=False) as clips:
        assert len(list(clips.epoch(0))) == 8  # unchecked, as documented


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(3.0), Tiny(3.0)])
    os.unlink(path / "waveform/c.0")
    with loader(path, o=Order(2, seed=0, batch_size=2)) as clips, pytest.raises(NotFoundError, match="waveform"):
        list(clips.epoch(0))


def test_arguments_that_do_not_fit_are_told(raw: Path, jpeg: Path) -> None:
    for wrong, words in (
        ({"o": Order(3, seed=0, batch_size=1)}, "the order runs over 3"),
        ({"fps": 25}, "25 fps"),
        ({"frames": 0, "samples": 0}, "without frames and samples"),
        ({"frames": -1}, "frames"),
        ({"size": (32, 48)}, "64x96"),
        ({"size": (60, 60)}, "60x60"),
        ({"threads": 0}, "threads"),
        ({"slots": 1}, "slots"),
        ({"slots": 65}, "64"),
        ({"source": True, "frames": 0}, "source without frames"),
    ):
        with pytest.raises(UsageError, match=words):
            loader(raw, **wrong)
    with pytest.raises(NotFoundError, match="not stored"):
        loader(raw, front_end="avid-linear257")
    with pytest.raises(UsageError, match="multiple of"):
        loader(jpeg, front_end="crisscross-mel80", samples=16001)
    with loader(raw) as clips, pytest.raises(UsageError):
        clips.steps(5, 3)


# ---- processes


def test_a_killed_reader_is_an_error_within_seconds_and_the_loader_can_start_again(raw: Path) -> None:
    with loader(raw, in_process=False) as clips:
        it = clips.steps()
        next(it)
        os.kill(clips.reader_pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(MachineError, match="killed by SIGKILL"):
            for _ in it:
                pass
        assert time.monotonic() - begin < 5
        clips.close()
        assert [b.step for b in clips.steps(0, 3)] == [0, 1, 2]


def _in_child(path: Path, in_process: bool, queue) -> None:
    with loader(path, in_process=in_process) as clips:
        queue.put([int(b.frames.sum()) for b in clips.steps(0, 3)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # 3.12 warns of any fork beside threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_trainer_may_itself_be_forked_or_spawned(raw: Path, method: str) -> None:
    with loader(raw) as clips:
        expected = [int(b.frames.sum()) for b in clips.steps(0, 3) if b.frames is not None]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(raw, False, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(20)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_loader_inherited_through_a_fork_starts_a_reader_of_its_own(raw: Path) -> None:
    with loader(raw, in_process=False) as clips:
        it = clips.steps(0, 6)
        expected = [int(next(it).frames.sum())]
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                sums = [int(b.frames.sum()) for b in clips.steps(0, 2)]
                clips.close()
                os.write(write, repr(sums).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as f:
            sums = eval(f.read())
        expected += [int(b.frames.sum()) for b in it]  # ours went on undisturbed
        assert len(expected) == 6 and sums == expected[:2]


SCRIPT = """
import os, sys
from avstore.loader import Loader
from avstore.sampler import Order
from avstore.views import AvidView
clips = Loader({path!r}, None, AvidView(), order=Order(7, 1000, seed=0, batch_size=7), frames=8, fps=16, samples=4000)
it = clips.steps()
next(it)
print(clips.reader_pid, flush=True)
if {fork}:
    if not os.fork():
        import time
        time.sleep(20)
        os._exit(0)
for b in it:
    pass
"""  # no `if __name__ == "__main__"`: the reader does not run the script again


def _gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as f:
                if f.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, "forked child"])
def test_the_reader_ends_when_the_trainer_does(raw: Path, how) -> None:
    script = SCRIPT.format(path=str(raw), fork=how == "forked child")
    trainer = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert trainer.stdout is not None and trainer.stderr is not None
        reader = int(trainer.stdout.readline())
        time.sleep(0.3)
        if how is signal.SIGINT:
            os.killpg(trainer.pid, signal.SIGINT)  # as a terminal does
            trainer.wait(20)
            words = trainer.stderr.read()
            assert words.count("Traceback") == 1 and "KeyboardInterrupt" in words  # the trainer's own, and no other
        else:
            trainer.kill()
            trainer.wait(20)
        assert _gone(reader, 10)
    finally:
        os.killpg(trainer.pid, signal.SIGKILL) if how == "forked child" else trainer.poll()
        trainer.stdout.close()
        trainer.stderr.close()


def _memory() -> int:
    """Anonymous and shared bytes of this process, resident."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return sum(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssShmem"))


@pytest.mark.parametrize("in_process", [True, False])
def test_descriptors_and_memory_do_not_grow_over_epochs_and_openings(raw: Path, in_process: bool) -> None:
    def fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        with loader(raw, in_process=in_process) as clips:
            for e in range(3):
                for b in clips.epoch(e):
                    assert isinstance(b, Batch)

    once()
    before, memory = fds(), _memory()
    for _ in range(4):
        once()
    assert fds() == before
    assert _memory() - memory < 24 * 2**20
    with loader(raw, in_process=in_process) as clips:
        for e in range(20):  # by now every shard was open
            list(clips.epoch(e))
        held, memory = fds(), _memory()
        reader = None if in_process else len(os.listdir(f"/proc/{clips.reader_pid}/fd"))
        for e in range(20):
            list(clips.epoch(e))
        assert fds() == held and _memory() - memory < 8 * 2**20
        assert in_process or len(os.listdir(f"/proc/{clips.reader_pid}/fd")) == reader


def test_views_of_the_running_script_cannot_go_to_a_reader_process(raw: Path) -> None:
    class Mine(RandomView):
        pass

    with pytest.raises(UsageError, match="cannot be given Mine"):
        loader(raw, Mine(), in_process=False)
    with loader(raw, Mine(), in_process=True) as clips:
        assert len(next(clips.steps())) == 5
