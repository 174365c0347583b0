"""Training on a device: resumed runs, repeated runs, the CPU's numbers, Adam through a checkpoint, SyncBatchNorm."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import config, differing, store_in, tensors

import trainers.trainer
from avstore.errors import InterruptedRun
from avstore.store import Store
from benchmarks.gpu_train import adam_difference, batch_norm_difference
from benchmarks.step import _trainer, synthetic
from trainers import data
from trainers.config import METHODS, preset_of
from trainers.events import Event
from trainers.loop import train
from trainers.meter import Meter
from trainers.metrics import read_metrics
from trainers.prefetch import Ahead, ahead, device_wait, look_ahead
from trainers.process import kernels
from trainers.run import Run
from trainers.snapshot import Snapshot, take_snapshot
from trainers.teacher import Teacher
from trainers.trainer import Trainer

SETS = ("device=cuda", "in_process=false", "checkpoint_every=2", "deterministic=true")


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, device: torch.device) -> None:
    store = store_in(tmp_path)
    whole = train("avid", store, config(*SETS), tmp_path / "whole").run

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        train("avid", store, config(*SETS), tmp_path / "parts", on_event=stop)
    assert Run(tmp_path / "parts").checkpoint().step == 3
    parts = train("avid", store, config(*SETS), tmp_path / "parts").run
    assert differing(tensors(whole), tensors(parts)) == []


def test_the_same_run_twice_is_the_same_to_the_bit(tmp_path: Path, device: torch.device) -> None:
    store = store_in(tmp_path)
    runs = [train("avid", store, config(*SETS), tmp_path / name).run for name in ("a", "b")]
    assert differing(*(tensors(r) for r in runs)) == []


def test_the_device_computes_what_the_cpu_does(tmp_path: Path, device: torch.device) -> None:
    """In float64, where rounding cannot hide a mistake; SGD, since Adam hides the gradient's scale."""
    store = store_in(tmp_path)
    how = ("precision=fp64", "optimiser=sgd", "learning_rate=0.0001", "temperature=0.5", "in_process=false")
    a, b = (
        tensors(train("avid", store, config(*how, f"device={d}"), tmp_path / d).run) for d in ("cpu", "cuda")
    )  # fmt: skip
    assert a.keys() == b.keys()
    for name, x in a.items():
        if x.dtype == torch.float64:
            assert torch.allclose(x, b[name], atol=1e-8, rtol=1e-6), name


def test_one_batch_ahead_gives_the_same_batches(tmp_path: Path, device: torch.device) -> None:
    store = store_in(tmp_path)
    cfg = config(*SETS)
    snapshot = take_snapshot(store, cfg)
    plan = data.Plan(len(snapshot.numbers), cfg)

    def batches(early: bool) -> list[data.Fed]:
        feed = data.Feed(store, snapshot, cfg, device, plan)
        wrapped = ahead(feed, device) if early else feed
        try:
            return [next(wrapped) for _ in range(plan.total_steps)]
        finally:
            wrapped.close()

    for one, two in zip(batches(False), batches(True), strict=True):
        assert torch.equal(one.batch.row, two.batch.row)
        assert one.batch.video is not None and one.batch.audio is not None
        assert torch.equal(one.batch.video, two.batch.video) and torch.equal(one.batch.audio, two.batch.audio)


def test_training_one_batch_ahead_ends_with_the_same_bits(tmp_path: Path, device: torch.device) -> None:
    store = store_in(tmp_path)
    cfg = config(*SETS)
    ends = []
    for early in (False, True):
        snapshot = take_snapshot(store, cfg)
        trainer = Trainer("avid", store, cfg, snapshot, tmp_path / str(early), device)
        feed = data.Feed(store, snapshot, cfg, device, trainer.plan)
        fed = ahead(feed, device) if early else feed
        try:
            with kernels(device, True):
                for _ in range(4):
                    trainer.step(fed)
        finally:
            fed.close()
        ends.append({k: v.clone() for k, v in trainer.method.state_dict().items()})
    assert differing(*ends) == []


def test_the_next_batch_is_launched_beside_the_compute(tmp_path: Path, device: torch.device) -> None:
    """Where the reader has it ready, which it has from the second step on at the latest here."""
    store = store_in(tmp_path)
    cfg = config(*SETS, "draws=8")
    snapshot = take_snapshot(store, cfg)
    trainer = Trainer("avid", store, cfg, snapshot, tmp_path / "run", device)
    fed = ahead(data.Feed(store, snapshot, cfg, device, trainer.plan), device)
    meter = Meter(1)
    try:
        for _ in range(10):
            values = trainer.step(fed, meter)
            torch.cuda.synchronize()
            time.sleep(0.05)  # a reader of tiny clips is far ahead by then
        assert fed.early >= 5
        torch.cuda.synchronize()
        waited = device_wait(fed)
        assert 0 <= waited["device_wait_s"] < 0.05 and device_wait(fed) == {}  # every wait has ended, and was told
    finally:
        fed.close()
    line = meter.line(values, device)
    assert {"data_wait_s", "prepare_s", "compute_s", "clips_per_s"} <= line.keys() and line["data_wait_s"] < 0.05


def test_the_devices_wait_is_measured(tmp_path: Path, device: torch.device) -> None:
    """A batch behind 200 large products on its own stream: the compute stream waits about as long as they take."""
    import torch.cuda as cuda

    a = torch.randn(4096, 4096, device=device)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            b = a
            for _ in range(200 if slow else 0):
                b = torch.nn.functional.normalize(b @ a)
            yield b.sum()

    def alone() -> float:
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        next(batches())
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    slow = True
    alone()
    takes = alone()
    source = batches()
    fed = Ahead(source, cuda.Stream(device), lambda: True)
    next(fed)
    torch.cuda.synchronize()
    assert takes / 2 < device_wait(fed)["device_wait_s"] < 2 * takes
    slow = False
    next(fed)
    look_ahead(fed)
    torch.cuda.synchronize()  # this one is there before it is asked for
    device_wait(fed)
    next(fed)
    torch.cuda.synchronize()
    assert device_wait(fed)["device_wait_s"] < 1e-3


def test_the_value_is_on_the_lines_of_a_run(tmp_path: Path, device: torch.device) -> None:
    run = train("avid", store_in(tmp_path), config(*SETS), tmp_path / "run").run
    lines = read_metrics(run.path / "metrics.jsonl")
    told = [x["device_wait_s"] for x in lines if "device_wait_s" in x]
    assert len(told) >= len(lines) // 2 and all(0 <= x < 1 for x in told)


def losses(store: Store, path: Path, *sets: str) -> list[float]:
    got: dict[int, float] = {}
    train("avid", store, config(*SETS, *sets), path,
          on_event=lambda e: got.update({e.step: e.values["loss"]}) if e.kind == "step" else None)  # fmt: skip
    return [got[k] for k in sorted(got)]


@pytest.mark.parametrize("how", ["compile", "graphs"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler
def test_compiled_runs_lose_what_plain_ones_do(how: str, tmp_path: Path, device: torch.device) -> None:
    """A short last batch is among them, and a run that goes on compiles again."""
    store = store_in(tmp_path)
    plain = losses(store, tmp_path / "plain", "batch=4")
    made = losses(store, tmp_path / how, "batch=4", f"compile={how}")
    assert made == pytest.approx(plain, rel=5e-3) and len(made) >= 9

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        train("avid", store, config(*SETS, "batch=4", f"compile={how}"), tmp_path / "parts", on_event=stop)
    assert losses(store, tmp_path / "parts", "batch=4", f"compile={how}") == pytest.approx(made[4:], rel=1e-3)


def given(
    method: torch.nn.Module, store: Store, snapshot: Snapshot, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Vectors of their own for a method's teachers, in place of runs and weights that are not here."""
    for module in method.modules():
        if isinstance(module, Teacher):
            table = torch.randn(16, module.dim, device=device, dtype=dtype)
            module.give(lambda batch, table=table: table[batch.row])
    return []


@pytest.mark.parametrize("name", [m for m in METHODS if METHODS[m].stage is None])
def test_every_method_takes_two_steps(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On synthetic clips: nothing of a method stays on the host, and its state goes through a checkpoint's dict."""
    monkeypatch.setattr(trainers.trainer, "bind_teachers", given)
    cfg = preset_of(name, "tiny").replace(batch=4, device="cuda", steps=100)
    cfg = cfg.replace(**{k: v for k, v in {"width": 4, "size": 32}.items() if k in cfg.values()})
    trainer = _trainer(cfg, 16, device)
    fed = data.Fed(synthetic(cfg, 4, 16, device), 0.0, 0.0, 4)
    first = trainer.step(iter([fed]))
    trainer.contract.load_method_state({k: x.cpu() for k, x in trainer.contract.method_state().items()})
    second = trainer.step(iter([fed]))
    assert float(first["loss"]) == float(first["loss"]) and float(second["loss"]) == float(second["loss"])


def test_fused_adam_goes_through_a_checkpoint(tmp_path: Path, device: torch.device) -> None:
    assert adam_difference(str(device), tmp_path) == 0


def test_sync_batch_norm_in_two_processes_is_one_process(device: torch.device) -> None:
    assert batch_norm_difference(str(device)) < 1e-10
