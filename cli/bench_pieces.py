"""`avstore bench pieces`: where the time of a raw clip goes."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console
from cli.choose import open_store
from cli.store import Json, StoreArgument


def pieces(
    store: StoreArgument = None,
    threads: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 1 and 2.")] = None,
    rounds: Annotated[int, typer.Option(help="In each, every piece runs once.")] = 4,
    seconds: Annotated[float, typer.Option(help="For how long, in each round.")] = 0.35,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """What copying, reading and checking a raw clip cost by themselves, beside a copy in memory."""
    from benchmarks import pieces as bench

    with console.Progress("pieces", "pieces") as progress:
        opened = open_store(store)
        table = bench.run(opened, threads=threads or (1, 2), rounds=rounds, seconds=seconds, progress=progress.show)
    console.result(table, json, markdown)
