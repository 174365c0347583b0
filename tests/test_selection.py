"""Selections: conditions, lists, subsets, held-out splits, and digests that name them exactly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avstore
from avstore.errors import NotFoundError, UsageError
from avstore.selection import read_list
from tests.tiny_store import Tiny, make_store

LABELS = ("cat", "dog", None)
SPLITS = ("train", "test", "Val", None)
VIDEOS = [
    Tiny(
        1,
        key=f"{'zyxw'[i % 4]}/{i:02d}.mp4",
        label=LABELS[i % 3],
        split=SPLITS[i % 4],
        sound=None if i % 5 == 0 else -1,
        picture=i % 7 != 3,
        status="failed" if i == 6 else "ok",
    )
    for i in range(24)
]
OK = [i for i in range(24) if i != 6]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> avstore.Store:
    return avstore.open(make_store(tmp_path_factory.mktemp("selection") / "s.zarr", VIDEOS))


def test_all_videos_sorted_by_key(store: avstore.Store) -> None:
    found = store.select()
    assert sorted(found.numbers.tolist()) == OK and found.description == "all videos" and len(found) == 23
    keys = [store.key(n) for n in found.numbers.tolist()]
    assert keys == sorted(keys) and keys[0] == "w/03.mp4"


@settings(max_examples=80, deadline=None)
@given(
    label=st.sets(st.sampled_from(["cat", "dog", ""]), max_size=2),
    negate=st.booleans(),
    held_out=st.booleans(),
    need_sound=st.booleans(),
    need_picture=st.booleans(),
)
def test_against_brute_force(
    store: avstore.Store, label: set[str], negate: bool, held_out: bool, need_sound: bool, need_picture: bool
) -> None:
    where = [f"label{'!=' if negate else '='}{','.join(sorted(label))}"] if label else []
    expected = [
        i for i in OK
        if (not label or ((VIDEOS[i].label or "") in label) != negate)
        and (held_out or str(VIDEOS[i].split).lower() not in ("test", "val"))
        and (not need_sound or VIDEOS[i].sound is not None)
        and (not need_picture or VIDEOS[i].picture)
    ]  # fmt: skip
    found = store.select(where=where, held_out=held_out, need_sound=need_sound, need_picture=need_picture)
    assert sorted(found.numbers.tolist()) == expected


def test_conditions_on_any_column(store: avstore.Store) -> None:
    assert store.select(where=["number=3,4"]).numbers.tolist() == [3, 4]
    assert store.select(where=["frames=0"], need_sound=True).numbers.tolist() == [3, 17]
    assert sorted(store.select(where=["silent=True", "label=cat"]).numbers.tolist()) == [0, 15]
    for text in ("label", "=dog", "label dog"):
        with pytest.raises(UsageError, match="is not column=value"):
            store.select(where=[text])
    with pytest.raises(NotFoundError, match="no column 'lable'"):
        store.select(where=["lable=dog"])
    with pytest.raises(UsageError, match="no videos are left") as e:
        store.select(where=["label=cow"])
    assert "label=cow" in e.value.why and "splits here" in e.value.next


def test_lists_of_keys(store: avstore.Store, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# mine\nz/00.mp4\n\nx/02\n05.mp4\nz/00.mp4\n")
    assert read_list(file) == ["z/00.mp4", "x/02", "05.mp4"]
    assert sorted(store.select(list=file).numbers.tolist()) == [0, 2, 5]
    assert sorted(store.select(list=["07"], where=["number=7"]).numbers.tolist()) == [7]
    with pytest.raises(NotFoundError, match="no video '99'"):
        store.select(list=["99"])
    with pytest.raises(NotFoundError, match="cannot be read"):
        store.select(list=tmp_path / "none.txt")


def test_subsets_are_a_seeded_draw_that_the_order_does_not_change(store: avstore.Store, tmp_path: Path) -> None:
    five, six = (set(store.select(subset=n, seed=1).numbers.tolist()) for n in (5, 6))
    assert len(five) == 5 and five < six
    assert set(store.select(subset=5, seed=2).numbers.tolist()) != five
    order = list(range(24))
    random.Random(0).shuffle(order)
    other = avstore.open(make_store(tmp_path / "shuffled.zarr", [VIDEOS[i] for i in order]))
    keys = {other.key(n) for n in other.select(subset=5, seed=1).numbers.tolist()}
    assert keys == {store.key(n) for n in five}
    for n in (0, 24, -1):
        with pytest.raises(UsageError, match=f"a subset of {n} of 23"):
            store.select(subset=n)
    draws = [store.select(subset=4, seed=s).numbers.tolist() for s in range(200)]
    counts = np.bincount(np.concatenate(draws), minlength=24)[OK]
    assert counts.sum() == 800 and counts.min() > 10 and counts.max() < 65  # 34.8 each on average, 5.4 standard


def test_digests_name_numbers_and_keys(store: avstore.Store, tmp_path: Path) -> None:
    whole = store.select()
    assert whole.digest == store.select(subset=23).digest and len(whole.digest) == 16
    assert whole.digest != store.select(where=["label!=cat"]).digest
    renamed = [Tiny(1, key="other.mp4" if i == 0 else v.key) for i, v in enumerate(VIDEOS) if i != 6]
    same = [Tiny(1, key=v.key) for i, v in enumerate(VIDEOS) if i != 6]
    digests = {
        avstore.open(make_store(tmp_path / f"{i}.zarr", v)).select().digest for i, v in enumerate((renamed, same))
    }
    assert len(digests) == 2


def test_rows_of_numbers(store: avstore.Store) -> None:
    found = store.select(where=["label=dog"])
    assert found.rows(found.numbers).tolist() == list(range(len(found)))
    with pytest.raises(NotFoundError, match="video 0 is not in this selection"):
        found.rows([0])
