"""Errors: each says what is wrong, why, and what to type next; each knows the exit code of the command line.

They inherit from the built-in that a caller would guess, so that nobody has to import ours to catch them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AvstoreError(Exception):
    """A failure told in three lines: what, why, what to type next."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.next = what, why, next

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.next) if line)

    def __reduce__(self) -> tuple[type[AvstoreError], tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.next)


class UsageError(AvstoreError, ValueError):
    """The call or command asks for something that cannot be."""

    exit_code = 2


class NotFoundError(AvstoreError, FileNotFoundError):
    """A file, store, run, video or name that is not there."""

    exit_code = 4


class ConflictError(AvstoreError):
    """What is asked differs from what is there: another spec, source, run or frame size; a locked store."""

    exit_code = 5


class CorruptError(AvstoreError, OSError):
    """Stored bytes that fail their checksum or contradict each other."""


class MachineError(AvstoreError, OSError):
    """The machine failed, not a file: full disk, vanished folder, I/O error. Nothing was committed."""


class ExtraMissingError(AvstoreError, ImportError):
    """A package of an optional extra is not installed."""


class InterruptedRun(AvstoreError):
    """Stopped by the user; the same command goes on from here."""

    exit_code = 130


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`did you mean X?` or the list of what there is; never empty unless there are no options."""
    options = sorted({str(o) for o in options})
    close = difflib.get_close_matches(str(word), options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there is: {', '.join(options)}" if options else ""
