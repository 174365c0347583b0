"""A derive in a process of its own, for tests that kill it: `python derive_process.py STORE FRONT_END`.

DIE_AT=n: it kills itself (SIGKILL) right before the n-th call that changes the disk. Prints the number of such calls.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from avstore.derive import derive


def main() -> None:
    count, at = 0, int(os.environ.get("DIE_AT", "0"))

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    import torch  # noqa: F401  (its own files are none of ours)

    for name in ("fsync", "rename", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    derive(sys.argv[1], sys.argv[2], workers=1)
    print(count)


if __name__ == "__main__":
    main()
