"""`avstore bench untrimmed`: which moments of long videos are worth a look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument


def untrimmed(
    store: StoreArgument = None,
    run: Annotated[str | None, typer.Option(help="A run with embeddings in the store. Default: the only one.")] = None,
    budget: Annotated[list[int] | None, typer.Option(help="Moments looked at, repeatable. Default: 1 to 10.")] = None,
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    folds: Annotated[int | None, typer.Option(help="Stratified folds instead of a column or the split.")] = None,
    fold_seed: Annotated[int, typer.Option(help="Of --folds.")] = 0,
    random_draws: Annotated[int, typer.Option(help="Of the random selector.")] = 10,
    epochs: Annotated[int | None, typer.Option(help="Of the preview. Default: the authors' 25.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value]; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Of the preview and the random selector.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """Accuracy against moments looked at: the learned preview, random, uniform, the first, all."""
    from avstore.index import choose_run
    from benchmarks import untrimmed as bench

    opened = open_store(store)
    with console.Progress("untrimmed", "parts") as progress:

        def show(stage: str, done: int, total: int) -> None:
            progress.stage_is(stage)
            progress.update(done, total)

        table = bench.bench(
            opened,
            choose_run(opened, run),
            budgets=tuple(budget) if budget else bench.BUDGETS,
            random_draws=random_draws,
            epochs=epochs,
            seed=seed,
            label=label,
            fold_count=folds,
            fold_seed=fold_seed,
            progress=show,
            **selection(where, list_, None, 0),
        )
    if json:
        console.as_json(table.to_json())
    elif markdown:
        console.data(table.to_markdown().rstrip())
    else:
        console.table(table)
