"""The loader: batches of clips for training and evaluation, in an order that depends on nothing but seed and epoch.

    order = Order(len(selection), draws=1, seed=0, batch_size=32)
    with Loader(store, selection, AvidView(12000), order=order, frames=8, fps=16, samples=48000) as loader:
        for batch in loader.steps(start=step):       # or loader.epoch(3)
            x = batch.tensors(device)                # uint8 frames, int16 sound, what is known of both
            ...

A reader process with decode threads fills slots ahead of the trainer (`avstore.reader`); `in_process=True` runs its
threads here instead: for notebooks, tests and systems without memfd. Same order, same bytes either way, for any number
of threads and processes. The state to resume is one counter: the step. Everything handed out is as stored: uint8,
int16; crops, colour and normalisation are the trainer's, on the batch (`avstore.augment`).
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from avstore import store as stores
from avstore.batch import Batch
from avstore.errors import AvstoreError, CorruptError, MachineError, UsageError
from avstore.job import make_job, require_whole, video_columns
from avstore.packed import Decode
from avstore.reader import LiveReader, ReaderProcess, ReaderThreads, StepFailed
from avstore.sampler import Order, SequentialOrder
from avstore.selection import Selection
from avstore.views import Views

if TYPE_CHECKING:
    import torch


class Loader:
    """See the top of this file.

    store: a store or its path. selection: whose videos, None for all; rows are places in it. views: where clips are cut
    (`avstore.views`). order: `Order` (training) or `SequentialOrder` (evaluation) over the selection; it knows batch
    size, world and rank. frames, fps: pictures of a clip, fps a number, a fraction or "native"; frames=0: none.
    samples: length of the sound window; 0: none. size: (H, W), the stored size or 1/2, 1/4, 1/8 of it (jpeg only).
    front_end: also the stored rows of this spectrogram for the sound window. source: also the source frame of each
    picture. seed: of the windows, by default the order's.
    threads: that decode. slots: batches of memory. hold: batches that stay valid after they were handed out.
    check: verify the checksums of frames; by default where they are JPEG, where it costs 1-2 % and 82 % of single
    flipped bits would decode without an error to wrong pixels, but not where they are raw, where it costs a third.
    Sound is always verified. device: "cuda..." registers the slots as pinned memory. decode: pictures stay JPEG in the
    slots, and `Batch.tensors` makes pixels of them by this function (`avstore.device_jpeg`); jpeg stores, whole size.

    UsageError for arguments that fit neither each other nor the store, NotFoundError for a front-end that is not
    stored, MachineError where the reader cannot start, or dies; CorruptError, naming video and second, for damaged
    bytes.
    """

    def __init__(
        self,
        store: stores.Store | str | os.PathLike[str],
        selection: Selection | None,
        views: Views,
        *,
        order: Order | SequentialOrder,
        frames: int = 16,
        fps: int | float | Fraction | str = 16,
        samples: int = 0,
        size: tuple[int, int] | None = None,
        front_end: str | None = None,
        source: bool = False,
        seed: int | None = None,
        threads: int = 2,
        slots: int = 4,
        hold: int = 1,
        in_process: bool = False,
        check: bool | None = None,
        device: torch.device | str | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._live: LiveReader | None = None
        self.decode = decode
        self.store = store if isinstance(store, stores.Store) else stores.open(store)
        self.selection = self.store.select() if selection is None else selection
        self.order, self.hold, self.in_process, self.device = order, hold, in_process, device
        require_whole("threads", threads, 1)
        require_whole("hold", hold, 1)
        require_whole("slots", slots, 1)
        if slots > 64:
            raise UsageError(f"{slots} slots", "64 are the most", "slots=4 keeps a reader busy")
        if slots < hold + 1:
            raise UsageError(f"{slots} slots", f"{hold} stay valid, and one must be free to fill", f"slots={hold + 2}")
        if order.n_videos != len(self.selection):
            raise UsageError(
                f"the order runs over {order.n_videos} videos, the selection has {len(self.selection)}",
                "rows are places in the selection", "Order(len(selection), ...)",
            )  # fmt: skip
        share = -(-order.batch_size // order.world)
        self.job = make_job(
            self.store, views, order, share, frames, fps, samples, size, front_end, source,
            getattr(order, "seed", 0) if seed is None else seed, threads, slots,
            self.store.spec.codec == "jpeg" if check is None else check, decode is not None,
        )  # fmt: skip
        self.layout = self.job.layout
        self.nbytes = slots * self.layout.nbytes
        self.columns = video_columns(self.store, self.selection.numbers)
        self._generation = self._next = 0
        self._handed: deque[Batch] = deque()
        self.start()

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self.order.batches

    @property
    def reader_pid(self) -> int:
        """The process that decodes: the reader's, or this one with `in_process`."""
        return self._live.process.pid if isinstance(self._live, ReaderProcess) else os.getpid()

    def start(self) -> None:
        """Starts the reader where it does not run (it does after construction). It decodes nothing unasked."""
        if self._live is None or self._live.pid != os.getpid():  # after a fork the parent's reader stays the parent's
            self._handed.clear()
            kind = ReaderThreads if self.in_process else ReaderProcess
            self._live = kind(self.job, self.columns, self.device)
            self._finalizer = weakref.finalize(self, LiveReader.close, self._live)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of an epoch."""
        first = epoch * self.order.batches
        return self.steps(first + start, first + self.order.batches)

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the global steps start .. stop-1 (without `stop`: for ever), counted over all epochs: read ahead
        does not pause between epochs. Beginning a new iteration ends the one before and releases its batches."""
        stop = 2**62 if stop is None else stop
        self.order.locate(start)  # UsageError
        if stop < start:
            raise UsageError(f"steps {start} to {stop}", "the end lies before the start")
        return self._iterate(start, stop)

    def _iterate(self, start: int, stop: int) -> Iterator[Batch]:
        self.start()
        live = cast(LiveReader, self._live)
        while self._handed:
            self._handed.popleft().release()
        self._generation += 1
        self._next = start
        generation = self._generation
        live.run(generation, start, stop, 0)
        try:
            for step in range(start, stop):
                while len(self._handed) >= self.hold:
                    self._handed.popleft().release()
                if generation != self._generation or live is not self._live:
                    raise UsageError("this iteration has ended", "the loader was asked for another one, or closed")
                begin = time.perf_counter()
                try:
                    slot = live.wait(generation, step)
                except StepFailed as e:
                    raise self._named(e.error, e.video) from e.error
                batch = self._batch(step, slot, live)
                batch.wait = time.perf_counter() - begin
                self._handed.append(batch)
                self._next = step + 1
                yield batch
        finally:
            if generation == self._generation and self._live is live and live.pid == os.getpid():
                held = sum(1 << b.slot for b in self._handed if b.slot >= 0)
                with contextlib.suppress(MachineError):
                    live.run(generation, 0, 0, held)  # nothing more is wanted; the last batches stay valid

    def _batch(self, step: int, slot: int, live: LiveReader) -> Batch:
        views = live.slots[slot]
        n = int(views["size"][0])
        epoch, index = self.order.locate(step)
        arrays = {k: v[:n] for k, v in views.items() if k != "size"}
        given = cast(dict[str, Any], arrays)
        return Batch(step, epoch, index, **given, _slot=slot, _give_back=self._release, _decode=self.decode)

    def ready(self) -> bool:
        """Whether the next batch of the running iteration can be had without waiting."""
        return self._live is not None and self._live.has(self._generation, self._next)

    def _release(self, slot: int) -> None:
        if self._live is not None and self._live.pid == os.getpid():
            self._live.free(slot)

    def _named(self, error: AvstoreError, video: int) -> AvstoreError:
        if video >= 0 and isinstance(error, CorruptError):
            return CorruptError(error.what.replace(f"video {video} ", f"video {video} ({self.store.key(video)}) ", 1),
                                error.why, error.next)  # fmt: skip
        return error

    def close(self) -> None:
        """Ends the reader and gives the memory back. Batches still in use keep theirs until they go."""
        self._generation += 1
        self._handed.clear()
        if self._live is not None:
            self._finalizer()
            self._live = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
