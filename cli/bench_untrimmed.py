"""`avstore bench untrimmed`: which moments of long videos are worth a look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import archive, console
from cli.bench import by_name, draw_curve
from cli.bench_probe import AllCheckpoints, CurveFile, Device, FoldColumn, SplitColumns, Work
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument

if TYPE_CHECKING:
    from avstore.store import Store


def untrimmed(
    store: StoreArgument = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A run with embeddings in the store, repeatable. Default: the only one.")
    ] = None,
    budget: Annotated[list[int] | None, typer.Option(help="Moments looked at, repeatable. Default: 1 to 10.")] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the preview of the first part and seed (safetensors).")
    ] = None,
    look: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Also where the preview looks in this video, and its attention; repeatable."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What --keep wrote: --look by it, nothing is measured.")
    ] = None,
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    fold_column: FoldColumn = None,
    split: SplitColumns = None,
    folds: Annotated[int | None, typer.Option(help="Stratified folds instead of a column or the split.")] = None,
    fold_seed: Annotated[int, typer.Option(help="Of --folds.")] = 0,
    random_draws: Annotated[int, typer.Option(help="Of the random selector.")] = 10,
    preset: Annotated[str, typer.Option(help="Of the preview: paper, or tiny for some dozens of videos.")] = "paper",
    epochs: Annotated[int | None, typer.Option(help="Of the preview. Default: the preset's; the authors' 25.")] = None,
    seeds: Annotated[int, typer.Option(help="Previews of each part, from --seed on.")] = 1,
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
    work: Work = None,
    device: Device = "auto",
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value]; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Of the preview and the random selector.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """Accuracy against moments looked at: the learned preview, random, uniform, the first, all.

    With --keep FILE the preview is kept; --look KEY prints which seconds of a video it chooses, and its attention.
    """
    asked = dict(locals())
    from avstore.errors import UsageError
    from avstore.index import choose_run
    from benchmarks import untrimmed as bench

    if curve is not None and not all_checkpoints:
        raise UsageError("--curve without --all-checkpoints", "a curve is drawn over checkpoints", "--all-checkpoints")
    if look and preview is None and keep is None:
        raise UsageError(
            "--look without a preview", "", "--keep FILE for the one that is trained now, or --preview FILE"
        )
    if preview is not None and (keep is not None or not look):
        raise UsageError("--preview looks at videos, and keeps nothing", "", "--preview FILE --look KEY")
    opened = open_store(store)
    if preview is not None:
        shown = _looks(opened, preview, look or [], max(budget or [5]))
        if json:
            console.as_json({"looks": shown})
        else:
            _print(shown)
        return
    which: list[str | int] = []
    folders: dict[str, Path] = {}
    if all_checkpoints:
        from benchmarks.curve import common_steps
        from trainers.run import find_run

        if not run:
            raise UsageError("no run is named", "checkpoints are of a run's networks", "--run runs/avid; repeatable")
        found = by_name([find_run(r) for r in run])
        names, folders = list(found), {name: r.path for name, r in found.items()}
        which = common_steps(list(found.values()))
    else:
        names = [choose_run(opened, r) for r in run] if run else [choose_run(opened, None)]
    with console.Progress("untrimmed", "parts") as progress:
        table = bench.bench(
            opened,
            names,
            budgets=tuple(budget) if budget else bench.BUDGETS,
            random_draws=random_draws,
            preset=preset,
            epochs=epochs,
            seed=seed,
            seeds=seeds,
            checkpoints=which,
            run_paths=folders,
            keep=keep,
            work=work,
            device=device,
            label=label,
            fold_column=fold_column,
            split_columns=split or (),
            fold_count=folds,
            fold_seed=fold_seed,
            progress=progress.show,
            **selection(where, list_, None, 0),
        )
    archive.keep(opened, table, "untrimmed", [Path(name).name for name in names], asked)
    shown = _looks(opened, keep, look or [], max(budget or [5])) if keep is not None else []
    if json:
        console.as_json(table.to_json() | ({"looks": shown} if shown else {}))
    elif markdown:
        console.data(table.to_markdown().rstrip())
    else:
        console.table(table)
    if all_checkpoints:
        draw_curve(table, "top-1", curve or Path("untrimmed-checkpoints.svg"))
    if shown and not json:
        _print(shown)
    if keep is not None:
        console.say(f"wrote {keep} ({console.size(keep.stat().st_size)})")
        if not look:
            console.say(f"next: avstore bench untrimmed {opened.path} --preview {keep} --look KEY")


def _looks(store: Store, file: Path, keys: list[str], budget: int) -> list[dict[str, Any]]:
    from benchmarks.look import kept, look

    found = kept(file)
    return [look(store, found, key, budget) for key in keys]


def _print(shown: list[dict[str, Any]]) -> None:
    from benchmarks.look import lines

    for found in shown:
        for line in lines(found):
            console.data(console.visible(line))
