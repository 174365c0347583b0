"""The loop: its schedule and counters, what it refuses, what it saves, and the stages of a method."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import config, differing, store_in, tensors
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.errors import AvstoreError, ConflictError, InterruptedRun, UsageError
from avstore.frontends import named, spectrogram
from avstore.store import Store
from trainers import data, fit
from trainers.avid import Avid
from trainers.config import TrainConfig, resolve
from trainers.events import Event
from trainers.loop import train, train_with_stages
from trainers.metrics import read_metrics
from trainers.optimiser import learning_rate_at
from trainers.run import OpenRun, Run
from trainers.snapshot import measure_statistics, take_snapshot


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("loop"))


def test_the_schedule_is_a_function_of_the_step() -> None:
    cosine = TrainConfig(learning_rate=1.0, schedule="cosine", warmup_steps=3)
    got = [learning_rate_at(s, 11, 5, cosine) for s in (0, 1, 2, 3, 7, 11)]
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5, 0.0])
    steps = TrainConfig(learning_rate=2.0, schedule="multistep", milestones=(2, 4), decay=0.1)
    assert [learning_rate_at(s, 50, 5, steps) for s in (9, 10, 19, 20)] == pytest.approx([2.0, 0.2, 0.2, 0.02])
    assert learning_rate_at(10**6, 11, 5, TrainConfig(learning_rate=0.3)) == 0.3


def test_a_run_from_beginning_to_end(store: Store, tmp_path: Path) -> None:
    events: list[Event] = []
    c = config("keep_every=2", "checkpoint_every=2", "keep_last=1")
    result = train("avid", store, c, tmp_path / "avid", on_event=events.append)
    # 10 videos of the train split in batches of 6: two steps an epoch, three epochs
    assert (result.step, result.total, result.repeated) == (6, 6, False)
    run = result.run
    assert run.finished and [x.step for x in run.checkpoints()] == [2, 4, 6]
    assert len(run.snapshot.numbers) == 10 and "without 2 held-out videos (split test/val)" in run.snapshot.notes
    lines = read_metrics(run.path / "metrics.jsonl")
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6] and [x["epoch"] for x in lines] == [0, 0, 1, 1, 2, 2]
    for line in lines:
        assert line["loss"] > 0 and math.isfinite(line["grad_norm"])
        assert {"lr", "data_wait_s", "compute_s", "prepare_s", "clips_per_s", "video_to_audio"} <= line.keys()
    assert lines[0]["lr"] == pytest.approx(0.002 / 3)
    assert [e.kind for e in events].count("step") == 6 and events[-1].kind == "finished"
    assert run.snapshot.fingerprint == store.fingerprint and run.config.values()["size"] == 32

    before = tensors(run)
    again: list[Event] = []
    repeated = train("avid", store, c, tmp_path / "avid", on_event=again.append)
    assert repeated.repeated and again[-1].kind == "nothing-to-do"
    assert not differing(before, tensors(run))


@pytest.mark.parametrize(
    ("sets", "written", "told"),
    # two steps an epoch; then three parts an epoch of which a step takes two: epoch 1 begins within step 2
    [((), [1, 2, 4, 5, 6], {1: 0, 5: 2}),
     (("accumulate=2", "batch=6", "drop_last=true", "steps=4"), [1, 2, 3, 4], {1: 0, 4: 2})],
)
def test_epochs_are_logged_whatever_the_interval(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], written: list[int],
    told: dict[int, int],
) -> None:  # fmt: skip
    """What `start_epoch` tells stands in its step's line, in a run that was stopped too; no line is there twice."""
    monkeypatch.setattr(Avid, "start_epoch", lambda self, epoch: {} if epoch == 1 else {"number": float(epoch)})
    c = config("log_every=100", "checkpoint_every=1", "keep_last=9", *sets)
    run = train("avid", store, c, tmp_path / "whole").run

    def lines(path: Path) -> dict[int, Any]:
        found = read_metrics(path / "metrics.jsonl")
        assert len({x["step"] for x in found}) == len(found)
        return {x["step"]: x for x in found}

    assert list(lines(run.path)) == written
    assert {step: x["epoch/number"] for step, x in lines(run.path).items() if "epoch/number" in x} == told
    for step in (5, 4, 3, 2):  # as if it had been killed after an earlier checkpoint
        shutil.copytree(run.path, tmp_path / f"from-{step}")
        for later in run.checkpoints():
            if later.step >= step:
                shutil.rmtree(tmp_path / f"from-{step}" / "checkpoints" / later.path.name)
        again = lines(train("avid", store, c, tmp_path / f"from-{step}").run.path)
        assert {k: x["loss"] for k, x in again.items() if k in written} == {
            k: x["loss"] for k, x in lines(run.path).items()
        }
        assert told.items() <= {k: x["epoch/number"] for k, x in again.items() if "epoch/number" in x}.items()


def test_another_configuration_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    train("avid", store, config("steps=1"), tmp_path / "avid")
    with pytest.raises(ConflictError, match=r"temperature is 0\.07 there, 0\.5 was asked") as e:
        train("avid", store, config("steps=1", "temperature=0.5"), tmp_path / "avid")
    assert e.value.exit_code == 5
    with pytest.raises(ConflictError, match="another selection"):
        train("avid", store, config("steps=1"), tmp_path / "avid", where=["label=a"])
    assert train("avid", store, config("steps=1", "log_every=3"), tmp_path / "avid").repeated  # changes no number
    other = store_in(tmp_path, fps=8)
    with pytest.raises(ConflictError, match="another store"):
        train("avid", other, config("steps=1"), tmp_path / "avid")


def test_two_trainings_in_one_folder(store: Store, tmp_path: Path) -> None:
    with OpenRun(tmp_path / "avid"), pytest.raises(ConflictError, match="is being trained"):
        train("avid", store, config("steps=1"), tmp_path / "avid")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_it_stops_at_what_is_not_finite(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    honest, calls = Avid.step, []

    def step(self: Avid, batch: Any) -> Any:
        loss, metrics = honest(self, batch)
        calls.append(1)
        if len(calls) == 3:
            weight = next(self.parameters())
            # sqrt at 0: a finite value with an infinite gradient
            bad = loss * torch.nan if where == "loss" else loss + (weight.sum() * 0).sqrt()
            return bad, metrics
        return loss, metrics

    c = config("checkpoint_every=2")
    monkeypatch.setattr(Avid, "step", step)
    with pytest.raises(AvstoreError, match=f"step 3: the {where} is not finite") as e:
        train("avid", store, c, tmp_path / "avid")
    assert "learning_rate" in e.value.next and "step 2 is as it was" in e.value.why
    run = Run(tmp_path / "avid")
    assert [x.step for x in run.checkpoints()] == [2]
    assert len(read_metrics(run.path / "metrics.jsonl")) == 2
    monkeypatch.undo()
    assert train("avid", store, c, tmp_path / "avid").step == 6  # and goes on from there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_goes_on(store: Store, tmp_path: Path, number: int) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(InterruptedRun, match="stopped at step 3 of 6") as e:
        train("avid", store, config(), tmp_path / "cut", on_event=interrupt)
    assert e.value.exit_code == 130 and signal.getsignal(number) == before
    assert Run(tmp_path / "cut").checkpoint().step == 3
    train("avid", store, config(), tmp_path / "cut")
    whole = train("avid", store, config(), tmp_path / "whole")
    assert not differing(tensors(whole.run), tensors(Run(tmp_path / "cut")))  # to the bit


def test_threads_other_than_the_main_one_train_too(store: Store, tmp_path: Path) -> None:
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(train("avid", store, config("steps=1"), tmp_path / "a")))
    thread.start()
    thread.join()
    assert out and out[0].step == 1


def test_training_leaves_the_random_state_alone(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train("avid", store, config("steps=1", "threads=2"), tmp_path / "avid")
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_accumulation_sees_every_clip_once(store: Store, tmp_path: Path) -> None:
    c = config("accumulate=2", "batch=4", "steps=5")
    run = train("avid", store, c, tmp_path / "avid").run
    lines = read_metrics(run.path / "metrics.jsonl")
    assert [x["samples"] for x in lines] == [4] * 5 and [x["epoch"] for x in lines] == [
        0,
        0,
        1,
        1,
        1,
    ]  # of a step's last part
    with pytest.raises(UsageError, match="does not divide"):
        config("accumulate=4", "batch=6")


def test_the_bank_is_the_selection(store: Store, tmp_path: Path) -> None:
    run = train("avid", store, config("steps=2"), tmp_path / "avid", where=["label=a"]).run
    saved = tensors(run)
    assert saved["method.safetensors:bank.memory"].shape == (5, 2, 8)
    assert bool(saved["method.safetensors:bank.seen"].all())
    assert [store.key(int(n)) for n in run.snapshot.numbers] == ["000.mp4", "002.mp4", "004.mp4", "006.mp4", "008.mp4"]


def test_a_stage_trains_its_own_stage_first(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """temporal starts from avid-cma, which starts from avid; what was said to the middle one reaches the first."""
    called = []

    def heard(name: str, store: Store, config: Any, run: Path, **rest: Any) -> None:
        init = rest.get("init")
        called.append((name, Path(run).name, None if init is None else Path(init).name, config.values()["width"]))

    monkeypatch.setattr("trainers.loop.train", heard)
    stage = resolve("avid-cma", preset="tiny", sets=["width=8"])
    train_with_stages("temporal", store, resolve("temporal", preset="tiny"), tmp_path / "mine", stage_config=stage)
    assert called == [
        ("avid", "avid", None, 8),
        ("avid-cma", "avid-cma", "avid", 8),
        ("temporal", "mine", "avid-cma", 16),
    ]


def test_avid_cma_trains_its_stage_first(store: Store, tmp_path: Path) -> None:
    c, stage = config("steps=2", name="avid-cma"), config("steps=2")
    kinds: list[str] = []

    def hear(event: Event) -> None:
        if event.kind in ("stage", "start", "finished", "nothing-to-do"):
            kinds.append(f"{event.kind} {event.method}")

    result = train_with_stages("avid-cma", store, c, tmp_path / "avid-cma", stage_config=stage, on_event=hear)
    assert kinds == ["stage avid", "start avid", "finished avid", "start avid-cma", "finished avid-cma"]
    before = Run(tmp_path / "avid")
    init = result.run.snapshot.init
    assert init == {
        "run": "avid", "step": 2, "checkpoint": before.checkpoint().digest, "config": before.config.digest,
    }  # fmt: skip
    assert result.run.snapshot.statistics == before.snapshot.statistics
    first = read_metrics(result.run.path / "metrics.jsonl")[0]
    assert first["epoch/positives/certified"] + first["epoch/positives/left_out"] > 0
    kinds.clear()
    assert train_with_stages("avid-cma", store, c, tmp_path / "avid-cma", stage_config=stage, on_event=hear).repeated
    assert kinds == ["stage avid", "nothing-to-do avid", "nothing-to-do avid-cma"]

    with pytest.raises(ConflictError, match="another selection") as e:  # its own stage, in its own folder
        train_with_stages("avid-cma", store, c, tmp_path / "avid-cma", stage_config=stage, where=["label=a"])
    assert f"--init {before.path}" in str(e.value)  # `test_memory.py`: from there it may be another
    with pytest.raises(ConflictError, match="--init"):
        train_with_stages("avid-cma", store, c, tmp_path / "avid-cma", stage_config=config("steps=3"))
    with pytest.raises(UsageError, match="random weights"):
        train_with_stages("avid", store, stage, tmp_path / "avid", init=before.path)


# ---- does the store serve the method ----------------------------------------------------------------------------


def test_the_frame_size_follows_the_store_unless_the_preset_insists(store: Store) -> None:
    fitted, notes = fit.fit(resolve("avid"), store)  # 224 asked of 64 lines
    assert fitted.method.size == fitted.values()["size"] == 48 and "48 pixels instead of 224" in notes[0]
    for asked in (resolve("avid", preset="paper"), resolve("avid", sets=["size=224"])):
        with pytest.raises(ConflictError, match="--profile 224"):
            fit.fit(asked, store)
    assert fit.largest_size(128) == 112 and fit.largest_size(256) == 224


def test_rates_sound_and_labels_that_the_store_lacks(tmp_path: Path) -> None:
    slow = avstore.open(make_store(tmp_path / "slow.zarr", [Tiny(2.0)], default_spec(fps=8, sample_rate=24000)))
    fitted, notes = fit.fit(resolve("avid"), slow)
    assert fitted.method.fps == 8 and any("8 frames a second instead of 16" in n for n in notes)
    with pytest.raises(ConflictError, match="--fps 16"):
        fit.fit(resolve("avid", sets=["fps=16"]), slow)
    dull = avstore.open(make_store(tmp_path / "dull.zarr", [Tiny(2.0)], default_spec(sample_rate=8000)))
    with pytest.raises(ConflictError, match="--sample-rate 24000"):
        fit.fit(resolve("avid"), dull)
    blind = avstore.open(
        make_store(tmp_path / "blind.zarr", [Tiny(2.0, picture=False)], default_spec(picture=False, sample_rate=24000))
    )
    with pytest.raises(ConflictError, match="needs pictures"):
        fit.fit(resolve("avid"), blind)


def test_videos_without_sound_are_dropped_and_counted(tmp_path: Path) -> None:
    videos = [Tiny(2.0, sound=None if i == 1 else -1.0, picture=i != 2) for i in range(5)]
    some = avstore.open(make_store(tmp_path / "some.zarr", videos, default_spec(sample_rate=24000)))
    snapshot = take_snapshot(some, config())
    assert snapshot.numbers.tolist() == [0, 3, 4]
    assert set(snapshot.notes) == {"without 1 videos that have no sound", "without 1 videos that have no picture"}


def test_statistics_are_of_the_selection_s_sound(store: Store) -> None:
    """Against all rows of the one video at once: with a window as long as the video every draw is the video."""
    one = np.array([1])
    got = measure_statistics(store, one, "avid-linear129", 2.0, 3, seed=4)
    wave, _ = store.waveform(1)
    rows = spectrogram(torch.from_numpy(wave), "avid-linear129", 24000).numpy().astype(np.float64)
    assert got["rows"] == 3 * len(rows) and got["hash"] == named("avid-linear129").hash
    np.testing.assert_allclose(got["mean"], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["std"], np.maximum(rows.std(0) + 1e-5, 0.1), rtol=1e-4)


def test_batches_are_normalised_and_blanks_are_zero(tmp_path: Path) -> None:
    """A method that takes videos without sound gets zeros and a mask, never NaN."""
    videos = [Tiny(2.0, sound=None if i % 2 else -1.0) for i in range(6)]
    some = avstore.open(make_store(tmp_path / "some.zarr", videos, default_spec(sample_rate=24000)))
    c = config("batch=6", "sound_gain=0")
    snapshot = take_snapshot(some, c)
    everyone = snapshot.__class__(**{**snapshot.__dict__, "numbers": np.arange(6)})
    plan = data.Plan(6, c)
    feed = data.Feed(some, everyone, c, torch.device("cpu"), plan)
    fed = next(feed)
    feed.close()
    b = fed.batch
    assert b.video is not None and b.audio is not None
    assert b.video.shape == (6, 3, 4, 32, 32) and b.audio.shape == (6, 1, 25, 129) and fed.clips == 6
    assert b.has_sound.tolist() == [int(r) % 2 == 0 for r in b.row]
    assert bool((b.audio[~b.has_sound] == 0).all()) and bool(b.audio[b.has_sound].abs().sum() > 0)
    assert bool(torch.isfinite(b.audio).all()) and bool(torch.isfinite(b.video).all())
    assert b.position.tolist() == list(range(6)) and sorted(b.row.tolist()) == list(range(6))
