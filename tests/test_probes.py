"""Probes of frozen features: who is trained and tested, the classifiers by hand, the benches on a tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_run import config, store_in

from avstore.errors import ConflictError, UsageError
from benchmarks import blocks, knn, linear, probing, svm
from benchmarks import published as figures
from benchmarks.archive import archived
from benchmarks.classifiers import SCHEDULES, Schedule, averaged
from benchmarks.probing import Part, Probed
from benchmarks.train_mode import moved_features, passes_of
from cli.main import invoke
from trainers.loop import train

QUICK = Schedule(40, 1e-2, milestones=(20, 30))


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


@pytest.mark.parametrize("classifier", [svm.svm(), svm.svm(fixed=1.0), linear.adam(QUICK), linear.logistic(),
                                        averaged(svm.svm()), knn.neighbours(5)])  # fmt: skip
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
    for classifier in (svm.svm(), linear.adam(QUICK), linear.logistic(), knn.neighbours(1)):
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


def test_train_mode_moves_statistics_by_training_videos_alone(trained):
    """Batch statistics while the probe learns, moved running statistics for the test part, no trace afterwards."""
    store, run = trained
    method = blocks.with_weights(run)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    numbers = store.numbers[:8]
    grids = {"conv5x": 1}

    def moved(part: Part) -> tuple[np.ndarray, np.ndarray]:
        learn, test = moved_features(method, run, store, numbers, part, clips=1, grids=grids, epochs=2)
        return learn["conv5x"], test["conv5x"]

    plain = blocks.picture_blocks(method, run, store, numbers, clips=1, grids=grids)["conv5x"]
    learn, test = moved(Part("p", np.arange(4), np.arange(4, 8)))
    assert not np.allclose(plain[4:], test[4:], atol=1e-3) and not np.allclose(learn[:4], plain[:4], atol=1e-3)
    assert not learn[4:].any() and not test[:4].any()
    _, fewer = moved(Part("p", np.arange(4), np.arange(6, 8)))
    np.testing.assert_allclose(fewer[6:], test[6:], rtol=1e-4, atol=1e-5)  # test videos move nothing
    _, other = moved(Part("p", np.arange(2, 6), np.arange(6, 8)))
    assert not np.allclose(other[6:], test[6:], atol=1e-4)  # others trained on: other statistics
    after = method.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m.training for m in method.modules())
    assert passes_of(300, 10, 12) == 3 and passes_of(12, 1, 12) == 12 and passes_of(10**5, 10, 12) == 1


def test_the_train_mode_of_a_bench_and_its_features_are_kept(trained, tmp_path, monkeypatch):
    store, run = trained
    options = {"clips": 1, "only": ["conv5x"], "seeds": 0, "controls": False, "fold_count": 2, "epochs": 1,
               "train_mode": True, "work": tmp_path}  # fmt: skip
    table = linear.bench(store, [run], **options)
    assert any("backbone in train mode" in n for n in table.notes)
    monkeypatch.setattr(blocks, "picture_blocks", None)
    assert linear.bench(store, [run], **options).rows == table.rows


def test_schedules_are_avids():
    """methods.md 6.2: 12 epochs, x .1 after 6 and 9; the ablations 20, x .3 after 8, 12, 15, 18, 25 clips."""
    kinetics, ablation = SCHEDULES["kinetics"], SCHEDULES["ablation"]
    assert (kinetics.epochs, kinetics.decay, kinetics.milestones, kinetics.clips) == (12, 0.1, (6, 9), 10)
    assert (ablation.epochs, ablation.decay, ablation.milestones, ablation.clips) == (20, 0.3, (8, 12, 15, 18), 25)
    assert kinetics.shortened(4).milestones == (2, 3) and linear.Asked(schedule="ablation").adam == ablation
    assert linear.Asked(schedule="ablation", clips=2, rate=0.1).adam.clips == 2
    note = " ".join(linear.Asked().told())
    assert "x 0.1 after epochs 6, 9 of 12" in note and "AVID: random augmented clips" in note


def test_logistic_chooses_on_the_validation_part_and_standardises_without_it():
    """Fold 0 marks who chooses. Its videos lie far out: were they in the mean, the others would be squeezed."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = (rng.normal(size=(40, 1, 6)) + 0.4 * (2 * y[:, None, None] - 1)).astype(np.float32)
    inner = np.repeat([1, 0], [30, 10])
    seen = []
    real = probing.standardised

    def noted(train, test):
        seen.append((len(train), len(test)))
        return real(train, test)

    probing.standardised, before = noted, probing.standardised
    try:
        _, setting = linear.logistic()(x, y, x[:4], inner)
        linear.logistic()(x, y, x[:4], None)
    finally:
        probing.standardised = before
    assert seen == [(30, 10), (40, 4), (36, 4), (40, 4)]  # a marked fold; else a tenth
    assert setting.startswith("C ")
    assert probing.held_out(y, inner, 10).tolist() == (inner == 0).tolist()
    assert probing.held_out(np.array([0, 1]), None, 10) is None  # a class of one video: nothing to spare
    lone = np.array([0, 0, 1, 1])
    assert probing.held_out(lone, np.array([0, 0, 1, 1]), 10).sum() == 2  # a fold with all of a class does not do


def test_shots_are_drawn_several_times(trained):
    store, run = trained
    table = linear.bench(store, [run], modality="a", classifier="logistic", clips=1, seeds=0, shots=2, shot_draws=3,
                         fold_count=2)  # fmt: skip
    assert {r["features"]: r["of"] for r in table.rows} == {"avid": 6, "raw spectrogram": 6, "commonest class": 6}
    assert any("3 draws of 2 training videos" in n for n in table.notes)
    again = linear.bench(store, [run], modality="a", clips=1, seeds=0, repeats=2, fold_count=2, epochs=1,
                         controls=False, only=["conv5x"])  # fmt: skip
    assert again.rows[0]["of"] == 4


def test_published_figures_stand_beside_what_compares():
    def shown(name, **asked):
        return {(r["features"].removeprefix("published: "), r["block"]): r["top-1"]
                for r in figures.rows("linear", name, **asked)}  # fmt: skip

    hmdb = shown("HMDB51", classifier="svm", frames=8, modality="v")
    assert hmdb == {("CrissCross, Kinetics-Sound", ""): 0.457, ("CrissCross, Kinetics-400", ""): 0.5,
                    ("CrissCross, AudioSet", ""): 0.562}  # fmt: skip
    with pytest.raises(UsageError) as e:
        figures.rows("linear", "HMDB51", classifier="adam", modality="v")
    assert e.value.next == "--modality v --classifier svm --frames 8"
    sounds = shown("Kinetics-Sounds", classifier="logistic", modality="av")
    assert [sounds[f"CrissCross {w} the asynchronous loss, Kinetics-400", b] for b in ("a", "v", "a + v")
            for w in ("without", "with")] == [0.432, 0.471, 0.533, 0.557, 0.65, 0.667]  # fmt: skip
    kinetics = shown("Kinetics-400", classifier="adam", modality="v")
    assert [v for (n, _), v in kinetics.items() if n.startswith("CrissCross")] == [0.39, 0.445, 0.501]
    assert kinetics["Cross-AVID", "conv5x"] == 0.3995 and len(kinetics) == 10
    esc = {(r["features"], r["setting"]): r["top-1"] for r in figures.rows("svm", "ESC-50")}
    dcase = figures.rows("svm", "DCASE")
    assert len(esc) == 26 and len(dcase) == 15 and all(s for _, s in esc) and all(r["setting"] for r in dcase)
    assert [r["top-1"] for r in dcase if "CrissCross" in r["features"]] == [0.93, 0.96, 0.97]
    assert [r["features"] for r in dcase if r["top-1"] is None] == ["published: Cross-AVID, Kinetics-400"]
    with pytest.raises(UsageError, match="no published figures") as e:
        figures.rows("svm", "ESC50")
    assert "ESC-50" in e.value.why and e.value.next


def test_raw_features_are_centred_by_training_alone():
    """Two directions around a mean far off: without centring all cosines are 1. What is tested moves no mean."""
    train = np.array([[[10.0, 11.0]], [[10.0, 9.0]]], np.float32)
    labels = np.array([0, 1])
    test = np.array([[[10.0, 9.5]]], np.float32)
    alone, _ = knn.neighbours(2, centred=True)(train, labels, test, None)
    both, _ = knn.neighbours(2, centred=True)(train, labels, np.concatenate([test, test + 50]), None)
    assert alone[0, 0].argmax() == 1 and alone[0, 0, 1] == pytest.approx(1.0)
    np.testing.assert_array_equal(alone[0], both[0])


def test_the_best_block_is_chosen_over_all_parts_and_says_so():
    """S4 Table 1's best column, by hand: 0.6 and 0.8 lie under 0.7 and 0.8; of equals the earlier; a single block has
    no best."""
    def outcomes(*values):
        return [[probing.Outcome(f"fold {i}", v, "C 1") for i, v in enumerate(values)]]

    rows = [probing.row("avid", "conv4x", outcomes(0.6, 0.8)), probing.row("avid", "conv5x", outcomes(0.7, 0.8)),
            probing.row("other", "conv4x", outcomes(0.5, 0.5)), probing.row("other", "conv5x", outcomes(0.5, 0.5)),
            probing.row("alone", "conv5x", outcomes(0.9, 0.9)), probing.row("raw", "", outcomes(0.1, 0.1))]  # fmt: skip
    best = probing.best_blocks(rows)
    assert [(r["features"], r["block"], r["setting"], r["top-1"]) for r in best] == [
        ("avid, best block, theirs", "best", "conv5x, C 1", pytest.approx(0.75)),
        ("other, best block, theirs", "best", "conv4x, C 1", 0.5)]  # fmt: skip
    assert "chosen on the test parts" in probing.BEST


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
    kept = sorted(f.name.split("-")[0] for f in archived(store, [run.name]))
    assert kept == ["linear", "svm"]
    read = json.loads(archived(store, [run.name])[-1].read_text())
    assert read["bench"] == "linear" and read["rows"] == rows and read["asked"]["modality"] == "av"
    work = ["--work", str(tmp_path / "work")]
    assert invoke(["bench", "knn", "--k", "1", "--no-raw", *work, *common]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [r["features"] for r in table["rows"]] == ["avid", "random weights", "commonest class"]
    assert any("saw 10 of 12 tested videos in pre-training" in n for n in table["notes"])
    monkeypatch.setattr("benchmarks.blocks.picture_blocks", None)  # what is kept is not computed again
    assert invoke(["bench", "knn", "--k", "1", "--no-raw", *work, *common]) == 0
    assert json.loads(capsys.readouterr().out) == table


@pytest.mark.parametrize("bench", [["svm", "--c", "1"], ["linear", "--modality", "a", "--epochs", "1"]])
def test_the_best_block_stands_below_its_blocks(trained, capsys, bench):
    store, run = trained
    command = ["bench", *bench, "--run", str(run.path), "--folds", "2", "--clips", "1", "--no-raw", "--json"]
    assert invoke([*command, "--block", "conv4x", "--block", "conv5x", str(store.path)]) == 0
    table = json.loads(capsys.readouterr().out)
    for name in ("avid", "random weights"):
        own = [r["top-1"] for r in table["rows"] if r["features"] == name]
        (best,) = [r for r in table["rows"] if r["features"] == f"{name}, best block, theirs"]
        assert len(own) == 2 and best["top-1"] == max(own) and best["setting"].startswith("conv")
    assert probing.BEST in table["notes"]
    assert not [n for n in table["notes"] if "sign-flip" in n and "best" in n]


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
        (["bench", "linear", "--run", str(run.path), "--folds", "2", "--shots", "1000", path], "next: --shots 3"),
        (["bench", "svm", "--run", str(run.path), "--folds", "2", "--fold-column", "nope", path], "--folds with"),
        (["bench", "svm", "--run", str(run.path), "--fold-column", "nope", path], "next: --fold-column COLUMN"),
        (["bench", "svm", "--run", str(run.path), "--published", "ESC", path], "next: --published"),
        (["bench", "linear", "--run", str(run.path), "--published", "UCF101", path], "next: --modality v"),
        (["bench", "linear", "--run", str(run.path), "--modality", "a", "--train-mode", path], "--train-mode of sound"),
        (["bench", "linear", "--run", str(run.path), "--classifier", "svm", "--repeats", "2", path], "--repeats with"),
        (["bench", "linear", "--run", str(run.path), "--modality", "av", "--classifier", "adam", path], "next: --mod"),
        (["bench", "linear", "--run", str(run.path), "--modality", "av", "--epochs", "9", path], "--epochs with logis"),
        (["bench", "linear", "--run", str(run.path), "--classifier", "svm", "--rate", "0.1", path], "--rate with svm"),
        (["bench", "linear", "--run", str(run.path), "--modality", "av", "--schedule", "ablation", path], "--schedule"),
        (["bench", "svm", "--run", str(run.path), "--checkpoint", "2", "--all-checkpoints", path], "leave one away"),
        (["bench", "finetune", "--run", str(run.path), "--checkpoint", "2", "--all-checkpoints", path], "one, or all"),
        (["bench", "finetune", "--run", str(run.path), "--modality", "a", "--frames", "32", path], "--frames of sound"),
        (["bench", "finetune", "--run", str(run.path), "--modality", "a", "--fps", "8", path], "--fps of sound"),
        (["bench", "knn", "--run", str(run.path), "--folds", "2", "--checkpoint", "777", path], "next: --checkpoint"),
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
    assert line.startswith("b, x - y: +0.250") and "over 2 parts and repetitions" in line


def test_each_network_has_a_control_of_its_own(trained, tmp_path):
    """Two runs of one shape share the random networks, one of another width has its own: 2 x 2 parts."""
    store, run = trained
    other = train("avid", store, config("steps=1", "learning_rate=0.1"), tmp_path / "other").run
    wide = train("avid", store, config("steps=1", "width=8"), tmp_path / "wide").run
    options = {"modality": "a", "clips": 1, "seeds": 1, "controls": False, "fold_count": 2}
    for bench, more in ((knn.bench, {"ks": (1,)}), (linear.bench, {"classifier": "logistic"})):
        rows = {r["features"]: r for r in bench(store, [run, other, wide], **options, **more).rows}
        assert list(rows) == ["mine", "other", "wide", "random weights", "commonest class"]
        assert rows["random weights"]["of"] == 4 and rows["wide"]["of"] == 2
