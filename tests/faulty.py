"""Faults for tests: a `sitecustomize` that makes a decoding child misbehave with files of certain names.

The child itself is the real one; only `open` of such a file is turned into a crash, a hang or a failing disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SITE = """
import builtins, os, signal, time
_open = builtins.open
def _faulty(file, *args, **kwargs):
    name = os.path.basename(os.fsdecode(file)) if isinstance(file, (str, bytes, os.PathLike)) else ""
    if "once" in name:
        mark = os.fsdecode(file) + ".mark"
        first = not os.path.exists(mark)
        if first:
            _open(mark, "w").close()
    else:
        first = True
    if first and "segv" in name: os.kill(os.getpid(), signal.SIGSEGV)
    if first and "killed" in name: os.kill(os.getpid(), signal.SIGKILL)
    if first and "leaves" in name: os._exit(7)
    if first and "spins" in name:
        while True: pass
    if first and "hangs" in name: time.sleep(1000)
    if first and "hungry" in name: bytearray(64 * 2**30)
    if first and "bad-disk" in name: raise OSError(5, "Input/output error")
    if first and "secret" in name: raise PermissionError(13, "Permission denied")
    if "slow" in name: time.sleep(0.3)
    if ".tmp." in name and args[:1] == ("wb",) and os.environ.get("FULL_DISK"):
        raise OSError(28, "No space left on device")
    return _open(file, *args, **kwargs)
builtins.open = _faulty
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children started from now on carry the faults."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
