"""One real run: the demo set made and ingested, AVID and AVID-CMA trained on it, embedded, its retrieval table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

import avstore
from benchmarks import demo_set
from benchmarks.gpu import Bench, Row
from benchmarks.retrieval import retrieval
from trainers.config import RunConfig, resolve, resolve_stage
from trainers.embed import embed
from trainers.loop import train_with_stages


def avid_cma(bench: Bench) -> Iterator[Row]:
    """Seconds of each stage, and R@1 from the table beside chance. UsageError and others as the stages raise them."""
    clips, held_out, steps = bench.size.demo
    began = time.perf_counter()
    demo_set.generate(bench.folder / "demo", train=clips, test=held_out, seconds=3 if bench.cuda else 1,
                      workers=4 if bench.cuda else 1)  # fmt: skip
    yield {"what": f"demo set of {clips + held_out} clips", "value": time.perf_counter() - began, "unit": "s"}
    began = time.perf_counter()
    how: dict[str, Any] = {} if bench.cuda else {"size": (32, 48), "fps": 8, "workers": 1}
    made = avstore.ingest(bench.folder / "demo", bench.folder / "demo.zarr", front_ends=(), **how)
    yield {
        "what": "ingest",
        "value": time.perf_counter() - began,
        "unit": "s",
        "note": f"{made.ok} ok, {made.failed} failed",
    }
    sets = [f"device={bench.device}"]
    if not bench.cuda:
        sets += [
            "width=4",
            "hidden=8",
            "dim=8",
            "size=32",
            "frames=4",
            "fps=8",
            "seconds=0.5",
            "batch=4",
            "negatives=4",
            "in_process=true",
            "threads=1",
            "statistics_clips=8",
            "precision=fp32",
        ]
    config = _short(resolve("avid-cma", preset="tiny", sets=[*sets, *([] if bench.cuda else ["positives=2"])]), steps)
    stage = _short(resolve_stage("avid-cma", preset="tiny", sets=sets), steps)
    with avstore.open(bench.folder / "demo.zarr") as store:
        began = time.perf_counter()
        done = train_with_stages("avid-cma", store, config, bench.folder / "runs" / "avid-cma", stage_config=stage)
        if bench.cuda:
            torch.cuda.synchronize()
        yield {"what": f"AVID and AVID-CMA, {done.total} steps of the latter", "value": time.perf_counter() - began,
               "unit": "s"}  # fmt: skip
        began = time.perf_counter()
        embed(done.run, store, device=bench.device)
        yield {"what": "embedded", "value": time.perf_counter() - began, "unit": "s"}
    with avstore.open(bench.folder / "demo.zarr") as store:
        began = time.perf_counter()
        run, seeds = done.run, int(bench.cuda)
        table = retrieval(store, [run.name], run_paths={run.name: run.path}, seeds=seeds, raw=bench.cuda)
        yield {"what": "retrieval table", "value": time.perf_counter() - began, "unit": "s"}
        for row in table.rows:
            words = ", ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, str))
            first = next((k for k in row if k.startswith("R@1") or k == "R@1"), None)
            if first is not None and row[first] is not None:
                value = row[first][0] if isinstance(row[first], tuple | list) else row[first]
                yield {"what": f"R@1, {words}", "value": float(value), "unit": ""}


def _short(config: RunConfig, steps: int) -> RunConfig:
    return config if not steps else dataclasses.replace(config.replace(steps=steps), preset=config.preset)
