"""A value over the checkpoints of a training, drawn against the epoch (CrissCross Fig. 3, right).

    which = common_steps(runs)
    draw(table, "top-1", Path("linear.svg"))          # rows with `step`, `epoch` and `of run`

Not here: what is measured at each checkpoint (the benches), and how lines are drawn (`chart.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.durable import write_atomic
from avstore.errors import UsageError
from benchmarks.chart import Curve, chart, drawing

if TYPE_CHECKING:
    from avstore.store import Store
    from benchmarks.table import Table
    from trainers.run import Run

GROUPS = ("level", "pair", "block", "selector", "moments")  # columns that a row of a curve may have


def common_steps(runs: Sequence[Run]) -> list[str | int]:
    """Steps of the checkpoints that all runs have, rising. UsageError where there are none."""
    steps: list[set[str | int]] = [{c.step for c in r.checkpoints()} for r in runs]
    common: list[str | int] = sorted(set.intersection(*steps)) if steps else []
    if not common:
        raise UsageError(
            "the runs have no checkpoint in common",
            "; ".join(f"{r.name}: {', '.join(str(c.step) for c in r.checkpoints()) or 'none'}" for r in runs)
            or "no run is named",
            "one --run, or train with keep_every",
        )
    return common


def place_of(run: Run, which: str | int = "latest") -> tuple[int, float]:
    """(step, epochs passed by then) of a checkpoint; NotFoundError as `Run.checkpoint`."""
    from trainers.data import Plan

    step = run.checkpoint(which).step
    return step, round(step / Plan(len(run.snapshot.numbers), run.config).steps_per_epoch, 4)


def over_checkpoints(bench: Callable[..., Table], store: Store, runs: Sequence[Run], **options: Any) -> Table:
    """A probe's table with the rows of every checkpoint that the runs share. Controls do not change with it: they, and
    the notes with their paired tests, are of the last. Rows get `step`, `epoch` and `of run`."""
    from benchmarks.probing import names

    of = {r.config.name: r for r in runs} | dict(zip(names(runs), runs, strict=True))
    steps = common_steps(runs)
    mine: list[dict[str, Any]] = []
    for which in steps:
        only = {"seeds": 0, "controls": False, "published": None} if which != steps[-1] else {}
        table = bench(store, runs, checkpoint=which, **options | {k: v for k, v in only.items() if k in options})
        for row in table.rows:
            name = str(row["features"]).split(", ")[0]  # before what a bench says of the row
            if name in of:
                step, epoch = place_of(of[name], which)
                row |= {"step": step, "epoch": epoch, "of run": row["features"]}
                row["features"] += f" step {step}"
                mine.append(row)
    rest = [r for r in table.rows if "step" not in r]
    order: dict[str, list[dict[str, Any]]] = {}
    for row in mine:
        order.setdefault(f"{row['of run']} {row.get('block', '')}", []).append(row)
    told = (*table.notes, f"controls, settings and paired tests: of the last checkpoint, step {steps[-1]}")
    return dataclasses.replace(table, rows=[*(r for rows in order.values() for r in rows), *rest], notes=told)


def curves(rows: Sequence[dict[str, Any]], value: str) -> list[Curve]:
    """A curve for each `of run` and group (block, pair, ...) of rows that have an epoch, in the order of the rows."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("epoch") is None or row.get(value) is None:
            continue
        told = " ".join(str(row[g]) for g in GROUPS if row.get(g) not in (None, ""))
        found.setdefault(f"{row['of run']} {told}".strip(), []).append((float(row["epoch"]), float(row[value])))
    return [Curve(n, [x for x, _ in sorted(p)], [y for _, y in sorted(p)]) for n, p in found.items()]


def levels(rows: Sequence[dict[str, Any]], value: str) -> list[tuple[str, float]]:
    """(name, value) of the rows without a checkpoint that have the value: controls."""
    out = []
    for row in rows:
        name = row.get("features", row.get("selector", row.get("scores", "")))
        if row.get("epoch") is None and row.get(value) is not None and not str(name).startswith("published"):
            told = " ".join(str(row[g]) for g in GROUPS if g != "selector" and row.get(g) not in (None, ""))
            out.append((f"{name} {told}".strip(), float(row[value])))
    return out


def draw(table: Table, value: str, file: Path) -> Path:
    """Writes the curves of a table as an SVG, eight to a chart, controls as level lines where one group is drawn.
    UsageError where fewer than two checkpoints were measured."""
    found = curves(table.rows, value)
    ends = sorted({x for c in found for x in c.x})
    if len(ends) < 2:
        raise UsageError(
            f"{len(ends)} checkpoints were measured",
            "a curve has two at least",
            "train with keep_every, or fewer --run",
        )
    flat = [Curve(name, [ends[0], ends[-1]], [y, y]) for name, y in levels(table.rows, value)]
    if len(found) + len(flat) <= 8:
        found = found + flat
    charts = [chart(f"{value}, {table.title}", found[i : i + 8], x="epoch", marks=True)
              for i in range(0, len(found), 8)]  # fmt: skip
    write_atomic(file, drawing(charts).encode())
    return file
