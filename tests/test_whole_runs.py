"""Whole runs of every method, from media files to embeddings: on the demo set and on real media (GRID), with the stages
and teachers that a method asks for. The loss falls, features do not collapse, a run that stopped goes on to the bit.

Parametrised over METHODS, so that a new line is held to it without another test. Nets of four channels: minutes of
CPU for all; what is learned in earnest stands in docs/results.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_runs import two_equal_one
from test_methods import smaller
from tiny_run import differing, tensors

import avstore
from avstore.ingest import ingest
from avstore.store import Store
from trainers.config import RunConfig, resolve
from trainers.embed import embed_videos
from trainers.loop import train
from trainers.methods import METHODS
from trainers.metrics import read_metrics
from trainers.run import Run

pytestmark = pytest.mark.slow

STEPS, HALF = 24, 16
COMMON: dict[str, Any] = {
    "steps": STEPS, "batch": 8, "draws": 1, "fps": 8, "log_every": 1, "checkpoint_every": HALF // 2, "keep_last": 10,
    "learning_rate": 5e-3, "schedule": "constant", "warmup_steps": 0, "statistics_clips": 16, "in_process": True,
    "threads": 1, "precision": "fp32", "epochs": 12,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "temporal": {"snippets": 3, "hop": 0.25, "seconds": 0.5, "alternate": "step", "model_width": 8, "heads": 2,
                 "feed_forward": 16},
    "ccl": {"audio_dim": 32, "image_dim": 32},
    "listen-to-look": {"dim": 32, "kl_weight": 1.0},
    "xdc": {"round_epochs": 20, "clusters": 3},  # one round, so that its loss is of one task
    # a covariance, and distances in pairs: of 8 clips they are mostly noise (measured: no trend in 24 steps)
    "barlow-twins": {"batch": 16, "drop_last": True},
    "avts": {"batch": 16, "drop_last": True},
    "sscl-stage-1": {"epochs": 40, "teacher_epochs": 1},
    "sscl": {"epochs": 40, "teacher_epochs": 1},
}  # fmt: skip
# What falls, where the loss is of other terms from epoch to epoch: who learns in all of the run; what is reconstructed.
FALLS = {"sscl": "audio_uni", "temporal": "reconstruction"}
FROM = {"xdc": 1, "sscl-stage-1": 1}  # the epoch from which the loss is of one task: before, clusters and teacher alone


def config(name: str, teacher: Path | None = None) -> RunConfig:
    """The tiny preset, smaller; with the teacher that it asks for."""
    made = smaller(resolve(name, preset="tiny"))
    given = COMMON | OWN.get(name, {})
    given |= {key: str(teacher) for key in ("teacher", "audio_teacher", "image_teacher") if key in made.values()}
    return made.replace(**{k: v for k, v in given.items() if k in made.values()})


class Runs:
    """The finished runs of a store, each made once: stages and teachers are shared."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store

    def config(self, name: str) -> RunConfig:
        teaches = METHODS[name].load().teachers is not None
        return config(name, self.get("avid").path if teaches else None)

    def init(self, name: str) -> Path | None:
        stage = METHODS[name].stage
        return None if stage is None else self.get(stage).path

    def get(self, name: str) -> Run:
        path = self.folder / name
        if path.is_dir() and Run(path).finished:
            return Run(path)
        return train(name, self.store, self.config(name), path, init=self.init(name)).run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> Runs:
    folder = tmp_path_factory.mktemp("demo")
    ingest(tiny_media, folder / "demo.zarr", size=(48, 64), fps=8)
    return Runs(folder / "runs", avstore.open(folder / "demo.zarr"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Runs:
    """Five speakers with four sentences each: MPEG program streams, 360 x 288 at 25 pictures a second."""
    folder = tmp_path_factory.mktemp("grid")
    for speaker in sorted((shared / "grid").iterdir()):
        (folder / "media" / speaker.name).mkdir(parents=True)
        for file in sorted(speaker.glob("*.mpg"))[:4]:
            (folder / "media" / speaker.name / file.name).symlink_to(file.resolve())
    ingest(folder / "media", folder / "grid.zarr", size=(48, 64), fps=8)
    store = avstore.open(folder / "grid.zarr")
    assert len(store.numbers) == 20
    return Runs(folder / "runs", store)


def whole(runs: Runs, name: str, folder: Path) -> None:
    run = runs.get(name)
    lines = read_metrics(run.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and run.finished

    falls = FALLS.get(name, "loss")
    told = [line[falls] for line in lines if falls in line and line["epoch"] >= FROM.get(name, 0)]
    third = len(told) // 3  # "falls": the mean of its last third lies below that of its first
    assert third >= 3 and np.mean(told[-third:]) < np.mean(told[:third]), told

    for key in (k for k in lines[-1] if "std" in k):
        assert min(line[key] for line in lines[-third:] if key in line) > 0.05, f"{key} collapsed"

    shutil.copytree(run.path, folder / name)
    shutil.rmtree(folder / name / "checkpoints" / f"step-{STEPS:06d}")
    again = train(name, runs.store, runs.config(name), folder / name, init=runs.init(name))
    assert again.step == STEPS and not again.repeated
    assert not differing(tensors(run), tensors(again.run))
    assert differing(tensors(run, HALF), tensors(run)), "nothing was learned"

    few = runs.store.numbers[:3]
    found = embed_videos(run.load(), run, runs.store, few)
    assert found, "no towers"
    for tower, (vectors, _, _) in found.items():
        assert np.isfinite(vectors).all() and vectors.std(0).max() > 0.01, f"{tower} says the same of every second"


@pytest.mark.parametrize("name", METHODS)
def test_on_the_demo_set(name: str, demo: Runs, tmp_path: Path) -> None:
    whole(demo, name, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_on_grid(name: str, grid: Runs, tmp_path: Path) -> None:
    whole(grid, name, tmp_path)


# ---- two processes: the methods whose own file asks only for their relative ---------------------------------------


def cases() -> dict[str, tuple[Any, int, int]]:
    """For `two_equal_one`. The others are in the tests of their files: a test below holds that none is missing."""
    made = resolve("avid-softmax", preset="tiny").method
    small = replace(made, width=4, hidden=8, dim=8, head_batch_norm=False, temperature=0.3, negatives=6, frames=2,
                    size=16, batch=6)  # fmt: skip
    make: Callable[..., Any] = METHODS["avid-softmax"].load().make
    return {"softmax": (make(small, 40), 1, 2)}


def test_two_processes_are_one(tmp_path: Path) -> None:
    two_equal_one("test_whole_runs", tmp_path)


def test_every_method_is_held_to_equal_one_process() -> None:
    """The classes in all `cases()`, which their files' tests run; AVID and AVID-CMA are in test_avid_cma's."""
    import test_avcl
    import test_ccl
    import test_crisscross
    import test_listen_to_look
    import test_rivals
    import test_sscl
    import test_temporal

    files = (test_avcl, test_ccl, test_crisscross, test_listen_to_look, test_rivals, test_sscl, test_temporal)
    held = {"Avid", "AvidCma"}
    for made in (cases(), *(file.cases() for file in files)):
        for method, _, _ in made.values():
            held |= {kind.__name__ for kind in type(method).__mro__}
    missed = [name for name, line in METHODS.items() if line.load().make.__name__ not in held]
    assert not missed, f"no test of two processes has {missed}"
