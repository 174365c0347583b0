"""`avstore bench summarize`: summaries of SumMe and TVSum against people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.store import Json


def summarize(
    annotations: Annotated[
        Path, typer.Argument(help="A folder of SumMe or TVSum as published, or an HDF5 file in the eccv16 layout.")
    ],
    features: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.h5", help="Features in the eccv16 layout, repeatable: DR-DSN is trained on each."),
    ] = None,
    splits_file: Annotated[Path | None, typer.Option(help="Published splits, JSON. Default: random ones.")] = None,
    splits: Annotated[int, typer.Option(help="Random divisions 80 / 20.")] = 5,
    split_seed: Annotated[int, typer.Option(help="Of the random divisions and random scores.")] = 0,
    seeds: Annotated[int, typer.Option(help="Trainings for each split.")] = 1,
    epochs: Annotated[int, typer.Option(help="Of DR-DSN.")] = 60,
    measure: Annotated[
        str | None,
        typer.Option(help="F over people: best (SumMe) or mean (TVSum). Default: as the annotations say."),
    ] = None,
    published: Annotated[
        str | None, typer.Option(metavar="SET", help="Published figures beside it. Default: by the annotations' name.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """F-score and rank correlation with people: DR-DSN on given features, random, uniform, people themselves."""
    from avstore.errors import UsageError
    from benchmarks import dr_dsn
    from benchmarks import summarize as bench
    from benchmarks.annotations import read

    known = read(annotations)
    given = {}
    for path in features or []:
        found = read(path)
        by_name = {v.name: v.features for v in found.videos.values()} | {k: v.features for k, v in found.videos.items()}
        rows = {n: by_name[w] for n, v in known.videos.items() for w in (n, v.name) if by_name.get(w) is not None}
        missing = sorted(set(known.videos) - set(rows))
        if missing:
            raise UsageError(
                f"{path} has no features of {len(missing)} of {len(known.videos)} videos, e.g. {missing[0]}",
                f"it has {', '.join(sorted(by_name)[:3])}, ...",
                "its groups, or their video_name, must be called as the annotations call the videos",
            )
        given[path.stem] = rows
    if not features and all(v.features is not None for v in known.videos.values()):
        given[known.name] = {n: v.features for n, v in known.videos.items()}
    parts = bench.read_splits(splits_file, list(known.videos)) if splits_file is not None else None
    with console.Progress("summaries", "rows") as progress:
        table = bench.summarize(
            known,
            given,  # type: ignore[arg-type]
            splits=parts,
            split_count=splits,
            split_seed=split_seed,
            seeds=seeds,
            measure=measure,
            published=published,
            config=dr_dsn.Config(epochs=epochs),
            progress=progress.show,
        )
    console.result(table, json, markdown)
