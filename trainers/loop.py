"""The loop that trains every method: device, precision, schedule, checkpoints, resume, processes. Written once.

    result = train("avid", store, config, "runs/avid")

A step is: `accumulate` parts of a batch, each cut, augmented and put through the method; one optimiser step; the
method's `after_step` (its bank). The learning rate is a function of the step, the data of a counter, every draw of
(seed, epoch, video, draw): so a run that was killed goes on as if it had not been, to the bit on a CPU with the same
torch, threads and instruction set. The first loss or gradient that is not finite stops the run before it is applied.

Under `torchrun` each process takes its slice of every batch; rank 0 alone writes. Nothing here prints: see `Event`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avstore import draws
from avstore.errors import AvstoreError, ConflictError, InterruptedRun, UsageError
from avstore.store import Store
from trainers import checkpoint as checkpoints
from trainers import data, distributed, fit
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.compiled import begin_part, compile_networks
from trainers.config import RunConfig, resolve_stage
from trainers.encoders import has_local_batch_norm
from trainers.methods import method as find_method
from trainers.metrics import MetricLog
from trainers.optimiser import channels_last, learning_rate_at, make_optimiser
from trainers.prefetch import ahead, look_ahead
from trainers.process import agreed, choose_precision, interrupts, processes, thread_count
from trainers.run import OpenRun, Run, build, find_run, require_same
from trainers.snapshot import Snapshot, take_snapshot
from trainers.teacher import bind_teachers
from trainers.typed import as_text


@dataclass(frozen=True)
class Event:
    """What a run tells while it works. kind: 'stage' (another run begins), 'note' (one line to read), 'start', 'step'
    (values: the line of metrics.jsonl), 'checkpoint', 'finished', 'nothing-to-do'."""

    kind: str
    method: str
    step: int = 0
    total: int = 0
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a training ended: its run, the last step, and whether there was nothing left to do."""

    run: Run
    step: int
    total: int
    repeated: bool
    seconds: float


OnEvent = Callable[[Event], None]
EPOCH = "epoch/"  # before the names of what `start_epoch` told


def _silent(event: Event) -> None:
    """Tells nobody."""


def train_with_stages(
    name: str,
    store: Store,
    config: RunConfig,
    run: str | os.PathLike[str] | None = None,
    *,
    init: str | os.PathLike[str] | None = None,
    stage_config: RunConfig | None = None,
    on_event: OnEvent = _silent,
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
    on_event: OnEvent = _silent,
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


class Trainer:
    """A method with its optimiser, data and counter. `run` drives it; benches call `step` alone."""

    def __init__(
        self,
        name: str,
        store: Store,
        config: RunConfig,
        snapshot: Snapshot,
        path: Path,
        device: torch.device,
        on_event: OnEvent = _silent,
        folder: OpenRun | None = None,
    ) -> None:
        self.name, self.config, self.loop, self.path, self.device = name, config, config.loop, path, device
        self.on_event, self.folder, self.snapshot = on_event, folder, snapshot
        loop = config.loop
        self.plan = data.Plan(len(snapshot.numbers), config, distributed.world(), distributed.rank())
        self.total = self.plan.total_steps
        self.method = build(config, snapshot, len(snapshot.numbers))
        self.precision = choose_precision(loop.precision, device)
        if self.precision == "fp64":
            self.method.double()
        self.method.to(device)
        if loop.channels_last:
            channels_last(self.method)
        if device.type == "cuda" and distributed.world() > 1:
            self.method = nn.SyncBatchNorm.convert_sync_batchnorm(self.method)
        for text in bind_teachers(self.method, store, snapshot, device, data.dtype_of(self.precision)):
            on_event(Event("note", name, text=text))
        compiled = compile_networks(self.method, loop.compile, device, distributed.world())
        if loop.compile != "off":
            names = ", ".join(compiled) or "no network"
            on_event(Event("note", name, text=f"compile={loop.compile}: {names}"))
        self.contract: Any = self.method  # the same, for what nn.Module does not declare
        self.optimiser = make_optimiser(self.method, loop)
        self.model: Callable[[Batch], tuple[Tensor, dict[str, Any]]] = self.method
        self.store, self.done = store, 0
        self._epoch: int | None = None
        self.jpeg: str | None = None  # who decodes the pictures, where it is not the reader; at first the checkpoint's

    def at_end(self) -> bool:
        found = checkpoints.list_checkpoints(self.path / "checkpoints")
        return bool(found) and found[-1].step >= self.total

    # -- the whole run ------------------------------------------------------------------------------------------

    def run(self, init_run: Run | None, stop: threading.Event) -> None:
        chief = distributed.rank() == 0
        found = checkpoints.list_checkpoints(self.path / "checkpoints")
        if found:
            self.resume(found[-1])
        elif init_run is not None:
            self._start_from(init_run, stop)
        self._note_processes()
        self.on_event(Event("start", self.name, self.done, self.total, self._words(bool(found))))
        log = MetricLog(self.path, self.done) if chief else None
        wrapped = self._wrap()
        kept = (self.jpeg or "cpu") if found else None
        source = data.Feed(self.store, self.snapshot, self.config, self.device, self.plan, self.done, jpeg=kept)
        self.jpeg = source.jpeg.decoder if source.jpeg.decode is not None else None
        if source.jpeg.why:
            self.on_event(Event("note", self.name, self.done, self.total, source.jpeg.why))
        feed = ahead(source, self.device)
        meter = Meter(distributed.world())
        try:
            while self.done < self.total:
                values = self.step(feed, meter)
                if self._line_is_due(values):
                    line = meter.line(values, self.device)
                    if log is not None:
                        log.write(self.done, line)
                    self.on_event(Event("step", self.name, self.done, self.total, values=line))
                stopping = agreed(stop.is_set(), self.device)
                if self.done % self.loop.checkpoint_every == 0 or self.done == self.total or stopping:
                    self.save(values)
                if stopping and self.done < self.total:
                    raise InterruptedRun(
                        f"stopped at step {self.done} of {self.total}",
                        f"saved in {self.path}",
                        "repeat the command: it goes on from here",
                    )
            self.on_event(Event("finished", self.name, self.done, self.total, f"{self.path}: {self.total} steps"))
        finally:
            feed.close()
            if log is not None:
                log.close()
            self.model = self.method
            if wrapped:
                del wrapped
                gc.collect()  # the wrapper goes before its process group, or gloo may abort at exit

    def _line_is_due(self, values: Mapping[str, Any]) -> bool:
        """Whether this step is logged: each `log_every`-th, the last of an epoch and of the run, and, whatever the
        interval, the one before which an epoch began and the method told something of it (`epoch/...`)."""
        told = any(name.startswith(EPOCH) for name in values)
        parts = self.plan.order.batches  # of an epoch; a step takes `accumulate` of them, across its end where need be
        ends = self.done * self.loop.accumulate // parts != (self.done - 1) * self.loop.accumulate // parts
        return told or ends or self.done % self.loop.log_every == 0 or self.done == self.total

    def step(self, feed: Iterator[data.Fed], meter: Meter | None = None) -> dict[str, Any]:
        """One optimiser step, on `accumulate` parts of a batch. Returns its metrics."""
        meter = Meter(distributed.world()) if meter is None else meter
        loop, step = self.loop, self.done
        self.method.train()
        rate = learning_rate_at(step, self.total, self.plan.steps_per_epoch, loop)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        values: dict[str, Any] = {}
        losses: list[Tensor] = []
        clips = 0
        for part in range(loop.accumulate):
            start = time.perf_counter()
            fed = next(feed)
            meter.data += fed.wait
            meter.prepare += time.perf_counter() - start - fed.wait
            start = time.perf_counter()
            if fed.batch.epoch != self._epoch:
                told = self.contract.start_epoch(fed.batch.epoch)
                values |= {f"{EPOCH}{k}": v for k, v in told.items()}
                self._epoch = fed.batch.epoch
            self._seed_dropout(step, part)
            last = part == loop.accumulate - 1
            begin_part(loop.compile)
            with self._no_sync(not last), self._autocast():
                loss, metrics = self.model(fed.batch)
            with self._no_sync(not last):
                (loss / loop.accumulate).backward()
            losses.append(loss.detach())
            values |= metrics
            values["shrunk"] = values.get("shrunk", 0.0) + fed.shrunk / loop.accumulate
            clips += fed.clips
            meter.compute += time.perf_counter() - start
            meter.prepare += look_ahead(feed)  # while the device computes what was just launched
        start = time.perf_counter()
        norm = nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
        loss_value, norm_value = torch.stack([torch.stack(losses).mean().double(), norm.double()]).tolist()
        self._require_finite(step, loss_value, norm_value)
        if loop.clip_gradient:
            nn.utils.clip_grads_with_norm_(self.method.parameters(), loop.clip_gradient, norm)
        self.optimiser.step()
        values |= self.contract.after_step()
        self.done = step + 1
        meter.compute += time.perf_counter() - start
        meter.clips += clips
        meter.steps += 1
        values |= {"loss": losses[0] if len(losses) == 1 else torch.stack(losses).mean()}
        return values | {"epoch": self._epoch, "lr": rate, "grad_norm": norm_value}

    # -- state --------------------------------------------------------------------------------------------------

    def save(self, values: Mapping[str, Any]) -> None:
        """A checkpoint of this step, by rank 0; every rank waits until it is on the disk."""
        if distributed.rank() == 0:
            state = {
                "total_steps": self.total,
                "epoch": self._epoch,
                "method": self.name,
                "config": self.config.digest,
                "loss": float(values["loss"]),
                "precision": self.precision,
                **({"jpeg": self.jpeg} if self.jpeg else {}),
            }
            done = checkpoints.save(
                self.path / "checkpoints",
                self.done,
                self.method,
                self.optimiser,
                self.contract.method_state(),
                state,
            )
            checkpoints.prune(self.path / "checkpoints", self.loop.keep_last, self.loop.keep_every)
            self.on_event(Event("checkpoint", self.name, self.done, self.total, str(done.path)))
        if distributed.world() > 1:
            dist.barrier()

    def resume(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Goes back to a checkpoint of this run. What keeps the rest from being equal to the bit is told."""
        state = checkpoints.load(checkpoint, self.method, self.optimiser)
        self.done, self.jpeg = int(state["step"]), state.get("jpeg")
        if int(state["total_steps"]) != self.total:
            raise ConflictError(
                f"{checkpoint.path} is of a run of {state['total_steps']} steps",
                f"this one has {self.total}",
                "give the same options again, or name another folder with --run",
            )
        differing = checkpoints.differences(state["environment"], checkpoints.environment())
        if state["precision"] != self.precision:
            differing.append(f"precision was {state['precision']}, is {self.precision}")
        if differing:
            self.on_event(
                Event(
                    "note",
                    self.name,
                    self.done,
                    self.total,
                    f"going on, but not equal to the bit to an uninterrupted run: {'; '.join(differing)}",
                )
            )

    def _start_from(self, init_run: Run, stop: threading.Event) -> None:
        """Takes over the stage's last checkpoint; where it saw other videos, all but the bank, which is filled anew."""
        file = find_method(self.name).load()
        if file.load_stage is None:
            raise UsageError(f"{self.name} cannot start from another run", "it starts from random weights")
        newest, load = init_run.checkpoint(), getattr(self.method, file.load_stage)
        weights = checkpoints.read_tensors(newest, "model.safetensors")
        state = checkpoints.read_tensors(newest, "method.safetensors")
        if init_run.snapshot.same_videos(self.snapshot) or "bank.memory" not in state:
            load(weights, state)
            return
        from trainers.memory import fill_memory

        n = len(self.snapshot.numbers)
        bank = MemoryBank(n, state["bank.memory"].shape[2], self.loop.seed)
        load(weights, state | {f"bank.{k}": x for k, x in bank.state().items()})  # refuses other networks at once

        def heard(done: int) -> None:
            if agreed(stop.is_set(), self.device):
                raise InterruptedRun(
                    f"stopped after {done} of {n} videos", "the memory bank was being filled", "repeat the command"
                )

        text = f"filling the memory bank with {n} videos: {init_run.path} saw others"
        self.on_event(Event("note", self.name, text=text))
        bank.memory, bank.seen = fill_memory(
            init_run.load(), Run(self.path), self.store, bank.memory.to(self.device), device=str(self.device),
            on_chunk=heard,
        )  # fmt: skip
        load(weights, state | {f"bank.{k}": x for k, x in bank.state().items()})

    # -- pieces -------------------------------------------------------------------------------------------------

    def _wrap(self) -> nn.Module | None:
        """The callable of a step, wrapped for several processes."""
        if distributed.world() == 1:
            self.model = self.method
            return None
        wrapped = nn.parallel.DistributedDataParallel(
            self.method,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(getattr(self.method, "unused_parameters", False)),
        )
        self.model = wrapped
        return wrapped

    def _no_sync(self, active: bool) -> contextlib.AbstractContextManager[Any]:
        if active and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _seed_dropout(self, step: int, part: int) -> None:
        """Dropout draws from torch's generator: seeded per step, part and rank, it needs no state either."""
        bits = draws.bits(self.loop.seed, "dropout", step, part, distributed.rank(), 1)
        torch.manual_seed(int(bits.reshape(-1)[0]) & (2**63 - 1))

    def _require_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        found = checkpoints.list_checkpoints(self.path / "checkpoints")
        kept = f"the checkpoint of step {found[-1].step} is as it was" if found else "there is no checkpoint yet"
        remedy = "--set precision=fp32, " if self.precision == "bf16" else ""
        raise AvstoreError(
            f"{self.name} stopped at step {step + 1}: the {what} is not finite (loss {loss}, gradient norm {norm})",
            f"this step was not applied and nothing overwritten; {kept}",
            f"train again with {remedy}a lower --set learning_rate, or --set clip_gradient=1 (in another --run)",
        )

    def _note_processes(self) -> None:
        if distributed.world() > 1 and self.device.type == "cpu" and has_local_batch_norm(self.method):
            self.on_event(
                Event(
                    "note",
                    self.name,
                    text=f"{distributed.world()} processes on a CPU: batch statistics stay per process",
                )
            )

    def _words(self, resumed: bool) -> str:
        begin = f"going on from step {self.done}" if resumed else "starting"
        return (
            f"{begin}: {len(self.snapshot.numbers)} videos, {self.total} steps of {self.loop.batch} clips, "
            f"{self.precision} on {self.device}, {torch.get_num_threads()} threads"
        )


@dataclass
class Meter:
    """Seconds since the last line: waiting for data, preparing it on the device, computing; and clips."""

    world: int
    data: float = 0.0
    prepare: float = 0.0
    compute: float = 0.0
    clips: int = 0
    steps: int = 0

    def line(self, values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The metrics of a step (means over ranks) with the means of the times since the last line."""
        names = [k for k, v in values.items() if isinstance(v, Tensor) or (isinstance(v, float) and k not in ("lr",))]
        stacked = torch.stack(
            [torch.as_tensor(values[k], dtype=torch.float64, device=device).reshape(()) for k in names]
        )
        means = (distributed.all_reduce_sum(stacked) / self.world).tolist() if names else []
        out: dict[str, Any] = {k: v for k, v in values.items() if k not in names}
        out |= dict(zip(names, means, strict=True))
        total = self.data + self.prepare + self.compute
        n = max(self.steps, 1)
        out |= {
            "data_wait_s": self.data / n,
            "prepare_s": self.prepare / n,
            "compute_s": self.compute / n,
            "clips_per_s": self.clips * self.world / total if total else 0.0,
        }
        self.data = self.prepare = self.compute = 0.0
        self.clips = self.steps = 0
        return out


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
