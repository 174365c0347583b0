"""`avstore bench gpu`: the GPU checks and measures in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.store import Json


def gpu(
    out: Annotated[Path, typer.Option(help="Where gpu.json and gpu.md go.")] = Path("bench-gpu"),
    part: Annotated[list[str] | None, typer.Option(help="Only this part, repeatable. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu, or auto.")] = "auto",
    size: Annotated[str | None, typer.Option(help="full or toy. Default: full on CUDA, toy on a CPU.")] = None,
    minutes: Annotated[float, typer.Option(help="For all parts together; what does not fit is not run.")] = 9.5,
    work: Annotated[Path | None, typer.Option(help="Folder for media and stores. Default: a temporary one.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The report on stdout too.")] = False,
    json: Json = False,
) -> None:
    """Everything that wants a GPU, part by part; on a CPU at toy size. Exit 1 where a part did not end."""
    from benchmarks import gpu as bench

    with console.Progress("gpu", "parts") as progress:
        report = bench.run(
            device=device, parts=part or (), size=size, minutes=minutes, work=work, progress=progress.show
        )
    paths = report.write(out)
    if json:
        console.as_json(report.to_json())
    elif markdown:
        console.data(report.to_markdown().rstrip())
    else:
        for table in (*report.tables(), report.verdicts()):  # the verdicts where the eye ends up
            console.table(table)
    console.say(f"report: {paths[1]}, {paths[0]}")
    failed = [name for name, p in report.parts.items() if p["why"]]
    if failed:
        console.warn(f"did not end: {', '.join(failed)}")
        raise typer.Exit(1)
