"""`avstore bench finetune`: a run's networks fine-tuned on labels, beside networks from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console
from cli.bench_probe import (
    AllCheckpoints,
    Checkpoint,
    Device,
    FoldColumn,
    Folds,
    FoldSeed,
    Label,
    ListFile,
    Markdown,
    Runs,
    Subset,
    SubsetSeed,
    Where,
)
from cli.choose import open_store, selection
from cli.store import Json, StoreArgument


def finetune(
    store: StoreArgument = None,
    run: Runs = None,
    modality: Annotated[str, typer.Option(help="a, v, or av: sound, pictures, and both together.")] = "v",
    preset: Annotated[str, typer.Option(help="ucf, hmdb (AVID's), or avcl.")] = "ucf",
    frames: Annotated[int, typer.Option(help="Of a clip; published: 8, 16, 32.")] = 8,
    fps: Annotated[str, typer.Option(help="Frames a second, or native.")] = "16",
    epochs: Annotated[int | None, typer.Option(help="Of everything. Default: the preset's.")] = None,
    warm_up: Annotated[int | None, typer.Option(help="Epochs before that, of the classifier alone.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    milestones: Annotated[
        list[int] | None, typer.Option("--milestone", help="Epoch at which it falls, repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Clips of a step.")] = None,
    draws: Annotated[int | None, typer.Option(help="Training clips of each video in an epoch.")] = None,
    clips: Annotated[int | None, typer.Option(help="Test clips of each video, scores averaged. Default: 10.")] = None,
    best_epoch: Annotated[
        bool, typer.Option("--best-epoch", help="Also the best epoch on the test part (CrissCross), labelled.")
    ] = False,
    scratch: Annotated[bool, typer.Option(help="The control: the same networks from random weights.")] = True,
    seeds: Annotated[int, typer.Option(help="Fine-tunings of each part.")] = 1,
    work: Annotated[
        Path | None, typer.Option(help="Finished results are kept here. Default: a folder in bench-finetune/.")
    ] = None,
    published: Annotated[str | None, typer.Option(help="UCF101 or HMDB51: the papers' figures beside.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.")] = "fp32",
    label: Label = "label",
    fold_column: FoldColumn = None,
    folds: Folds = None,
    fold_seed: FoldSeed = 0,
    checkpoint: Checkpoint = "latest",
    all_checkpoints: AllCheckpoints = False,
    where: Where = None,
    list_: ListFile = None,
    subset: Subset = None,
    seed: SubsetSeed = 0,
    device: Device = "auto",
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Fine-tunes on each official split (UCF101, HMDB51, ...), beside training from scratch. Resumes by repeating."""
    from avstore.errors import UsageError
    from benchmarks import finetune as bench
    from benchmarks.recipe import make_recipe
    from trainers.run import find_run

    if fps != "native" and not fps.isdigit():
        raise UsageError(f"--fps {fps}", "a whole number of frames a second, or native", "--fps 16")
    recipe = make_recipe(
        preset, modality, frames, fps=int(fps) if fps.isdigit() else fps, epochs=epochs, warm_up=warm_up, rate=rate,
        milestones=tuple(milestones) if milestones else None, batch=batch, draws=draws, clips=clips,
        select="best" if best_epoch else None, precision=precision,
    )  # fmt: skip
    opened = open_store(store)
    if not run:
        raise UsageError("no run is named", "fine-tuning starts from a run's networks", "--run runs/avid-cma")
    runs = [find_run(name) for name in run]
    which: list[str | int] = [int(checkpoint) if checkpoint.isdigit() else checkpoint]
    if all_checkpoints:
        steps: list[set[str | int]] = [{c.step for c in r.checkpoints()} for r in runs]
        which = sorted(set.intersection(*steps))
        if not which:
            raise UsageError("the runs have no checkpoint in common", "", "one --run, or train with keep_every")
    with console.Progress("finetune", "steps") as progress:

        def show(stage: str, done: int, total: int) -> None:
            progress.stage_is(stage)
            progress.update(done, total)

        table = bench.bench(
            opened, runs, recipe=recipe, seeds=seeds, scratch=scratch, checkpoints=which, published=published,
            work=work, device=device, progress=show, label=label, fold_column=fold_column, fold_count=folds,
            fold_seed=fold_seed, **selection(where, list_, subset, seed),
        )  # fmt: skip
    if json:
        console.as_json(table.to_json())
    elif markdown:
        console.data(table.to_markdown().rstrip())
    else:
        console.table(table)
