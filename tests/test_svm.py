"""One-vs-rest linear SVMs with squared hinge: scikit-learn's LinearSVC, solved to the end; and what probes reach on
real sounds and faces without any learning."""

from __future__ import annotations

import csv
import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

import avstore
from avstore.errors import ConflictError, UsageError
from avstore.ingest import ingest
from benchmarks import blocks, linear, probing, squared_hinge, svm, unseen
from benchmarks.probing import Outcome, Part, Probed
from benchmarks.squared_hinge import CLOSE, OneVsRest


def points(n: int, d: int, classes: int, seed: int = 0, apart: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return apart * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d)), y


def reference(x: np.ndarray, y: np.ndarray, c: float, test: np.ndarray, **options: object) -> np.ndarray:
    model = LinearSVC(C=c, loss="squared_hinge", random_state=0, **({"tol": 1e-11, "max_iter": 10**7} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = model.fit(x, y).decision_function(test)
    return scores if scores.ndim == 2 else np.stack([-scores, scores], 1)


def test_two_points_by_hand():
    """x = -1 and 1: b = 0 by symmetry, w^2 / 2 + 2 C (1 - w)^2 is least at w = 4 C / (1 + 4 C)."""
    for c in (0.1, 1.0, 25.0):
        w = 4 * c / (1 + 4 * c)
        scores = OneVsRest(np.array([[-1.0], [1.0]]), np.array([3, 7])).fit(c).decide(np.array([[2.0], [0.0]]))
        np.testing.assert_allclose(scores, [[-2 * w, 2 * w], [0, 0]], atol=1e-12)


@pytest.mark.parametrize(("n", "d", "classes"), [(40, 3, 2), (40, 120, 2), (60, 5, 3), (60, 200, 4), (150, 40, 5)])
@pytest.mark.parametrize("dual", [True, False])
def test_scores_are_those_of_linear_svc(n, d, classes, dual):
    """More values than examples and fewer, its dual solver and its primal one, strengths upwards and downwards."""
    x, y = points(n, d, classes)
    test = np.random.default_rng(1).normal(size=(30, d))
    machines = OneVsRest(x, y)
    for c in (1e-3, 1e-1, 10.0, 1e-2):
        ours = machines.fit(c).decide(test)
        np.testing.assert_allclose(ours, reference(x, y, c, test, dual=dual), atol=2e-6 * (1 + np.abs(ours).max()))


def test_the_published_limit_of_iterations_changes_little_where_it_converges():
    """LinearSVC as AVID runs it (200 iterations, its own tolerance) and the optimum: the same classes."""
    x, y = points(150, 40, 5, apart=0.6)
    test, truth = points(200, 40, 5, seed=0, apart=0.6)
    theirs = reference(x, y, 1e-2, test, tol=1e-4, max_iter=200, dual="auto")
    ours = OneVsRest(x, y).fit(1e-2).decide(test)
    assert np.abs(ours - theirs).max() < 5e-3
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.99 and (ours.argmax(1) == truth).mean() > 0.5


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 60),
    classes=st.integers(2, 4),
    doubled=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    exponents=st.lists(st.integers(-5, 2), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_the_optimality_conditions_hold(n, d, classes, doubled, scale, exponents, seed):
    """At the optimum beta_i = 2 C y_i max(0, 1 - y_i f_i), whatever was fitted before; repeated examples too."""
    rng = np.random.default_rng(seed)
    x, y = scale * rng.normal(size=(n, d)), rng.permutation(np.arange(n) % min(n, classes))
    if doubled:
        x, y = np.concatenate([x, x]), np.concatenate([y, y[::-1]])  # equal points with other classes
    machines = OneVsRest(x, y)
    for e in exponents:
        c = 10.0**e
        machines.fit(c)
        f = machines.decide(x)
        wanted = 2 * c * machines.y * np.maximum(0, 1 - machines.y * f)
        if machines.direct:  # (w, b) is the sum over examples
            wanted = np.concatenate([x, np.ones((len(x), 1))], 1).T @ wanted
        # outputs are promised to CLOSE only, and each counts 2 C times: what float64 leaves of K + I / 2C, badly
        # conditioned where C is large and the features long
        slack = 2 * c * CLOSE * (np.abs(machines.z).sum(0).max() if machines.direct else 1)
        np.testing.assert_allclose(machines.beta, wanted, atol=1e-6 * max(1e-3, np.abs(wanted).max()) + slack)


def test_a_rotation_of_the_features_changes_nothing():
    x, y = points(30, 80, 3)
    test = np.random.default_rng(2).normal(size=(10, 80))
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(80, 80)))[0]
    a, b = OneVsRest(x, y).fit(0.1).decide(test), OneVsRest(x @ q, y).fit(0.1).decide(test @ q)
    np.testing.assert_allclose(a, b, atol=1e-9)


def test_decide_orders_strengths_and_classes_as_asked():
    x, y = points(40, 10, 4)
    train, test = x.reshape(20, 2, 10).astype(np.float32), x[:6].reshape(3, 2, 10).astype(np.float32)
    labels = np.where(y[::2] == 0, 0, 5)  # 1 .. 4 do not occur
    got = svm.decide(train, labels, test, [1.0, 1e-3, 1.0])
    assert [g.shape for g in got] == [(3, 2, 6)] * 3 and (got[0] == got[2]).all() and not (got[0] == got[1]).all()
    assert (got[0][..., 1:5] == -np.inf).all()
    expected = reference(train.reshape(-1, 10), np.repeat(labels, 2), 1e-3, test.reshape(-1, 10), dual=True)
    np.testing.assert_allclose(got[1][..., [0, 5]].reshape(6, 2), expected, atol=1e-5)


def test_the_choice_of_c_is_that_of_linear_svc():
    """The classifier of the bench against the same protocol written with LinearSVC: the same C, the same classes."""
    rng = np.random.default_rng(5)
    y = np.arange(48) % 4
    x = (0.5 * rng.normal(size=(4, 30))[y][:, None] + rng.normal(size=(48, 3, 30))).astype(np.float32)
    inner = np.arange(48) // 4 % 3
    test = x[::5] + 0.3 * rng.normal(size=x[::5].shape).astype(np.float32)

    def scores(train: np.ndarray, labels: np.ndarray, there: np.ndarray, c: float) -> np.ndarray:
        a, b = probing.standardised(train, there)
        flat = reference(a.reshape(-1, 30), np.repeat(labels, 3), c, b.reshape(-1, 30), dual=True)
        return flat.reshape(*there.shape[:2], 4)

    held = inner == 0
    accuracy = [(scores(x[~held], y[~held], x[held], c).mean(1).argmax(1) == y[held]).mean() for c in svm.STRENGTHS]
    best = svm.STRENGTHS[int(np.argmax(accuracy))]
    got, said = svm.svm()(x, y, test, inner)
    assert said == f"C {best:g}"
    np.testing.assert_allclose(got, scores(x, y, test, best), atol=1e-4)


def test_the_oracle_is_the_best_of_the_fixed_strengths():
    x, y = points(60, 8, 3)
    which = np.arange(60) // 3 % 3
    parts = tuple(Part(f"fold {f}", np.flatnonzero(which != f), np.flatnonzero(which == f), which[which != f])
                  for f in range(3))  # fmt: skip
    probed = Probed(np.arange(60), y, ("a", "b", "c"), parts, "planted")
    features = x[:, None].astype(np.float32)
    got = svm.oracle(features, probed, svm.STRENGTHS, None)
    each = [[o.accuracy for o in probing.probe(features, probed, svm.svm(fixed=c))] for c in svm.STRENGTHS]
    assert [o.accuracy for o in got] == np.max(each, 0).tolist()


@pytest.mark.parametrize(
    ("x", "labels", "word"),
    [(np.zeros((3, 2)), np.zeros(3, int), "one class"), (np.zeros(3), np.arange(3), "features"),
     (np.zeros((3, 2)), np.arange(2), "labels"), (np.full((2, 1), np.nan), np.arange(2), "finite")],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(x, labels, word):
    with pytest.raises(UsageError, match=word):
        OneVsRest(x, labels)


def test_more_examples_than_values_are_solved_for_the_weights_themselves():
    """The same machines as by the matrix of inner products, and as LinearSVC's, of a tenth of its memory."""
    x, y = points(150, 6, 4)
    machines, other = OneVsRest(x, y), OneVsRest(x[:8], y[:8])
    assert machines.direct and machines.beta.shape == (7, 4) and not other.direct
    test = np.random.default_rng(1).normal(size=(20, 6))
    for c in (1e-2, 10.0, 1e-4):
        np.testing.assert_allclose(machines.fit(c).decide(test), reference(x, y, c, test, dual=False), atol=1e-5)
    assert squared_hinge.needed(16_000, 8192) == 8 * (16_000 * 8192 + 3 * 16_000**2)  # ESC-50, ten clips: 6.7 GiB
    assert squared_hinge.needed(95_370, 512) < 2**30  # UCF101, ten clips


def test_where_memory_is_short_iterations_are_limited_and_it_is_said(monkeypatch):
    x, y = points(60, 20, 3, apart=0.8)
    train, labels = x[:, None].astype(np.float32), y
    exact, said = svm.svm()(train, labels, train, None)
    monkeypatch.setattr(squared_hinge, "available", lambda: 10_000)
    assert not squared_hinge.fits(60, 20)
    short, told = svm.svm()(train, labels, train, None)
    assert said.startswith("C ") and "LinearSVC" not in said and "LinearSVC of 200 iterations" in told
    assert (short.argmax(-1) == exact.argmax(-1)).mean() > 0.95
    monkeypatch.setattr(squared_hinge, "available", lambda: None)
    assert squared_hinge.fits(10**6, 10**6)


def test_strengths_and_order_of_calls_are_checked():
    machines = OneVsRest(np.eye(3), np.arange(3))
    with pytest.raises(UsageError, match="not fitted"):
        machines.decide(np.eye(3))
    for c in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="above 0"):
            machines.fit(c)


def runs_of_folds(count: int, unseen_parts: dict[int, tuple[int, ...]]) -> tuple[Any, list[Any], Probed]:
    """A store of 12 videos in three folds, and runs that were pre-trained on all but those of some folds."""
    which = np.arange(12) % 3
    parts = tuple(Part(f"fold {f}", np.flatnonzero(which != f), np.flatnonzero(which == f)) for f in range(3))

    class Snapshot:
        store = "/data/other.zarr"

        also_saw: np.ndarray = np.zeros(0, np.int64)
        unknown: tuple[str, ...] = ()

        def __init__(self, numbers: np.ndarray | None) -> None:
            self.numbers = numbers

        def require_fits(self, store: object) -> None:
            if self.numbers is None:
                raise ConflictError("another store")

    class Run:
        def __init__(self, i: int) -> None:
            left = unseen_parts.get(i)
            self.name = f"run{i}"
            self.config = SimpleNamespace(name="avid")
            self.snapshot = Snapshot(None if left is None else 100 + np.flatnonzero(~np.isin(which, left)))

        def checkpoints(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(step=10)]

    return None, [Run(i) for i in range(count)], Probed(100 + np.arange(12), which % 2, ("a", "b"), parts, "")


def test_runs_of_folds_are_asked_what_they_have_not_seen():
    store, runs, probed = runs_of_folds(7, {0: (0,), 1: (1,), 2: (2,), 3: (0,), 4: (1,), 5: (2,)})
    plan, asked, notes = unseen.plan(store, runs, ["m"] * 6 + ["foreign"], probed)
    assert [[p.name for p in parts] for parts in asked[:6]] == [["fold 0"], ["fold 1"], ["fold 2"]] * 2
    assert asked[6] == probed.parts == plan.parts and len(notes) == 2 and "not seen in pre-training" in notes[1]
    assert notes[0] == "run6 was trained on another store, other.zarr; whether these videos were in it is not known"
    answers = [[Outcome(p.name, i + 0.1 * j, "") for j, p in enumerate(parts)] for i, parts in enumerate(asked[:6])]
    both = unseen.whole(answers, plan)
    assert [[o.part for o in one] for one in both] == [["fold 0", "fold 1", "fold 2"]] * 2
    assert [[o.accuracy for o in one] for one in both] == [[0, 1, 2], [3, 4, 5]]


def test_a_run_that_saw_all_parts_is_told_and_half_answers_are_refused():
    store, runs, probed = runs_of_folds(1, {0: ()})
    plan, asked, notes = unseen.plan(store, runs, ["m"], probed)
    assert plan.parts == asked[0] == probed.parts and "run0 saw 12 of 12" in notes[0]
    store, runs, probed = runs_of_folds(3, {0: (0,), 1: (1,), 2: (1,)})
    plan, _, notes = unseen.plan(store, runs[:2], ["m", "m"], probed)
    assert [p.name for p in plan.parts] == ["fold 0", "fold 1"] and "left out" in notes[-1] and "fold 2" in notes[-1]
    with pytest.raises(UsageError, match="whole answers"):
        unseen.plan(store, runs, ["m"] * 3, probed)
    with pytest.raises(UsageError, match="m, other are asked different parts") as e:
        unseen.plan(store, runs[:2], ["m", "other"], probed)
    assert "m fold 0; other fold 1" in e.value.why and e.value.next.startswith("name the runs of all folds")


def test_runs_that_are_asked_different_splits_are_told_what_is_common():
    """One run has not seen split1, the other none of three: both can be asked split1, whichever is named first."""
    _, runs, folds = runs_of_folds(2, {0: (0,), 1: (0, 1, 2)})
    parts = tuple(dataclasses.replace(p, name=f"split{i + 1}") for i, p in enumerate(folds.parts))
    probed = dataclasses.replace(folds, parts=parts)
    store = SimpleNamespace(columns=["label", "split1", "split2", "split3"])
    for order in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="are asked different parts") as e:
            unseen.plan(store, [runs[i] for i in order], [f"run{i}" for i in order], probed)
        assert "run0 split1" in e.value.why and "run1 split1, split2, split3" in e.value.why
        assert e.value.next == "--split split1, which all have not seen, or name runs of the other parts"
    one = dataclasses.replace(probed, parts=parts[:1])
    assert unseen.plan(store, runs, ["run0", "run1"], one)[0].parts == parts[:1]


def test_whether_a_run_saw_labels_is_said():
    store, runs, probed = runs_of_folds(1, {0: ()})
    for name, said in (("avid", "without labels"), ("supervised", "with their labels"), ("ccl", "with their labels")):
        runs[0].config.name = name
        (note,) = unseen.told(store, runs[0], probed.numbers, probed.parts)
        assert note == f"run0 saw 12 of 12 tested videos in pre-training, {said}"


def test_what_is_kept_is_not_computed_again(tmp_path, monkeypatch):
    """`bench svm` and `bench linear` with a work folder: the same table, features and what was learned on them from
    the folder; what another schedule or other parts would learn is learned."""
    from tiny_run import config, store_in

    from trainers.loop import train

    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=1"), tmp_path / "runs" / "mine").run
    options: dict[str, Any] = {"clips": 1, "fold_count": 2, "seeds": 1, "controls": False}
    adam = {"modality": "v", "only": ["conv5x"], "repeats": 2, "epochs": 2}
    few = {"modality": "a", "classifier": "svm", "shots": 2, "shot_draws": 2}
    asked = ((svm.bench, {"only": ["conv5x"]}), (linear.bench, {"modality": "av"}), (linear.bench, adam),
             (linear.bench, few))  # fmt: skip
    for bench, more in asked:
        plain = bench(store, [run], **options, **more)
        first = bench(store, [run], work=tmp_path / "work", **options, **more)
        with monkeypatch.context() as m:
            for name in ("sound_blocks", "picture_blocks"):
                m.setattr(blocks, name, lambda *a, **k: pytest.fail("computed again"))
            m.setattr(probing, "probe", lambda *a, **k: pytest.fail("learned again"))
            again = bench(store, [run], work=tmp_path / "work", **options, **more)
            with pytest.raises(pytest.fail.Exception, match="learned again"):
                bench(store, [run], work=tmp_path / "work", **options, **more, fold_seed=1)
        assert plain.rows == first.rows == again.rows
        assert any("saw" in note for note in plain.notes)  # this run was pre-trained on what it is asked
    for other in ({"epochs": 3}, {"rate": 0.1}, {"schedule": "ablation"}, {"repeats": 3}):
        plain = linear.bench(store, [run], **options, **{**adam, **other})
        assert linear.bench(store, [run], work=tmp_path / "work", **options, **{**adam, **other}).rows == plain.rows


@pytest.fixture(scope="module")
def esc10(tmp_path_factory: pytest.TempPathFactory, shared: Path):
    """Two recordings of each class and official fold of ESC-10's first five classes: 50 in all."""
    folder = tmp_path_factory.mktemp("esc")
    root = shared / "esc10-ogg"
    rows = []
    for label in sorted(p for p in root.iterdir() if p.is_dir())[:5]:
        for fold in "12345":
            rows += [(p.relative_to(root), label.name, fold) for p in sorted(label.glob(f"{fold}-*.ogg"))[:2]]
    with (folder / "esc.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("path", "label", "fold"), *rows])
    ingest(folder / "esc.csv", folder / "esc.zarr", root=root, front_ends=())
    return avstore.open(folder / "esc.zarr")


def test_real_sounds_by_official_folds_are_above_chance(esc10):
    """ESC: 5 classes, chance .2. The margin is .2: four standard errors of 50 recordings are .23."""
    probed = probing.choose(esc10, modality="a")
    assert len(probed.numbers) == 50 and len(probed.parts) == 5 and "official folds" in probed.description
    raw = blocks.raw_sound(esc10, probed.numbers, clips=2)
    spectrogram = np.mean([o.accuracy for o in probing.probe(raw, probed, svm.svm())])
    two = Probed(probed.numbers, probed.labels, probed.classes, probed.parts[:2], "two folds")
    forest = np.mean([o.accuracy for o in svm.classical(svm.mfcc(esc10, probed.numbers), two)])
    assert np.mean([o.accuracy for o in probing.chance(probed)]) == pytest.approx(0.2)
    assert spectrogram > 0.4 and forest > 0.4, (spectrogram, forest)


def test_speakers_are_told_by_sight_and_sound_without_learning(tmp_path, shared):
    """GRID, 5 speakers x 5 clips, chance .2: raw pixels, raw spectrograms, logistic regression, stratified folds."""
    root = shared / "grid"
    names = [p.relative_to(root) for s in range(1, 6) for p in sorted((root / f"s{s}").glob("*.mpg"))[:5]]
    with (tmp_path / "grid.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("path", "speaker"), *((p, p.parts[0]) for p in names)])
    ingest(tmp_path / "grid.csv", tmp_path / "grid.zarr", root=root, size=(64, 96), fps=8, front_ends=())
    store = avstore.open(tmp_path / "grid.zarr")
    probed = probing.choose(store, label="speaker", fold_count=5, modality="av")
    for make in (blocks.raw_pictures, blocks.raw_sound):
        found = probing.probe(make(store, probed.numbers, clips=2), probed, linear.logistic([0.1]))
        accuracy = np.mean([o.accuracy for o in found])
        assert accuracy > 0.5, (make.__name__, accuracy)
