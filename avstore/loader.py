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
import json
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from avstore import store as stores
from avstore.errors import AvstoreError, CorruptError, MachineError, NotFoundError, UsageError, did_you_mean
from avstore.filler import Filler
from avstore.frontends import FRONT_ENDS
from avstore.job import Job
from avstore.packed import Decode, unpack
from avstore.reader import TO_READER, TO_TRAINER
from avstore.sampler import Order, SequentialOrder
from avstore.selection import Selection
from avstore.slots import Layout, Memory
from avstore.spec import spectrogram_array
from avstore.views import Views
from avstore.windows import clip_samples, frame_rows

if TYPE_CHECKING:
    import torch

_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from avstore.reader import main; main(given)"
)


@dataclass
class Batch:
    """One rank's share of a global batch: arrays over a slot of the loader, valid until `release`, which the loader
    calls by itself when `hold` later batches have been asked for. B pairs; `...` is (V,) where the views cut V > 1
    clips of each pair, and nothing otherwise.

    frames: uint8 (B, ..., T, H, W, 3) RGB. waveform: int16 (B, ..., samples). spectrogram: float16 (B, ..., R, bins),
    stored rows. source: int32 (B, ..., T), ordinal in the file of each frame. Those not asked for are None.
    row: int64 (B,), place of the video in the selection. video: its number. draw: which of its clips of this epoch.
    position: place in the epoch's global order. box: int64 (B, 4), y, x, height, width of the picture in the frame.
    offset, sound_offset: int64 (B, ...), where the pictures and the sound start, in samples of the tape.
    valid_frames, valid_samples: int64 (B, ...), how many come from the video; the rest loops / is zero.
    has_picture, has_sound: bool (B, ...), whether the window shows or sounds anything; else it is all zeros.
    shrunk: bool (B,), windows moved closer together than asked. wait: seconds that the trainer waited for this batch.
    jpeg: only where the loader has a `decode`: int32 (B, ..., T), bytes of the JPEG at the beginning of each row of
    `frames` (`avstore.packed`); `tensors` makes pixels of them.
    """

    step: int
    epoch: int
    index: int  # of the global batch in its epoch
    row: np.ndarray
    video: np.ndarray
    draw: np.ndarray
    position: np.ndarray
    box: np.ndarray
    offset: np.ndarray
    sound_offset: np.ndarray
    valid_frames: np.ndarray
    valid_samples: np.ndarray
    has_picture: np.ndarray
    has_sound: np.ndarray
    shrunk: np.ndarray
    frames: np.ndarray | None = None
    waveform: np.ndarray | None = None
    spectrogram: np.ndarray | None = None
    source: np.ndarray | None = None
    jpeg: np.ndarray | None = None
    wait: float = 0.0
    _slot: int = field(default=-1, repr=False)
    _loader: Loader | None = field(default=None, repr=False)
    _copied: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.row)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are arrays, by name."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, np.ndarray)}

    def tensors(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The arrays as tensors. On a CPU (or None): views of the slot, valid as long as the batch. On another device:
        copies, started without waiting; the slot is not used again before they are done. Where the loader has a
        `decode`, `frames` are what it makes of their JPEGs on the device, and `jpeg` is left out."""
        import torch

        arrays = self.arrays()
        lengths = arrays.pop("jpeg", None)
        coded = arrays.pop("frames") if lengths is not None else None
        out = {name: torch.from_numpy(array) for name, array in arrays.items()}
        device = torch.device("cpu" if device is None else device)
        on_cpu = device.type == "cpu"
        if not on_cpu:
            out = {name: tensor.to(device, non_blocking=True) for name, tensor in out.items()}
        if lengths is not None and coded is not None:
            if self._loader is None or self._loader.decode is None:
                raise UsageError("this batch was released", "its pictures are in its slot", "call `tensors` before")
            out["frames"] = unpack(coded, lengths, self._loader.decode, device)
        if on_cpu:
            return out
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))
        return out

    def release(self) -> None:
        """Gives the slot back. Its arrays must not be used any more."""
        loader, self._loader = self._loader, None
        if loader is not None:
            if self._copied is not None:
                self._copied.synchronize()
            loader._release(self._slot)


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
        self._live: _Reader | None = None
        self.decode = decode
        self.store = store if isinstance(store, stores.Store) else stores.open(store)
        self.selection = self.store.select() if selection is None else selection
        self.order, self.hold, self.in_process, self.device = order, hold, in_process, device
        _whole("threads", threads, 1)
        _whole("hold", hold, 1)
        _whole("slots", slots, 1)
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
        job, fields = _job(
            self.store, views, order, share, frames, fps, samples, size, front_end, source,
            getattr(order, "seed", 0) if seed is None else seed, threads, slots,
            self.store.spec.codec == "jpeg" if check is None else check, decode is not None,
        )  # fmt: skip
        self.job, self.layout = job, Layout(fields)
        self.nbytes = slots * self.layout.nbytes
        self.job = job = Job(**{**job.__dict__, "layout": self.layout})
        numbers = self.selection.numbers
        s = self.store
        self.columns = np.ascontiguousarray(
            np.column_stack([numbers, s.places[numbers], s.frames[numbers], s.samples[numbers], s.sound[numbers],
                             s.boxes[numbers]]).astype(np.int64)
        )  # fmt: skip
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
        return self._live.process.pid if isinstance(self._live, _Process) else os.getpid()

    def start(self) -> None:
        """Starts the reader where it does not run (it does after construction). It decodes nothing unasked."""
        if self._live is None or self._live.pid != os.getpid():  # after a fork the parent's reader stays the parent's
            self._handed.clear()
            kind = _Threads if self.in_process else _Process
            self._live = kind(self.job, self.columns, self.device)
            self._finalizer = weakref.finalize(self, _Reader.close, self._live)

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
        live = cast(_Reader, self._live)
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
                except _Failed as e:
                    raise self._named(e.error, e.video) from e.error
                batch = self._batch(step, slot, live)
                batch.wait = time.perf_counter() - begin
                self._handed.append(batch)
                self._next = step + 1
                yield batch
        finally:
            if generation == self._generation and self._live is live and live.pid == os.getpid():
                held = sum(1 << b._slot for b in self._handed if b._loader is not None)
                with contextlib.suppress(MachineError):
                    live.run(generation, 0, 0, held)  # nothing more is wanted; the last batches stay valid

    def _batch(self, step: int, slot: int, live: _Reader) -> Batch:
        views = live.slots[slot]
        n = int(views["size"][0])
        epoch, index = self.order.locate(step)
        arrays = {k: v[:n] for k, v in views.items() if k != "size"}
        batch = Batch(step, epoch, index, **cast(dict[str, Any], arrays))
        batch._slot, batch._loader = slot, self
        return batch

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


class _Failed(Exception):
    """A step that the reader could not make."""

    def __init__(self, error: AvstoreError, video: int) -> None:
        super().__init__()
        self.error, self.video = error, video


class _Reader:
    """What both ways of reading share: slots that are ready, by step, of the current generation."""

    def __init__(self, job: Job, device: Any, *, shared: bool) -> None:
        self.pid = os.getpid()
        self.memory = Memory(job.slots * job.layout.nbytes, shared=shared)
        self.slots = [job.layout.views(self.memory.map, k) for k in range(job.slots)]
        self.device, self.pinned = device, _pin(self.memory, device)
        self.ready: dict[int, int] = {}
        self.failed: dict[int, tuple[AvstoreError, int]] = {}

    def run(self, generation: int, start: int, stop: int, held: int) -> None:
        """Asks for steps start .. stop-1. All slots but those in the bits of `held` go back to the reader."""
        self.ready.clear()
        self.failed.clear()
        self._tell(b"R", generation, start, stop, held)

    def free(self, slot: int) -> None:
        self._tell(b"F", slot, 0, 0, 0)

    def wait(self, generation: int, step: int) -> int:
        """The slot that holds `step`; _Failed or MachineError instead."""
        while step not in self.ready:
            if step in self.failed:
                raise _Failed(*self.failed[step])
            self._next_message(generation)
        return self.ready.pop(step)

    def has(self, generation: int, step: int) -> bool:
        """Whether `wait` would not wait."""
        while step not in self.ready and step not in self.failed and self._heard():
            self._next_message(generation)
        return step in self.ready or step in self.failed

    def _next_message(self, generation: int) -> None:
        came, at, slot, error = self._hear()
        if came != generation:
            return  # of an iteration that has ended; its slots went back when this one began
        if error is None:
            self.ready[at] = slot
        elif at < 0:
            raise _Failed(*error)
        else:
            self.failed[at] = error

    def _tell(self, kind: bytes, a: int, b: int, c: int, held: int) -> None:
        raise NotImplementedError

    def _hear(self) -> tuple[int, int, int, tuple[AvstoreError, int] | None]:
        raise NotImplementedError

    def _heard(self) -> bool:
        """Whether `_hear` would not wait."""
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self.pid != os.getpid():
            return
        self._end()
        if self.pinned:
            _unpin(self.memory, self.device)
        self.ready.clear()
        self.slots.clear()
        self.memory.close()


class _Threads(_Reader):
    """The reader's threads in this process."""

    def __init__(self, job: Job, columns: np.ndarray, device: Any) -> None:
        super().__init__(job, device, shared=False)
        self.queue: queue.SimpleQueue[tuple[int, int, int, tuple[AvstoreError, int] | None]] = queue.SimpleQueue()
        put = self.queue.put
        self.filler = Filler(job, self.memory, columns, lambda *message: put(message))

    def _tell(self, kind: bytes, a: int, b: int, c: int, held: int) -> None:
        if kind == b"R":
            self.filler.run(a, b, c, held)
        else:
            self.filler.free(a)

    def _hear(self) -> tuple[int, int, int, tuple[AvstoreError, int] | None]:
        return self.queue.get()

    def _heard(self) -> bool:
        return not self.queue.empty()

    def _end(self) -> None:
        self.filler.close()


class _Process(_Reader):
    """The reader in a process of its own, started by exec: no fork, and the trainer's `__main__` is not run again."""

    def __init__(self, job: Job, columns: np.ndarray, device: Any) -> None:
        if not hasattr(os, "memfd_create") or not sys.executable:
            raise MachineError(
                "a reader process cannot be started here", "it needs Linux' memfd, and a Python to run",
                "Loader(..., in_process=True) reads with threads of this process",
            )  # fmt: skip
        try:
            told = pickle.dumps(job)
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            raise _not_importable(job, str(e)) from e
        if type(job.views).__module__ == "__main__":
            raise _not_importable(job, "it is defined in the script that runs, which the reader does not run again")
        super().__init__(job, device, shared=True)
        about = Memory(columns.nbytes + len(told), shared=True)
        np.frombuffer(about.map, np.int64, count=columns.size)[:] = columns.reshape(-1)
        about.map[columns.nbytes : columns.nbytes + len(told)] = told
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (theirs.fileno(), self.memory.fd, about.fd)
        given = {
            "path": [p or os.getcwd() for p in sys.path], "parent": self.pid, "socket": fds[0], "slots_fd": fds[1],
            "slots_bytes": self.memory.nbytes, "job_fd": fds[2], "job_bytes": about.nbytes, "videos": len(columns),
        }  # fmt: skip
        try:
            # a process group of its own: Ctrl-C goes to the trainer alone, which then closes the socket
            self.process = subprocess.Popen(
                [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", _START, json.dumps(given)],  # type: ignore[attr-defined]
                pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0,
            )  # fmt: skip
        except OSError as e:
            self.socket.close()
            raise MachineError("the reader process could not be started", str(e), "in_process=True does without") from e
        finally:
            theirs.close()
            about.close()
            self.memory.drop_descriptor()

    def _tell(self, kind: bytes, a: int, b: int, c: int, held: int) -> None:
        try:
            self.socket.send(TO_READER.pack(kind, a, b, c, held))
        except OSError as e:
            raise self._dead() from e

    def _hear(self) -> tuple[int, int, int, tuple[AvstoreError, int] | None]:
        try:
            message = self.socket.recv(1 << 16)
        except OSError:
            message = b""
        if not message:
            raise self._dead()
        kind, generation, step, slot = TO_TRAINER.unpack_from(message)
        error = pickle.loads(message[TO_TRAINER.size :]) if kind == b"E" else None
        return generation, step, slot, error

    def _heard(self) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def _dead(self) -> MachineError:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        why = {
            -signal.SIGKILL: "SIGKILL most often means out of memory",
            -signal.SIGBUS: "a shard could not be read: the disk failed, or something shortened the file",
        }
        return MachineError(
            f"the reader process {how}",
            why.get(code, "its words, if any, are above"),
            "repeat the command: it goes on where it stopped (fewer slots or a smaller batch take less memory)",
        )

    def _end(self) -> None:
        self.socket.close()  # the reader ends at once
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _not_importable(job: Job, why: str) -> UsageError:
    return UsageError(
        f"the reader process cannot be given {type(job.views).__name__}", why,
        "define it in a module that can be imported, or use in_process=True",
    )  # fmt: skip


def _job(
    store: stores.Store, views: Views, order: Order | SequentialOrder, share: int, frames: int, fps: Any, samples: int,
    size: tuple[int, int] | None, front_end: str | None, source: bool, seed: int, threads: int, slots: int, check: bool,
    packed: bool,
) -> tuple[Job, dict[str, tuple[tuple[int, ...], str]]]:  # fmt: skip
    """The job, still without its layout, and the fields of a slot; UsageError where the arguments do not fit."""
    spec = store.spec
    _whole("frames", frames, 0)
    _whole("samples", samples, 0)
    if not frames and not samples:
        raise UsageError("a clip without frames and samples", "nothing would be read", "frames=16, samples=48000")
    if frames and not spec.picture:
        raise UsageError("this store has no pictures", f"{store.path} is an audio store", "Loader(..., frames=0)")
    if source and not frames:
        raise UsageError("source without frames", "`source` tells which file frame each picture is", "frames=16")
    rate = None if fps == "native" else stores.as_fraction("fps", fps)
    picture = 0
    if frames:
        frame_rows(0, frames, spec.fps if rate is None else rate, spec.fps, spec.sample_rate)  # UsageError
        picture = clip_samples(frames, spec.fps if rate is None else rate, spec.sample_rate)
    scale = 1
    if size is not None and frames:
        scales = {(spec.height // k, spec.width // k): k for k in ((1, 2, 4, 8) if spec.codec == "jpeg" else (1,))}
        if tuple(size) not in scales:
            raise UsageError(
                f"frames of {size[0]}x{size[1]} from a store of {spec.height}x{spec.width}",
                f"its {spec.codec} frames decode to {', '.join(f'{h}x{w}' for h, w in scales)}",
                "resize the batch on the device, or ingest with --size",
            )
        scale = scales[size[0], size[1]]
    if packed and (not frames or spec.codec != "jpeg" or scale != 1):
        raise UsageError(
            f"{frames} frames of codec {spec.codec} at 1/{scale} of their size for a decoder of JPEG on the device",
            "it takes JPEG pictures as they are stored; only the CPU decodes at half scale", "leave decode away",
        )  # fmt: skip
    views_n = views.views
    shape: tuple[int, ...] = (share,) if views_n == 1 else (share, views_n)
    fields: dict[str, tuple[tuple[int, ...], str]] = {"size": ((1,), "int64")}
    fields |= {name: ((share,), "int64") for name in ("row", "video", "draw", "position")}
    fields |= {"box": ((share, 4), "int64"), "shrunk": ((share,), "bool")}
    fields |= {name: (shape, "int64") for name in ("offset", "sound_offset", "valid_frames", "valid_samples")}
    fields |= {name: (shape, "bool") for name in ("has_picture", "has_sound")}
    read = {"waveform": store.arrays["waveform"]}
    if frames:
        read["frames"] = store.arrays["frames"]
        fields["frames"] = ((*shape, frames, spec.height // scale, spec.width // scale, 3), "uint8")
        if packed:
            fields["jpeg"] = ((*shape, frames), "int32")
        if source or rate is None:
            read["source"] = store.arrays["source"]
        if source:
            fields["source"] = ((*shape, frames), "int32")
    if samples:
        fields["waveform"] = ((*shape, samples), "int16")
    rows, silence = 0, 0.0
    if front_end is not None:
        if front_end not in store.front_ends:
            raise NotFoundError(
                f"front-end {front_end!r} is not stored here", did_you_mean(front_end, store.front_ends),
                "avstore derive stores it; avstore.frontends.spectrogram computes it from batch.waveform",
            )  # fmt: skip
        store._require_recipe(front_end)
        array = spectrogram_array(front_end)
        if not samples or samples * array.rate % spec.sample_rate:
            raise UsageError(
                f"{samples} samples are no whole number of rows of {front_end}",
                f"it has {array.rate} rows a second at {spec.sample_rate} samples",
                f"samples must be a positive multiple of {spec.sample_rate // np.gcd(spec.sample_rate, array.rate)}",
            )
        rows, silence = samples * array.rate // spec.sample_rate, FRONT_ENDS[front_end].floor
        read["spectrogram"] = array
        fields["spectrogram"] = ((*shape, rows, *array.row), "float16")
    job = Job(
        str(Path(store.path).absolute()), read, spec.shard_seconds, spec.fps, spec.sample_rate, order, views, seed,
        frames, rate, picture, samples, rows, silence, scale, check, threads, slots, Layout({}),
    )  # fmt: skip
    return job, fields


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name} = {value!r}", f"a whole number from {least}")


def _pin(memory: Memory, device: Any) -> bool:
    """Registers the slots with CUDA, so that copies to the device need no staging and do not block."""
    if device is None or not str(device).startswith("cuda"):
        return False
    import torch

    address = np.frombuffer(memory.map, np.uint8).ctypes.data
    code = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 1))  # portable: for every device
    if code:
        raise MachineError(
            f"{memory.nbytes / 2**20:.0f} MiB of slots could not be pinned", f"cudaHostRegister returned {code}",
            "raise `ulimit -l`, use a smaller batch, or device=None",
        )  # fmt: skip
    return True


def _unpin(memory: Memory, device: Any) -> None:
    import torch

    torch.cuda.synchronize(torch.device(device))
    torch.cuda.cudart().cudaHostUnregister(np.frombuffer(memory.map, np.uint8).ctypes.data)
