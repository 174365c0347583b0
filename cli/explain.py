"""`avstore explain`: what networks look at and listen to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument


def explain(
    store: StoreArgument = None,
    run: Annotated[list[str] | None, typer.Option(help="A run; repeat it to see two side by side.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes.")] = Path("explain"),
    head: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A fine-tuned network, or the work folder of bench finetune --keep: class activation maps.",
        ),
    ] = None,
    of_class: Annotated[
        str | None, typer.Option("--class", help="Of --head: the class. Default: each video's own.")
    ] = None,
    video: Annotated[list[int] | None, typer.Option(metavar="NUMBER", help="A video to map, repeatable.")] = None,
    second: Annotated[int | None, typer.Option(help="Of each. Default: its middle.")] = None,
    count: Annotated[int, typer.Option(help="Videos to map where none is named.")] = 4,
    block: Annotated[
        str | None,
        typer.Option(help="conv2x ... conv5x: later ones are coarser. Default: conv4x, of --head conv5x."),
    ] = None,
    form: Annotated[str, typer.Option(help="grad-cam, or product: place by place.")] = "grad-cam",
    projection: Annotated[str, typer.Option(help="pca, tsne or umap.")] = "pca",
    points: Annotated[int, typer.Option(help="Videos in the map of features; 0: none.")] = 200,
    label: Annotated[str, typer.Option(help="The column that colours it.")] = "label",
    checkpoint: Annotated[str, typer.Option(help="latest, or a step.")] = "latest",
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value]; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Json = False,
) -> None:
    """Draw saliency of sight and sound over clips, and a map of the features, as pictures, Parquet and a page."""
    from benchmarks.explain_page import explain as make
    from trainers.run import find_run

    opened = open_store(store)
    runs = [find_run(name) for name in run or ()]
    numbers = opened.select(**selection(where, list_, None, 0)).numbers
    with console.Progress("explain", "runs") as progress:
        made = make(
            opened, runs, output, numbers=numbers, heads=_heads(head or []), of_class=of_class,
            videos=video or (), second=second, count=count, points=points,
            block=block, form=form, how=projection, label=label, seed=seed, device=device, progress=progress.show,
            which=int(checkpoint) if checkpoint.isdigit() else checkpoint,
        )  # fmt: skip
    if json:
        console.as_json(made.table.to_json())
    elif made.table.rows:
        console.table(made.table)
    console.say(f"wrote {len(made.files)} files into {output}: open {output / 'explain.html'} in a browser")


def _heads(given: list[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    from avstore.errors import NotFoundError

    out: list[Path] = []
    for path in given:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise NotFoundError(f"no fine-tuned network in {path}", "", "avstore bench finetune --keep leaves them")
        out += found
    return out
