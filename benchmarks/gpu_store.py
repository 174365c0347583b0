"""Training fed from a store against the same step on a batch that is there already, and the loader by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import avstore
from avstore import device_jpeg
from benchmarks import demo_set
from benchmarks.gpu import Bench, Row, wanted
from benchmarks.gpu_train import counted
from trainers import data
from trainers.config import RunConfig, resolve
from trainers.meter import Meter
from trainers.prefetch import Ahead, ahead
from trainers.process import kernels
from trainers.snapshot import take_snapshot
from trainers.trainer import Trainer


def configuration(bench: Bench) -> RunConfig:
    """AVID on 16 frames of 112 pixels, its own nets; tiny ones at toy size."""
    common = [f"device={bench.device}", "statistics_clips=16", "seed=0", "draws=50", "epochs=1000"]
    if bench.cuda:
        wanted = ["frames=16", "size=112", f"batch={bench.size.batch}", "negatives=1024", "decode_threads=8"]
        return resolve("avid", sets=[*common, *wanted])
    tiny = ["video_depth=10", "width=4", "hidden=8", "dim=8", "small=true", "frames=4", "fps=8", "size=32",
            "seconds=0.5", "front_end=avid-linear129", "negatives=6", "batch=4", "in_process=true", "threads=1",
            "precision=fp32"]  # fmt: skip
    return resolve("avid", sets=[*common, *tiny])


def media_store(folder: Path, clips: int, seconds: int, **options: Any) -> avstore.Store:
    """A store of generated clips with sight and sound."""
    demo_set.generate(folder / "media", train=clips, test=0, seconds=seconds, workers=1)
    avstore.ingest(folder / "media", folder / "media.zarr", front_ends=(), **options)
    return avstore.open(folder / "media.zarr")


def store_against_synthetic(bench: Bench) -> Iterator[Row]:
    """Clips a second on one batch again and again, from the store, from the store one batch ahead; the share of the
    time that waits for data, by the host and by the device, on the last of these roads; the loader alone."""
    with kernels(torch.device(bench.device), False):
        yield from _store_rates(bench)


def _store_rates(bench: Bench) -> Iterator[Row]:
    size: dict[str, Any] = {} if bench.cuda else {"size": (32, 48), "fps": 8, "workers": 1}
    clips = 256 if bench.cuda else 6
    with media_store(bench.folder, clips, 4 if bench.cuda else 1, **size) as store:
        config = configuration(bench)
        snapshot = take_snapshot(store, config)
        device = torch.device(bench.device)
        feed = data.Feed(store, snapshot, config, device, data.Plan(len(snapshot.numbers), config))
        try:
            trainer = Trainer(config.name, store, config, snapshot, bench.folder / "run", device)
            one = next(feed)
            still = _Again(data.Fed(_kept(one.batch), 0.0, 0.0, one.clips))
            with counted(trainer.method) as products:
                trainer.step(still)
            synthetic, _ = _timed(bench, trainer, still)
            ceiling = bench.limits.get("matmul-bf16" if trainer.precision == "bf16" else "matmul-tf32")
            ceiling = ceiling or bench.limits.get("matmul-fp32")
            flops = 6 * products[0] / one.clips / 1e12  # forward, and twice that backward; 2 for each
            yield {
                "what": f"training step on one batch of {one.clips}, again and again",
                "value": synthetic,
                "unit": "clips/s",
                "limit": ceiling / flops if ceiling else None,
                "note": f"{trainer.precision}; the limit: matrix products alone",
            }
            rate, times = _timed(bench, trainer, feed)
            yield _from_store("training from the store, copies on the stream that computes", rate, synthetic, times)
            if bench.cuda:
                rate, times = _timed(bench, trainer, ahead(feed, device))
                what = "training from the store as `avstore train` does: copies one batch ahead on their own stream"
                yield _from_store(what, rate, synthetic, times)
            yield waiting(times)
            yield from _coded(bench, store, snapshot, config)
            alone = _loader_alone(bench, feed)
            yield {"what": "the loader alone, to the CPU's memory", "value": alone, "unit": "clips/s"}
            many = alone / synthetic
            yield {"what": "the loader alone against training on one batch", "value": many, "unit": "times",
                   **wanted(many, ">=", 3)}  # fmt: skip
        finally:
            feed.close()


def _from_store(what: str, rate: float, synthetic: float, times: dict[str, float]) -> Row:
    note = f"prepare {1e3 * times['prepare_s']:.1f} ms, compute {1e3 * times['compute_s']:.1f} ms a step"
    return {"what": what, "value": rate, "unit": "clips/s", "limit": synthetic,
            "note": f"{note}; the limit: the same step on one batch"}  # fmt: skip


def waiting(times: dict[str, float]) -> Row:
    """The share of a step that waits for data: the host for the reader, and the device for a batch that the reader had
    but that was not copied and augmented yet. They follow each other, so that their sum counts nothing twice."""
    host, device = times["host"], times.get("device")
    value = host + (device or 0.0)
    told = f"the host for the reader {host:.2%}"
    told += "; no device to wait" if device is None else f", the device for copies and augmentation {device:.2%}"
    return {"what": "share of a step that waits for data", "value": value, "unit": "", **wanted(value, "<=", 0.01),
            "note": told}  # fmt: skip


def _coded(bench: Bench, store: avstore.Store, snapshot: Any, config: RunConfig) -> Iterator[Row]:
    """What `jpeg=auto` measures and chooses: clips a second read, decoded and on the device, by each way there is. On a
    CPU libjpeg-turbo stands in for a device."""
    device = torch.device(bench.device)
    plan = data.Plan(len(snapshot.numbers), config)
    stand_in: Any = None if bench.cuda else {"stand-in": device_jpeg.make("cpu", device)}
    feed = data.Feed(store, snapshot, config.replace(jpeg="auto"), device, plan, decoders=stand_in)
    try:
        rate = data.clips_per_second(feed.loader, device)
        yield {"what": f"loader to the device, jpeg=auto took: {feed.jpeg.decoder}", "value": rate, "unit": "clips/s",
               "note": feed.jpeg.why}  # fmt: skip
    finally:
        feed.close()


def _kept(batch: Any) -> Any:
    """The batch with tensors of its own, not the feed's slot."""
    import dataclasses

    copied = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{k: v.clone() for k, v in copied.items() if isinstance(v, torch.Tensor)})


class _Again(Iterator[data.Fed]):
    """One batch for ever. Positions move on, as a bank asks for distinct ones only inside a step."""

    def __init__(self, fed: data.Fed) -> None:
        self.fed = fed

    def __next__(self) -> data.Fed:
        return self.fed


def _timed(bench: Bench, trainer: Trainer, feed: Any) -> tuple[float, dict[str, float]]:
    """Clips a second of training steps; seconds of a step (`prepare_s`, `compute_s`); shares of the time that the host
    waited for the reader (`host`) and, of a feed that runs ahead, the device for its batch (`device`)."""
    for _ in range(3 if bench.cuda else 1):
        trainer.step(feed)
    if bench.cuda:
        torch.cuda.synchronize()
    if isinstance(feed, Ahead):
        feed.waited()  # while it warmed up
    meter, began, clips = Meter(1), time.perf_counter(), 0
    while True:
        trainer.step(feed, meter)
        clips = meter.clips
        if time.perf_counter() - began >= 2 * bench.size.seconds:
            break
    if bench.cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - began
    times = {"prepare_s": meter.prepare / meter.steps, "compute_s": meter.compute / meter.steps}
    times["host"] = meter.data / wall
    if isinstance(feed, Ahead):
        times["device"] = feed.waited()[0] / wall  # all have ended
    return clips / wall, times


def _loader_alone(bench: Bench, feed: data.Feed) -> float:
    began, clips, first = time.perf_counter(), 0, True
    for batch in feed.loader.steps(0):
        if first:  # the reader starts with an empty pipe
            began, first = time.perf_counter(), False
            continue
        clips += len(batch)
        if time.perf_counter() - began >= bench.size.seconds:
            break
    return clips / (time.perf_counter() - began)
