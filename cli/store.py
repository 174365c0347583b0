"""`avstore info`, `ls`, `verify`: what is in a store, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.choose import open_store, store_path

if TYPE_CHECKING:
    import numpy as np

    from avstore.store import Store

StoreArgument = Annotated[
    Path | None, typer.Argument(metavar="[STORE]", help="Default: $AVSTORE_STORE, else the only store here.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def info(store: StoreArgument = None, json: Json = False) -> None:
    """What a store holds: counts, hours, spec, columns, sizes, coverage, failures."""
    value = describe(open_store(store))
    if json:
        console.as_json(value)
        return
    spec = value["spec"]
    shown: list[tuple[str, Any]] = [
        ("store", value["path"]),
        ("videos", f"{value['videos']} ok, {value['failed']} failed, {value['pending']} pending"),
        ("hours", f"{value['hours']:.2f}"),
        ("picture", f"{value['with_picture']} videos, {spec['height']}x{spec['width']} at {spec['fps']} fps, "
                    f"{spec['codec']}, fit {spec['fit']}" if spec["picture"] else "none (audio store)"),
        ("sound", f"{value['with_sound']} videos, {spec['sample_rate']} Hz mono, {value['silent']} of them silent"),
    ]  # fmt: skip
    shown += [("failed", f"{n} {reason}") for reason, n in value["reasons"].items()]
    shown += [(f"column {c}", text) for c, text in value["columns"].items()]
    shown += [(path, f"{console.size(n)}") for path, n in value["bytes"].items()]
    for run, towers in value["embeddings"].items():
        shown += [(f"embeddings {run}", ", ".join(f"{t} ({c['videos']} videos)" for t, c in towers.items()))]
    shown += [("fingerprint", value["fingerprint"]), ("made with", ", ".join(value["made_with"]))]
    console.pairs(shown)


def describe(store: Store) -> dict[str, Any]:
    """Everything `info` says, as JSON values."""
    from collections import Counter

    from avstore.index import embedded_runs

    status = [store.facts["status"][n] for n in store.current.tolist()]
    failed = [n for n, s in zip(store.current.tolist(), status, strict=True) if s == "failed"]
    seconds = store.frames[store.numbers] / store.spec.fps
    sound_only = store.frames[store.numbers] == 0
    seconds[sound_only] = store.samples[store.numbers][sound_only] / store.spec.sample_rate
    columns = {}
    for name in store.columns:
        values = Counter(str(v) for v in store.column(name) if v is not None)
        some = ", ".join(f"{v} ({n})" for v, n in values.most_common(6))
        columns[name] = f"{len(values)} values: {some}{', ...' if len(values) > 6 else ''}"
    lineage = store.lineage
    return {
        **lineage,
        "failed": len(failed),
        "pending": sum(s == "pending" for s in status),
        "pending_tasks": store.pending_tasks,
        "reasons": dict(Counter(store.facts["reason"][n] for n in failed).most_common()),
        "hours": float(seconds.sum()) / 3600,
        "with_picture": int(store.has_picture[store.numbers].sum()),
        "with_sound": int(store.has_sound[store.numbers].sum()),
        "silent": sum(bool(store.facts["silent"][n]) for n in store.numbers.tolist() if store.has_sound[n]),
        "columns": columns,
        "front_ends": store.front_ends,
        "bytes": _bytes(store),
        "embeddings": {
            run: {t: _coverage(store, run, t) for t in towers} for run, towers in embedded_runs(store).items()
        },
        "made_with": [f"{k} {'/'.join(v)}" for k, v in sorted(lineage["versions"].items())],
    }


def _bytes(store: Store) -> dict[str, int]:
    """Bytes on disk of each array."""
    import os

    out = {}
    for file in sorted(store.path.rglob("zarr.json")):
        folder = file.parent
        if folder == store.path or any(part.startswith(".") for part in folder.relative_to(store.path).parts):
            continue
        size = sum(e.stat().st_size for e in os.scandir(folder) if e.is_file() and e.name.startswith("c."))
        if size:
            out[str(folder.relative_to(store.path))] = size
    return out


def _coverage(store: Store, run: str, tower: str) -> dict[str, Any]:
    """How many of the ok videos have embeddings, and what the array says of its making."""
    import numpy as np

    from avstore.durable import read_json
    from avstore.index import read_rows

    rows = read_rows(store, run, tower)
    there = ~np.isnan(rows[:, :1]).all(axis=1)
    inside = store.places[store.numbers] < len(rows)
    numbers = store.numbers[inside]
    meta = read_json(store.path / "embeddings" / run / tower / "zarr.json")
    covered = int(there[store.places[numbers]].sum()) if len(numbers) else 0
    return {"videos": covered, "dimensions": int(rows.shape[1]), "lineage": meta.get("attributes", {})}


def ls(
    store: StoreArgument = None,
    columns: Annotated[
        str | None, typer.Option(help="Names separated by commas; any column or field of the records.")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value] or column!=...; repeatable.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failed videos with their reasons.")] = False,
    all: Annotated[bool, typer.Option("--all", help="Every video: ok, failed and pending.")] = False,
    limit: Annotated[int | None, typer.Option("-n", "--limit", help="At most so many.")] = None,
    json: Json = False,
) -> None:
    """List the videos of a store."""
    opened = open_store(store)
    names = [c.strip() for c in columns.split(",") if c.strip()] if columns else _default_columns(opened, failed)
    numbers = opened.current if all else opened.current[~opened.ok[opened.current]] if failed else opened.numbers
    if failed:
        numbers = numbers[[opened.facts["status"][int(n)] == "failed" for n in numbers]] if len(numbers) else numbers
    numbers = _where(opened, numbers, where or [])
    total = len(numbers)
    if limit is not None:
        numbers = numbers[: max(0, limit)]
    if total > len(numbers):
        console.say(f"{len(numbers)} of {total}")
    if not total:
        console.say("no videos" + (" failed" if failed else ""))
    if json and not columns:
        for n in numbers.tolist():
            console.as_json(opened[n].to_json())
        return
    values = [opened.column(name, numbers) for name in names]
    if json:
        for row in zip(*values, strict=True):
            console.as_json(dict(zip(names, row, strict=True)))
        return
    shown = [["" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in column] for column in values]
    console.columns(names, zip(*shown, strict=True))


def _default_columns(store: Store, failed: bool) -> list[str]:
    if failed:
        return ["number", "key", "reason", "message"]
    given = [c for c in ("label", "split") if c in store.columns]
    return ["number", "key", "seconds", *given]


def _where(store: Store, numbers: np.ndarray, conditions: list[str]) -> np.ndarray:
    """The numbers that meet every condition."""
    import numpy as np

    from avstore.selection import parse_where, text_of

    for column, wanted, values in parse_where(store, conditions):
        texts = np.array([text_of(v) for v in store.column(column, numbers)], dtype=object)
        numbers = numbers[[(t in values) == wanted for t in texts]] if len(numbers) else numbers
    return numbers


def verify(
    store: StoreArgument = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Plans, records, metadata, sizes and indexes; not the bytes of the chunks.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Shards read at once. Default: the CPUs.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make what is damaged again, from the source files; healthy bytes stay.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option(help="With --repair: the folder of the source files. Default: as it was ingested.")
    ] = None,
    json: Json = False,
) -> None:
    """Read everything and name what is damaged: the file, the video, the second. Exit 1 when something is."""
    from avstore.errors import UsageError
    from avstore.verify import Checked, Event, Fault
    from avstore.verify import verify as check

    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}", "at least one")
    path = store_path(store)
    if repair:
        if quick:
            raise UsageError("--quick with --repair", "a repair reads everything first", "leave --quick away")
        _repair(path, source, json)
        return
    if source is not None:
        raise UsageError("--source without --repair", "verify reads the store alone", "add --repair")
    shown = 0
    with console.Progress("verify", "tasks") as progress:

        def show(event: Event) -> None:
            nonlocal shown
            if isinstance(event, Checked):
                progress.update(event.done, event.total, media=event.seconds, extra=console.size(event.size))
            elif isinstance(event, Fault) and not json:
                shown += 1
                if shown <= 100:
                    console.data(_fault(event))

        report = check(path, show, payloads=not quick, threads=threads)
    if json:
        console.as_json(report.to_json())
    elif shown > 100:
        console.data(f"... {shown - 100} more faults; --json lists them")
    for text in report.notes:
        console.say(text)
    if report.stray:
        console.say(f"{len(report.stray)} leftovers of interrupted commands, e.g. {console.visible(report.stray[0])}")
    read = f"{report.videos} videos, {report.chunks} chunks, {console.size(report.size)}"
    if report.ok:
        console.say(f"{path}: whole ({read})")
        return
    faults = len(report.faults) + report.more
    console.warn(f"{path}: {faults} faults in {len(report.damaged)} videos, tasks to make again: "
                 f"{', '.join(map(str, report.tasks)) or 'none'} ({read})")  # fmt: skip
    raise typer.Exit(1)


def _repair(path: Path, source: Path | None, json: bool) -> None:
    """Repairs and says what was found, made again, and left; exit 1 when something is left."""
    from avstore.repair import Remade, repair
    from avstore.verify import Checked, Fault

    with console.Progress("verify", "tasks") as progress:

        def show(event: Any) -> None:
            if isinstance(event, Checked):
                progress.update(event.done, event.total, media=event.seconds, extra=console.size(event.size))
            elif isinstance(event, Remade):
                progress.stage_is("repair")
                progress.update(event.done, event.total)
            elif isinstance(event, Fault) and not json:
                console.data(_fault(event))

        out = repair(path, source, on_event=show)
    if json:
        console.as_json(out.to_json())
    if out.swept:
        console.say(f"{len(out.swept)} leftovers of interrupted commands removed")
    if out.found.ok and not out.files:
        console.say(f"{path}: whole, nothing to repair")
    else:
        console.say(f"{path}: {len(out.found.faults) + out.found.more} faults; {len(out.tasks)} tasks made again, "
                    f"{len(out.files)} files written")  # fmt: skip
    for what, why in out.left:
        console.warn(f"left: {console.visible(what)}: {console.visible(why)}")
    if not out.ok:
        raise typer.Exit(1)


def _fault(fault: Any) -> str:
    where = "" if fault.second is None else f" at second {fault.second:g}"
    who = "" if fault.video is None else f": video {fault.video} ({console.visible(fault.key)}){where}"
    if fault.video is None and where:
        who = f":{where} of the tape"
    return f"{console.visible(fault.file)}{who}: {console.visible(fault.what)}"
