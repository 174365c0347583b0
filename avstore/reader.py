"""The reader: decode threads that fill slots with batches, in the order of steps, ahead of the trainer.

    trainer process                      reader process (or, with in_process=True, threads beside the trainer)
    Loader  -- run, free slot -->        Filler: plan step -> tell the kernel -> decode its clips into a free slot
            <-- slot k holds step s --

Everything a batch is made of is a pure function of the step: its pairs (order), its windows (views), its bytes (store).
So the reader computes all of it, and the trainer's main thread, which holds the GIL, only receives a slot's number.
The process is started by `Loader` with its memory and one end of a socket; it ends when the socket closes, or when its
parent is gone. It never imports torch. No prctl(PDEATHSIG): that signal comes when the *thread* that started us ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import signal
import socket
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from avstore import draws
from avstore.codecs import MISSING, decode_source
from avstore.cut import cut_frames, cut_rows
from avstore.errors import AvstoreError, CorruptError
from avstore.packed import PIXELS, cut_packed
from avstore.sampler import Order, SequentialOrder
from avstore.shard import LocalReader
from avstore.slots import Layout, Memory
from avstore.spec import ArraySpec
from avstore.views import Views
from avstore.windows import Extents, frame_rows, picture_samples, spectrogram_row, valid

# One row per video of the selection, int64, shared with the reader.
COLUMNS = ("number", "place", "frames", "samples", "sound_start", "sound_end", "y", "x", "height", "width")
AHEAD = 2  # steps planned, and announced to the kernel, before their slots are free
GROUP = 256  # pairs that are planned at once: NumPy's cost per call is shared by several steps
PROBES = 2  # clips of a step that are looked up in the page cache before the whole step is announced

TO_READER = struct.Struct("<cqqqQ")  # b"R" generation, first step, stop, slots still held | b"F" slot, 0, 0, 0
TO_TRAINER = struct.Struct("<cqqq")  # b"S" generation, step, slot | b"E" generation, step, 0 + pickled (error, video)

Ready = Callable[[int, int, int, "tuple[AvstoreError, int] | None"], None]


@dataclass(frozen=True)
class Job:
    """All that the reader must know; what one batch is, as a function of the step."""

    root: str
    arrays: dict[str, ArraySpec]  # those that are read: frames, source, waveform, spectrogram
    shard_seconds: int
    tape_fps: int
    sample_rate: int
    order: Order | SequentialOrder
    views: Views
    seed: int
    frames: int  # of a clip; 0: no pictures
    fps: Fraction | None  # None: native
    picture: int  # length of the pictures, samples
    samples: int  # length of the sound; 0: none
    spectrogram: int  # rows; 0: none
    silence: float  # a spectrogram's value where there is no sound
    scale: int  # 1, 2, 4, 8: the stored frame size divided
    check: bool
    threads: int
    slots: int
    layout: Layout


@dataclass(eq=False)
class Plan:
    """One step before it has a slot: where each clip's bytes lie. C clips = B pairs x views."""

    step: int
    rows: np.ndarray  # (B,)
    draws: np.ndarray
    first: int
    picture: np.ndarray  # (B, V) starts, samples
    sound: np.ndarray
    shrunk: np.ndarray  # (B,)
    tape: np.ndarray  # (C, T) absolute rows of `frames`
    valid_frames: np.ndarray  # (C,)
    valid_samples: np.ndarray  # (C,)
    heard: np.ndarray  # (C,) samples to read: 0 without sound


@dataclass(eq=False)
class Fill:
    """A plan with a slot: its clips are handed to the threads one by one."""

    plan: Plan
    slot: int
    generation: int
    next: int = 0
    running: int = 0
    done: int = 0
    dropped: bool = False
    errors: dict[int, tuple[AvstoreError, int]] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return len(self.plan.heard)


class Filler:
    """Plans steps, fills slots, and reports each through `ready(generation, step, slot, error)`, from its threads."""

    def __init__(self, job: Job, memory: Memory, columns: np.ndarray, ready: Ready, *, maps: bool = False) -> None:
        """maps: raw shards in the page cache are mapped, see `LocalReader.mapped`."""
        self.job, self.ready = job, ready
        self.column = {name: columns[:, i] for i, name in enumerate(COLUMNS)}
        self.boxes = _scaled(columns[:, COLUMNS.index("y") : COLUMNS.index("y") + 4], job.scale)
        self.slots = [job.layout.views(memory.map, k) for k in range(job.slots)]
        self.maps, self.reader = maps, LocalReader(Path(job.root))
        self.sources: OrderedDict[int, np.ndarray] = OrderedDict()
        self.changed = threading.Condition()
        self.free_slots: deque[int] = deque(range(job.slots))
        self.plans: deque[Plan] = deque()
        self.fills: list[Fill] = []
        self.generation = self.next_step = self.stop = 0
        self.group = max(1, GROUP * job.order.world // job.order.batch_size)
        self.planning = self.closing = False
        self.cold = True  # until a probe says that the page cache has it all
        self.threads = [
            threading.Thread(target=self._thread, name=f"avstore-reader-{i}", daemon=True) for i in range(job.threads)
        ]
        for thread in self.threads:
            thread.start()

    # ---- what the trainer asks for

    def run(self, generation: int, start: int, stop: int, held: int) -> None:
        """Forget what is under way and deliver steps start .. stop-1 as `generation`. Bit k of `held`: the trainer
        still uses slot k; all others are ours again, also those whose message it has not read."""
        with self.changed:
            self.generation, self.next_step, self.stop = generation, start, stop
            self.plans.clear()
            self.fills = [f for f in self.fills if f.running]
            for fill in self.fills:
                fill.dropped = True
            busy = {f.slot for f in self.fills}
            self.free_slots = deque(k for k in range(self.job.slots) if not held >> k & 1 and k not in busy)
            self.changed.notify_all()

    def free(self, slot: int) -> None:
        """The trainer is done with a slot."""
        with self.changed:
            if slot not in self.free_slots:
                self.free_slots.append(slot)
            self.changed.notify_all()

    def close(self) -> None:
        """Stops the threads (each finishes its clip) and closes the shards."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        self.reader.close()
        self.slots.clear()

    # ---- the threads

    def _take(self) -> tuple[Fill | None, int]:
        """The next thing to do, under the lock: (fill, clip), (None, step to plan) or (None, -1): wait."""
        if not self.planning and len(self.plans) < AHEAD and self.next_step < self.stop:
            self.planning = True
            step, epoch_end = self.next_step, (self.next_step // self.job.order.batches + 1) * self.job.order.batches
            self.next_step = min(step + self.group, self.stop, epoch_end)
            return None, step
        while True:
            for fill in self.fills:
                if fill.next < fill.clips and not fill.dropped:
                    fill.next += 1
                    fill.running += 1
                    return fill, fill.next - 1
            if not self.plans or not self.free_slots:
                return None, -1
            fill = Fill(self.plans.popleft(), self.free_slots.popleft(), self.generation)
            self._head(fill)
            if fill.clips:
                self.fills.append(fill)
                self.changed.notify_all()
            else:  # a short last batch can leave a rank with nothing
                self.ready(fill.generation, fill.plan.step, fill.slot, None)

    def _thread(self) -> None:
        try:
            self._work()
        except Exception as e:  # a bug of ours: the trainer must not wait for ever
            self.ready(self.generation, -1, -1, (_told(e), -1))

    def _work(self) -> None:
        while True:
            with self.changed:
                fill, what = self._take()
                while fill is None and what < 0 and not self.closing:
                    self.changed.wait()
                    fill, what = self._take() if not self.closing else (None, -1)
                if self.closing:
                    return
                generation, stop = self.generation, self.next_step
            if fill is None:
                self._plan(what, stop, generation)
                continue
            error = None
            try:
                self._clip(fill.plan, self.slots[fill.slot], what)
            except Exception as e:
                error = _told(e), int(self.column["number"][fill.plan.rows[what // self.job.views.views]])
            with self.changed:
                fill.running -= 1
                fill.done += 1
                if error is not None:
                    fill.errors[what] = error
                if fill.dropped:
                    if not fill.running:
                        self.fills.remove(fill)
                        self.free_slots.append(fill.slot)
                        self.changed.notify_all()
                    continue
                if fill.done < fill.clips:
                    continue
                self.fills.remove(fill)
                if fill.errors:
                    self._fail(fill.generation, fill.plan.step, fill.errors[min(fill.errors)])
                    self.free_slots.append(fill.slot)
                    continue
                self.ready(fill.generation, fill.plan.step, fill.slot, None)

    def _fail(self, generation: int, step: int, error: tuple[AvstoreError, int]) -> None:
        """Nothing after a failed step is worth doing; earlier steps still arrive."""
        self.stop = min(self.stop, step)
        self.plans = deque(p for p in self.plans if p.step < step)
        self.ready(generation, step, -1, error)

    # ---- a step

    def _plan(self, step: int, stop: int, generation: int) -> None:
        plans: list[Plan] = []
        error = None
        try:
            plans = self.plan(step, stop)
            for plan in plans:
                self._announce(plan)
            self._set_maps()
        except Exception as e:
            error = _told(e), -1
        with self.changed:
            self.planning = False
            if generation == self.generation:
                if error is not None:
                    self._fail(generation, step, error)
                self.plans.extend(p for p in plans if p.step < self.stop)
            self.changed.notify_all()

    def plan(self, step: int, stop: int) -> list[Plan]:
        """Pairs, windows and tape rows of the steps step .. stop-1, all of one epoch: arithmetic only."""
        job, column = self.job, self.column
        epoch, first, rows, pair_draws = self._pairs(step, stop)
        bounds = np.cumsum([0, *(len(r) for r in rows)]).tolist()
        row, draw = np.concatenate(rows), np.concatenate(pair_draws)
        n, sr = job.views.views, job.sample_rate
        frames = column["frames"][row]
        extents = Extents(picture_samples(frames, job.tape_fps, sr), column["sound_start"][row],
                          column["sound_end"][row])  # fmt: skip
        u = draws.uniform(job.seed, "window", epoch, row, draw, max(job.views.numbers, 1))
        cut = job.views.starts(extents, u, draw, max(job.picture, 1), max(job.samples, 1))
        picture, sound = (np.asarray(x, np.int64).reshape(len(row), n) for x in (cut.picture, cut.sound))
        each = np.repeat(np.arange(len(row)), n)  # clip -> pair
        tape, valid_frames = np.zeros((len(each), 0), np.int64), np.zeros(len(each), np.int64)
        if job.frames:
            if job.fps is None:
                local, valid_frames = self._native(row[each], picture.reshape(-1))
            else:
                local = frame_rows(picture.reshape(-1), job.frames, job.fps, job.tape_fps, sr)
                valid_frames = (local < frames[each][:, None]).sum(1)
                loop = np.arange(job.frames) % np.maximum(valid_frames, 1)[:, None]
                local = np.take_along_axis(local, loop, 1)  # from the clip's first frame again
            tape = column["place"][row][each][:, None] * job.tape_fps + local
        starts = sound.reshape(-1)
        inside = valid(starts, job.samples, column["samples"][row][each])
        meets = (starts < column["sound_end"][row][each]) & (starts + job.samples > column["sound_start"][row][each])
        heard, shrunk = np.where(meets, inside, 0), np.asarray(cut.shrunk, bool)
        out = []
        for i, (a, b) in enumerate(pairwise(bounds)):
            p, c = slice(a, b), slice(a * n, b * n)
            out.append(Plan(step + i, row[p], draw[p], first[i], picture[p], sound[p], shrunk[p], tape[c],
                            valid_frames[c], inside[c], heard[c]))  # fmt: skip
        return out

    def _pairs(self, step: int, stop: int) -> tuple[int, list[int], list[np.ndarray], list[np.ndarray]]:
        """(epoch, and of each step: first position, rows, draws)."""
        epoch, index = self.job.order.locate(step)
        batches = self.job.order.run(epoch, index, index + stop - step)
        return epoch, [b.first for b in batches], [b.rows for b in batches], [b.draws for b in batches]

    def _native(self, rows: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Local rows (C, T) of consecutive distinct source frames, from the one shown at each start; earlier where a
        video ends too soon, looping where it is too short."""
        job = self.job
        out = np.zeros((len(rows), job.frames), np.int64)
        counts = np.zeros(len(rows), np.int64)
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            have, place = int(self.column["frames"][row]), int(self.column["place"][row]) * job.tape_fps
            if not have:
                continue
            shown = self._source(np.arange(place, place + have))
            new = np.flatnonzero(np.diff(shown, prepend=shown[0] - 1))  # rows where another source frame begins
            first = min(start * job.tape_fps // job.sample_rate, have - 1)
            at = min(int(np.searchsorted(new, first, "right")) - 1, max(len(new) - job.frames, 0))
            local = new[at : at + job.frames].copy()
            local[0] = max(local[0], first) if at + 1 >= len(new) or first < new[at + 1] else local[0]
            counts[i] = len(local)
            out[i] = np.resize(local, job.frames)
        return out, counts

    def _source(self, rows: np.ndarray) -> np.ndarray:
        """int32: the source frame that each absolute tape row shows. Few shards' tables are kept."""
        per = self.job.shard_seconds * self.job.tape_fps
        out = np.empty(len(rows), np.int32)
        shards = rows // per
        for shard in np.unique(shards).tolist():
            table = self.sources.get(shard)
            if table is None:
                key = self.job.arrays["source"].key(shard)
                with self.reader.descriptor(key) as (fd, size):
                    data = os.pread(fd, size, 0)
                table = self.sources[shard] = decode_source(data, per, key)
                while len(self.sources) > 16:
                    self.sources.pop(next(iter(self.sources)), None)
            mask = shards == shard
            out[mask] = table[rows[mask] - shard * per]
        return out

    def _announce(self, plan: Plan) -> None:
        """Where the page cache lacks any of a few clips of the step, asks the kernel for all of it now."""
        clips = len(plan.heard)
        if not clips:
            return
        if not self.cold:
            self.cold = any(not self._cached(plan, i) for i in range(0, clips, -(-clips // PROBES)))
        if not self.cold:
            return
        warm = True
        for i in range(clips):
            warm &= self._cached(plan, i, announce=True)
        self.cold = not warm

    def _set_maps(self) -> None:
        """What is not in the page cache is read whole, not page by page."""
        self.reader.maps = self.maps and not self.cold

    def _cached(self, plan: Plan, clip: int, announce: bool = False) -> bool:
        """Whether the first bytes of a clip's frames (sound, where it has none) are in the page cache."""
        job, warm = self.job, True
        for array, first, last in self._extents(plan, clip):
            per = job.shard_seconds * array.rate // array.inner_rows
            first, last = first // array.inner_rows, last // array.inner_rows
            shard = first // per
            last = min(last, (shard + 1) * per - 1)
            key = array.key(shard)
            with contextlib.suppress(AvstoreError, OSError):  # whoever reads the clip will say what is wrong
                flat = self.reader.entries(key, first - shard * per, last - first + 1, per)
                there = [i for i in range(0, len(flat), 2) if flat[i] != MISSING]
                if not there:
                    continue
                begin, end = flat[there[0]], flat[there[-1]] + flat[there[-1] + 1]
                with self.reader.descriptor(key) as (fd, _):
                    try:
                        os.preadv(fd, [bytearray(1)], begin, os.RWF_NOWAIT)
                    except OSError as e:
                        if e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                            raise
                        warm = False
                        if announce:
                            os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)
            if not announce:
                break
        return warm

    def _extents(self, plan: Plan, clip: int) -> list[tuple[ArraySpec, int, int]]:
        """(array, first row, last row) of what a clip reads."""
        out = []
        if self.job.frames and plan.valid_frames[clip]:
            rows = plan.tape[clip]
            out.append((self.job.arrays["frames"], int(rows.min()), int(rows.max())))
        if plan.heard[clip] and self.job.samples:
            pair, view = divmod(clip, self.job.views.views)
            place = int(self.column["place"][plan.rows[pair]])
            start = place * self.job.sample_rate + int(plan.sound[pair, view])
            out.append((self.job.arrays["waveform"], start, start + int(plan.heard[clip]) - 1))
        return out

    def _head(self, fill: Fill) -> None:
        """Writes what is known of a step beside its pixels and sound."""
        plan, slot = fill.plan, self.slots[fill.slot]
        n, rows = len(plan.rows), plan.rows
        slot["size"][0] = n
        slot["row"][:n] = rows
        slot["video"][:n] = self.column["number"][rows]
        slot["draw"][:n] = plan.draws
        slot["position"][:n] = plan.first + np.arange(n)
        slot["shrunk"][:n] = plan.shrunk
        slot["box"][:n] = self.boxes[rows]
        views = slot["offset"].shape[1:]
        slot["offset"][:n] = plan.picture.reshape(n, *views)
        slot["sound_offset"][:n] = plan.sound.reshape(n, *views)
        slot["valid_frames"][:n] = plan.valid_frames.reshape(n, *views)
        slot["valid_samples"][:n] = plan.valid_samples.reshape(n, *views)
        slot["has_picture"][:n] = (plan.valid_frames > 0).reshape(n, *views)
        slot["has_sound"][:n] = (plan.heard > 0).reshape(n, *views)

    def _packed(self, plan: Plan, clip: int, out: np.ndarray, lengths: np.ndarray) -> None:
        job = self.job
        if not plan.valid_frames[clip]:
            out[:], lengths[:] = 0, PIXELS
            return
        cut_packed(self.reader, job.arrays["frames"], job.shard_seconds * job.tape_fps, plan.tape[clip], out, lengths,
                   check=job.check)  # fmt: skip

    def _clip(self, plan: Plan, slot: dict[str, np.ndarray], clip: int) -> None:
        """Decodes one clip into its rows of the slot."""
        job = self.job
        pair, view = divmod(clip, job.views.views)
        video = int(plan.rows[pair])
        place = int(self.column["place"][video])
        try:
            if job.frames:
                out = slot["frames"].reshape(-1, *slot["frames"].shape[-4:])[clip]
                if "jpeg" in slot:
                    self._packed(plan, clip, out, slot["jpeg"].reshape(-1, job.frames)[clip])
                elif plan.valid_frames[clip]:
                    cut_frames(self.reader, job.arrays["frames"], job.shard_seconds * job.tape_fps, plan.tape[clip],
                               out, check=job.check)  # fmt: skip
                else:
                    out[:] = 0
            if "source" in slot:
                shown = slot["source"].reshape(-1, job.frames)[clip]
                shown[:] = self._source(plan.tape[clip]) if plan.valid_frames[clip] else -1
            heard, start = int(plan.heard[clip]), int(plan.sound[pair, view])
            if job.samples:
                out = slot["waveform"].reshape(-1, job.samples)[clip]
                out[heard:] = 0
                cut_rows(self.reader, job.arrays["waveform"], job.shard_seconds, place * job.sample_rate + start,
                         out[:heard])  # fmt: skip
            if job.spectrogram:
                array = job.arrays["spectrogram"]
                out = slot["spectrogram"].reshape(-1, *slot["spectrogram"].shape[-2:])[clip]
                first = int(spectrogram_row(start, array.rate, job.sample_rate))
                total = int(self.column["samples"][video]) * array.rate // job.sample_rate
                n = max(0, min(job.spectrogram, total - first)) if heard else 0
                cut_rows(self.reader, array, job.shard_seconds, place * array.rate + first, out[:n])
                out[n:] = job.silence
                gaps = np.isnan(out[:n])
                if gaps.any():
                    out[:n][gaps] = job.silence
        except CorruptError as e:
            second = getattr(e, "second", None)  # of the tape
            where = plan.picture[pair, view] / job.sample_rate if second is None else second - place
            raise CorruptError(
                f"video {int(self.column['number'][video])} is damaged at second {where:.2f}",
                f"{e.what}: {e.why}", e.next,
            ) from e  # fmt: skip


def _scaled(boxes: np.ndarray, scale: int) -> np.ndarray:
    """Boxes (n, 4) y, x, height, width of frames decoded at 1/scale: every pixel that the picture touches wholly."""
    if scale == 1:
        return boxes
    start = -(-boxes[:, :2] // scale)
    return np.concatenate([start, np.maximum((boxes[:, :2] + boxes[:, 2:]) // scale - start, 1)], 1)


def _told(e: Exception) -> AvstoreError:
    """Any exception as one that says what to do."""
    if isinstance(e, AvstoreError):
        return e
    return AvstoreError(
        f"the reader failed: {type(e).__name__}: {e}", "an error inside avstore or in the views it was given",
        "in_process=True runs the reader beside you, where a debugger sees it",
    )  # fmt: skip


def main(given: dict[str, Any]) -> None:
    """The helper process. `given`: descriptors, sizes and the parent's pid, from `avstore.loader`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; we end when it does
    control = socket.socket(fileno=given["socket"])
    shared = Memory.adopt(given["job_fd"], given["job_bytes"])
    count = given["videos"] * len(COLUMNS)
    columns = np.frombuffer(shared.map, np.int64, count=count).reshape(given["videos"], len(COLUMNS))
    job: Job = pickle.loads(shared.map[count * 8 : given["job_bytes"]])
    memory = Memory.adopt(given["slots_fd"], given["slots_bytes"])

    def ready(generation: int, step: int, slot: int, error: tuple[AvstoreError, int] | None) -> None:
        tail = b"" if error is None else pickle.dumps(error)
        with contextlib.suppress(OSError):  # the trainer is gone: the main thread sees it too
            control.send(TO_TRAINER.pack(b"S" if error is None else b"E", generation, step, slot) + tail)

    filler = Filler(job, memory, columns, ready, maps=True)  # a process that may end by SIGBUS: the trainer is told
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        if not poll.poll(1000):
            if os.getppid() != given["parent"]:  # a child that the trainer forked may still hold our socket's end
                os._exit(0)
            continue
        try:
            message = control.recv(TO_READER.size)
        except OSError:
            message = b""
        if not message:
            os._exit(0)  # at once: nothing of ours outlives us
        kind, a, b, c, held = TO_READER.unpack(message)
        if kind == b"R":
            filler.run(a, b, c, held)
        else:
            filler.free(a)
