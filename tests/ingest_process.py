"""An ingest in a process of its own, for tests that kill it: `python ingest_process.py SOURCE STORE`.

SHARD=i/n: only this share. DIE_AT=n: the process kills itself (SIGKILL) right before the n-th call that changes the
disk; DIE_AFTER=1: right after; DIE_BOTH=1: its decoding children too, before itself.
Prints the number of such calls at the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from avstore.ingest import ingest

CALLS = ("open", "fsync", "rename", "link", "unlink", "mkdir", "ftruncate", "rmdir")
OPTIONS: dict[str, Any] = {
    "size": (32, 48),
    "fps": 8,
    "sample_rate": 8000,
    "front_ends": ("crisscross-mel80",) if os.environ.get("FRONT_END") else (),
    "shard_seconds": 8,
}


def main() -> None:
    count, at = 0, int(os.environ.get("DIE_AT", "0"))
    after = bool(os.environ.get("DIE_AFTER"))

    def die() -> None:
        if os.environ.get("DIE_BOTH"):
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                die()
            try:
                return real(*args, **kwargs)
            finally:
                if count == at:
                    die()

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    share = tuple(int(n) for n in os.environ["SHARD"].split("/")) if os.environ.get("SHARD") else None
    workers = int(os.environ.get("WORKERS", "2"))
    summary = ingest(sys.argv[1], sys.argv[2], workers=workers, shard=share, **OPTIONS)  # type: ignore[arg-type]
    print(count, summary.ok, summary.failed)


if __name__ == "__main__":
    main()
