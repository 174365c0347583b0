"""Two processes under torchrun, gloo: their loaders' slices are disjoint, complete, and the same in every run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_store import Tiny, make_store

SCRIPT = """
import hashlib, json, sys
import torch.distributed as dist
from avstore.loader import Loader
from avstore.sampler import Order
from avstore.views import AvidView

dist.init_process_group("gloo")
world, rank = dist.get_world_size(), dist.get_rank()
order = Order({videos}, 2, seed=3, batch_size=4, world=world, rank=rank)
mine = []
with Loader({store!r}, None, AvidView(1000), order=order, frames=4, fps=16, samples=1600) as loader:
    for batch in loader.epoch(1, start={start}):
        sums = [hashlib.sha256(f.tobytes() + w.tobytes()).hexdigest()[:12]
                for f, w in zip(batch.frames, batch.waveform)]
        mine.append([batch.step, batch.position.tolist(), batch.row.tolist(), batch.draw.tolist(), sums])
every = [None] * world
dist.all_gather_object(every, mine)
if rank == 0:
    with open({out!r}, "w") as f:
        json.dump(every, f)
dist.barrier()
dist.destroy_process_group()
"""
VIDEOS = 11


def ranks(store: Path, folder: Path, world: int, start: int = 0) -> list[list[list]]:
    """What each of `world` processes got."""
    folder.mkdir(exist_ok=True)
    script, out = folder / "slices.py", folder / f"out-{world}-{start}.json"
    script.write_text(SCRIPT.format(store=str(store), videos=VIDEOS, out=str(out), start=start))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(script)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_gloo_processes_see_disjoint_complete_slices(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", [Tiny(2.0 + i % 3) for i in range(VIDEOS)])
    two = ranks(store, tmp_path / "a", 2)
    pairs = [(v, d) for rank in two for _, _, rows, draws, _ in rank for v, d in zip(rows, draws, strict=True)]
    assert sorted(pairs) == [(v, d) for v in range(VIDEOS) for d in range(2)]  # complete, and no pair twice
    one = ranks(store, tmp_path / "b", 1)[0]
    steps = [[x + y for x, y in zip(a[1:], b[1:], strict=True)] for a, b in zip(*two, strict=True)]
    assert [s[1:] for s in one] == steps  # the same global order, pixels and sound as one process
    again = ranks(store, tmp_path / "c", 2, start=3)
    assert again == [rank[3:] for rank in two]  # deterministic, and the same remainder after a resume
