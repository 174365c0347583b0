"""One shard file: payloads in tape order without gaps, then an index of (offset, length) pairs, then its CRC-32C.

Written once, by one writer, under a temporary name. Read through two calls: `entries` (a slice of the table at the
file's tail) and `read` (bytes at an offset); whatever offers these two can stand in for a local disk.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from operator import add
from pathlib import Path
from typing import BinaryIO, Protocol

import google_crc32c
import numpy as np

from avstore.codecs import MISSING
from avstore.durable import machine_errors, sync_folder, temporary
from avstore.errors import CorruptError, NotFoundError

_MISSING = int(MISSING)
INDEX_ROW = 16  # bytes: offset and length, two little-endian uint64


class ShardWriter:
    """Appends the chunks of one shard in rising order; the file appears under its name only by `close`."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.path, self.tmp = path, temporary(path)
        self.index = np.full((chunks, 2), MISSING, dtype="<u8")
        self.offset, self.last = 0, -1
        self.file: BinaryIO | None = None

    def append(self, chunk: int, payload: bytes | memoryview) -> None:
        """Writes the payload (its checksum included) of inner chunk `chunk`."""
        if not self.last < chunk < len(self.index):
            raise ValueError(f"chunk {chunk} after {self.last} of {len(self.index)}")
        with machine_errors(self.path):
            if self.file is None:
                self.file = open(self.tmp, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by close/abort)
            self.file.write(payload)
        self.index[chunk] = self.offset, len(payload)
        self.offset, self.last = self.offset + len(payload), chunk

    def close(self) -> None:
        """Index -> fsync -> rename -> fsync(folder). A shard without any chunk makes no file."""
        if self.file is None:
            return
        with machine_errors(self.path):
            try:
                table = self.index.tobytes()
                self.file.write(table)
                self.file.write(google_crc32c.value(table).to_bytes(4, "little"))
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.rename(self.tmp, self.path)
            except BaseException:
                self.abort()
                raise
            sync_folder(self.path.parent)

    def abort(self) -> None:
        """Drops what was written; the final name is untouched."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(OSError):
                os.unlink(self.tmp)


class Reader(Protocol):
    """What a place that holds shards must offer."""

    def entries(self, key: str, first: int, n: int, chunks: int) -> tuple[int, ...]: ...

    def read(self, key: str, offset: int, out: np.ndarray) -> None: ...


class LocalReader:
    """Reads shards from a folder, with a bounded set of open descriptors that threads share.

    A descriptor is closed only when nobody uses it: the kernel gives its number to the next file, and a late read
    would return another shard's bytes.
    """

    def __init__(self, root: Path, max_open: int = 128, *, maps: bool = False) -> None:
        """max_open: shards that stay open. maps: let `mapped` map them (as many again), see there."""
        self.root, self.max_open, self.maps = Path(root), max_open, maps
        self.views: OrderedDict[str, np.ndarray] = OrderedDict()
        self.lock = threading.Lock()
        self.open: OrderedDict[str, list[int]] = OrderedDict()  # key -> [fd, size, users]
        self.pid = os.getpid()

    @contextlib.contextmanager
    def descriptor(self, key: str) -> Iterator[tuple[int, int]]:
        """(fd, size) of a shard, held open inside the block."""
        entry = self._acquire(key)
        try:
            yield entry[0], entry[1]
        finally:
            self._release(entry)

    def _acquire(self, key: str) -> list[int]:
        with self.lock:
            if (
                self.pid != os.getpid()
            ):  # after a fork the parent's descriptors are shared offsets we do not use, but the lock count is stale
                self.open, self.pid = OrderedDict(), os.getpid()
            entry = self.open.get(key)
            if entry is None:
                try:
                    fd = os.open(self.root / key, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as e:
                    raise NotFoundError(
                        f"shard {key} is missing",
                        f"it should be in {self.root}",
                        "avstore verify STORE says what else is, --repair makes it again",
                    ) from e
                entry = self.open[key] = [fd, os.fstat(fd).st_size, 0]
            entry[2] += 1
            self.open.move_to_end(key)
            if len(self.open) > self.max_open:
                self._evict()
        return entry

    def _release(self, entry: list[int]) -> None:
        with self.lock:
            entry[2] -= 1
            if len(self.open) > self.max_open:
                self._evict()

    def _evict(self) -> None:
        if len(self.open) <= self.max_open:
            return
        for key in [k for k, e in self.open.items() if e[2] == 0][: len(self.open) - self.max_open]:
            os.close(self.open.pop(key)[0])

    def mapped(self, key: str) -> np.ndarray | None:
        """The whole shard as an array over the page cache, uint8, read-only; None where `maps` is off.

        A copy out of it costs what a copy in memory does; `read` a third more, in the kernel. But where the file
        shrinks, or the disk fails, touching it ends the process by SIGBUS: for processes that may end so.
        """
        if not self.maps:
            return None
        with self.lock:
            view = self.views.get(key)
            if view is not None:
                self.views.move_to_end(key)
                return view
        with self.descriptor(key) as (fd, size):
            if not size:
                return None
            view = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), np.uint8)  # goes when its last user has
        with self.lock:
            self.views[key] = view
            while len(self.views) > self.max_open:
                self.views.popitem(last=False)
        return view

    def close(self) -> None:
        with self.lock:
            self.views.clear()
            for key in [k for k, e in self.open.items() if e[2] == 0]:
                os.close(self.open.pop(key)[0])

    def entries(self, key: str, first: int, n: int, chunks: int) -> tuple[int, ...]:
        """Offset and length, alternating, of chunks `first ... first + n` of a shard with `chunks` in all.

        MISSING twice where a chunk is not there. CorruptError when an entry points outside the payloads. Plain ints: a
        clip has a few dozen, on which NumPy's calls take five times as long, more than 2 % of decoding the clip.
        """
        entry = self._acquire(key)
        try:
            tail = entry[1] - 4 - INDEX_ROW * chunks
            data = os.pread(entry[0], INDEX_ROW * n, tail + INDEX_ROW * first) if tail >= 0 else b""
        finally:
            self._release(entry)
        if len(data) != INDEX_ROW * n:
            raise CorruptError(
                f"shard {key} is cut short",
                f"{entry[1]} bytes cannot hold an index of {chunks} chunks",
                "avstore verify STORE --repair",
            )
        flat = struct.unpack(f"<{2 * n}Q", data)
        if n and max(map(add, flat[::2], flat[1::2])) > tail:  # a hole, or damage: look closer
            for offset, length in zip(flat[::2], flat[1::2], strict=True):
                if offset != _MISSING and offset + length > tail:
                    raise CorruptError(
                        f"the index of shard {key} is damaged",
                        "an entry points outside the file",
                        "avstore verify STORE --repair",
                    )
        return flat

    def index(self, key: str, first: int, n: int, chunks: int) -> np.ndarray:
        """`entries` as a table, uint64 (n, 2)."""
        return np.array(self.entries(key, first, n, chunks), "<u8").reshape(n, 2)

    def read(self, key: str, offset: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 contiguous, with the bytes at `offset`."""
        entry = self._acquire(key)
        try:
            done = os.preadv(entry[0], [out], offset)  # type: ignore[list-item]  # numpy arrays are buffers
            while 0 < done < out.nbytes:
                more = os.preadv(entry[0], [out[done:]], offset + done)  # type: ignore[list-item]
                if not more:
                    break
                done += more
        finally:
            self._release(entry)
        if done != out.nbytes:
            raise CorruptError(
                f"shard {key} is cut short",
                f"{done} of {out.nbytes} bytes at {offset}",
                "avstore verify STORE --repair",
            )

    def scatter(self, key: str, offset: int, parts: Sequence[memoryview]) -> None:
        """One vectored read into several buffers of bytes, in order (raw frames and their checksums)."""
        with self.descriptor(key) as (fd, _):
            want = sum(map(len, parts))
            done = 0
            for i in range(0, len(parts), 1000):  # IOV_MAX is 1024
                some = parts[i : i + 1000]
                got = os.preadv(fd, some, offset + done)
                done += got
                if got != sum(map(len, some)):
                    break
        if done != want:
            raise CorruptError(
                f"shard {key} is cut short", f"{done} of {want} bytes at {offset}", "avstore verify STORE --repair"
            )

    def will_need(self, key: str, offset: int, length: int) -> None:
        """Tells the kernel that these bytes are wanted soon."""
        with contextlib.suppress(NotFoundError, OSError), self.descriptor(key) as (fd, _):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
