"""One table of split words: what ingest calls a split is trained on, or held out and tested, by all alike."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_store import Tiny, make_store

import avstore
from avstore.sources import folder_columns
from avstore.split_words import PARTS, held_out, part_of
from benchmarks import splits
from benchmarks.sides import choose_sides


@pytest.mark.parametrize("word", [*PARTS, "Valid", "DEV", "Eval", "TEST"])
def test_a_folder_is_a_split_and_no_one_trains_on_what_is_tested(word, tmp_path):
    """Folders train/ and `word`/, of which the second is what a store of them tests, if anything."""
    assert folder_columns(f"{word}/cat/1.mp4") == {"label": "cat", "split": word.lower()}
    videos = [Tiny(1, key=f"{i}.mp4", label="ab"[i % 2], split="train" if i < 4 else word) for i in range(6)]
    store = avstore.open(make_store(tmp_path / "s.zarr", videos))
    trained = store.select(held_out=False).numbers.tolist()
    assert trained == ([0, 1, 2, 3, 4, 5] if part_of(word) == "train" else [0, 1, 2, 3])
    if part_of(word) in ("train", "unused"):
        return
    (split,) = splits.official(store, store.numbers)
    assert split.train.tolist() == [0, 1, 2, 3] and split.test.tolist() == [4, 5] and not len(split.val)
    (sides,) = choose_sides(store)
    assert not set(sides.queries.tolist()) & set(trained)
    assert split.name == ("validation split" if part_of(word) == "validation" else "test split")


def test_words_of_no_part():
    assert part_of(None) is None and part_of("cat") is None and part_of(" Val ") == "validation"
    assert not held_out(None) and not held_out("pretrain") and not held_out("Training") and held_out("unused")
    assert folder_columns("developer/x.mp4") == {"label": "developer"}


def test_evaluation_is_tested_unless_there_is_a_test_part():
    with_test = ["train", "eval", "test", "val"]
    assert splits.tested_of(with_test).tolist() == [False, False, True, False]
    assert splits.tested_of(["train", "eval", "val"]).tolist() == [False, True, False]
    assert splits.tested_of(["train", "val", ""]).tolist() == [False, True, False]
    assert not np.any(splits.tested_of(["train", "", "cat"]))
