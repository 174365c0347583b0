"""SIGKILL at any instant, then the same command again: the same bytes as without, and no temporary file left.

Real processes on real encoded media. The instants are drawn in time (parent, children, or both are killed), and in
the number of calls that change the disk (the process kills itself right before or right after the n-th).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ingest_media import digest, mixed

SCRIPT = Path(__file__).with_name("ingest_process.py")


@pytest.fixture(scope="module")
def source(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tiny_media, tmp_path_factory.mktemp("killed") / "media", clips=8)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float, int]:
    """Digest of the store, seconds that it took, and calls that change the disk."""
    store = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    began = time.monotonic()
    done = finish(source, store)
    return digest(store), time.monotonic() - began, int(done.split()[0])


def start(source: Path, store: Path, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SCRIPT.parent.parent), str(SCRIPT.parent)])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(source), str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def finish(source: Path, store: Path) -> str:
    process = start(source, store)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def children(pid: int) -> list[int]:
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            out += [int(c) for c in (task / "children").read_text().split()]
    return out


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disturb(source: Path, store: Path, instant: float, whom: str) -> bool:
    """Starts an ingest and kills at `instant` seconds; whether the parent was killed in time."""
    process = start(source, store)
    try:
        process.wait(instant)
    except subprocess.TimeoutExpired:
        if whom == "parent":
            kill([process.pid])
        elif whom == "child":
            kill(children(process.pid)[:1])
        else:
            kill([*children(process.pid), process.pid])
    _, err = process.communicate(timeout=600)
    assert process.returncode == (-9 if whom != "child" and process.returncode else 0), err
    return process.returncode != 0


def check(source: Path, store: Path, want: dict[str, str]) -> None:
    finish(source, store)
    assert digest(store) == want
    assert not list(store.rglob("*.tmp.*"))


def campaign(source: Path, folder: Path, undisturbed: tuple[dict[str, str], float, int], times: int, seed: int) -> int:
    want, seconds, _ = undisturbed
    rng, killed = random.Random(seed), 0
    for i in range(times):
        store = folder / f"{i}.zarr"
        whom = ("parent", "both", "child")[i % 3]
        killed += disturb(source, store, rng.uniform(0.1, seconds), whom)
        check(source, store, want)
    return killed


def test_some_random_instants(source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]) -> None:
    campaign(source, tmp_path, undisturbed, 3, seed=8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_again_and_again_it_still_ends_the_same(
    source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]
) -> None:
    want, seconds, _ = undisturbed
    rng = random.Random(9)
    for _ in range(6):
        disturb(source, tmp_path / "s.zarr", rng.uniform(0.3 * seconds, seconds), "parent")
    check(source, tmp_path / "s.zarr", want)


def at_call(source: Path, store: Path, n: int, after: bool, want: dict[str, str]) -> None:
    process = start(source, store, DIE_AT=str(n), **({"DIE_AFTER": "1"} if after else {}))
    _, err = process.communicate(timeout=600)
    assert process.returncode == -9, err
    check(source, store, want)


def test_at_some_of_the_calls_that_change_the_disk(
    source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]
) -> None:
    want, _, calls = undisturbed
    for n in sorted(random.Random(10).sample(range(1, calls + 1), 3)):
        at_call(source, tmp_path / f"{n}.zarr", n, bool(n % 2), want)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_many_random_instants(source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]) -> None:
    assert campaign(source, tmp_path, undisturbed, 20, seed=11) >= 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_at_many_of_the_calls_that_change_the_disk(
    source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]
) -> None:
    """Before or after every tenth of the calls; AVSTORE_KILLS=1: of all of them."""
    want, _, calls = undisturbed
    every = int(os.environ.get("AVSTORE_KILLS", "10"))
    for n in range(1 + random.Random(12).randrange(every), calls + 1, every):
        at_call(source, tmp_path / f"{n}.zarr", n, bool(n // every % 2), want)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_shares_beside_one_another_one_of_them_killed(
    source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]
) -> None:
    """Two real processes with --shard 0/2 and 1/2 at the same time: one store, the same bytes; one is killed and
    repeated while the other works."""
    want, seconds, _ = undisturbed
    store = tmp_path / "s.zarr"
    first, second = start(source, store, SHARD="0/2"), start(source, store, SHARD="1/2")
    with contextlib.suppress(subprocess.TimeoutExpired):
        second.wait(0.6 * seconds)
    kill([second.pid])
    second.communicate(timeout=600)
    again = start(source, store, SHARD="1/2")
    for process in (first, again):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    check(source, store, want)
