"""Decoding children: kept alive over many videos, limited, replaced when they crash, hang or grow old.

A `Pool` yields results in the order of its jobs while the children work ahead inside a byte budget. A child that dies
or overruns costs one video one retry, alone on the machine as far as this pool goes; then the video is `crashed` or
`timed_out`. One thread per child waits on its pipe, so that a child that hangs never holds up the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avstore.durable import machine_errors
from avstore.errors import AvstoreError, MachineError
from avstore.spec import Spec
from avstore.spool import HEADER, Payloads

LIFE = 500  # videos after which a child is replaced: libraries leak
START = 120.0  # seconds that a child may take to start
BUDGET = 512 * 2**20  # bytes of finished videos that wait for the writer


@dataclass(frozen=True)
class Job:
    """A video to probe or decode. `spool` is a temporary name of this process beside the shards."""

    kind: str  # probe | decode
    path: str
    spool: str
    cpu_seconds: float
    slot: int = 0
    start: str | None = None
    end: str | None = None
    device: bool = True  # may be decoded on the device, where the pool has one

    @property
    def wall_seconds(self) -> float:
        """Backstop for a child that hangs without computing."""
        return 60 + 4 * self.cpu_seconds


@dataclass
class Result:
    """A child's answer: the header (see `avstore.worker`), and the payloads of a decoded video."""

    job: Job
    header: dict[str, Any]
    payloads: Payloads | None = None

    def close(self) -> None:
        if self.payloads is not None:
            self.payloads.close()
            self.payloads = None


class Died(Exception):
    """A child ended or was ended: `.reason` crashed or timed_out, `.message`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Child:
    """One child process. Not for use by several threads at once."""

    def __init__(self, spec: Spec, decode: str = "pyav") -> None:
        self.jobs = 0
        package = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        env = {
            **os.environ,
            "PYTHONPATH": package + (os.pathsep + inherited if inherited else ""),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with tempfile.TemporaryFile() as errors:
            # -P: a folder of videos may hold a `json.py`. A session of its own: Ctrl-C is the parent's affair.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "avstore.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                start_new_session=True,
                bufsize=0,
            )
            if hasattr(fcntl, "F_SETPIPE_SZ") and self.process.stdout is not None:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
            try:
                self._send({"spec": spec.to_json(), "decode": decode})
                self.versions: dict[str, str] = self._receive(time.monotonic() + START)[0]["versions"]
            except Died as e:
                self.end()
                errors.seek(0)
                words = errors.read().decode(errors="replace").strip().splitlines()
                why = words[-1] if words else e.message
                raise AvstoreError("a decoding child does not start", why, "avstore doctor says what is missing") from e

    def do(self, job: Job) -> Result:
        """The answer to a job. Raises Died; then the child is of no more use."""
        self.jobs += 1
        deadline = time.monotonic() + job.wall_seconds
        try:
            self._send(dict(job.__dict__))
            header, body = self._receive(deadline)
        except Died as e:
            with contextlib.suppress(OSError):
                os.unlink(job.spool)
            if e.message == "SIGXCPU":
                raise Died("timed_out", f"took more than {job.cpu_seconds:g} s of CPU time") from e
            if e.reason == "timed_out":
                raise Died("timed_out", f"no end after {job.wall_seconds:g} s") from e
            raise Died("crashed", f"the decoder ended with {e.message}") from e
        payloads = None
        if "index" in header:
            with machine_errors(Path(job.spool)):
                payloads = Payloads(body if len(body) == header["size"] else None, Path(job.spool))
        return Result(job, header, payloads)

    def end(self) -> None:
        """Kills the process, if it still runs, and reaps it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        view = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while len(view):
                view = view[self.process.stdin.write(view) or 0 :]
        except OSError as e:
            raise self._ended() from e

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        sizes = HEADER.unpack(self._exactly(HEADER.size, deadline))
        header = json.loads(self._exactly(sizes[0], deadline))
        return header, self._exactly(sizes[1], deadline)

    def _exactly(self, n: int, deadline: float) -> bytearray:
        assert self.process.stdout is not None
        out = bytearray(n)
        view = memoryview(out)
        fd = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while len(view):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Died("timed_out", "no answer")
                got = os.readv(fd, [view])
                if not got:
                    raise self._ended()
                view = view[got:]
        return out

    def _ended(self) -> Died:
        code = self.process.wait()
        if code >= 0:
            return Died("crashed", f"exit code {code}")
        try:
            return Died("crashed", signal.Signals(-code).name)
        except ValueError:
            return Died("crashed", f"signal {-code}")


class Pool:
    """`workers` children for one spec; a context manager ends them.

    `on_death(job, reason, message)` is told of every child that dies, from the thread that saw it.
    """

    def __init__(
        self, workers: int, spec: Spec, budget: int = BUDGET, on_death: Any = None, decode: str = "pyav"
    ) -> None:
        self.workers, self.spec, self.budget, self.on_death, self.decode = workers, spec, budget, on_death, decode
        self.versions: dict[str, str] = {}
        self.changed = threading.Condition()
        self.jobs: Iterator[Job] | None = None
        self.given = self.running = self.held = 0
        self.done: dict[int, Result] = {}
        self.error: BaseException | None = None
        self.solo = self.closed = False
        self.threads: list[threading.Thread] = []
        self.children: set[Child] = set()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Iterable[Job], stop: threading.Event | None = None) -> Iterator[Result]:
        """Results in the order of `jobs`. Each is closed, and its bytes given back to the budget, when the next one
        is asked for. Ends early, after closing the pool, when `stop` is set; raises what a thread raised."""
        with self.changed:
            if self.jobs is not None or self.closed:
                raise RuntimeError("the pool is busy or closed")
            self.jobs, self.given, self.held, self.done = iter(jobs), 0, 0, {}
            self.changed.notify_all()
        while len(self.threads) < self.workers:
            thread = threading.Thread(target=self._work, name=f"child-{len(self.threads)}", daemon=True)
            self.threads.append(thread)
            thread.start()
        index = 0
        while True:
            with self.changed:
                while not (stopped := stop is not None and stop.is_set()) and index not in self.done:
                    if self.error is not None:
                        raise self.error
                    if self.jobs is None and index == self.given:
                        return
                    self.changed.wait(0.1)
                result = None if stopped else self.done.pop(index)
            if result is None:
                self.close()
                return
            weight = result.payloads.weight if result.payloads is not None else 0
            try:
                yield result
            finally:
                result.close()
            index += 1
            with self.changed:
                self.held -= weight
                self.changed.notify_all()

    def hello(self) -> dict[str, str]:
        """Versions of everything that shapes the bytes, as the children tell them; starts one where none did yet."""
        if not self.versions:
            child = self._start()
            self._end(child)
        return self.versions

    def close(self) -> None:
        """Ends the children and drops what nobody took."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            for child in self.children:
                child.process.kill()
        for thread in self.threads:
            thread.join()
        for result in self.done.values():
            result.close()
        self.done.clear()

    def _take(self) -> tuple[int, Job] | None:
        """The next job, once the budget allows; None when the pool is closed.

        Jobs are given in order, so the one that the writer waits for is always given: when everything given before it
        is taken, nothing is held.
        """
        with self.changed:
            while not self.closed and self.error is None:
                if self.jobs is not None and not self.solo and self.held < self.budget:
                    job = next(self.jobs, None)
                    if job is not None:
                        self.given, self.running = self.given + 1, self.running + 1
                        return self.given - 1, job
                    self.jobs = None
                    self.changed.notify_all()
                self.changed.wait()
            return None

    def _work(self) -> None:
        child: Child | None = None
        try:
            while (taken := self._take()) is not None:
                index, job = taken
                result, child = self._do(job, child)
                with self.changed:
                    self.running -= 1
                    self.done[index] = result
                    self.held += result.payloads.weight if result.payloads is not None else 0
                    self.changed.notify_all()
        except BaseException as e:
            with self.changed:
                if not self.closed:
                    self.error = self.error or e
                self.changed.notify_all()
        finally:
            if child is not None:
                self._end(child)

    def _do(self, job: Job, child: Child | None) -> tuple[Result, Child | None]:
        died: Died | None = None
        for attempt in range(2):
            with self._alone() if attempt else contextlib.nullcontext():
                if self.closed:
                    raise RuntimeError("the pool is closed")
                if child is not None and child.jobs >= LIFE:
                    self._end(child)
                    child = None
                if child is None:
                    child = self._start()
                try:
                    # whoever died with a file on the device gets another chance without it
                    return child.do(replace(job, device=not attempt)), child
                except Died as e:
                    died = e
                self._end(child)
                child = None
            if self.on_death is not None and not self.closed:
                self.on_death(job, died.reason, died.message)
        assert died is not None
        return Result(job, {"failed": died.reason, "message": died.message}), None

    def _start(self) -> Child:
        """A new child; tried again where one is killed while it starts, for that is nobody's fault yet."""
        for attempt in range(3):
            try:
                child = Child(self.spec) if self.decode == "pyav" else Child(self.spec, self.decode)
                break
            except OSError as e:
                raise MachineError("cannot start a decoding child", e.strerror or str(e), "use fewer --workers") from e
            except AvstoreError as e:
                if attempt == 2 or self.closed or "SIGKILL" not in e.why:
                    raise
        with self.changed:
            self.versions = child.versions
            self.children.add(child)
            if self.closed:
                child.process.kill()
        return child

    def _end(self, child: Child) -> None:
        with self.changed:
            self.children.discard(child)
        child.end()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside the block no other job runs in this pool."""
        with self.changed:
            self.running -= 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or not self.solo)
            self.solo = True
            self.changed.wait_for(lambda: self.closed or self.running == 0)
            self.running += 1
        try:
            yield
        finally:
            with self.changed:
                self.solo = False
                self.changed.notify_all()
