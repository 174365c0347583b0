"""What an ingest tells while it works: typed events, for a progress display or a log. No printing here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Listed:
    """The source was read: files to try, those of them that no plan has yet, and what was left out (path, why)."""

    files: int
    new: int
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class Waiting:
    """Another process plans for this store; this one waits."""

    holder: dict[str, str]


@dataclass(frozen=True)
class Probed:
    """One more video was probed."""

    done: int
    total: int


@dataclass(frozen=True)
class Planned:
    """A plan was written: its number, videos, tasks, and the seconds of media in it."""

    plan: int
    videos: int
    tasks: int
    seconds: int


@dataclass(frozen=True)
class Started:
    """Decoding begins: what is left to do, in videos, seconds of tape and tasks."""

    videos: int
    seconds: int
    tasks: int
    workers: int


@dataclass(frozen=True)
class VideoDone:
    """A video was decoded, or failed (`reason`, `message`), and handed to the writer. Not committed yet."""

    number: int
    key: str
    seconds: float
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class ChildDied:
    """A decoding child crashed or overran with this video."""

    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class TaskDone:
    """A task was committed: its number, the bytes it wrote, and the tasks that are left in this run."""

    task: int
    size: int
    left: int


@dataclass(frozen=True)
class Decoding:
    """Who decodes pictures, and why, where that was not simply asked for."""

    decoder: str
    why: str


Event = Decoding | Listed | Waiting | Probed | Planned | Started | VideoDone | ChildDied | TaskDone


@dataclass
class Summary:
    """How a store stands after an ingest. Counts are over keys: each counts by its latest number."""

    store: Path
    source: Path
    ok: int = 0
    failed: int = 0
    pending: int = 0  # left to the other processes of a `--shard i/n`
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, str | None]] = field(default_factory=list)  # key, reason, message
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path, why it was not tried
    changed: list[str] = field(default_factory=list)  # keys whose file has another size than when it was planned
    removed: list[str] = field(default_factory=list)  # keys whose file is gone from the source
    new: int = 0  # videos that this command planned
    done: int = 0  # videos that this command committed, ok or failed
    seconds: float = 0.0  # of media that this command decoded
    size: int = 0  # bytes of the shards that this command wrote
    wall: float = 0.0  # seconds that it took
    listed: str | None = None  # one line about the list that was the source: rows, found, missing (named in `skipped`)
    note: str | None = None  # one line that the user should read, e.g. that an audio store was made

    @property
    def exit_code(self) -> int:
        """0, or 3 while failed files remain."""
        return 3 if self.failed else 0
