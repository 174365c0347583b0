"""Official splits of a store: which videos are trained on, which choose settings, which are tested.

    for split in official(store, numbers): split.train, split.val, split.test

A column `split` is one division; UCF101 and HMDB51 have three, in columns split1, split2, split3, and results are
averaged over them. Where a split has a training, a validation and a test part, the validation part chooses what is to
be chosen; where it has no test part (Kinetics), the validation part is tested, and the split's name says so. An
evaluation part is the test part where there is no other, else a validation part.

`lost` tells of listed videos that the store could not decode: without it they would shrink a test part in silence.
Not here: folds (`rank.folds`, `probing`), and what is done with the parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import UsageError, did_you_mean
from avstore.split_words import part_of

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True, eq=False)
class Split:
    """Places into the numbers given, int64, disjoint; `val` is empty where nothing is left to choose with."""

    name: str
    train: np.ndarray
    test: np.ndarray
    val: np.ndarray


def columns_of(store: Store) -> list[str]:
    """split1, split2, ... where the store has them, else split where it has that, else nothing."""
    numbered = [c for c in store.columns if re.fullmatch(r"split\d+", c)]
    return sorted(numbered, key=lambda c: int(c[5:])) or [c for c in store.columns if c == "split"]


def official(store: Store, numbers: np.ndarray, columns: Sequence[str] | None = None) -> list[Split]:
    """The divisions of these videos by `columns` (default: `columns_of`). A video outside a split's parts is in none.

    UsageError where a column is not there, where no column is, where one has no training part or nothing to test.
    """
    numbers = np.asarray(numbers, np.int64)
    chosen = columns_of(store) if columns is None else list(dict.fromkeys(columns))
    if not chosen:
        raise UsageError(
            f"{store.path} has no train and test split",
            f"its columns: {', '.join(store.columns) or 'none'}",
            "--folds 5, or ingest with a list that has a column split",
        )
    return [_split(store, numbers, column, len(chosen) > 1 or column != "split") for column in chosen]


def tested_of(given: Sequence[str]) -> np.ndarray:
    """bool, which of these values of a split are tested: the test part; where there is none, the evaluation part; where
    there is neither, the validation part."""
    parts = np.array([part_of(v) or "" for v in given], dtype=object)
    there = next((p for p in ("test", "evaluation", "validation") if (parts == p).any()), "test")
    return np.asarray(parts == there, np.bool_)


def lost(
    store: Store,
    columns: Sequence[str],
    *,
    folds: bool = False,
    where: Sequence[str] = (),
    list: str | Path | Sequence[str] | None = None,
    subset: int | None = None,
    **_: object,
) -> tuple[str, ...]:
    """A line for each column that tests videos which are not ok in the store (failed, or still to be decoded).

    folds: every value but none is tested, else what `tested_of` says. `where` and
    `list` as in a selection; of a `subset`, which is drawn from the ok videos, nothing is said.
    """
    if subset is not None:
        return ()
    from avstore.selection import parse_where, read_list, text_of

    numbers = store.current
    for column, wanted, values in parse_where(store, where):
        mine = np.array([text_of(v) in values for v in store.column(column, numbers)], np.bool_)
        numbers = numbers[mine == wanted]
    if list is not None:
        names = read_list(list) if isinstance(list, str | Path) else [str(n) for n in list]
        numbers = numbers[np.isin(numbers, store.find(names))]
    out = []
    for column in columns:
        given = np.array([text_of(v) for v in store.column(column, numbers)])
        tested = given != "" if folds else tested_of(given.tolist())
        bad = tested & ~store.ok[numbers]
        if bad.any():
            out.append(
                f"{int(bad.sum())} of the {int(tested.sum())} videos that column {column} tests are not ok in the "
                "store and are not asked: avstore ls --failed says why"
            )
    return tuple(out)


def _split(store: Store, numbers: np.ndarray, column: str, named: bool) -> Split:
    if column not in store.columns:
        why = did_you_mean(column, store.columns)
        raise UsageError(f"{store.path} has no column {column!r}", why, "--split COLUMN; see avstore ls")
    given = ["" if v is None else str(v) for v in store.column(column, numbers)]

    parts = np.array([part_of(v) or "" for v in given])
    tested = tested_of(given)
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(tested)
    val = np.flatnonzero(np.isin(parts, ("validation", "evaluation")) & ~tested)
    name = column if named else "test split"
    if len(test) and (parts[test] == "validation").all():
        name = f"{column}, its validation part" if named else "validation split"
    if not len(train) or not len(test):
        there = ", ".join(sorted({v for v in given if v})) or "none"
        if named:
            raise UsageError(
                f"column {column} has {len(train)} training and {len(test)} test videos",
                f"each official split needs both; its values: {there}",
                "see avstore ls; --where, or another --split",
            )
        raise UsageError(
            f"{store.path} has no train and test split",
            f"its splits: {there}",
            "--folds 5, or ingest with a list that has a column fold or split",
        )
    return Split(name, train, test, val)
