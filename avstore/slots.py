"""Slots: batches' memory, laid out once and filled again and again.

A `Layout` says where each field of a batch lies in a slot; a `Memory` is anonymous memory, shared by descriptor with
the reader process (a memfd: no name, so nothing can be left behind) or private to this one, and pinned where there is
a CUDA device. What lies in a slot is the filler's (`avstore.filler`) and the batch's (`avstore.batch`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from avstore.errors import MachineError

_PAGE = 4096


class Layout:
    """Fields of a slot: name -> (shape, dtype), each starting on a page, so that it can be copied by DMA."""

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.fields = dict(fields)
        self.places: dict[str, int] = {}
        offset = 0
        for name, (shape, dtype) in self.fields.items():
            self.places[name] = offset
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            offset += -(-size // _PAGE) * _PAGE
        self.nbytes = max(offset, _PAGE)

    def views(self, buffer: memoryview | mmap.mmap, slot: int) -> dict[str, np.ndarray]:
        """The fields of a slot as arrays over `buffer`; nothing is copied."""
        base = slot * self.nbytes
        return {
            name: np.frombuffer(
                buffer, dtype, count=int(np.prod(shape, dtype=np.int64)), offset=base + self.places[name]
            ).reshape(shape)
            for name, (shape, dtype) in self.fields.items()
        }


class Memory:
    """`nbytes` of zeroed anonymous memory: `map` to use it, `fd` (shared memory only) to hand it to a child."""

    def __init__(self, nbytes: int, *, shared: bool) -> None:
        self.fd = -1
        self.nbytes = max(nbytes, _PAGE)
        try:
            if shared:
                self.fd = os.memfd_create("avstore", os.MFD_CLOEXEC)
                os.posix_fallocate(self.fd, 0, self.nbytes)  # fails now where there is not enough, not by SIGBUS later
                self.map = mmap.mmap(self.fd, self.nbytes)
            else:
                self.map = mmap.mmap(-1, self.nbytes)
        except OSError as e:
            self.close()
            raise MachineError(
                f"no {self.nbytes / 2**20:.0f} MiB of memory for the loader's slots",
                e.strerror or str(e),
                "use a smaller batch or fewer slots",
            ) from e

    @classmethod
    def adopt(cls, fd: int, nbytes: int) -> Memory:
        """Maps memory that another process made and passed on."""
        self = cls.__new__(cls)
        self.fd, self.nbytes, self.map = -1, nbytes, mmap.mmap(fd, nbytes)
        os.close(fd)  # the map holds a descriptor of its own
        return self

    def drop_descriptor(self) -> None:
        """Closes `fd`; the memory stays mapped."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Gives the memory back; where arrays over it are still in use, when the last of them goes."""
        self.drop_descriptor()
        with contextlib.suppress(AttributeError, BufferError):
            self.map.close()


def pin(memory: Memory, device: Any) -> bool:
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


def unpin(memory: Memory, device: Any) -> None:
    """The reverse, once all copies are done."""
    import torch

    torch.cuda.synchronize(torch.device(device))
    torch.cuda.cudart().cudaHostUnregister(np.frombuffer(memory.map, np.uint8).ctypes.data)
