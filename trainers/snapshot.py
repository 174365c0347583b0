"""A run's snapshot of its store: which videos, in which rows, and what normalises their spectrograms.

Bank rows and orders of epochs come from here, never from the store of the day, which may have grown since.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore import draws
from avstore.errors import ConflictError, UsageError
from avstore.frontends import BinStatistics, named, spectrogram
from avstore.selection import digest_of
from trainers.ancestry import seen_before
from trainers.config import RunConfig
from trainers.fit import needs_of, select
from trainers.methods import method

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

FORMAT = 1
LEAST_STD = {"ln": 0.02, "db": 0.1, "none": 0.001}  # of a bin: what hardly ever moves is not magnified a hundredfold


@dataclass(frozen=True)
class Snapshot:
    """What a run saw of its store.

    numbers: int64 (n,), the videos in bank order; digest: of numbers and keys. statistics: {"front_end", "hash",
    "mean", "std", "rows"}, or None without sound. notes: what is approximate, one text each. init: the run that this
    one started from. also_saw: int64, sorted, the videos of this store beyond `numbers` that the run it started from
    and its teachers saw (`ancestry.py`), None where nobody noted it; unknown: those of which that cannot be told.
    """

    store: str
    fingerprint: str
    numbers: np.ndarray
    digest: str
    selection: str  # how it was made
    tasks: int  # committed then
    statistics: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    init: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None  # class names in order, for methods that need labels
    versions: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)  # source -> digest, of methods that learn from others
    also_saw: np.ndarray | None = None
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            **value,
            "numbers": self.numbers.tolist(),
            "notes": list(self.notes),
            "labels": None if self.labels is None else list(self.labels),
            "also_saw": None if self.also_saw is None else self.also_saw.tolist(),
            "unknown": list(self.unknown),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Snapshot:
        value = dict(value)
        if value.pop("format", None) != FORMAT:
            raise ConflictError("this run has a snapshot of another format", f"this avstore reads format {FORMAT}")
        labels, also_saw = value["labels"], value.get("also_saw")  # runs of older versions lack the latter
        return cls(
            **{
                **value,
                "numbers": np.array(value["numbers"], np.int64),
                "notes": tuple(value["notes"]),
                "labels": None if labels is None else tuple(labels),
                "also_saw": None if also_saw is None else np.array(also_saw, np.int64),
                "unknown": tuple(value.get("unknown", ())),
            }
        )

    def same_videos(self, other: Snapshot) -> bool:
        """Whether both are of the same videos of one store in the same rows, so that a bank of one serves the other."""
        return (self.fingerprint, self.digest) == (other.fingerprint, other.digest)

    def require_fits(self, store: Store) -> None:
        """ConflictError unless `store` is the one that this snapshot was taken of."""
        if store.fingerprint != self.fingerprint:
            raise ConflictError(
                f"this run was made on another store than {store.path}",
                f"its spec has fingerprint {self.fingerprint}, this one's {store.fingerprint}",
                f"name its store ({self.store}), or start a new run with --run",
            )
        if self.numbers.size and int(self.numbers.max()) >= store.total:
            raise ConflictError(
                f"this run has videos that {store.path} lacks",
                f"up to number {int(self.numbers.max())} of {store.total}",
                f"name its store ({self.store})",
            )
        if digest_of(store, self.numbers) != self.digest or not store.ok[self.numbers].all():
            raise ConflictError(
                f"the videos of this run are others in {store.path}",
                "numbers and keys do not agree with its snapshot",
                f"name its store ({self.store}), or start a new run with --run",
            )


def take_snapshot(
    store: Store,
    config: RunConfig,
    notes: Sequence[str] = (),
    init: Run | None = None,
    selection: dict[str, Any] | None = None,
) -> Snapshot:
    """What a run keeps of its store. With `init`, a finished run, the selection is that run's where none is asked and
    `store` is its store, so that its bank's rows go on. Of another selection or store the run begins a bank of its own
    (a note says so); its bins are normalised by the statistics of `init`, by which its networks were trained."""
    needs = needs_of(config)
    asked = {k: v for k, v in (selection or {}).items() if v not in (None, (), [])}
    goes_on = init is not None and not asked and _is_of(init.snapshot, store)
    chosen = None if goes_on else select(store, config, **asked)
    told, lineage = [*notes], None
    if init is not None:
        before = init.snapshot
        newest = init.checkpoint()
        if not init.finished:
            raise ConflictError(
                f"the run {init.path} is not finished",
                f"its last checkpoint is step {newest.step}",
                "repeat its command first",
            )
        if chosen is None:
            numbers, digest, words = before.numbers, before.digest, before.selection
        else:
            numbers, digest, words = chosen.numbers, chosen.digest, chosen.description
            if not (digest == before.digest and _is_of(before, store)):
                told.append(
                    f"{config.name} starts from {init.path}, which saw other videos ({len(before.numbers)} of "
                    f"{before.store}: {before.selection}): a memory bank is filled anew, by embedding these once"
                )
        lineage = {"run": init.name, "step": newest.step, "checkpoint": newest.digest, "config": init.config.digest}
        same_sound = before.statistics is not None and before.statistics["front_end"] == needs.front_end
        statistics = before.statistics if same_sound else None
    else:
        assert chosen is not None
        numbers, digest, words, statistics = chosen.numbers, chosen.digest, chosen.description, None
    if needs.sound and needs.front_end is not None and statistics is None:
        statistics = measure_statistics(
            store, numbers, needs.front_end, needs.seconds, config.loop.statistics_clips, config.loop.seed
        )
    labels = None
    if needs.labels:
        labels = tuple(sorted({str(x) for x in store.column("label", numbers) if x is not None}))
    teachers = _teachers(config)
    before_it = seen_before(store, [] if init is None else [init], teachers)
    dropped = [part for part in words.split("; ") if part.startswith("without ")]
    return Snapshot(
        store=os.fspath(store.path),
        fingerprint=store.fingerprint,
        numbers=np.asarray(numbers, np.int64),
        digest=digest,
        selection=words,
        tasks=sum(len(p.tasks) for p in store.plans) - store.pending_tasks,
        statistics=statistics,
        notes=(*told, *dropped),
        init=lineage,
        labels=labels,
        versions={k: sorted(v) for k, v in store.versions.items()},
        teachers=teachers,
        also_saw=np.setdiff1d(before_it.numbers, numbers),
        unknown=before_it.unknown,
    )


def _is_of(snapshot: Snapshot, store: Store) -> bool:
    try:
        snapshot.require_fits(store)
    except ConflictError:
        return False
    return True


def _teachers(config: RunConfig) -> dict[str, str]:
    named = method(config.name).load().teachers
    if named is None:
        return {}
    from trainers.teacher import digests

    return digests(named(config.method))


def measure_statistics(
    store: Store, numbers: np.ndarray, front_end: str, seconds: float, clips: int, seed: int
) -> dict[str, Any]:
    """Mean and deviation of each bin over `clips` sound windows of these videos, a seeded sample (videos in turn).

    Rows beyond a video's sound do not count. A deviation is at least 0.1 dB (0.02 in natural logarithms; of raw sound a
    thousandth of full scale).
    """
    import torch

    recipe, rate = named(front_end), store.spec.sample_rate
    window = int(Fraction(str(seconds)) * rate)
    heard = numbers[store.has_sound[numbers]]
    if not len(heard):
        raise UsageError("no video of this selection has sound", "the front-end's statistics come from them")
    order = np.argsort(draws.uniform(seed, "select", 0, np.arange(len(heard)), 0)[:, 0], kind="stable")
    statistics = BinStatistics(recipe.bins)
    for first in range(0, clips, 64):
        turns, places = np.divmod(np.arange(first, min(first + 64, clips)), len(heard))
        chosen = heard[order[places]]
        u = draws.uniform(seed, "select", 1, order[places], turns)[:, 0]
        start = store.sound[chosen, 0]
        room = np.maximum(store.sound[chosen, 1] - start - window, 0)
        offsets = draws.integers(u, start, start + room)
        waves = np.zeros((len(chosen), window), np.int16)
        valid = np.zeros(len(chosen), np.int64)
        for i, (video, offset) in enumerate(zip(chosen.tolist(), offsets.tolist(), strict=True)):
            end = min(offset + window, int(store.sound[video, 1]))
            waves[i, : end - offset], _ = store.waveform(video, Fraction(offset, rate), Fraction(end - offset, rate))
            valid[i] = end - offset
        rows = spectrogram(torch.from_numpy(waves), front_end, rate)
        there = (
            np.arange(rows.shape[1])[None]
            < (valid * recipe.rate.numerator // (recipe.rate.denominator * rate))[:, None]
        )
        statistics.update(rows, there)
    std = np.maximum(statistics.std, LEAST_STD[recipe.log])
    return {
        "front_end": front_end,
        "hash": recipe.hash,
        "mean": statistics.mean.tolist(),
        "std": std.tolist(),
        "rows": statistics.count,
    }
