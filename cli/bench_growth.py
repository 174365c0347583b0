"""`avstore bench growth`: what a store costs as it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.choose import open_store
from cli.store import Json, StoreArgument


def growth(
    store: StoreArgument = None,
    work: Annotated[Path, typer.Option(help="Where simulated stores are written, and removed again.")] = Path(
        "bench-growth"
    ),
    videos: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 100 to 1,000,000.")] = None,
    seconds: Annotated[float, typer.Option(help="For how long clips are read.")] = 4.0,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """Opening, first batch and cost of a clip of simulated stores: many records over this store's few real shards."""
    from benchmarks import growth as bench

    opened = open_store(store)
    with console.Progress("growth", "stores") as progress:
        chosen = {"videos": tuple(videos)} if videos else {}
        table = bench.run(opened.path, work, seconds=seconds, progress=progress.show, **chosen)
    console.result(table, json, markdown)
