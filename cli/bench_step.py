"""`avstore bench step`: what a training step costs."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console
from cli.store import Json


def step(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="What is trained.")] = "avid",
    preset: Annotated[str, typer.Option(help="small, tiny, paper.")] = "small",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="One setting; repeatable.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="overhead, rates, bank, mining, compiled; repeatable. Default: all but compiled."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="In each, everything that is compared runs once.")] = 3,
    mine: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Videos of the banks mined; repeatable. Default: 1e4 to 1e6.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Kind of bank mined; repeatable. Default: all, at 1e6 random and correlated."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="A run whose trained bank is mined too.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch on a CPU; 0: as it chooses.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")] = False,
    json: Json = False,
) -> None:
    """What a step costs: the loop above its passes, precisions, the bank, the mining of positives."""
    from benchmarks import step as steps

    sizes = steps.Sizes(rounds=rounds, mining=tuple(mine) if mine else steps.Sizes().mining)
    with console.Progress("step", "parts") as progress:
        tables = steps.run(
            method, preset, sets=set_ or (), sizes=sizes, only=only or (), kinds=kind or (), bank=run,
            threads=threads, device=device, progress=progress.show,
        )  # fmt: skip
    console.result(tables, json, markdown)
