"""The report: one page about a store or a run, with everything that was measured of it.

    report(store=store, runs=[run], within=60)      # the page's text

In the page: a run's configuration and training curves with its wait for data, tables of results, counts, failures with
their reasons, a contact sheet with sound, maps of saliency, timelines of summaries, answers of retrieval. Tables are
those that benches kept in the store's logs (`archive.py`), those given by name (a bench's `--json`), and
RUN/benches/*.json; further pictures come in by name, or from RUN/pictures/. Saliency and timelines run networks: they
have a budget, and what was left out is named on the page with the command that makes it. Not here: any bench.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avstore.errors import CorruptError, NotFoundError, UsageError
from avstore.index import embedded_runs
from benchmarks import page
from benchmarks.archive import archived
from benchmarks.budget import Budget
from benchmarks.card import Told, card, uri
from benchmarks.chart import Curve, chart
from benchmarks.lineage import trainers_of
from benchmarks.sheet import draw, sheet
from benchmarks.table import Table
from benchmarks.timeline import Teller, timelines

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

FAILURES = 200  # named one by one
KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
MOST = 16 * 2**20  # bytes of one picture
TIMES = (("data-wait", "data_wait_s"), ("prepare", "prepare_s"), ("compute", "compute_s"))
ALONE = frozenset({"step", "samples", "rows", "duplicates", "epoch", "lr", "loss", "grad_norm", "clips_per_s",
                   *(name for _, name in TIMES), "device_wait_s"})  # fmt: skip


def read_tables(path: Path) -> list[Table]:
    """The tables in a JSON file that a bench wrote: one, or a list. NotFoundError, CorruptError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFoundError(f"there is no file {path}", "", "avstore bench NAME --json > FILE.json writes one") from e
    except (ValueError, OSError) as e:
        raise CorruptError(f"{path} is no JSON", str(e), "avstore bench NAME --json > FILE.json writes it") from e
    out = []
    for one in value if isinstance(value, list) else [value]:
        fits = isinstance(one, dict) and isinstance(one.get("columns"), list) and isinstance(one.get("rows"), list)
        if not fits or not all(isinstance(r, dict) for r in one["rows"]):
            raise CorruptError(f"{path} holds no table of results", "it needs title, columns and rows", "bench --json")
        columns, notes = tuple(map(str, one["columns"])), tuple(map(str, one.get("notes", ())))
        spreads = tuple(map(str, one.get("spreads", ())))
        out.append(Table(str(one.get("title", path.stem)), columns, one["rows"], notes, spreads))
    return out


def read_picture(path: Path) -> str:
    """A picture file as a data: address. UsageError for a kind that browsers do not show, or one too large."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path} is no picture for a page", f"there is: {', '.join(KINDS)}")
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "a picture for the report", "avstore explain makes some")
    if path.stat().st_size > MOST:
        raise UsageError(f"{path} has {path.stat().st_size} bytes", f"at most {MOST}: it goes into the page itself")
    return uri(path.read_bytes(), kind)


def hours(seconds: float) -> str:
    """`2.4 h`, `20 min`, `45 s`."""
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def counts(store: Store) -> str:
    """Section: how many videos, how long, with what; the values of each column."""
    numbers = store.numbers
    status = Counter(store.facts["status"][int(n)] for n in store.current)
    length = sum(float(store.seconds(int(n))) for n in numbers)
    spec = store.spec
    size = sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())
    values: list[tuple[str, Any]] = [
        ("videos", f"{len(numbers):,}"),
        ("failed", f"{status.get('failed', 0):,}"),
        *([("pending", f"{status['pending']:,}")] if status.get("pending") else []),
        ("of media", hours(length)),
        ("with picture", f"{int(store.has_picture[numbers].sum()):,}"),
        ("with sound", f"{int(store.has_sound[numbers].sum()):,}"),
        ("on disk", f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"),
    ]
    if spec.picture:
        values.append((f"pixels at {spec.fps} fps", f"{spec.height}\N{MULTIPLICATION SIGN}{spec.width}"))
    values.append(("of sound, mono", f"{spec.sample_rate / 1000:g} kHz"))
    body = page.tiles(values)
    for name in [c for c in ("label", "split") if c in store.columns]:
        found = Counter(str(v) for v in store.column(name) if v is not None)
        if len(found) > 1:
            told = ", ".join(f"{v} {n:,}" for v, n in found.most_common(12)) + (", \u2026" if len(found) > 12 else "")
            body += f'<p class="note">{page.escaped(name)}: {len(found)} values. {page.escaped(told)}</p>'
    return page.section("Store", body, f"{store.path.name}, fingerprint {store.fingerprint}")


def failures(store: Store) -> str:
    """Section: why videos failed, and which."""
    failed = [int(n) for n in store.current if store.facts["status"][int(n)] == "failed"]
    if not failed:
        return page.section("Failures", "", "None: every file of the plan is in the store.")
    reasons = Counter(str(store.facts["reason"][n]) for n in failed)
    rows = [
        {"number": n, "key": store.key(n), "reason": store.facts["reason"][n], "message": store.facts["message"][n]}
        for n in failed[:FAILURES]
    ]
    more = (f"{len(failed) - FAILURES:,} more: avstore ls --failed",) if len(failed) > FAILURES else ()
    shown = page.table(Table("Which", ("number", "key", "reason", "message"), rows, more))
    opened = " open" if len(failed) <= 12 else ""
    body = page.bars(reasons.most_common()) + f"<details{opened}><summary>{len(rows)} files</summary>{shown}</details>"
    return page.section("Failures", body, f"{len(failed):,} of {len(store.current):,} videos are not in the store.")


def contact(store: Store, count: int = 18, seed: int = 0, label: str = "label") -> str:
    """Section: `count` videos, drawn class by class by a seed, moving and with players. "" for an empty store."""
    if count < 0:
        raise UsageError(f"{count} videos in the contact sheet", "0 or more")
    numbers = store.numbers
    if not len(numbers) or not count:
        return ""
    values = store.column(label, numbers) if label in store.columns else [None] * len(numbers)
    labels = [None if v is None else str(v) for v in values]
    cards = [card(store, int(numbers[i]), Told(label=labels[i])) for i in draw(labels, count, seed).tolist()]
    how = f"drawn class by class (seed {seed})" if label in store.columns else f"drawn at random (seed {seed})"
    note = f"{len(cards)} of {len(numbers):,} videos, {how}: 3 s from the middle of each. A click plays the sound."
    return page.section("Contact sheet", f'<div class="cards">{"".join(cards)}</div>', note)


def training(run: Run) -> str:
    """Section: the curves in metrics.jsonl, with where the time of a step goes."""
    from trainers.metrics import read_metrics

    lines = read_metrics(run.path / "metrics.jsonl")
    title = f"Training of {run.name}"
    if len(lines) < 2:
        return page.section(title, "", "It has not logged two steps yet.")
    step = [float(x["step"]) for x in lines]
    smooth = max(1, len(lines) // 20)

    def curve(name: str, key: str, scale: float = 1) -> Curve:
        values = [x.get(key) for x in lines]
        kept = [scale * v if isinstance(v, int | float) and not isinstance(v, bool) else None for v in values]
        return Curve(name, step, kept)

    others = [k for k in dict.fromkeys(k for x in lines for k in x) if k not in ALONE]
    values = {k: {x[k] for x in lines if isinstance(x.get(k), int | float)} for k in others}
    terms = [k for k in others if len(values[k]) > 1]
    fixed = [f"{k.replace('_', ' ')} {next(iter(values[k])):.4g}" for k in others if len(values[k]) == 1]
    device = [float(x.get("device_wait_s") or 0) for x in lines]  # a part of compute; none on a CPU
    parts = [*TIMES, *([("device-wait", "device_wait_s")] if any("device_wait_s" in x for x in lines) else [])]
    figures = [
        chart("Loss", [curve("loss", "loss")], smooth=smooth),
        chart("Milliseconds of a step", [curve(n, k, 1000) for n, k in parts], zero=True),
        chart("Clips per second", [curve("clips/s", "clips_per_s")], zero=True, smooth=smooth),
        chart("Learning rate", [curve("lr", "lr")], zero=True),
        chart("Gradient norm", [curve("norm", "grad_norm")], zero=True, smooth=smooth),
        *(chart(k.replace("_", " "), [curve(k, k)], smooth=smooth) for k in terms),
    ]
    note = f"{len(lines)} logged steps of {int(step[-1])}."
    total = [sum(float(x.get(k) or 0) for x in lines) for _, k in TIMES]
    if sum(total):
        note += f" Waiting for data took {100 * total[0] / sum(total):.1f} % of the time of the logged steps."
        if len(parts) > len(TIMES):
            share = 100 * sum(device) / sum(total)
            note += f" Within compute, the device waited for its batches to be copied and augmented {share:.1f} %."
    if fixed:
        note += f" The same throughout: {', '.join(fixed)}."
    if smooth > 1:
        note += f" Strong lines: mean of the last {smooth} points; behind them the points."
    return page.section(title, f'<div class="charts">{"".join(figures)}</div>', note)


def about(run: Run) -> str:
    """Section: what the run was asked, what it saw of its store, how far it is."""
    from trainers.machine import read_machine, sentence, short
    from trainers.typed import as_text

    checkpoints = run.checkpoints()
    values: list[tuple[str, Any]] = [("method", run.config.name)]
    if (run.path / "snapshot.json").is_file():
        values.append(("videos trained on", f"{len(run.snapshot.numbers):,}"))
    if checkpoints:
        total = int(checkpoints[-1].state["total_steps"])
        values.append(
            ("steps", f"{checkpoints[-1].step:,}" if run.finished else f"{checkpoints[-1].step:,} of {total:,}")
        )
        values.append(("checkpoint kept" if len(checkpoints) == 1 else "checkpoints kept", len(checkpoints)))
    machine = read_machine(run.path)
    values += short(machine) if machine is not None else []
    asked = run.config.values()
    rows = [{"key": k, "value": as_text(v)} for k, v in asked.items()]
    listed = page.table(Table("Every key", ("key", "value"), rows))
    note = ""
    if (run.path / "snapshot.json").is_file():
        told = [run.snapshot.selection, *run.snapshot.notes]
        told += [sentence(machine)] if machine is not None else []
        note = " ".join(f"{t[:1].upper()}{t[1:].rstrip('.')}." for t in dict.fromkeys(told) if t)
    body = page.tiles(values) + f"<details><summary>Configuration, {len(rows)} keys</summary>{listed}</details>"
    return page.section(f"Run {run.name}", body, note)


def benches(tables: Sequence[Table]) -> str:
    """Section: tables of results; "" without any."""
    return page.section("Results", "".join(page.table(t) for t in tables)) if tables else ""


def pictured(files: Sequence[Path]) -> str:
    """Section: pictures that other commands made; "" without any."""
    if not files:
        return ""
    shown = "".join(page.picture(read_picture(f), f.stem.replace("-", " ").replace("_", " ")) for f in files)
    return page.section("Pictures", f'<div class="pictures">{shown}</div>')


def beside(run: Run) -> tuple[list[Path], list[Path]]:
    """(tables, pictures) kept in the run's own folder: benches/*.json and pictures/*."""
    pictures = sorted(p for p in (run.path / "pictures").glob("*") if p.suffix.lower() in KINDS)
    return sorted((run.path / "benches").glob("*.json")), pictures


def attended(
    store: Store, runs: Sequence[Run], budget: Budget, *, count: int, seed: int, label: str, device: str
) -> str:
    """Section: maps of saliency of `count` clips by each run's networks; "" without any."""
    if not count or not runs:
        return ""
    from benchmarks.explain_page import saliency_section

    return saliency_section(store, runs, store.numbers, count, budget, label=label, seed=seed, device=device)


def report(
    *,
    store: Store | None,
    runs: Sequence[Run] = (),
    embedded: Sequence[str] | None = None,
    tables: Sequence[Path] = (),
    pictures: Sequence[Path] = (),
    count: int = 18,
    queries: int = 4,
    saliency: int = 2,
    summaries: int = 2,
    within: float = 120.0,
    seed: int = 0,
    label: str = "label",
    device: str = "auto",
) -> str:
    """The page about a store, about runs, or both.

    embedded: names of runs in the store whose retrieval is shown; None: of the runs given, else of all up to two.
    count: videos in the contact sheet; queries: examples for each of v-v and a-a, 0 for none. saliency, summaries:
    clips with maps and videos with timelines, 0 for none; within: seconds for these two together. UsageError without
    anything to tell of; NotFoundError for a file or embeddings that are named and not there.
    """
    if store is None and not runs:
        raise UsageError("a report of nothing", "neither a store nor a run is given")
    if min(saliency, summaries) < 0:
        raise UsageError(f"{saliency} maps of saliency, {summaries} summaries", "0 or more")
    budget = Budget(within)
    files, shown = list(tables), list(pictures)
    for run in runs:
        found = beside(run)
        files += [f for f in found[0] if f not in files]
        shown += [f for f in found[1] if f not in shown]
    parts = [s for run in runs for s in (about(run), training(run))]
    if store is None:
        parts.append(benches([t for f in files for t in read_tables(f)]))
        budget.leave("store, contact sheet, saliency, summaries, retrieval", "the store is not there",
                     f"avstore report {runs[0].path} --store STORE")  # fmt: skip
    else:
        there = embedded_runs(store)
        names = list(embedded) if embedded is not None else [r.name for r in runs if r.name in there]
        if embedded is None and not runs:
            names = list(there)[:2]
        for name in names:
            if name not in there:
                raise NotFoundError(
                    f"no embeddings of {name} in {store.path}",
                    f"there is: {', '.join(there) or 'none'}",
                    f"avstore embed {name} {store.path}",
                )
        given = [t for f in files for t in read_tables(f)]
        for f in archived(store, [*names, *(r.name for r in runs)] if runs else None):
            try:
                given += read_tables(f)
            except CorruptError as e:  # one damaged log must not cost the page
                budget.leave(f"the table in {f}", e.what, "remove the file, and do that bench again")
        parts.append(benches(given))
        if not given:
            budget.leave("tables of results", "no bench was done here", f"avstore bench retrieval {store.path}")
        parts += [counts(store), failures(store), contact(store, count, seed, label)]
        lookers, lost = (list(runs), []) if runs else trainers_of(store, names)
        for name in lost if saliency else ():
            budget.leave(f"saliency of {name}", "the folder of this run is not in runs/ or beside the store",
                         f"avstore explain {store.path} --run RUN")  # fmt: skip
        parts.append(attended(store, lookers, budget, count=saliency, seed=seed, label=label, device=device))
        tellers = [Teller(r.name, r) for r in runs] or [Teller(n) for n in names]
        parts.append(timelines(store, tellers, budget, count=summaries, seed=seed, label=label, device=device))
        if queries and not names:
            which = runs[0].path if runs else "RUN"
            why = f"the store has no embeddings{f' of {runs[0].name}' if runs else ''}"
            budget.leave("retrieval", why, f"avstore embed {which} {store.path}")
        for name in names:
            heads = {"video", "audio"} & set(there[name])
            if queries and heads:
                pairs = [p for p, tower in (("v-v", "video"), ("a-a", "audio")) if tower in heads]
                try:
                    parts += sheet(store, name, pairs=pairs, count=queries, seed=seed, label=label)
                except NotFoundError as e:
                    budget.leave(f"retrieval of {name}", e.what, e.next)
    parts += [pictured(shown), budget.section()]
    title = " and ".join(r.name for r in runs) if runs else str(store.path.name) if store is not None else ""
    sub = "A report of a store" if not runs else "A report of a training run" if len(runs) == 1 else "A report of runs"
    where = f", on {store.path.name}" if runs and store is not None else ""
    return page.page(title, f"{sub}{where}.", [p for p in parts if p], menu=True)
