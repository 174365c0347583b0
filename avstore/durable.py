"""Durable files: canonical JSON, atomic replace, and link-if-absent, each synced before it becomes visible.

The order is always data -> fsync -> name -> fsync of the folder, so that a name that can be seen has its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from avstore.errors import CorruptError, MachineError

# Failures of the machine, not of a media file: they stop a run with nothing committed.
MACHINE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ENOMEM,
    errno.EROFS,
    errno.ENODEV,
    errno.EMFILE,
    errno.ENFILE,
}


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, no NaN, and a final newline: equal values, equal bytes."""
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def read_json(path: Path) -> Any:
    """The value of a JSON file; CorruptError when it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as e:
        raise CorruptError(f"{path} is not valid JSON", str(e), "avstore verify STORE names what is damaged") from e


ZEROS = "0" * 64
SEAL = re.compile(rb'"digest":"([0-9a-f]{64})"')


def sealed_json(value: dict[str, Any]) -> bytes:
    """Canonical JSON with a `digest`: the SHA-256 of these very bytes with 64 zeros in its place."""
    data = canonical_json({**value, "digest": ZEROS})
    return data.replace(ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def read_sealed(path: Path) -> Any:
    """The value of a file of `sealed_json`, without its digest; CorruptError when a byte of it has changed."""
    data = path.read_bytes()
    found = SEAL.search(data)
    if (
        found is None
        or hashlib.sha256(data[: found.start(1)] + ZEROS.encode() + data[found.end(1) :]).hexdigest()
        != found[1].decode()
    ):
        raise CorruptError(
            f"{path} is damaged", "its digest does not fit its bytes", "avstore verify STORE names what is damaged"
        )
    value = json.loads(data)
    del value["digest"]
    return value


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(path: Path) -> Path:
    """The temporary name beside `path` of this process; swept by the next exclusive holder of the store."""
    return path.with_name(f"{path.name}.tmp.{os.getpid()}")


@contextlib.contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turns an OSError on a store's file into a MachineError that names the disk."""
    try:
        yield
    except MachineError:
        raise
    except OSError as e:
        reason = f"{e.strerror or e} (while writing {path})"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"the disk that holds {path.parent} is full",
                reason,
                "free some space, then repeat the command: it goes on where it stopped",
            ) from e
        next = "check the disk, then repeat the command: it goes on where it stopped"
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            next = f"choose a place where you may write, or see who may: ls -ld {path.parent}"
        raise MachineError(f"cannot write {path}", reason, next) from e


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` only when the block ends well: tmp -> fsync -> rename -> fsync(folder)."""
    tmp = temporary(path)
    with machine_errors(path):
        try:
            with open(tmp, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.rename(tmp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(tmp)
            raise
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, whole or not at all."""
    with replacing(path) as f:
        f.write(data)


def write_new(path: Path, data: bytes) -> bool:
    """Creates `path` with `data` if nobody has: tmp -> fsync -> link -> unlink tmp -> fsync(folder).

    Returns False where the file was there already (the first writer wins).
    """
    tmp = temporary(path)
    with machine_errors(path):
        try:
            with open(tmp, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            try:
                os.link(tmp, path)
                created = True
            except FileExistsError:
                created = False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tmp)
        sync_folder(path.parent)
    return created
