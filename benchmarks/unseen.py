"""Which parts of a probe a run may be asked: those whose test videos it has not seen in pre-training.

Runs of folds (`avstore train --fold i/n`) are asked their own fold, so that n runs of a seed make one whole answer. A
run of none of the tested videos is asked everything. So are a run that has seen videos of every part, and one of
another store, of which nobody can tell; a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import ConflictError, UsageError
from benchmarks.probing import Outcome, Part, Probed

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run


def parts_of(store: Store, run: Run, probed: Probed) -> tuple[tuple[Part, ...], int | None]:
    """The parts that a run is asked, and how many videos tested in them it has seen: 0, or all parts are asked; None:
    it is of another store."""
    try:
        run.snapshot.require_fits(store)
    except ConflictError:  # of another store: whether it holds the same media cannot be told
        return probed.parts, None
    trained = run.snapshot.numbers
    counts = [int(np.isin(probed.numbers[p.test], trained).sum()) for p in probed.parts]
    fresh = tuple(p for p, n in zip(probed.parts, counts, strict=True) if not n)
    return (fresh, 0) if fresh else (probed.parts, sum(counts))


def plan(
    store: Store, runs: Sequence[Run], names: Sequence[str], probed: Probed
) -> tuple[Probed, list[tuple[Part, ...]], list[str]]:
    """The probe of the parts that all rows are asked, what each run is asked of it, and notes.

    names: the row of each run. UsageError where a row's runs do not make whole answers: each part as often as the next,
    or rows are asked different parts.
    """
    asked, notes = [], [*probed.notes]
    for run in runs:
        parts, count = parts_of(store, run, probed)
        asked.append(parts)
        if count is None:
            notes.append(
                f"{run.name} was trained on another store, {Path(run.snapshot.store).name}; whether these videos were "
                "in it is not known"
            )
        elif count:
            tested = sum(len(p.test) for p in probed.parts)
            notes.append(f"{run.name} saw {count} of {tested} tested videos in pre-training, without labels")
    kept: tuple[Part, ...] | None = None
    for name in dict.fromkeys(names):
        mine = [p.name for parts, n in zip(asked, names, strict=True) if n == name for p in parts]
        times = {p.name: mine.count(p.name) for p in probed.parts if p.name in mine}
        whole = tuple(p for p in probed.parts if p.name in times)
        if len(set(times.values())) > 1 or (kept is not None and [p.name for p in whole] != [p.name for p in kept]):
            raise UsageError(
                f"the runs of {name} do not make whole answers",
                "each is asked the parts that it has not seen in pre-training: "
                + ", ".join(f"{part} of {n} runs" for part, n in times.items()),
                "name the runs of all folds for each seed (and for each method)",
            )
        kept = whole
    assert kept is not None
    if any(len(parts) < len(probed.parts) for parts in asked):
        notes.append("each run is asked the parts alone whose test videos it has not seen in pre-training")
    left = [p.name for p in probed.parts if p.name not in {k.name for k in kept}]
    if left:
        notes.append(f"left out, as every run has seen videos of it: {', '.join(left)}")
    return Probed(probed.numbers, probed.labels, probed.classes, kept, probed.description), asked, notes


def whole(answers: Sequence[Sequence[Outcome]], probed: Probed) -> list[list[Outcome]]:
    """Answers of runs, each over some parts, as answers over all of them: the i-th of each part together."""
    by_part = [[o for answer in answers for o in answer if o.part == p.name] for p in probed.parts]
    return [list(one) for one in zip(*by_part, strict=True)]
