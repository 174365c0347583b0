"""The loop that trains every method: device, precision, schedule, checkpoints, resume, processes. Written once.

    result = train("avid", store, config, "runs/avid")

Here is what lies around a run: its folder, held while it is trained; its snapshot of the store, taken once; the stages
before it. What a step is, and how a run goes on as if it had not been killed, is `trainer.py`'s.

Under `torchrun` each process takes its slice of every batch; rank 0 alone writes. Nothing here prints: see `events.py`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from avstore.errors import AvstoreError, ConflictError, UsageError
from avstore.store import Store
from trainers import distributed, fit
from trainers.config import RunConfig, resolve_stage
from trainers.events import Event, OnEvent, silent
from trainers.methods import method as find_method
from trainers.process import interrupts, processes, thread_count
from trainers.run import OpenRun, Run, find_run, require_same
from trainers.snapshot import Snapshot, take_snapshot
from trainers.trainer import Trainer
from trainers.typed import as_text


@dataclass(frozen=True)
class Result:
    """How a training ended: its run, the last step, and whether there was nothing left to do."""

    run: Run
    step: int
    total: int
    repeated: bool
    seconds: float


def train_with_stages(
    name: str,
    store: Store,
    config: RunConfig,
    run: str | os.PathLike[str] | None = None,
    *,
    init: str | os.PathLike[str] | None = None,
    stage_config: RunConfig | None = None,
    on_event: OnEvent = silent,
    **selection: Any,
) -> Result:
    """`train`, after the stage that the method starts from, where it has one.

    The stage (AVID, for avid-cma) is a run of its own in runs/<stage>, beside `run`, after its own stage where it has
    one; it resumes too, and is a no-op once finished. `init`: a finished run of that method to start from instead.
    `stage_config`: from `resolve_stage`.
    """
    line = find_method(name)
    path = Path(run) if run is not None else Path("runs") / name
    if line.stage is None:
        if init is not None:
            raise UsageError(f"{name} starts from random weights", "it has no stage before it", "leave --init away")
        return train(name, store, config, path, on_event=on_event, **selection)
    if init is None:
        before = path.parent / line.stage
        if before.resolve() == path.resolve():
            raise ConflictError(
                f"the {line.stage} stage of {name} would be trained in {path} too",
                "each has a folder of its own",
                "name another folder with --run",
            )
        stage = stage_config if stage_config is not None else resolve_stage(name, preset=config.preset)
        on_event(Event("stage", line.stage, text=f"{name} starts from {line.stage}, trained first in {before}"))
        below = None
        if find_method(line.stage).stage is not None:  # its own stage hears what it was told
            values = stage.values()
            told = [f"{key}={as_text(values[key])}" for key in sorted(stage.asked)]
            below = resolve_stage(line.stage, preset=stage.preset, sets=told)
        try:
            train_with_stages(line.stage, store, stage, before, stage_config=below, on_event=on_event, **selection)
        except ConflictError as e:
            other = any(word in e.what for word in ("configuration", "selection", "another store", "videos"))
            if before.joinpath("config.json").is_file() and other:
                raise ConflictError(
                    e.what, e.why, f"start from it as it is with --init {before}, or --run for another"
                ) from e
            raise
        init = before
    return train(name, store, config, path, init=init, on_event=on_event, **selection)


def train(
    name: str,
    store: Store,
    config: RunConfig,
    run: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    on_event: OnEvent = silent,
    **selection: Any,
) -> Result:
    """Trains method `name` on `store` in the folder `run`, from its last checkpoint where there is one.

    `selection`: where, list, subset, subset_seed (`data.select`); held-out splits are left out unless `where` names a
    split. `init`: the finished run of the method's stage.

    Raises ConflictError (another configuration, store or selection than the folder's; a store that cannot serve the
    method), InterruptedRun after SIGINT or SIGTERM (the step is finished and saved), AvstoreError at the first loss or
    gradient that is not finite.
    """
    if config.name != name:
        raise UsageError(f"a configuration of {config.name} for {name}", "they must be of one method")
    started = time.perf_counter()
    with processes(config.loop) as device, thread_count(config.loop.threads), interrupts() as stop:
        config, notes = fit.fit(config, store)
        init_run = None if init is None else find_run(init)
        chief = distributed.rank() == 0
        folder = OpenRun(run) if chief else None
        try:
            snapshot, again = _snapshot(folder, Path(run), store, config, notes, init_run, selection)
            for text in notes if not again else snapshot.notes:
                on_event(Event("note", name, text=text))
            trainer = Trainer(name, store, config, snapshot, Path(run), device, on_event, folder)
            if again and trainer.at_end():
                on_event(
                    Event(
                        "nothing-to-do", name, trainer.total, trainer.total, f"{run} is finished: {trainer.total} steps"
                    )
                )
                return Result(Run(run), trainer.total, trainer.total, True, time.perf_counter() - started)
            trainer.run(init_run, stop)
        finally:
            if folder is not None:
                folder.close()
    return Result(Run(run), trainer.total, trainer.total, False, time.perf_counter() - started)


# ---- around a run -----------------------------------------------------------------------------------------------


def _snapshot(
    folder: OpenRun | None,
    path: Path,
    store: Store,
    config: RunConfig,
    notes: list[str],
    init_run: Run | None,
    selection: dict[str, Any],
) -> tuple[Snapshot, bool]:
    """The run's snapshot: read where the run goes on, else taken by rank 0 and read by the others."""
    again = False
    error: AvstoreError | None = None
    if folder is not None:
        try:
            again = folder.start(config)
            if again:
                _require_same_run(folder.run.snapshot, store, config, init_run, selection)
            else:
                folder.write_snapshot(take_snapshot(store, config, notes, init_run, selection))
        except AvstoreError as e:
            error = e
    if distributed.world() > 1:
        box: list[Any] = [again, error]
        dist.broadcast_object_list(box)
        again, error = box
    if error is not None:
        raise error
    if distributed.rank():
        require_same(path, Run(path).config, config)
    return Run(path).snapshot, again


def _require_same_run(
    snapshot: Snapshot, store: Store, config: RunConfig, init_run: Run | None, selection: dict[str, Any]
) -> None:
    snapshot.require_fits(store)
    if any(v not in (None, (), []) for v in selection.values()):
        again = fit.select(store, config, **selection)
        if again.digest != snapshot.digest:
            raise ConflictError(
                "this run has another selection of videos",
                f"it has {snapshot.selection}; asked was {again.description}",
                "give the same options again, or name another folder with --run",
            )
    if init_run is not None and snapshot.init is not None:
        digest = init_run.checkpoint().digest
        if digest != snapshot.init["checkpoint"]:
            raise ConflictError(
                f"this run started from another checkpoint than the newest of {init_run.path}",
                f"from step {snapshot.init['step']} ({snapshot.init['checkpoint']}), not {digest}",
                "name another folder with --run",
            )
