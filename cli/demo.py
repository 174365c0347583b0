"""`avstore demo`: the generated media on which everything can be tried."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the clips go; made again only if missing.")],
    train: Annotated[int, typer.Option(help="Training clips.")] = 300,
    test: Annotated[int, typer.Option(help="Test clips.")] = 100,
    seconds: Annotated[float | None, typer.Option(help="Length of a clip. Default 3; with --long 20.")] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Untrimmed videos: noise in which something happens for 2 to 3 s.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything in the set.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: the CPUs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; write nothing.")] = False,
) -> None:
    """Generate an audio-visual demo set: eight classes whose sight and sound share hidden causes."""
    import os

    from benchmarks.demo_set import LONG, causes, generate

    if dry_run:
        causes(train, test, seed, seconds, long)  # refuses what makes no set
        each = (LONG if long else 3) if seconds is None else seconds
        console.say(f"{train + test} clips of {each:g} s, about {console.size((train + test) * 37e3 * each / 3)}")
        return
    with console.Progress("demo", "clips") as progress:
        generate(
            folder,
            train=train,
            test=test,
            seed=seed,
            seconds=seconds,
            workers=workers or os.cpu_count() or 1,
            progress=lambda done, total: progress.update(done, total),
            long=long,
        )
    console.say(f"{folder}: {train} training and {test} test clips{' of untrimmed video' if long else ''}")
    console.say(f"next: avstore ingest {folder}")
