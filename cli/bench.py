"""`avstore bench`: what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import archive, console
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument

if TYPE_CHECKING:
    from benchmarks.table import Table
    from trainers.run import Run


def retrieval(
    store: StoreArgument = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A run with embeddings in the store, repeatable. Default: the only one.")
    ] = None,
    label: Annotated[str, typer.Option(help="The column whose equality makes an item relevant.")] = "label",
    class_level: Annotated[bool, typer.Option("--class", help="Class level only.")] = False,
    instance_level: Annotated[bool, typer.Option("--instance", help="Instance level only.")] = False,
    gallery: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Default: split=train; repeatable.")
    ] = None,
    queries: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Default: split=test; repeatable.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Stratified folds by --label: each is the queries once, the rest the gallery.")
    ] = None,
    fold_seed: Annotated[int, typer.Option(help="Of the folds, as in train --fold-seed.")] = 0,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="An official split, repeatable. Default: split1, ... averaged, else split."
        ),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(help="heads, trunks, conv2x ... conv5x, repeatable. Default: heads and trunks."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(help="Of each video, evenly spaced. Default: every second; for blocks 10.")
    ] = None,
    as_: Annotated[
        list[str] | None,
        typer.Option("--as", metavar="PROTOCOL", help="Also as published: SeLaVi, VCOP; repeatable."),
    ] = None,
    published: Annotated[str | None, typer.Option(help="UCF101 or HMDB51: the papers' figures beside.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="latest, or a step: the run's networks, not the store's embeddings.")
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="A row for each kept checkpoint, and a drawing of the value.")
    ] = False,
    curve: Annotated[Path | None, typer.Option(metavar="FILE", help="Where --all-checkpoints draws, an SVG.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="A folder in which what networks gave is kept: repeating goes on from there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value], for both sides; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")] = None,
    subset: Annotated[int | None, typer.Option(help="With --folds: a seeded draw of so many videos.")] = None,
    seed: Annotated[int, typer.Option(help="Of --subset.")] = 0,
    seeds: Annotated[int, typer.Option(help="Encoders with random weights to compare with; 0: none.")] = 1,
    no_raw: Annotated[bool, typer.Option("--no-raw", help="Leave out raw pixels, motion and spectrograms.")] = False,
    each: Annotated[bool, typer.Option("--each", help="A row for each run, instead of one for each method.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also a page: the table, and queries with what they found.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """R@k, mAP and MRR: video-video, audio-audio, video-audio, audio-video, with their controls."""
    asked = dict(locals())
    from avstore.errors import UsageError
    from avstore.index import choose_run
    from benchmarks.retrieval import DEFAULT, LEVELS
    from benchmarks.retrieval import retrieval as measure

    if checkpoint is not None and all_checkpoints:
        raise UsageError("--checkpoint with --all-checkpoints", "one, or all", "leave one away")
    if curve is not None and not all_checkpoints:
        raise UsageError("--curve without --all-checkpoints", "a curve is drawn over checkpoints", "--all-checkpoints")
    if html is not None and (checkpoint is not None or all_checkpoints):
        raise UsageError("--html with checkpoints", "its examples are of embeddings in the store", "embed the run")
    if subset is not None and folds is None:
        raise UsageError("--subset without --folds", "it thins out queries and gallery alike", "use --list or --where")
    if html is not None and folds is not None:
        raise UsageError("--html with --folds", "examples are of one set of queries", "--queries and --gallery")
    opened = open_store(store)
    which: list[str | int] = []
    if checkpoint is not None or all_checkpoints:
        from benchmarks.curve import common_steps
        from trainers.run import find_run

        if not run:
            raise UsageError(
                "no run is named", "checkpoints are of a run's networks", "--run runs/avid-cma; repeatable"
            )
        found = by_name([find_run(r) for r in run])
        names, folders = list(found), {name: r.path for name, r in found.items()}
        which = common_steps(list(found.values())) if all_checkpoints else [number(str(checkpoint))]
    elif block and not {"heads", "trunks"} & set(block) and run:  # nothing is read from the store's embeddings
        from trainers.run import find_run

        found = by_name([find_run(r) for r in run])
        names, folders = list(found), {name: r.path for name, r in found.items()}
    else:
        names = [choose_run(opened, r) for r in run] if run else [choose_run(opened, None)]
        from benchmarks.lineage import maker

        folders = {}
        for name, r in zip(names, run or names, strict=True):
            made = maker(opened, name, r)
            folders[name] = made.path if made is not None else Path(r) if "/" in r else Path("runs") / r
    levels = tuple(lv for lv, on in zip(LEVELS, (class_level, instance_level), strict=True) if on) or LEVELS
    with console.Progress("retrieval", "steps") as progress:
        table = measure(
            opened,
            list(dict.fromkeys(names)),
            label=label,
            levels=levels,
            gallery=gallery or (),
            queries=queries or (),
            fold_count=folds,
            fold_seed=fold_seed,
            seeds=seeds,
            raw=not no_raw,
            each=each,
            run_paths=folders,
            split_columns=split or (),
            shown=block or DEFAULT,
            clips=clips,
            protocols=as_ or (),
            checkpoints=which,
            published=published,
            work=work,
            device=device,
            progress=progress.show,
            **selection(where, list_, subset, seed),
        )
    archive.keep(opened, table, "retrieval", [Path(name).name for name in names], asked)
    if html is not None:
        from avstore.durable import write_atomic
        from benchmarks import page
        from benchmarks.sheet import sheet

        shown = list(dict.fromkeys(names))
        sides: dict[str, Any] = {"gallery": gallery or (), "queries": queries or (), **selection(where, list_, None, 0)}
        sides |= {"split_columns": split} if split else {}
        parts = [s for n in shown for s in sheet(opened, n, label=label, **sides)]
        parts.insert(0, page.section("Results", page.table(table)))
        text = page.page("Retrieval by example", f"{', '.join(shown)} in {opened.path.name}", parts, menu=True)
        write_atomic(html, text.encode())
        console.say(f"wrote {html} ({console.size(html.stat().st_size)}): open it in a browser")
    console.result(table, json, markdown)
    if all_checkpoints:
        draw_curve(table, "R@1", curve or Path("retrieval-checkpoints.svg"))


def by_name(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by the names of their folders, by their paths where folders of one name are asked for."""
    names = [r.name for r in runs]
    return {r.name if names.count(r.name) == 1 else str(r.path): r for r in runs}


def number(checkpoint: str) -> str | int:
    """latest, or a step as a number."""
    return int(checkpoint) if checkpoint.isdigit() else checkpoint


def draw_curve(table: Table, value: str, file: Path) -> None:
    """The drawing of --all-checkpoints, when the table is kept and printed: one checkpoint makes no curve, and a line
    says so."""
    from benchmarks.curve import draw

    if len({row["step"] for row in table.rows if row.get("step") is not None}) < 2:
        console.warn("one checkpoint is kept: there is no curve to draw (train with keep_every)")
        return
    draw(table, value, file)
    console.say(f"wrote {file} ({console.size(file.stat().st_size)})")


def loader(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of videos: all contenders read its clips.")],
    work: Annotated[
        Path,
        typer.Option(help="Where the stores and the others' files are made and kept; gigabytes per hour of media."),
    ] = Path("bench-loader"),
    threads: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 1 and 2.")] = None,
    rounds: Annotated[int, typer.Option(help="In each, every contender runs once.")] = 5,
    seconds: Annotated[float, typer.Option(help="For how long, in each round.")] = 1.5,
    only: Annotated[list[str] | None, typer.Option(help="A contender, repeatable; the limits are always in.")] = None,
    cases: Annotated[
        bool, typer.Option("--cases", help="Also what else comes along, beside a busy trainer, growth.")
    ] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Leave out the epoch with a cold page cache.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    json: Json = False,
) -> None:
    """How fast clips come: avstore, other loaders, and the limit of the machine, side by side."""
    from benchmarks import loader as speed

    with console.Progress("loader", "steps") as progress:
        tables = speed.run(
            source,
            work,
            threads=threads or (1, 2),
            rounds=rounds,
            seconds=seconds,
            cold=not warm,
            only=only or (),
            progress=progress.show,
        )
        if cases:
            from benchmarks import loader_cases

            tables += loader_cases.run(source, work, progress=progress.show)
    console.result(tables, json, markdown)
