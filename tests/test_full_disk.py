"""A disk that is really full: a small tmpfs, filled at different moments of an ingest, then given more room.

Needs the right to mount; skipped by name elsewhere, where injected faults (tests/test_ingest.py) stand for it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ingest_media import digest, write_wav

from avstore.errors import MachineError
from avstore.ingest import ingest
from avstore.verify import verify
from cli.main import invoke

HOW: dict[str, Any] = {"sample_rate": 8000, "front_ends": (), "shard_seconds": 16, "workers": 1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 40 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def test_it_stops_and_goes_on_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    """As the disk grows step by step, each run commits whole tasks or says that this disk is full; what is committed
    never changes, and in the end the bytes are those of an undisturbed run."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        write_wav(tmp_path / "in" / f"{i}.wav", 12, seed=i)
    ingest(tmp_path / "in", tmp_path / "whole.zarr", **HOW)
    want, store = digest(tmp_path / "whole.zarr"), disk / "s.zarr"
    size, stopped, committed = 40, 0, set[str]()
    while True:
        try:
            ingest(tmp_path / "in", store, **HOW)
            break
        except MachineError as e:
            stopped += 1
            assert str(disk) in str(e) and "full" in e.what and "free some space" in e.next, e
        have = digest(store)
        now = {name for name in have if name.startswith("commits/")}
        assert now >= committed and all(have[n] == want[n] for n in now)
        for name in now:
            assert have[f"waveform/c.{int(Path(name).stem)}"] == want[f"waveform/c.{int(Path(name).stem)}"]
        committed = now
        size += 60
        assert size < 3000
        resize(disk, size)
    assert stopped >= 4 and 0 < len(committed) < 4
    assert digest(store) == want and verify(store).ok and not list(store.rglob("*.tmp.*"))


def test_the_command_says_which_disk(disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", 12)
    words = ["ingest", tmp_path / "in", disk / "s.zarr", "--front-end", "none", "--workers", 1]
    assert invoke([str(w) for w in words]) == 1
    err = capfd.readouterr().err
    assert "the disk that holds" in err and "is full" in err and str(disk) in err, err
    assert "No space left on device" in err and "next: free some space" in err and "Traceback" not in err
    resize(disk, 4000)
    assert invoke([str(w) for w in words]) == 0
