"""`avstore bench ingest`: how fast videos become a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.store import Json


def ingest(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of videos.")],
    work: Annotated[
        Path, typer.Option(help="Where stores are made, and deleted again; on the disk that is to be measured.")
    ] = Path("bench-ingest"),
    rounds: Annotated[int, typer.Option(help="In each, the bare loop and ingest run once.")] = 3,
    workers: Annotated[int | None, typer.Option(help="Decoding processes of each. Default: one per CPU.")] = None,
    copies: Annotated[
        int, typer.Option(help="Take every file so many times, so that a small set runs long enough.")
    ] = 1,
    profile: Annotated[str, typer.Option(help="Of the store: 112 or 224.")] = "112",
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    json: Json = False,
) -> None:
    """Ingest beside a loop that only decodes, resizes and encodes, and where the rest goes."""
    from benchmarks import ingest as speed

    with console.Progress("ingest", "runs") as progress:
        tables = speed.run(
            source, work, rounds=rounds, workers=workers, copies=copies, profile=profile, progress=progress.show
        )
    console.result(tables, json, markdown)
