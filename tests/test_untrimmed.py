"""Moments of long videos: selectors by hand, and a preview that finds the one moment that tells the class."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_run import config, store_in

from avstore.errors import UsageError
from benchmarks import untrimmed
from benchmarks.probing import Part
from cli.main import invoke
from trainers import embed, preview
from trainers.loop import train


def test_selectors_by_hand():
    assert untrimmed.uniform(10, 2).tolist() == [2, 7]
    assert untrimmed.uniform(3, 10).tolist() == [0, 1, 2]
    assert untrimmed.first(5, 3).tolist() == [0, 1, 2]
    one, more = untrimmed.drawn(20, 3, 7, 0), untrimmed.drawn(20, 5, 7, 0)
    assert len(set(more.tolist())) == 5 and more[:3].tolist() == one.tolist()
    assert untrimmed.drawn(20, 5, 8, 0).tolist() != more.tolist()


def planted(videos: int = 90, length: int = 12) -> tuple[list[np.ndarray], np.ndarray]:
    """One moment of each video tells its class, and is loud in a feature of its own; all others are noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(videos) % 3
    features = []
    for y in labels:
        x = rng.normal(size=(length, 8)).astype(np.float32) * 0.3
        at = rng.integers(length)
        x[at, y] += 3
        x[at, 7] += 4
        features.append(x)
    return features, labels


def test_a_preview_finds_what_chance_misses():
    features, labels = planted()
    part = Part("half", np.arange(0, 60), np.arange(60, 90))
    recipe = preview.PreviewConfig(
        steps=2, hidden=32, dim=16, learning_rate=0.3, classifier_rate=1.0, batch=20, epochs=80, milestones=(60,)
    )

    def select(x, y):
        return preview.fit(x, y, 3, (8,), config=recipe).choose

    rows = untrimmed.evaluate(features, labels, [part], select, classes=3, budgets=(1, 12), random_draws=5)
    found = {(r["selector"], r["moments"]): r for r in rows}
    learned, random = found["learned preview", 1], found["random", 1]
    assert learned["top-1"] > random["top-1"] + 0.2 and learned["mAP"] > random["mAP"]
    assert learned["cost"] == random["cost"] == 1
    whole = {r["top-1"] for r in rows if r["moments"] in (12, "all")}
    assert len(whole) == 1  # who sees everything sees the same
    with pytest.raises(UsageError, match="budgets"):
        untrimmed.evaluate(features, labels, [part], select, classes=3, budgets=(0,))


def test_on_the_command_line(tmp_path, capsys):
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    asked = ["bench", "untrimmed", str(store.path), "--folds", "2", "--budget", "1", "--epochs", "1", "--json"]
    assert invoke(asked) in (2, 4)  # nothing is embedded yet
    capsys.readouterr()
    embed.embed(run, store)
    assert invoke(asked) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["selector"] for r in rows} == {"learned preview", "random", "uniform", "first", "all"}
    other = train("avid", store, config("steps=2", "learning_rate=0.1"), tmp_path / "runs" / "other").run
    embed.embed(other, store)
    assert invoke([*asked, "--run", "mine", "--run", "other", "--seeds", "2"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {(r["run"], r["of"]) for r in table["rows"]} == {("mine", 4), ("other", 4)}
    assert any(n.startswith("1 moments, learned preview: mine - other") and "over 4 parts" in n for n in table["notes"])
    assert any(n.startswith("mine, 1 moments: learned preview - uniform") for n in table["notes"])
    one = [a for a in asked if a not in ("--folds", "2")]
    for words, told in ((["--split", "split9", "--run", "mine"], "no column"), (["--run", "nobody"], "no embeddings"),
                        (["--budget", "0", "--run", "mine"], "budgets"), (["--all-checkpoints"], "no run is named"),
                        (["--seeds", "0", "--run", "mine"], "0 seeds"), ([], "embeddings of 2 runs")):  # fmt: skip
        assert invoke([*one, *words]) in (2, 4), words
        assert told in capsys.readouterr().err


def test_what_networks_give_now_is_what_is_stored(tmp_path):
    """Moments joined over towers: zeros where sound is missing; the same from a checkpoint as from the store."""
    x = (np.array([[1.0], [2.0], [3.0]]), np.array([5, 5, 4]), np.array([1, 0, 0]))
    y = (np.array([[7.0]]), np.array([5]), np.array([1]))
    four, five = untrimmed.joined([x, y], np.array([4, 5]))
    assert four.tolist() == [[3, 0]] and five.tolist() == [[2, 0], [1, 7]]
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=2"), tmp_path / "runs" / "mine").run
    embed.embed(run, store)
    towers = ["video-trunk", "audio-trunk"]
    stored, sizes = untrimmed._stored(store, "mine", store.numbers, towers)
    probed, now, widths = untrimmed._computed(store, run, "latest", "cpu", {"fold_count": 2})
    assert sizes == widths and probed.numbers.tolist() == store.numbers.tolist()
    for a, b in zip(stored, now, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
