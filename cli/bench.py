"""`avstore bench`: what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument


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
    from avstore.errors import UsageError
    from avstore.index import choose_run
    from benchmarks.retrieval import LEVELS
    from benchmarks.retrieval import retrieval as measure

    if subset is not None and folds is None:
        raise UsageError("--subset without --folds", "it thins out queries and gallery alike", "use --list or --where")
    if html is not None and folds is not None:
        raise UsageError("--html with --folds", "examples are of one set of queries", "--queries and --gallery")
    opened = open_store(store)
    names = [choose_run(opened, r) for r in run] if run else [choose_run(opened, None)]
    folders = {name: Path(r) if "/" in r else Path("runs") / r for name, r in zip(names, run or names, strict=True)}
    levels = tuple(lv for lv, on in zip(LEVELS, (class_level, instance_level), strict=True) if on) or LEVELS
    with console.Progress("retrieval", "steps") as progress:

        def show(stage: str, done: int, total: int) -> None:
            progress.stage_is(stage)
            progress.update(done, total)

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
            progress=show,
            **selection(where, list_, subset, seed),
        )
    if html is not None:
        from avstore.durable import write_atomic
        from benchmarks import page
        from benchmarks.sheet import sheet

        shown = list(dict.fromkeys(names))
        sides: dict[str, Any] = {"gallery": gallery or (), "queries": queries or (), **selection(where, list_, None, 0)}
        parts = [s for n in shown for s in sheet(opened, n, label=label, **sides)]
        parts.insert(0, page.section("Results", page.table(table)))
        text = page.page("Retrieval by example", f"{', '.join(shown)} in {opened.path.name}", parts, menu=True)
        write_atomic(html, text.encode())
        console.say(f"wrote {html} ({console.size(html.stat().st_size)}): open it in a browser")
    if json:
        console.as_json(table.to_json())
    elif markdown:
        console.data(table.to_markdown().rstrip())
    else:
        console.table(table)


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

        def show(stage: str, done: int, total: int) -> None:
            progress.stage_is(stage)
            progress.update(done, total)

        tables = speed.run(
            source,
            work,
            threads=threads or (1, 2),
            rounds=rounds,
            seconds=seconds,
            cold=not warm,
            only=only or (),
            progress=show,
        )
        if cases:
            from benchmarks import loader_cases

            tables += loader_cases.run(source, work, progress=show)
    if json:
        console.as_json([t.to_json() for t in tables])
        return
    for t in tables:
        if markdown:
            console.data(t.to_markdown().rstrip() + "\n")
        else:
            console.table(t)
