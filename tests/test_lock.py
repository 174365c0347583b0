"""The lock: who is refused, who waits, what a killed holder leaves. Real processes, real flock."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avstore.errors import ConflictError, MachineError
from avstore.lock import StoreLock, filesystem_of, require_locks

HOLD = """
import sys, time
from pathlib import Path
from avstore.lock import StoreLock
lock = StoreLock(Path(sys.argv[1]))
lock.exclusive(sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""


def holder(root: Path, doing: str = "ingest") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root), doing], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with StoreLock(tmp_path) as lock:
            with pytest.raises(ConflictError) as e:
                lock.exclusive()
            assert str(process.pid) in e.value.what and socket.gethostname() in e.value.what
            assert e.value.exit_code == 5
            with pytest.raises(ConflictError):
                lock.shared(wait=lambda: pytest.fail("an ingest is not waited for"))
    finally:
        end(process)
    with StoreLock(tmp_path) as lock:  # killed, not released: the kernel let go, and the stale words do not matter
        lock.exclusive()
        assert lock.holder()["pid"] == str(os.getpid())


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with StoreLock(tmp_path) as first, StoreLock(tmp_path) as second:
        first.exclusive()
        with pytest.raises(ConflictError, match=str(os.getpid())):
            second.exclusive()
        assert not second.try_exclusive()
        first.close()
        assert second.try_exclusive()


def test_shared_holders_share_and_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    with StoreLock(tmp_path) as a, StoreLock(tmp_path) as b, StoreLock(tmp_path) as c:
        a.exclusive("planning")
        a.shared()
        b.shared()
        assert not c.try_exclusive()
        a.close()
        assert not c.try_exclusive()
        assert b.try_exclusive()  # the last one may turn its shared lock into an exclusive one


def test_planning_is_waited_for(tmp_path: Path) -> None:
    process = holder(tmp_path, "planning")
    waited = []

    def wait() -> None:
        waited.append(time.monotonic())
        if len(waited) == 3:
            end(process)

    with StoreLock(tmp_path) as lock:
        lock.shared(wait)
        assert lock.mode == "shared" and len(waited) >= 3


def test_the_trial_passes_here_and_leaves_nothing(tmp_path: Path) -> None:
    require_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["flock", "flock that lets everyone in", "link"])
def test_a_filesystem_without_locks_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if broken == "link":
        monkeypatch.setattr(os, "link", fail)
    else:
        monkeypatch.setattr(fcntl, "flock", fail if broken == "flock" else lambda *_: None)
    with pytest.raises(MachineError) as e:
        require_locks(tmp_path)
    assert filesystem_of(tmp_path) in e.value.what and broken.split()[0] in e.value.why
    assert list(tmp_path.iterdir()) == []


def test_the_filesystem_has_a_name(tmp_path: Path) -> None:
    kind, _, mount = filesystem_of(tmp_path).partition(" at ")
    assert kind and os.path.ismount(mount)
