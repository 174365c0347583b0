"""The reader, from both ends: a process that fills the trainer's slots, and what the trainer's process holds of it.

    trainer process                      reader process (or, with in_process=True, threads beside the trainer)
    Loader  -- run, free slot -->        Filler: plan step -> tell the kernel -> decode its clips into a free slot
            <-- slot k holds step s --

The reader computes all of a batch (`avstore.filler`), and the trainer's main thread, which holds the GIL, only receives
a slot's number. The process is started with its memory and one end of a socket; it ends when the socket closes, or
when its parent is gone. It never imports torch. No prctl(PDEATHSIG): that signal comes when the *thread* that started
us ends. Pickles go between these two processes only, in memory that has no name.
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
import struct
import subprocess
import sys
from typing import Any

import numpy as np

from avstore.errors import AvstoreError, MachineError, UsageError
from avstore.filler import Filler
from avstore.job import COLUMNS, Job
from avstore.slots import Memory, pin, unpin

TO_READER = struct.Struct("<cqqqQ")  # b"R" generation, first step, stop, slots still held | b"F" slot, 0, 0, 0
TO_TRAINER = struct.Struct("<cqqq")  # b"S" generation, step, slot | b"E" generation, step, 0 + pickled (error, video)

_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from avstore.reader import main; main(given)"
)


# ---- the trainer's end


class StepFailed(Exception):
    """A step that the reader could not make."""

    def __init__(self, error: AvstoreError, video: int) -> None:
        super().__init__()
        self.error, self.video = error, video


class LiveReader:
    """What both ways of reading share: slots that are ready, by step, of the current generation."""

    def __init__(self, job: Job, device: Any, *, shared: bool) -> None:
        self.pid = os.getpid()
        self.memory = Memory(job.slots * job.layout.nbytes, shared=shared)
        self.slots = [job.layout.views(self.memory.map, k) for k in range(job.slots)]
        self.device, self.pinned = device, pin(self.memory, device)
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
        """The slot that holds `step`; StepFailed or MachineError instead."""
        while step not in self.ready:
            if step in self.failed:
                raise StepFailed(*self.failed[step])
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
            raise StepFailed(*error)
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
            unpin(self.memory, self.device)
        self.ready.clear()
        self.slots.clear()
        self.memory.close()


class ReaderThreads(LiveReader):
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


class ReaderProcess(LiveReader):
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


# ---- the reader's end


def main(given: dict[str, Any]) -> None:
    """The helper process. `given`: descriptors, sizes and the parent's pid, from `ReaderProcess`."""
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
