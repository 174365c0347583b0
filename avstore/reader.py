"""The reader process: fills the trainer's slots from a process of its own, away from the trainer's main thread.

    trainer process                      reader process (or, with in_process=True, threads beside the trainer)
    Loader  -- run, free slot -->        Filler: plan step -> tell the kernel -> decode its clips into a free slot
            <-- slot k holds step s --

The reader computes all of a batch (`avstore.filler`), and the trainer's main thread, which holds the GIL, only receives
a slot's number. The process is started by `Loader` with its memory and one end of a socket; it ends when the socket
closes, or when its parent is gone. It never imports torch. No prctl(PDEATHSIG): that signal comes when the *thread*
that started us ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
from typing import Any

import numpy as np

from avstore.errors import AvstoreError
from avstore.filler import Filler
from avstore.job import COLUMNS, Job
from avstore.slots import Memory

TO_READER = struct.Struct("<cqqqQ")  # b"R" generation, first step, stop, slots still held | b"F" slot, 0, 0, 0
TO_TRAINER = struct.Struct("<cqqq")  # b"S" generation, step, slot | b"E" generation, step, 0 + pickled (error, video)


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
