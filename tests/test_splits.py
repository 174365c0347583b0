"""Official splits: their parts by hand, what a validation part is for, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_store import Tiny, make_store

import avstore
from avstore.errors import UsageError
from benchmarks import probing, splits
from benchmarks.sides import choose_sides, unseen


class MoreColumns:
    """A store with columns that its plan does not have."""

    def __init__(self, store, extra):
        self.store, self.extra = store, extra
        self.columns = (*store.columns, *extra)

    def column(self, name, numbers=None):
        if name not in self.extra:
            return self.store.column(name, numbers)
        numbers = self.store.numbers if numbers is None else numbers
        return [self.extra[name][int(n)] for n in numbers]

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    videos = [Tiny(1, key=f"{i:02d}.mp4", label="ab"[i % 2]) for i in range(12)]
    return avstore.open(make_store(tmp_path_factory.mktemp("splits") / "s.zarr", videos))


def column(test=(), val=(), unused=(), n=12):
    return ["test" if i in test else "val" if i in val else "unused" if i in unused else "train" for i in range(n)]


def test_parts_by_hand(store):
    more = MoreColumns(store, {"split2": column(test={0, 1}), "split10": column(test={2, 3}, unused={4, 5}),
                               "split": column(test={9})})  # fmt: skip
    two, ten = splits.official(more, store.numbers)
    assert (two.name, ten.name) == ("split2", "split10")  # by number, before the plain column
    assert two.test.tolist() == [0, 1] and two.train.tolist() == list(range(2, 12)) and not len(two.val)
    assert ten.test.tolist() == [2, 3] and ten.train.tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    (plain,) = splits.official(more, store.numbers, ["split"])
    assert plain.name == "test split" and plain.test.tolist() == [9]
    (some,) = splits.official(more, store.numbers[[9, 2]], ["split"])
    assert some.test.tolist() == [0] and some.train.tolist() == [1]  # places into the numbers given


def test_a_validation_part_chooses_or_is_tested(store):
    (three,) = splits.official(MoreColumns(store, {"split": column(test={0, 1}, val={2, 3})}), store.numbers)
    assert three.val.tolist() == [2, 3] and three.test.tolist() == [0, 1] and 2 not in three.train
    (kinetics,) = splits.official(MoreColumns(store, {"split": column(val={2, 3})}), store.numbers)
    assert kinetics.name == "validation split" and kinetics.test.tolist() == [2, 3] and not len(kinetics.val)


@pytest.mark.parametrize(("extra", "asked", "word"), [
    ({}, None, "no train and test split"),
    ({"split": column()}, None, "no train and test split"),
    ({"split": [None] * 12}, None, "no train and test split"),
    ({"split1": column()}, None, "split1 has 12 training and 0 test"),
    ({"split1": column(test={0})}, ["split4"], "no column 'split4'"),
])  # fmt: skip
def test_what_is_no_split_is_refused(store, extra, asked, word):
    with pytest.raises(UsageError, match=word):
        splits.official(MoreColumns(store, extra), store.numbers, asked)


def test_probes_average_official_splits(store):
    more = MoreColumns(store, {f"split{i + 1}": column(test={2 * i, 2 * i + 1}) for i in range(3)}
                       | {"fold": ["1", "2"] * 6})  # fmt: skip
    probed = probing.choose(more)
    assert [p.name for p in probed.parts] == ["split1", "split2", "split3"] and "official splits" in probed.description
    assert [p.name for p in probing.choose(more, split_columns=["split3"]).parts] == ["split3"]
    more.extra["fold"] = ["1", "1", "2", "2"] * 3
    assert [p.name for p in probing.choose(more, fold_column="fold").parts] == ["fold 1", "fold 2"]
    with pytest.raises(UsageError, match="--folds with --split"):
        probing.choose(more, split_columns=["split3"], fold_count=3)
    more.extra["fold"][3] = None
    with pytest.raises(UsageError, match="1 of 12 videos have no fold"):
        probing.choose(more, fold_column="fold")


def test_settings_are_chosen_on_the_validation_part(store):
    """What a classifier is given: training and validation, the latter as the first inner fold; the test part never."""
    more = MoreColumns(store, {"split": column(test={0, 1}, val={2, 3, 4, 5})})
    probed = probing.choose(more)
    (part,) = probed.parts
    rows, inner = part.learned_on()
    assert rows.tolist() == [6, 7, 8, 9, 10, 11, 2, 3, 4, 5] and inner.tolist() == [1] * 6 + [0] * 4
    seen = {}

    def classifier(train, labels, test, inner):
        seen.update(train=train[:, 0, 0].tolist(), test=test[:, 0, 0].tolist(), inner=inner.tolist())
        return np.eye(2)[np.zeros(len(test), int)][:, None], ""

    probing.probe(np.arange(12, dtype=np.float32)[:, None, None], probed, classifier)
    assert seen == {"train": rows.tolist(), "test": [0, 1], "inner": inner.tolist()}
    few = probing.few_shot(probed, 1).parts[0]
    assert few.val is None and len(few.train) == 2 and set(few.train) <= set(part.train)
    with pytest.raises(UsageError, match="validation part are not trained on"):
        probing.choose(MoreColumns(store, {"label": ["c" if i == 2 else "ab"[i % 2] for i in range(12)],
                                           "split": column(test={0, 1}, val={2, 3})}))  # fmt: skip


def test_sides_of_each_split_and_who_is_asked_which(store):
    more = MoreColumns(store, {f"split{i + 1}": column(test={2 * i, 2 * i + 1}, val={11}) for i in range(3)})
    sides = choose_sides(more)
    assert [s.queries.tolist() for s in sides] == [[0, 1], [2, 3], [4, 5]]
    assert 11 not in sides[0].gallery and len(sides[0].gallery) == 9  # a validation part is on neither side
    assert unseen(sides, sides[1].gallery) == ([sides[1]], 0)
    assert [s.queries.tolist() for s in choose_sides(more, split_columns=["split2"])] == [[2, 3]]
    with pytest.raises(UsageError, match="--folds with --split"):
        choose_sides(more, split_columns=["split2"], fold_count=3)


def test_tested_videos_that_are_not_ok_are_told(tmp_path):
    """Two of four test videos failed, one training video too; selections narrow both counts; folds test everybody."""
    videos = [Tiny(1, key=f"{i}.mp4", label="ab"[i % 2], split="test" if i < 4 else "train",
                   status="failed" if i in (0, 1, 9) else "ok") for i in range(10)]  # fmt: skip
    store = avstore.open(make_store(tmp_path / "s.zarr", videos))
    (line,) = splits.lost(store, ["split"])
    assert line.startswith("2 of the 4 videos that column split tests are not ok") and "avstore ls --failed" in line
    assert splits.lost(store, ["split"], where=["label=b"])[0].startswith("1 of the 2")
    assert splits.lost(store, ["split"], list=["0.mp4", "2.mp4", "3.mp4"])[0].startswith("1 of the 3")
    assert splits.lost(store, ["split"], list=["2.mp4"]) == splits.lost(store, ["split"], subset=3) == ()
    assert splits.lost(store, ["label"], folds=True)[0].startswith("3 of the 10")
    assert line in probing.choose(store, modality="v").notes
