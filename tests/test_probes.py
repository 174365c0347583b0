"""Probes of frozen features: who is trained and tested, the classifiers by hand, the benches on a tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_run import config, store_in

from avstore.errors import ConflictError, UsageError
from benchmarks import blocks, knn, linear, probing, svm
from benchmarks.probing import Part, Probed
from cli.main import invoke
from trainers.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    store = store_in(folder, codec="jpeg")
    return store, train("avid", store, config("steps=2"), folder / "runs" / "mine").run


def planted(n: int = 60, classes: int = 3, clips: int = 4, noise: float = 0.3) -> tuple[np.ndarray, Probed]:
    """Features that tell the class, and three folds."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    centres = rng.normal(size=(classes, 5))
    x = (centres[y][:, None] + noise * rng.normal(size=(n, clips, 5))).astype(np.float32)
    which = np.arange(n) // classes % 3
    parts = tuple(
        Part(f"fold {f}", np.flatnonzero(which != f), np.flatnonzero(which == f), which[which != f]) for f in range(3)
    )
    return x, Probed(np.arange(n), y, ("a", "b", "c")[:classes], parts, "planted")


@pytest.mark.parametrize("classifier", [svm.svm(), svm.svm(fixed=1.0), linear.adam(40, 1e-2), linear.logistic(),
                                        knn.neighbours(5)])  # fmt: skip
def test_what_can_be_told_apart_is_and_what_cannot_is_chance(classifier):
    x, probed = planted()
    outcomes = probing.probe(x, probed, classifier)
    assert [o.part for o in outcomes] == ["fold 0", "fold 1", "fold 2"]
    assert min(o.accuracy for o in outcomes) > 0.9
    shuffled = Probed(probed.numbers, np.random.default_rng(1).permutation(probed.labels), *(
        (probed.classes, probed.parts, "")))  # fmt: skip
    assert np.mean([o.accuracy for o in probing.probe(x, shuffled, classifier)]) < 0.6
    again = probing.probe(x, probed, classifier)
    assert [o.accuracy for o in again] == [o.accuracy for o in outcomes]


def test_two_classes_work_with_every_classifier():
    x, probed = planted(40, 2)
    for classifier in (svm.svm(), linear.adam(40, 1e-2), linear.logistic(), knn.neighbours(1)):
        assert np.mean([o.accuracy for o in probing.probe(x, probed, classifier)]) > 0.9


def test_the_strength_is_chosen_without_the_test_part():
    """The test labels may be anything: choice and scores stay; the oracle's do not."""
    x, probed = planted(noise=1.5)
    part = probed.parts[0]
    a = svm.svm()(x[part.train], probed.labels[part.train], x[part.test], part.inner)
    b = svm.svm()(x[part.train], probed.labels[part.train], x[part.test][::-1], part.inner)
    assert a[1] == b[1] and np.allclose(a[0], b[0][::-1])
    honest = np.mean([o.accuracy for o in probing.probe(x, probed, svm.svm())])
    best = np.mean([o.accuracy for o in svm.oracle(x, probed, svm.STRENGTHS, None)])
    assert best >= honest


def test_neighbours_vote_by_hand():
    train = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.6, 0.8]]], np.float32)
    test = np.array([[[1.0, 0.0]]], np.float32)
    scores, _ = knn.neighbours(3, temperature=1.0)(train, np.array([0, 1, 1]), test, None)
    # weights exp(cos - 1): 1 for class 0; exp(-1) + exp(-.4) for class 1
    assert scores[0, 0] == pytest.approx([1.0, np.exp(-1) + np.exp(-0.4)], abs=1e-6)
    assert knn.neighbours(1)(train, np.array([0, 1, 1]), test, None)[0].argmax() == 0


def test_standardised_by_training_alone():
    train = np.array([[[0.0, 5.0]], [[2.0, 5.0]]], np.float32)
    a, b = probing.standardised(train, np.array([[[4.0, 5.0]]], np.float32))
    assert a[:, 0].tolist() == [[-1, 0], [1, 0]] and b[0, 0].tolist() == [3, 0]


def test_few_shots_are_nested_draws_of_training():
    _, probed = planted()
    few = probing.few_shot(probed, 2, seed=1)
    for before, after in zip(probed.parts, few.parts, strict=True):
        assert set(after.train) <= set(before.train) and (after.test == before.test).all()
        assert np.bincount(probed.labels[after.train]).tolist() == [2, 2, 2]
        assert set(after.train) <= set(probing.few_shot(probed, 4, seed=1).parts[probed.parts.index(before)].train)
    with pytest.raises(UsageError, match="99 shots"):
        probing.few_shot(probed, 99)


def test_windows_of_a_tiled_recording():
    assert blocks.sound_starts(5000, 2000, 10).tolist() == np.round(np.linspace(0, 4900, 10)).astype(int).tolist()
    assert blocks.sound_starts(5000, 2000, 3, tiled=False).tolist() == [0, 1500, 3000]
    assert blocks.sound_starts(500, 2000, 2, tiled=False).tolist() == [0, 0]
    wave = np.arange(5, dtype=np.int16)
    assert blocks.sound_windows(wave, np.array([0, 4]), 7).tolist() == [[0, 1, 2, 3, 4, 0, 1], [4, 0, 1, 2, 3, 4, 0]]


def test_maps_are_pooled_to_at_most_the_grid():
    maps = {"conv2x": torch.arange(16.0).reshape(1, 1, 4, 4), "conv5x": torch.arange(8.0).reshape(1, 1, 2, 2, 2)}
    got = blocks.pooled(maps, {"conv2x": 2, "conv5x": 4}, "avg")
    assert got["conv2x"].tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert got["conv5x"].tolist() == [[2, 3, 4, 5]]  # time to one step; two cells a side stay two
    assert blocks.pooled(maps, {"conv5x": 1}, "max")["conv5x"].tolist() == [[7]]


def test_features_of_a_run_are_its_network_s(trained):
    store, run = trained
    method = blocks.with_weights(run)
    numbers = store.numbers[:3]
    seen = blocks.picture_blocks(method, run, store, numbers, clips=2)
    heard = blocks.sound_blocks(method, run, store, numbers, clips=2)
    assert set(seen) == set(heard) == {"conv2x", "conv3x", "conv4x", "conv5x"}
    assert all(x.shape[:2] == (3, 2) and x.dtype == np.float32 for x in (*seen.values(), *heard.values()))
    few = blocks.picture_blocks(method, run, store, numbers[::-1], clips=2, batch=1)
    for name in seen:  # neither the batch nor the order of videos matters
        np.testing.assert_allclose(few[name][::-1], seen[name], rtol=1e-4, atol=1e-5)
    other = blocks.picture_blocks(blocks.with_weights(run, "random", seed=5), run, store, numbers, clips=2)
    assert not np.allclose(other["conv5x"], seen["conv5x"])
    with pytest.raises(ConflictError, match="no network"):
        blocks.trunk(torch.nn.Linear(2, 2), "a")


def test_train_mode_leaves_no_trace(trained):
    store, run = trained
    method = blocks.with_weights(run)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    numbers = store.numbers[:4]
    plain = blocks.picture_blocks(method, run, store, numbers, clips=1)["conv5x"]
    with linear._Statistics(method, blocks.trunk(method, "v"), True):
        leaky = blocks.picture_blocks(method, run, store, numbers, clips=1)["conv5x"]
    assert not np.allclose(plain, leaky, atol=1e-3)
    after = method.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (blocks.picture_blocks(method, run, store, numbers, clips=1)["conv5x"] == plain).all()


def test_the_benches_print_their_controls(trained, capsys, monkeypatch, tmp_path):
    store, run = trained
    common = ["--run", str(run.path), "--folds", "2", "--clips", "2", "--json", str(store.path)]
    assert invoke(["bench", "svm", "--block", "conv5x", "--published", "ESC-50", *common]) == 0
    table = json.loads(capsys.readouterr().out)
    names = [r["features"] for r in table["rows"]]
    assert names[:5] == ["avid", "random weights", "raw spectrogram", "MFCC, zero crossings, random forest",
                         "commonest class"]  # fmt: skip
    assert all(n.startswith("published: ") for n in names[5:]) and len(names) > 5
    assert invoke(["bench", "linear", "--modality", "av", *common]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["features"], r.get("block")) for r in rows[:6]] == [
        (f, b) for f in ("avid", "random weights") for b in ("a", "v", "a + v")
    ]
    assert {"raw spectrogram", "raw pixels and their change", "commonest class"} <= {r["features"] for r in rows}
    work = ["--work", str(tmp_path / "work")]
    assert invoke(["bench", "knn", "--k", "1", "--no-raw", *work, *common]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [r["features"] for r in table["rows"]] == ["avid", "random weights", "commonest class"]
    assert any("saw 10 of 12 tested videos in pre-training" in n for n in table["notes"])
    monkeypatch.setattr("benchmarks.blocks.picture_blocks", None)  # what is kept is not computed again
    assert invoke(["bench", "knn", "--k", "1", "--no-raw", *work, *common]) == 0
    assert json.loads(capsys.readouterr().out) == table


def test_what_cannot_be_probed_is_told(trained, capsys):
    store, run = trained
    path = str(store.path)
    for arguments, word in (
        (["bench", "svm", path], "no run is named"),
        (["bench", "svm", "--run", str(run.path), "--label", "lable", path], "no column"),
        (["bench", "svm", "--run", str(run.path), "--folds", "2", "--block", "conv6x", path], "no block"),
        (["bench", "linear", "--run", str(run.path), "--modality", "x", "--folds", "2", path], "no modality"),
        (["bench", "knn", "--run", str(run.path), "--fold-column", "folds", path], "no column"),
        (["bench", "knn", "--run", str(run.path), "--fold-column", "split", path], "divides training from testing"),
        (["bench", "knn", "--run", str(run.path), "--split", "split2", path], "no column"),
        (["bench", "linear", "--run", str(run.path), "--split", "split", "--folds", "2", path], "--folds with --split"),
        (["bench", "knn", "--run", str(run.path), "--curve", "x.svg", path], "--all-checkpoints"),
        (["bench", "knn", "--run", str(run.path), "--where", "label=a", path], "one class only"),
        (["bench", "knn", "--run", str(run.path), "--where", "split=train", path], "no train and test split"),
    ):
        assert invoke(arguments) in (2, 4, 5), arguments
        assert word in capsys.readouterr().err, arguments


def test_runs_that_differ_in_more_than_their_seed_are_rows_of_their_own(trained, tmp_path):
    store, run = trained
    again = train("avid", store, config("steps=2", "seed=5"), tmp_path / "again").run
    other = train("avid", store, config("steps=2", "learning_rate=0.1"), tmp_path / "other").run
    assert probing.names([run, again]) == ["avid", "avid"]
    assert probing.names([run, again, other]) == ["mine", "again", "other"]
    table = knn.bench(store, [run, other], ks=(1,), clips=1, seeds=0, controls=False, fold_count=2, modality="a")
    assert [r["features"] for r in table.rows] == ["mine", "other", "commonest class"]
    assert any(n.startswith("k = 1, mine - other: ") and "over 2 parts" in n for n in table.notes)


def test_seeds_pair_where_there_is_one_part():
    rows = [{"features": n, "block": "b", "values": [np.mean(e)], "each": [[v] for v in e]}
            for n, e in (("x", (0.5, 0.7)), ("y", (0.4, 0.3)), ("z", (0.2,)))]  # fmt: skip
    (line,) = probing.differences(rows, ["x", "y", "z"])  # z has one run: one pair says nothing
    assert line.startswith("b, x - y: +0.250") and "over 2 parts and runs" in line
