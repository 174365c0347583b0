"""A finished video on its way from a decoding child to the writer: payloads and an index of them.

Up to 64 MB in memory; beyond that in a file beside the shards, whose name is swept as temporary.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from typing import BinaryIO

HOLD = 64 * 2**20  # bytes of one video in memory
HEADER = struct.Struct("<QQ")  # what precedes a child's answer: bytes of the JSON header, bytes of the body


class SpoolFull(Exception):
    """The spool file cannot be written: a failure of the machine. `.errno` and `.strerror` as in the OSError."""

    def __init__(self, e: OSError) -> None:
        super().__init__(str(e))
        self.errno, self.strerror = e.errno, e.strerror or str(e)


class Spool:
    """Payloads one after another; `path` is used only beyond `hold` bytes."""

    def __init__(self, path: Path, hold: int = HOLD) -> None:
        self.path, self.hold = path, hold
        self.memory = bytearray()
        self.file: BinaryIO | None = None
        self.size = 0

    def append(self, payload: bytes) -> int:
        """The offset at which `payload` lies now."""
        offset = self.size
        self.size += len(payload)
        if self.file is None and self.size > self.hold:
            try:
                self.file = open(self.path, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by close/abort)
                self.file.write(self.memory)
            except OSError as e:
                raise SpoolFull(e) from e
            self.memory = bytearray()
        if self.file is None:
            self.memory += payload
        else:
            try:
                self.file.write(payload)
            except OSError as e:
                raise SpoolFull(e) from e
        return offset

    def close(self) -> bytearray | None:
        """The payloads, or None where they lie in the file."""
        if self.file is None:
            return self.memory
        try:
            self.file.close()
        except OSError as e:
            raise SpoolFull(e) from e
        return None

    def abort(self) -> None:
        """Drops all of it."""
        self.memory = bytearray()
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class Payloads:
    """The writer's side: slices of what a child handed back. Close it when the slices are written."""

    def __init__(self, body: bytearray | None, path: Path) -> None:
        self.path = path
        self.map: mmap.mmap | None = None
        if body is None:
            with open(path, "rb") as f:
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self.view = memoryview(self.map)
        else:
            self.view = memoryview(body)
        # A spooled video costs the page cache, not us: it weighs a sixteenth in the budget.
        self.weight = len(self.view) if body is not None else len(self.view) // 16

    def __getitem__(self, span: tuple[int, int]) -> memoryview:
        """Bytes `offset ... offset + length`."""
        return self.view[span[0] : span[0] + span[1]]

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a slice lives on in the traceback of a failure
            self.view.release()
            if self.map is not None:
                self.map.close()
        if self.map is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
