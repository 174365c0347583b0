"""Which parts of a probe a run may be asked: those whose test videos it has not seen in pre-training.

What a run's stages and teachers saw, it has seen. Runs of folds (`avstore train --fold i/n`) are asked their own fold,
so that n runs of a seed make one whole answer. A run of none of the tested videos is asked everything. So are a run
that has seen videos of every part, and one of another store, of which nobody can tell; a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avstore.errors import ConflictError, UsageError
from benchmarks.probing import Outcome, Part, Probed
from trainers.ancestry import seen_by
from trainers.methods import method

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run


def parts_of(store: Store, run: Run, probed: Probed) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts that a run is asked: those of whose test videos neither it nor what it learned from (its stages and
    teachers: `trainers/ancestry.py`) has seen any, all where there are none; and what is to be said of that."""
    try:
        seen = seen_by(run, store).numbers
    except ConflictError:  # of another store: whether it holds the same media cannot be told
        return probed.parts, told(store, run, probed.numbers, probed.parts)
    fresh = tuple(p for p in probed.parts if not np.isin(probed.numbers[p.test], seen).any())
    return fresh or probed.parts, told(store, run, probed.numbers, fresh or probed.parts)


def told(store: Store, run: Run, numbers: np.ndarray, parts: Sequence[Part]) -> tuple[str, ...]:
    """What is known of test videos of these parts (places into `numbers`) that a run was pre-trained on: notes."""
    try:
        seen = seen_by(run, store)
    except ConflictError:
        other = Path(run.snapshot.store).name
        return (f"{run.name} was trained on another store, {other}; whether these videos were in it is not known",)
    out = []
    tested = np.concatenate([numbers[p.test] for p in parts])
    count = int(np.isin(tested, seen.numbers).sum())
    if count:
        alone = count == int(np.isin(tested, run.snapshot.numbers).sum())
        how = "with their labels" if method(run.config.name).labels else "without labels"
        out.append(f"{run.name}{'' if alone else ', its stages and teachers included,'} saw {count} of {len(tested)} "
                   f"tested videos in pre-training, {how}")  # fmt: skip
    if seen.unknown:
        out.append(f"{run.name} learned from {', '.join(seen.unknown)}: whether that saw these videos is not known")
    return tuple(out)


def plan(
    store: Store, runs: Sequence[Run], names: Sequence[str], probed: Probed
) -> tuple[Probed, list[tuple[Part, ...]], list[str]]:
    """The probe of the parts that all rows are asked, what each run is asked of it, and notes.

    names: the row of each run. UsageError where a row's runs do not make whole answers: each part as often as the next,
    or rows are asked different parts.
    """
    asked, notes = [], [*probed.notes]
    for run in runs:
        parts, said = parts_of(store, run, probed)
        asked.append(parts)
        notes += said
    rows: dict[str, tuple[Part, ...]] = {}
    for name in dict.fromkeys(names):
        mine = [p.name for parts, n in zip(asked, names, strict=True) if n == name for p in parts]
        times = {p.name: mine.count(p.name) for p in probed.parts if p.name in mine}
        if len(set(times.values())) > 1:
            raise UsageError(
                f"the runs of {name} do not make whole answers",
                "each is asked the parts that it has not seen in pre-training: "
                + ", ".join(f"{part} of {n} runs" for part, n in times.items()),
                "name the runs of all folds for each seed (and for each method)",
            )
        rows[name] = tuple(p for p in probed.parts if p.name in times)
    kept = next(iter(rows.values()))
    if any(parts != kept for parts in rows.values()):
        raise _differing(store, rows)
    if any(len(parts) < len(probed.parts) for parts in asked):
        notes.append("each run is asked the parts alone whose test videos it has not seen in pre-training, its stages "
                     "and teachers included")  # fmt: skip
    left = [p.name for p in probed.parts if p.name not in {k.name for k in kept}]
    if left:
        notes.append(f"left out, as every run has seen videos of it: {', '.join(left)}")
    return Probed(probed.numbers, probed.labels, probed.classes, kept, probed.description), asked, notes


def _differing(store: Store, rows: Mapping[str, Sequence[Part]]) -> UsageError:
    """Rows that are asked different parts cannot be compared: which, and what all could be asked."""
    first, *others = rows.values()
    common = [p.name for p in first if all(p in parts for parts in others)]
    columns = [name.partition(",")[0] for name in common]  # `split1, its validation part`
    advice = "name the runs of all folds for each seed (and for each method)"
    if common and all(c in store.columns for c in columns):
        asked = " ".join(f"--split {c}" for c in columns)
        advice = f"{asked}, which all have not seen, or name runs of the other parts"
    elif common:
        advice += f"; all have not seen {', '.join(common)}"
    return UsageError(
        f"{', '.join(rows)} are asked different parts",
        "each is asked the parts that it has not seen in pre-training: "
        + "; ".join(f"{name} {', '.join(p.name for p in parts)}" for name, parts in rows.items()),
        advice,
    )


def whole(answers: Sequence[Sequence[Outcome]], probed: Probed) -> list[list[Outcome]]:
    """Answers of runs, each over some parts, as answers over all of them: the i-th of each part together."""
    by_part = [[o for answer in answers for o in answer if o.part == p.name] for p in probed.parts]
    return [list(one) for one in zip(*by_part, strict=True)]
