"""`avstore export`: embeddings, or features for video summarisation, as HDF5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avstore.errors import NotFoundError, UsageError, did_you_mean
from cli import console
from cli.choose import open_store, selection
from cli.store import Json

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

LAYOUTS = ("embeddings", "eccv16")


def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.h5", help="The file to write.")],
    run: Annotated[
        list[str] | None, typer.Option(help="Whose embeddings; repeatable. Default: all (eccv16: the only one).")
    ] = None,
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "embeddings",
    tower: Annotated[
        list[str] | None,
        typer.Option(
            help="Of --layout eccv16: whose vectors are the features: video (default), audio, ..., joint; "
            "repeatable: side by side."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of --layout eccv16: SumMe or TVSum, whose summaries are written beside."),
    ] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only videos with column=value; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Only videos of this list.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a store's embeddings with their columns into an HDF5 file.

    --layout eccv16 writes the layout that video summarisers share: features of every 15th frame, segments by KTS.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"no layout {layout!r}", did_you_mean(layout, LAYOUTS))
    if layout != "eccv16" and annotations is not None:
        raise UsageError("--annotations belongs to --layout eccv16", "", "--layout eccv16")
    if layout != "eccv16" and tower:
        raise UsageError("--tower belongs to --layout eccv16", "the layout embeddings holds every tower of a run",
                         "--layout eccv16, or leave it away")  # fmt: skip
    if layout == "eccv16" and run and len(run) > 1:
        raise UsageError(f"{len(run)} runs in one eccv16 file", "it holds one row of features for each pick", "one run")
    from benchmarks import export as bench
    from benchmarks.annotations import read

    opened = open_store(store)
    numbers = opened.select(**selection(where, list_, None, 0)).numbers
    if layout == "eccv16":
        said = read(annotations) if annotations is not None else None
        towers = tower or ["video"]
        with console.Progress("export", "videos") as progress:
            done = bench.export_eccv16(
                opened, out, run[0] if run else None, towers, numbers, annotations=said, force=force,
                trained=_trained(opened, run, towers), progress=progress.update,
            )  # fmt: skip
    else:
        done = bench.export_embeddings(opened, out, run, numbers, force=force)
    if json:
        lists = {n: [{"key": k, "why": w} for k, w in getattr(done, n)] for n in ("left_out", "filled")}
        console.as_json({**done.__dict__, **lists})
    for key, why in done.left_out:
        console.warn(console.visible(f"left out: {key}: {why}"))
    for key, why in done.filled:
        console.warn(console.visible(f"{key}: {why}"))
    parts = ", ".join(done.groups) if layout != "eccv16" else f"one group for each ({done.groups[0]} ...)"
    console.say(console.visible(f"{done.path}: {done.videos} videos, {done.rows} rows: {parts}"))
    if layout == "eccv16":
        console.say("next: avstore bench summarize ANNOTATIONS --features " + console.visible(done.path))


def _trained(store: Store, run: list[str] | None, towers: list[str]) -> Run | None:
    """The run whose model makes joint features; None where the store has such a tower, or none is asked."""
    from avstore.index import choose_run, embedded_runs

    name = choose_run(store, run[0] if run else None)
    if "joint" not in towers or "joint" in embedded_runs(store)[name]:
        return None
    from benchmarks.lineage import trainers_of

    found, _ = trainers_of(store, [name])
    if not found:
        raise NotFoundError(
            f"{name} has no tower joint in {store.path}, and its run is not in runs/ here or beside the store",
            "joint features are outputs of the run's own model",
            "put its folder there, or --tower video --tower audio",
        )
    return found[0]
