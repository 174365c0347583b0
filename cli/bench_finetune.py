"""`avstore bench finetune`: a run's networks fine-tuned on labels, beside networks from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import archive, console
from cli.bench import draw_curve
from cli.bench_probe import (
    AllCheckpoints,
    Checkpoint,
    CurveFile,
    Device,
    FoldColumn,
    Folds,
    FoldSeed,
    Label,
    ListFile,
    Markdown,
    Runs,
    SplitColumns,
    Subset,
    SubsetSeed,
    Where,
    require_one_question,
)
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument


def finetune(
    store: StoreArgument = None,
    run: Runs = None,
    modality: Annotated[str, typer.Option(help="a, v, or av: sound, pictures, and both together.")] = "v",
    preset: Annotated[
        str, typer.Option(help="ucf, hmdb (AVID's), avcl, or crisscross-ucf, crisscross-hmdb (SGD at 224).")
    ] = "ucf",
    frames: Annotated[
        int | None, typer.Option(help="Of a clip; published: 8, 16, 32. Default: the preset's, 8 (avcl: 16).")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels to a side, e.g. 112 or 224. Default: the preset's, else the run's.")
    ] = None,
    fps: Annotated[
        str | None, typer.Option(help="Frames a second, or native. Default: the preset's, 16 (avcl: native).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of everything. Default: the preset's.")] = None,
    warm_up: Annotated[int | None, typer.Option(help="Epochs before that, of the classifier alone.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    fold_rate: Annotated[
        list[str] | None,
        typer.Option(metavar="PART=RATE", help="Of one part, e.g. split1=0.0005, repeatable (CrissCross' files)."),
    ] = None,
    milestones: Annotated[
        list[int] | None, typer.Option("--milestone", help="Epoch at which it falls, repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Clips of a step.")] = None,
    draws: Annotated[int | None, typer.Option(help="Training clips of each video in an epoch.")] = None,
    clips: Annotated[
        int | None,
        typer.Option(help="Test clips of each video, averaged and alone. Default: 10, and alone the preset's 25."),
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="The epoch that counts: last, best (on the test part), validation. By preset.")
    ] = None,
    best_epoch: Annotated[
        bool, typer.Option("--best-epoch", help="The same as --select best: also the best test epoch, labelled.")
    ] = False,
    scratch: Annotated[bool, typer.Option(help="The control: the same networks from random weights.")] = True,
    seeds: Annotated[int, typer.Option(help="Fine-tunings of each part.")] = 1,
    work: Annotated[
        Path | None, typer.Option(help="Finished results are kept here. Default: a folder in bench-finetune/.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Fine-tuned networks stay in the work folder, for explain --head.")
    ] = False,
    published: Annotated[
        str | None, typer.Option(help="UCF101, HMDB51, K32 or K100: the papers' figures beside.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.")] = "fp32",
    label: Label = "label",
    fold_column: FoldColumn = None,
    folds: Folds = None,
    fold_seed: FoldSeed = 0,
    split: SplitColumns = None,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    curve: CurveFile = None,
    where: Where = None,
    list_: ListFile = None,
    subset: Subset = None,
    seed: SubsetSeed = 0,
    device: Device = "auto",
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Fine-tunes on each official split (UCF101, HMDB51, ...), beside training from scratch. Resumes by repeating."""
    asked = dict(locals())
    from avstore.errors import UsageError
    from benchmarks import finetune as bench
    from benchmarks.curve import common_steps
    from benchmarks.recipe import make_recipe
    from trainers.run import find_run

    if fps is not None and fps != "native" and not fps.isdigit():
        raise UsageError(f"--fps {fps}", "a whole number of frames a second, or native", "--fps 16")
    rates: dict[str, float] = {}
    for given in fold_rate or ():
        part, _, value = given.rpartition("=")
        try:
            rates[part] = float(value)
        except ValueError:
            part = ""
        if not part or not 0 < rates[part] < float("inf"):
            raise UsageError(f"--fold-rate {given}", "a part and a rate above 0", "--fold-rate split1=0.0005")
    require_one_question(all_checkpoints, checkpoint)
    if best_epoch and select not in (None, "best"):
        raise UsageError(f"--best-epoch with --select {select}", "each of them says which epoch counts", "give one")
    recipe = make_recipe(
        preset, modality, frames, fps=int(fps) if fps is not None and fps.isdigit() else fps, epochs=epochs,
        warm_up=warm_up, rate=rate, milestones=tuple(milestones) if milestones else None, batch=batch, draws=draws,
        clips=clips, size=size, select="best" if best_epoch else select, precision=precision,
    )  # fmt: skip
    opened = open_store(store)
    if not run:
        raise UsageError("no run is named", "fine-tuning starts from a run's networks", "--run runs/avid-cma")
    runs = [find_run(name) for name in run]
    which: list[str | int] = [int(checkpoint) if checkpoint.isdigit() else checkpoint]
    if all_checkpoints:
        which = common_steps(runs)
    elif curve is not None:
        raise UsageError("--curve without --all-checkpoints", "a curve is drawn over checkpoints", "--all-checkpoints")
    with console.Progress("finetune", "steps") as progress:
        table = bench.bench(
            opened, runs, recipe=recipe, rates=rates, seeds=seeds, scratch=scratch, checkpoints=which,
            published=published, work=work, keep=keep, device=device, progress=progress.show, label=label,
            fold_column=fold_column, fold_count=folds, fold_seed=fold_seed, split_columns=split or (),
            **selection(where, list_, subset, seed),
        )  # fmt: skip
    archive.keep(opened, table, "finetune", [r.name for r in runs], asked)
    console.result(table, json, markdown)
    if all_checkpoints:
        draw_curve(table, "top-1", curve or Path("finetune-checkpoints.svg"))
