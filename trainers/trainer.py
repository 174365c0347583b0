"""The trainer of every method: one step after another, checkpoints, resume. Written once.

A step is: `accumulate` parts of a batch, each cut, augmented and put through the method; one optimiser step; the
method's `after_step` (its bank). The learning rate is a function of the step, the data of a counter, every draw of
(seed, epoch, video, draw): so a run that was killed goes on as if it had not been, to the bit on a CPU with the same
torch, threads and instruction set. The first loss or gradient that is not finite stops the run before it is applied.

Which folder, which videos and which stage come before is `loop.py`'s.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avstore import draws
from avstore.errors import AvstoreError, ConflictError, InterruptedRun, UsageError
from avstore.store import Store
from trainers import checkpoint as checkpoints
from trainers import data, distributed
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.compiled import begin_part, compile_networks
from trainers.config import RunConfig
from trainers.encoders import has_local_batch_norm
from trainers.events import Event, OnEvent, silent
from trainers.machine import note_machine
from trainers.meter import Meter
from trainers.methods import method as find_method
from trainers.metrics import MetricLog
from trainers.optimiser import channels_last, learning_rate_at, make_optimiser
from trainers.prefetch import ahead, device_wait, look_ahead
from trainers.process import agreed, choose_precision
from trainers.run import OpenRun, Run, build
from trainers.snapshot import Snapshot
from trainers.teacher import bind_teachers

EPOCH = "epoch/"  # before the names of what `start_epoch` told


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
        on_event: OnEvent = silent,
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
        compiled = compile_networks(self.method, loop.compile, device, distributed.world(), loop.accumulate)
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
        note_machine(self.path, self.method, self.device, self.precision, self.done)
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
                    line = meter.line(values, self.device) | device_wait(feed, self.loop.accumulate)
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
            for name in ("shrunk", "looped", "padded"):  # clips that are not what was asked for, each in its way
                values[name] = values.get(name, 0.0) + getattr(fed, name) / loop.accumulate
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
