"""Kill a training at any moment: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import config, differing, store_in, tensors

from avstore.store import Store
from trainers.loop import train
from trainers.run import Run

CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import avstore
from tiny_run import config
from trainers.loop import train
train("avid", avstore.open({store!r}), config({sets}), {run!r})
"""
SETS = ("checkpoint_every=2", "steps=400", "keep_last=1000", "schedule=constant")


def start(store: Store, run: Path, sets: tuple[str, ...]) -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve().parent
    code = CHILD.format(
        tests=str(here), root=str(here.parent), store=str(store.path), run=str(run), sets=", ".join(map(repr, sets))
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_after(child: subprocess.Popen[bytes], run: Path, step: int, delay: float, patience: float = 240) -> None:
    """SIGKILL `delay` seconds after the checkpoint of `step` is there."""
    end = time.monotonic() + patience
    while not (run / "checkpoints" / f"step-{step:06d}").is_dir():
        assert child.poll() is None, "the training ended by itself"
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.005)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_killed_and_repeated_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    kill_after(start(store, tmp_path / "killed", SETS), tmp_path / "killed", 4, 0.05)
    reached = Run(tmp_path / "killed").checkpoint().step
    assert 4 <= reached < 400
    # `steps` is part of the configuration, so the whole run is compared step by step instead of at its end
    total = reached + 4
    again = start(store, tmp_path / "killed", SETS)
    kill_after(again, tmp_path / "killed", total, 0.0)
    assert not list((tmp_path / "killed" / "checkpoints").glob("step-*/.*"))
    whole = start(store, tmp_path / "whole", SETS)
    kill_after(whole, tmp_path / "whole", total, 0.0)
    for step in (reached, reached + 2, total):
        assert not differing(tensors(Run(tmp_path / "killed"), step), tensors(Run(tmp_path / "whole"), step)), step


@pytest.mark.slow
def test_killed_at_ten_random_instants(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    sets = ("checkpoint_every=1", "steps=60", "keep_last=3")
    rng, reached = random.Random(0), 0
    for _ in range(10):
        child = start(store, tmp_path / "killed", sets)
        kill_after(child, tmp_path / "killed", min(reached + 1, 59), rng.uniform(0, 0.3))
        reached = Run(tmp_path / "killed").checkpoint().step
        if reached >= 55:
            break
    sure = train("avid", store, config(*sets), tmp_path / "killed")
    whole = train("avid", store, config(*sets), tmp_path / "whole")
    assert sure.step == whole.step == 60
    assert not differing(tensors(sure.run), tensors(whole.run))


def test_the_reader_process_gives_the_same_run(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    beside = train("avid", store, config("steps=3", "in_process=false"), tmp_path / "beside")
    inside = train("avid", store, config("steps=3", "in_process=true", "decode_threads=3"), tmp_path / "inside")
    assert not differing(tensors(beside.run), tensors(inside.run))
