"""The lock of a store: `flock` on STORE/lock, exclusive or shared, with the exclusive holder's host and pid inside.

`flock` and not `fcntl`: the latter drops with any descriptor that the process closes, and would let a second ingest
in the same process pass. The kernel releases it when its holder dies, so that a killed run leaves no stale lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from avstore.durable import MACHINE_ERRNOS, machine_errors
from avstore.errors import ConflictError, MachineError


class StoreLock:
    """Held from `exclusive()` or `shared()` until `close()`; a context manager closes it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "lock"
        with machine_errors(self.path):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.mode: str | None = None

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exclusive(self, doing: str = "ingest") -> None:
        """Takes the lock alone; ConflictError naming the holder's host and pid where somebody has it.

        `doing` tells others what it is held for: they wait for a `planning` that ends soon, not for an `ingest`.
        """
        if not self._take(fcntl.LOCK_EX):
            raise self._conflict()
        self.mode = "exclusive"
        self._write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "doing": doing}) + "\n")

    def try_exclusive(self, doing: str = "ingest") -> bool:
        """As `exclusive`, but False where somebody has it."""
        try:
            self.exclusive(doing)
        except ConflictError:
            return False
        return True

    def shared(self, wait: Callable[[], None] | None = None) -> None:
        """Takes the lock together with other shared holders, or turns an exclusive one into a shared one.

        Where somebody else plans, `wait` is called between the tries (about ten a second) until that ends; without
        `wait`, or where an ingest has the lock for itself: ConflictError.
        """
        if self.mode == "exclusive":
            self._write("")
        while not self._take(fcntl.LOCK_SH):
            if wait is None or self.holder().get("doing") not in ("planning", None):
                raise self._conflict()
            wait()
            time.sleep(0.1)
        self.mode = "shared"

    def close(self) -> None:
        """Releases the lock; does nothing when called again."""
        if self.fd < 0:
            return
        if self.mode == "exclusive":
            with contextlib.suppress(MachineError):
                self._write("")
        os.close(self.fd)
        self.fd, self.mode = -1, None

    def holder(self) -> dict[str, str]:
        """What the exclusive holder wrote: host, pid, doing; empty where nobody did."""
        try:
            found = json.loads(os.pread(self.fd, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise MachineError(
                f"cannot lock {self.path} on {filesystem_of(self.path)}",
                f"flock does not work there: {e.strerror or e}",
                "name a STORE on a local disk, or on NFS 4 with locking",
            ) from e
        return True

    def _write(self, text: str) -> None:
        with machine_errors(self.path):
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, text.encode(), 0)

    def _conflict(self) -> ConflictError:
        holder = self.holder()
        who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
        return ConflictError(
            f"the store {self.path.parent} is being written by {who}",
            "two of them would write the same files",
            "wait until it ends, or share the work: avstore ingest --shard 0/2 here, --shard 1/2 there",
        )


def require_locks(root: Path) -> None:
    """MachineError naming the filesystem where `flock` or `link` does not work in the folder `root`.

    Tried for real: a second descriptor must be refused, and a hard link must appear and be refused when repeated.
    """
    probe, other = root / f"trial.tmp.{os.getpid()}", root / f"trial2.tmp.{os.getpid()}"
    what = "flock"
    first = second = -1
    try:
        with machine_errors(probe):
            first = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            second = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise OSError(errno.ENOTSUP, "a second holder was let in")
        except BlockingIOError:
            pass
        what = "link"
        os.link(probe, other)
        try:
            os.link(probe, other)
            raise OSError(errno.ENOTSUP, "an existing name was replaced")
        except FileExistsError:
            pass
    except MachineError:
        raise
    except OSError as e:
        if e.errno in MACHINE_ERRNOS:  # a full disk says nothing about locks
            with machine_errors(probe):
                raise
        raise MachineError(
            f"a store cannot be made on {filesystem_of(root)}",
            f"{what} does not work there: {e.strerror or e}",
            "name a STORE on a local disk, or on NFS 4 with locking",
        ) from e
    finally:
        for fd in (first, second):
            if fd >= 0:
                os.close(fd)
        for path in (probe, other):
            with contextlib.suppress(OSError):
                os.unlink(path)


def filesystem_of(path: Path) -> str:
    """The kind of filesystem and its mount point, e.g. `vfat at /media/usb`."""
    real = os.path.realpath(path)
    best, kind = "/", "this filesystem"
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, mount, name, *_ = line.split(" ")
            mount = mount.replace("\\040", " ")
            if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
                best, kind = mount, name
    return f"{kind} at {best}"
