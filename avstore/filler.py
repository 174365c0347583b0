"""The filler: decode threads that fill slots with batches, in the order of steps, ahead of the trainer.

Everything a batch is made of is a pure function of the step: its pairs (order), its windows (views), its bytes (store).
A thread plans some steps (`avstore.steps`) and tells the kernel (`avstore.readahead`); then all decode a step's clips
into a free slot. Where the threads run, beside the trainer or in a process of their own, is `avstore.reader`'s. This
never imports torch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avstore.cut import cut_frames, cut_rows
from avstore.errors import AvstoreError, CorruptError
from avstore.job import COLUMNS, Job
from avstore.packed import PIXELS, cut_packed
from avstore.readahead import ReadAhead
from avstore.shard import LocalReader
from avstore.slots import Memory
from avstore.steps import Plan, Planner
from avstore.windows import spectrogram_row

AHEAD = 2  # steps planned, and announced to the kernel, before their slots are free
GROUP = 256  # pairs that are planned at once: NumPy's cost per call is shared by several steps

Ready = Callable[[int, int, int, "tuple[AvstoreError, int] | None"], None]


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
        self.reader = LocalReader(Path(job.root))
        self.planner = Planner(job, self.column, self.reader)
        self.ahead = ReadAhead(job, self.column["place"], self.reader, maps=maps)
        self.changed = threading.Condition()
        self.free_slots: deque[int] = deque(range(job.slots))
        self.plans: deque[Plan] = deque()
        self.fills: list[Fill] = []
        self.generation = self.next_step = self.stop = 0
        self.group = max(1, GROUP * job.order.world // job.order.batch_size)
        self.planning = self.closing = False
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
            plans = self.planner.plan(step, stop)
            self.ahead.announce(plans)
        except Exception as e:
            error = _told(e), -1
        with self.changed:
            self.planning = False
            if generation == self.generation:
                if error is not None:
                    self._fail(generation, step, error)
                self.plans.extend(p for p in plans if p.step < self.stop)
            self.changed.notify_all()

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
                shown[:] = self.planner.source(plan.tape[clip]) if plan.valid_frames[clip] else -1
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
