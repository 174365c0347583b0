"""`avstore bench svm | linear | knn`: what a simple classifier makes of a run's frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import archive, console
from cli.bench import draw_curve
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument

Runs = Annotated[list[str] | None, typer.Option("--run", help="A run whose networks are probed, repeatable.")]
Label = Annotated[str, typer.Option(help="The column of classes.")]
FoldColumn = Annotated[
    str | None, typer.Option(help="The column of official folds. Default: fold, where there is one.")
]
Folds = Annotated[int | None, typer.Option(help="Stratified folds instead of a column or the split.")]
FoldSeed = Annotated[int, typer.Option(help="Of --folds.")]
Clips = Annotated[int, typer.Option(help="Clips of each video, evenly spaced; their scores are averaged.")]
Seeds = Annotated[int, typer.Option(help="Networks with random weights to compare with; 0: none.")]
Checkpoint = Annotated[str, typer.Option(help="latest, or a step.")]
AllCheckpoints = Annotated[
    bool, typer.Option("--all-checkpoints", help="A row for each kept checkpoint, and a drawing of the value.")
]
CurveFile = Annotated[
    Path | None, typer.Option("--curve", metavar="FILE", help="Where --all-checkpoints draws, an SVG.")
]
SplitColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--split", metavar="COLUMN", help="An official split, repeatable. Default: split1, ... averaged, else split."
    ),
]
Work = Annotated[
    Path | None, typer.Option(help="A folder in which what is computed is kept: repeating goes on from there.")
]
Where = Annotated[list[str] | None, typer.Option(help="column=value[,value]; repeatable.")]
ListFile = Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")]
Subset = Annotated[int | None, typer.Option(help="A seeded draw of so many videos.")]
SubsetSeed = Annotated[int, typer.Option("--seed", help="Of --subset.")]
NoControls = Annotated[bool, typer.Option("--no-raw", help="Leave out the raw features.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Markdown tables on stdout.")]


def svm(
    store: StoreArgument = None,
    run: Runs = None,
    label: Label = "label",
    fold_column: FoldColumn = None,
    folds: Folds = None,
    fold_seed: FoldSeed = 0,
    split: SplitColumns = None,
    clips: Clips = 10,
    block: Annotated[list[str] | None, typer.Option(help="conv2x ... conv5x, repeatable. Default: all.")] = None,
    c: Annotated[float | None, typer.Option("--c", help="The strength. Default: chosen within training.")] = None,
    oracle: Annotated[bool, typer.Option("--oracle", help="Also with C chosen on the test part.")] = False,
    augment: Annotated[bool, typer.Option("--augment", help="Training clips at random places and loudness.")] = False,
    published: Annotated[str | None, typer.Option(help="ESC-50 or DCASE: the papers' figures beside.")] = None,
    seeds: Seeds = 1,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
    work: Work = None,
    where: Where = None,
    list_: ListFile = None,
    subset: Subset = None,
    seed: SubsetSeed = 0,
    no_raw: NoControls = False,
    device: Device = "auto",
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """One-vs-rest linear SVMs on sound, official folds (ESC-50, ESC-10, DCASE)."""
    asked = dict(locals())
    from benchmarks import svm as bench

    _run(bench.bench, asked, only=block or (), fixed=c,
         with_oracle=oracle, augment=augment, published=published, work=work, clips=clips, seeds=seeds,
         controls=not no_raw, device=device, label=label, fold_column=fold_column, fold_count=folds,
         fold_seed=fold_seed, split_columns=split or (), **selection(where, list_, subset, seed))  # fmt: skip


def linear(
    store: StoreArgument = None,
    run: Runs = None,
    modality: Annotated[str, typer.Option(help="a, v, or av: sound, pictures, and both together.")] = "v",
    label: Label = "label",
    fold_column: FoldColumn = None,
    folds: Folds = None,
    fold_seed: FoldSeed = 0,
    split: SplitColumns = None,
    classifier: Annotated[
        str, typer.Option(help="adam (a or v), logistic or svm. Default: adam, with av logistic.")
    ] = "",
    frames: Annotated[int | None, typer.Option(help="Of a clip of pictures. Default: as in pre-training.")] = None,
    clips: Annotated[
        int | None, typer.Option(help="Clips of each video, evenly spaced. Default: the schedule's, 10 or 25.")
    ] = None,
    block: Annotated[list[str] | None, typer.Option(help="conv2x ... conv5x, repeatable. Default: all.")] = None,
    shots: Annotated[int | None, typer.Option(help="Training videos of each class. Default: all.")] = None,
    shot_draws: Annotated[int, typer.Option(help="Draws of --shots: mean and spread over them.")] = 5,
    schedule: Annotated[str, typer.Option(help="AVID's: kinetics (12 epochs) or ablation (20).")] = "kinetics",
    epochs: Annotated[int | None, typer.Option(help="Of the linear layer. Default: the schedule's.")] = None,
    rate: Annotated[float | None, typer.Option(help="Its learning rate. Default: the schedule's.")] = None,
    repeats: Annotated[int, typer.Option(help="Trainings of the linear layer, from other seeds.")] = 1,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="As published: the backbone's statistics move.")
    ] = False,
    published: Annotated[
        str | None, typer.Option(help="UCF101, HMDB51, Kinetics-400, Kinetics-Sounds, ...: the papers' figures.")
    ] = None,
    seeds: Seeds = 1,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
    work: Work = None,
    where: Where = None,
    list_: ListFile = None,
    subset: Subset = None,
    seed: SubsetSeed = 0,
    no_raw: NoControls = False,
    device: Device = "auto",
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Linear probes of each block (a or v), or of sight and sound together (av)."""
    asked = dict(locals())
    from benchmarks import linear as bench

    _run(bench.bench, asked, modality=modality,
         classifier=classifier, frames=frames, schedule=schedule, only=block or (), shots=shots,
         shot_draws=shot_draws, epochs=epochs, rate=rate, repeats=repeats, train_mode=train_mode, published=published,
         clips=clips, work=work, seeds=seeds, controls=not no_raw, device=device, label=label,
         fold_column=fold_column, fold_count=folds, fold_seed=fold_seed, split_columns=split or (),
         **selection(where, list_, subset, seed))  # fmt: skip


def knn(
    store: StoreArgument = None,
    run: Runs = None,
    modality: Annotated[str, typer.Option(help="a or v.")] = "v",
    k: Annotated[list[int] | None, typer.Option("--k", help="Neighbours, repeatable. Default: 1, 5, 20.")] = None,
    label: Label = "label",
    fold_column: FoldColumn = None,
    folds: Folds = None,
    fold_seed: FoldSeed = 0,
    split: SplitColumns = None,
    clips: Clips = 10,
    seeds: Seeds = 1,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
    work: Work = None,
    where: Where = None,
    list_: ListFile = None,
    subset: Subset = None,
    seed: SubsetSeed = 0,
    no_raw: NoControls = False,
    device: Device = "auto",
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """The vote of the nearest training videos, nothing trained."""
    asked = dict(locals())
    from benchmarks import knn as bench

    _run(bench.bench, asked, modality=modality,
         ks=tuple(k) if k else bench.KS, clips=clips, work=work, seeds=seeds, controls=not no_raw, device=device,
         label=label, fold_column=fold_column, fold_count=folds, fold_seed=fold_seed,
         split_columns=split or (), **selection(where, list_, subset, seed))  # fmt: skip


def require_one_question(every: bool, checkpoint: str) -> None:
    """UsageError where --all-checkpoints and a step of --checkpoint are both given."""
    from avstore.errors import UsageError

    if every and checkpoint != "latest":
        raise UsageError(f"--checkpoint {checkpoint} with --all-checkpoints", "one, or all", "leave one away")


def _run(
    bench: Any,
    asked: dict[str, Any],
    **options: Any,
) -> None:
    """Opens, measures each checkpoint that is asked for, draws, keeps the table for the report, prints. asked: the
    command's arguments."""
    from avstore.errors import UsageError
    from benchmarks.curve import over_checkpoints
    from trainers.run import find_run

    names, every, checkpoint = asked["run"], bool(asked["all_checkpoints"]), str(asked["checkpoint"])
    curve: Path | None = asked["curve"]
    if curve is not None and not every:
        raise UsageError("--curve without --all-checkpoints", "a curve is drawn over checkpoints", "--all-checkpoints")
    require_one_question(every, checkpoint)
    opened = open_store(asked["store"])
    if not names:
        raise UsageError("no run is named", "a probe is of a run's networks", "--run runs/avid-cma; repeatable")
    runs = [find_run(given) for given in names]
    name = bench.__module__.rsplit(".", 1)[-1]
    with console.Progress("probe", "steps") as progress:
        if every:
            table = over_checkpoints(bench, opened, runs, progress=progress.show, **options)
        else:
            which = int(checkpoint) if checkpoint.isdigit() else checkpoint
            table = bench(opened, runs, checkpoint=which, progress=progress.show, **options)
    archive.keep(opened, table, name, [r.name for r in runs], asked)
    console.result(table, asked["json"], asked["markdown"])
    if every:
        draw_curve(table, "top-1", curve or Path(f"{name}-checkpoints.svg"))
