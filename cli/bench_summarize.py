"""`avstore bench summarize`: summaries of SumMe and TVSum against people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.bench import by_name, draw_curve, number
from cli.bench_probe import AllCheckpoints, Checkpoint, CurveFile, Device, Work, require_one_question
from cli.choose import open_store
from cli.store import Json

if TYPE_CHECKING:
    from benchmarks.annotations import Annotations
    from benchmarks.kept import Kept


def summarize(
    annotations: Annotated[
        Path, typer.Argument(help="A folder of SumMe or TVSum as published, or an HDF5 file in the eccv16 layout.")
    ],
    features: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.h5", help="Features in the eccv16 layout, repeatable: DR-DSN is trained on each."),
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A run whose networks give the features, repeatable; with --store.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Of --run: the store in which the annotated videos lie.")] = None,
    tower: Annotated[
        list[str] | None, typer.Option(help="Of --run: video (default), audio, ...; repeatable: side by side.")
    ] = None,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
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
    work: Work = None,
    device: Device = "auto",
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table on stdout.")] = False,
    json: Json = False,
) -> None:
    """F-score and rank correlation with people: DR-DSN on given features, random, uniform, people themselves."""
    from avstore.errors import UsageError
    from benchmarks import dr_dsn
    from benchmarks import summarize as bench
    from benchmarks.annotations import read
    from benchmarks.kept import Kept

    if not run and (store is not None or tower or all_checkpoints or checkpoint != "latest"):
        raise UsageError("--store, --tower and checkpoints without --run", "they are of a run's networks",
                         "--run runs/temporal --store STORE, or --features FILE.h5")  # fmt: skip
    twice = sorted({str(path) for path in features or [] if (features or []).count(path) > 1})
    if twice:
        raise UsageError(f"--features {twice[0]} is given twice", "each file is a row", "give it once")
    if curve is not None and not all_checkpoints:
        raise UsageError("--curve without --all-checkpoints", "a curve is drawn over checkpoints", "--all-checkpoints")
    require_one_question(all_checkpoints, checkpoint)
    known, kept, places = read(annotations), Kept(work), dict[str, dict[str, Any]]()
    given = {}
    stems = [path.stem for path in features or []] + [Path(r).name for r in run or []]
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
        given[path.stem if stems.count(path.stem) == 1 else str(path)] = rows
    if run:
        more, places = _of_runs(run, store, known, tower or ["video"], checkpoint, all_checkpoints, kept, device)
        given |= more
    if not features and not run and all(v.features is not None for v in known.videos.values()):
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
            places=places,
            kept=kept,
            progress=progress.show,
        )
    console.result(table, json, markdown)
    if all_checkpoints:
        draw_curve(table, "F", curve or Path("summarize-checkpoints.svg"))


def _of_runs(
    named: list[str],
    store: Path | None,
    known: Annotations,
    towers: list[str],
    checkpoint: str,
    every: bool,
    kept: Kept,
    device: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """({row: {video: features}}, {row: its place on a curve}) of runs' networks, of each checkpoint they share."""
    from benchmarks.curve import common_steps, place_of
    from benchmarks.export import matched, zeroed
    from benchmarks.picks import features_of
    from trainers.run import find_run

    opened, found = open_store(store), by_name([find_run(r) for r in named])
    which = common_steps(list(found.values())) if every else [number(checkpoint)]
    given, places = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    with console.Progress("features", "networks") as progress:
        for name, one in found.items():
            for at in which:
                progress.update(len(given), len(found) * len(which))
                step, epoch = place_of(one, at)
                row = f"{name} step {step}" if every else name
                given[row] = features_of(opened, one, at, known, towers, kept=kept, device=device)
                silent = {opened.key(n) for n, _ in matched(opened, opened.numbers, known)
                          if any(zeroed(opened, n, t) for t in towers)}  # fmt: skip
                if every:
                    places[row] = {"step": step, "epoch": epoch, "of run": f"DR-DSN on {name}"}
    for key in sorted(silent):
        console.warn(console.visible(f"{key}: it is silent: zeros for its sound"))
    return given, places
