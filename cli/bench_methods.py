"""`avstore bench methods`: every method at one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.choose import open_store
from cli.store import Json, StoreArgument


def methods(
    store: StoreArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; a repeated command goes on in it.")] = Path(
        "bench-methods"
    ),
    method: Annotated[list[str] | None, typer.Option(help="A method, repeatable. Default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Batches that a row is shown in all, stages and teachers included.")] = 200,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="k=v", help="A setting, for the methods that have it.")
    ] = None,
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    folds: Annotated[
        int | None, typer.Option(help="Stratified folds: seed s leaves fold s out. Default: train and test split.")
    ] = None,
    fold_seed: Annotated[int, typer.Option(help="Of --folds.")] = 0,
    sound: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Also probe the sound encoders on this store, by its folds.")
    ] = None,
    no_raw: Annotated[bool, typer.Option("--no-raw", help="Leave out raw features.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """Every method with the same encoders at one budget: retrieval by class, and probes of the sound encoders.

    Measured where the budget ends, as the question is; over a training: bench retrieval --all-checkpoints with its run.
    """
    from benchmarks import methods as bench

    opened = open_store(store)
    with console.Progress("methods", "runs") as progress:
        table = bench.bench(
            opened, out, methods=method or (), steps=steps, seeds=seeds, sets=set_ or (), label=label, fold_count=folds,
            fold_seed=fold_seed, sound=None if sound is None else open_store(sound), raw=not no_raw,
            progress=progress.show,
        )  # fmt: skip
    console.result(table, json, markdown)
