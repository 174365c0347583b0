"""SIGKILL at any instant, then the same command again: the same bytes as without, and no temporary file left.

Real processes on real encoded media. The parent, a child or both are killed at instants that are drawn in time, in the
number of calls that change the disk (right before or right after the n-th), and, where strace is installed, in the
number of system calls of any kind. AVSTORE_CAMPAIGN=200 sets how many kills the slow campaign makes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ingest_media import digest, mixed

from avstore.verify import verify

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


def start(source: Path, store: Path, before: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SCRIPT.parent.parent), str(SCRIPT.parent)])
    return subprocess.Popen(
        [*(before or []), sys.executable, str(SCRIPT), str(source), str(store)],
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
    """Starts an ingest and kills at `instant` seconds; whether somebody was there to be killed."""
    process, killed = start(source, store), False
    try:
        process.wait(instant)
    except subprocess.TimeoutExpired:
        if whom == "parent":
            kill([process.pid])
        elif whom == "child":
            killed = bool(there := children(process.pid))
            kill(there[:1])
        else:
            kill([*children(process.pid), process.pid])
    _, err = process.communicate(timeout=600)
    assert process.returncode == (-9 if whom != "child" and process.returncode else 0), err
    return killed or process.returncode != 0


def check(source: Path, store: Path, want: dict[str, str]) -> None:
    finish(source, store)
    assert digest(store) == want
    assert not list(store.rglob("*.tmp.*"))
    assert verify(store).ok


# How a run is killed: what the instant is drawn in, and who dies.
WAYS = [
    ("time", "parent"), ("calls", "parent"), ("system calls", "parent"), ("time", "both"),
    ("system calls", "child"), ("calls", "both"), ("time", "child"),
]  # fmt: skip
SYSTEM_CALLS = 5000  # of the parent's main thread, and of a child after its start, about


def kill_one(source: Path, store: Path, way: tuple[str, str], rng: random.Random, seconds: float, calls: int) -> bool:
    """Starts an ingest and kills at an instant of this kind; whether somebody died of it."""
    how, whom = way
    strace = shutil.which("strace")
    if how == "time" or (strace is None and (how, whom) == ("system calls", "child")):
        return disturb(source, store, rng.uniform(0.1, seconds), whom)
    if how == "calls" or strace is None:
        both = {"DIE_BOTH": "1"} if whom == "both" else {}
        after = {"DIE_AFTER": "1"} if rng.random() < 0.5 else {}
        process = start(source, store, DIE_AT=str(rng.randrange(1, calls + 1)), **both, **after)
        _, err = process.communicate(timeout=600)
        assert process.returncode in (0, -9), err  # 0: a run that had less to do did not come so far
        return process.returncode == -9
    n, log = rng.randrange(1, SYSTEM_CALLS), store.with_suffix(".calls")
    inject = [strace, "-qq", "-o", str(log), "-e", f"inject=all:signal=SIGKILL:when={n}"]
    if whom == "parent":
        process = start(source, store, before=inject)
        _, err = process.communicate(timeout=600)
        assert process.returncode in (0, -9), err
        return process.returncode == -9
    process = start(source, store)
    while not (there := children(process.pid)) and process.poll() is None:
        time.sleep(0.005)
    if there:
        subprocess.run([*inject, "-p", str(rng.choice(there))], timeout=600, stderr=subprocess.DEVNULL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return log.is_file() and log.read_bytes().count(b"\n") >= n  # else it had less to do


def campaign(
    source: Path, folder: Path, undisturbed: tuple[dict[str, str], float, int], kills: int, seed: int
) -> Counter[str]:
    """Kills until so many have died, sometimes twice in a row; each time the repeated command must end with the same
    bytes, without temporary files, and `verify` finds nothing. Returns how often in which way."""
    want, seconds, calls = undisturbed
    rng, done, i = random.Random(seed), Counter[str](), 0
    while done.total() < kills:
        store = folder / f"{i}.zarr"
        for _ in range(rng.choice([1, 1, 1, 2])):
            way = WAYS[i % len(WAYS)]
            i += 1
            if kill_one(source, store, way, rng, seconds, calls):
                done[f"{way[1]} by {way[0]}"] += 1
        check(source, store, want)
        assert i < 20 + 4 * kills, done
        shutil.rmtree(store)
    return done


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
@pytest.mark.timeout(7200)
def test_many_instants(source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]) -> None:
    kills = int(os.environ.get("AVSTORE_CAMPAIGN", "20"))
    began = time.monotonic()
    done = campaign(source, tmp_path, undisturbed, kills, seed=11)
    print(f"{done.total()} kills in {time.monotonic() - began:.0f} s: {dict(done)}")
    assert len(done) >= 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_at_many_of_the_calls_that_change_the_disk(
    source: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], float, int]
) -> None:
    """Before or after every twentieth of the calls; AVSTORE_KILLS=1: of all of them."""
    want, _, calls = undisturbed
    every = int(os.environ.get("AVSTORE_KILLS", "20"))
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
