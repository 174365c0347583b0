"""Selections: the videos that a run or bench uses, sorted by key, with a digest that names them exactly.

selection = select(store, where=["split=train"], subset=1000, seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore import split_words
from avstore.errors import NotFoundError, UsageError, did_you_mean

if TYPE_CHECKING:
    from avstore.catalogue import Catalogue


@dataclass(frozen=True)
class Selection:
    """Video numbers sorted by key, int64 (n,); `digest` covers numbers and keys; `description` says how it was made."""

    numbers: np.ndarray
    digest: str
    description: str

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, numbers: Iterable[int]) -> np.ndarray:
        """The row of each video number in this selection, int64; NotFoundError for one that is not in it."""
        wanted = np.asarray(numbers if isinstance(numbers, np.ndarray) else [*numbers], np.int64)
        if not len(wanted):
            return np.zeros(0, np.int64)
        by_number, ordered = self._by_number
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        strange = np.flatnonzero(ordered[at] != wanted) if len(ordered) else np.zeros(1, np.int64)
        if len(strange):
            raise NotFoundError(f"video {int(wanted[strange[0]])} is not in this selection", self.description)
        return by_number[at]

    @cached_property
    def _by_number(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of their numbers, and the numbers in that order."""
        rows = np.argsort(self.numbers, kind="stable")
        return rows, self.numbers[rows]


def parse_where(store: Catalogue, conditions: Sequence[str]) -> list[tuple[str, bool, set[str]]]:
    """(column, wanted?, values) of conditions `column=value[,value]` and `column!=value[,value]`."""
    out = []
    for text in conditions:
        column, operator, values = text.partition("!=") if "!=" in text else text.partition("=")
        column = column.strip()
        if not operator or not column:
            raise UsageError(
                f"condition {text!r} is not column=value",
                "a column, = or !=, then values separated by commas",
                "e.g. --where split=train",
            )
        store.column(column)  # NotFoundError with a close match
        lists = values.strip().startswith("[")  # display=[560, 320]
        wanted = {values.strip()} if lists else {v.strip() for v in values.split(",")}
        out.append((column, operator == "=", {v.lower() if v in ("True", "False") else v for v in wanted}))
    return out


def text_of(value: object) -> str:
    """How a value of a column is written in a condition: as in JSON, an absent one as nothing."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_list(path: str | Path) -> list[str]:
    """Keys of a text file, one a line; blank lines and `#` comments aside; equal lines once."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as e:
        raise NotFoundError(f"list {path} cannot be read", e.strerror or str(e)) from e
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))


def select(
    store: Catalogue,
    *,
    where: Sequence[str] = (),
    list: str | Path | Sequence[str] | None = None,
    subset: int | None = None,
    seed: int = 0,
    held_out: bool = True,
    need_sound: bool = False,
    need_picture: bool = False,
) -> Selection:
    """The ok videos of `store` that meet all conditions.

    `where`: conditions on columns. `list`: a file of keys (a key without its suffix, or its last part, also finds its
    video when that is unique). `subset`: a seeded draw of n. `held_out=False` drops rows of a split that is
    not trained on (`split_words.py`). UsageError when nothing is left.
    """
    numbers = store.numbers  # ok, current
    said = []
    for column, wanted, values in parse_where(store, where):
        column_values = np.array([text_of(v) for v in store.column(column, numbers)])
        numbers = numbers[np.isin(column_values, sorted(values)) == wanted]
        said.append(f"{column}{'=' if wanted else '!='}{','.join(sorted(values))}")
    if list is not None:
        names = read_list(list) if isinstance(list, str | Path) else [str(n) for n in list]
        found = store.find(names)
        numbers = numbers[np.isin(numbers, found)]
        said.append(f"list {Path(list).name if isinstance(list, str | Path) else 'of keys'}")
    if not held_out and "split" in store.columns:
        splits = store.column("split", numbers)
        out = {s: split_words.held_out(s) for s in set(splits)}
        keep = np.array([not out[s] for s in splits], bool)
        if len(keep) and not keep.all():
            said.append(f"without {int((~keep).sum())} held-out videos (split test/val)")
        numbers = numbers[keep]
    for need, name, mask in ((need_sound, "sound", store.has_sound), (need_picture, "picture", store.has_picture)):
        if need:
            keep = mask[numbers]
            if not keep.all():
                said.append(f"without {int((~keep).sum())} videos that have no {name}")
            numbers = numbers[keep]
    numbers = np.array(sorted(numbers.tolist(), key=store.keys.__getitem__), np.int64)
    if subset is not None:
        if not 0 < subset <= len(numbers):
            raise UsageError(
                f"a subset of {subset} of {len(numbers)} videos",
                "it must be between 1 and the number of videos",
                "--subset N --seed S",
            )
        order = sorted(
            range(len(numbers)),
            key=lambda i: hashlib.sha256(
                f"{seed}:{store.key(int(numbers[i]))}".encode("utf-8", "surrogateescape")
            ).digest(),
        )
        numbers = numbers[np.sort(np.array(order[:subset]))]
        said.append(f"subset {subset} seed {seed}")
    if not len(numbers):
        splits = sorted({str(s) for s in store.column("split") if s is not None}) if "split" in store.columns else []
        raise UsageError(
            "no videos are left in this selection",
            "; ".join(said) or "the store has no ok videos",
            f"splits here: {', '.join(splits)}" if splits else "avstore ls STORE shows what there is",
        )
    return Selection(numbers, digest_of(store, numbers), "; ".join(said) or "all videos")


def digest_of(store: Catalogue, numbers: np.ndarray) -> str:
    """16 hex digits over numbers and keys, in this order: what `Selection.digest` is."""
    digest, step = hashlib.sha256(), 1 << 14
    for first in range(0, len(numbers), step):
        lines = [f"{n}:{store.keys[n]}\n" for n in numbers[first : first + step].tolist()]
        digest.update("".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def close_column(column: str, columns: Iterable[str]) -> NotFoundError:
    return NotFoundError(
        f"this store has no column {column!r}", did_you_mean(column, columns), "avstore info STORE lists the columns"
    )
