"""`bench step`: what a training step costs beside its forward and backward pass.

Four questions, a table each: how much the loop adds to a bare forward and backward pass; clips per second in fp32 and
bf16, with and without channels-last; the memory bank's update and the draw of negatives, by the number of videos; and
the mining of CMA's positives, by number, engine and kind of bank, with the share that is certified exact.

Clips are synthetic and already on the device: reading them is `bench loader`'s. What is compared runs in turn, round by
round; a ratio is the median over rounds of times measured one after the other, so that a machine that slows down slows
both. Mining is timed on a sample of queries and scaled to all rows, which it is proportional to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from avstore.frontends import named, spectrogram
from benchmarks.table import Table
from trainers import fit
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.config import RunConfig, resolve
from trainers.data import Fed
from trainers.negatives import draw_negatives
from trainers.optimiser import channels_last
from trainers.positives import mine_positives
from trainers.process import choose_device, thread_count
from trainers.snapshot import Snapshot
from trainers.trainer import Trainer

Progress = Callable[[str, int, int], None]
LIMIT = 0.05  # of the loop above forward and backward, at `small`
FORMS = {"fp32": ("fp32", False), "fp32, channels last": ("fp32", True), "bf16": ("bf16", False),
         "bf16, channels last": ("bf16", True)}  # fmt: skip
DIM, POSITIVES = 128, 32  # AVID's embedding, CMA's positives
MANY, OF_MANY = 300_000, ("random", "correlated")  # above so many videos a bank takes minutes: two kinds, unless named


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 2000  # videos of the synthetic selection
    rounds: int = 3
    steps: int = 1  # of each kind in a round
    banks: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    mining: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    queries: int = 512  # below 500, faiss leaves BLAS


def run(
    method: str = "avid",
    preset: str = "small",
    *,
    sets: Sequence[str] = (),
    sizes: Sizes | None = None,
    only: Sequence[str] = (),
    kinds: Sequence[str] = (),
    bank: str | Path | None = None,
    threads: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Table]:
    """The tables of PARTS (or of `only` these), in their order; those of ON_REQUEST only by name.

    method, preset, sets: what is trained, as `avstore train`. kinds: of BANKS, for mining; default all, from
    MANY videos those of OF_MANY. bank: a run (folder or name) whose trained bank is mined too. threads: of torch; 0: as
    it chooses.
    UsageError for unknown names and sizes below 1; NotFoundError where `bank` is no run with a checkpoint.
    """
    sizes = sizes or Sizes()
    for name in only:
        if name not in PARTS:
            raise UsageError(f"bench step has no part {name!r}", did_you_mean(name, PARTS))
    for name in kinds:
        if name not in BANKS:
            raise UsageError(f"no kind of bank is called {name!r}", did_you_mean(name, BANKS))
    if min(sizes.rows, sizes.rounds, sizes.steps, sizes.queries, *sizes.banks, *sizes.mining) < 1:
        raise UsageError("nothing to measure", f"{sizes}", "every size is at least 1")
    told = progress or (lambda stage, done, total: None)
    config = resolve(method, preset=preset, sets=[*sets, "compile=off"])
    where = choose_device(device)
    with thread_count(threads):
        asked = _Asked(config, sizes, where, tuple(kinds), bank, told)
        return [PARTS[name](asked) for name in PARTS if (name in only if only else name not in ON_REQUEST)]


@dataclass(frozen=True)
class _Asked:
    config: RunConfig
    sizes: Sizes
    device: torch.device
    kinds: tuple[str, ...]
    bank: str | Path | None
    told: Progress


# ---- the loop -------------------------------------------------------------------------------------------------------


def synthetic(config: RunConfig, n: int, rows: int, device: torch.device, seed: int = 0) -> Batch:
    """A batch of `n` clips of random pixels and sound as this method is fed them, of videos drawn from `rows`."""
    needs, views = fit.needs_of(config), fit.views_of(config)
    g = torch.Generator().manual_seed(seed)
    shape = (n,) if views == 1 else (n, views)

    def content(*size: int) -> Tensor:
        x = torch.randn(n * views, *size, generator=g)
        x = x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
        return x.unflatten(0, shape).to(device)

    video = content(3, needs.frames, needs.size, needs.size) if needs.picture else None
    audio = None
    if needs.sound and needs.front_end is not None:
        rate = max(24000, named(needs.front_end).sample_rate)
        f, m = spectrogram(torch.zeros(1, round(needs.seconds * rate)), needs.front_end, rate).shape[1:]
        audio = content(1, f, m)
    here = torch.ones(n, dtype=torch.bool, device=device)
    return Batch(
        row=torch.randperm(rows, generator=g)[:n].to(device), position=torch.arange(n, device=device),
        draw=torch.zeros(n, dtype=torch.long, device=device), has_picture=here, has_sound=here.clone(), epoch=0,
        seed=seed, video=video, audio=audio, views=views,
        labels=(torch.arange(n, device=device) % 10) if needs.labels else None,
        sound_share=torch.ones(shape, device=device),
    )  # fmt: skip


def _trainer(config: RunConfig, rows: int, device: torch.device) -> Trainer:
    labels = tuple("abcdefghij") if fit.needs_of(config).labels else None
    snapshot = Snapshot("", "", np.arange(rows), "", "synthetic", 0, labels=labels)
    nowhere: Any = None  # of the store nothing is read: the clips are given
    return Trainer(config.name, nowhere, config, snapshot, Path(), device)


def overhead(asked: _Asked) -> Table:
    """The loop's step beside the same method's bare passes, on the same batch."""
    config, sizes, device = asked.config, asked.sizes, asked.device
    rows = max(sizes.rows, config.loop.batch)
    trainer = _trainer(config.replace(accumulate=1, steps=10**6), rows, device)
    fed = Fed(synthetic(config, config.loop.batch, rows, device), 0.0, 0.0, config.loop.batch)

    def endless() -> Iterator[Fed]:
        while True:
            yield fed

    feed, method, optimiser = endless(), trainer.contract, trainer.optimiser

    def passes() -> None:
        with trainer._autocast():
            loss, _ = method(fed.batch)
        loss.backward()

    def bare() -> None:
        method.train()
        for p in method.parameters():
            p.grad = None
        passes()
        method.__dict__.get("_pending", []).clear()  # what it kept for its bank

    def by_hand() -> None:
        optimiser.zero_grad(set_to_none=True)
        passes()
        optimiser.step()
        method.after_step()

    trainer.step(feed)  # first of all: the bank's start, kernels chosen, memory grown
    kinds: dict[str, Callable[[], Any]] = {
        "forward and backward": bare, "with optimiser and bank": by_hand, "loop": lambda: trainer.step(feed),
    }  # fmt: skip
    times = _in_turn(kinds, sizes.rounds, sizes.steps, device, asked.told, "overhead")
    bare_s = times["forward and backward"]
    table: list[dict[str, Any]] = []
    for name, seconds in times.items():
        ratio = statistics.median(s / b for s, b in zip(seconds, bare_s, strict=True))
        table.append({"step": name, "ms": 1000 * statistics.median(seconds), "above": ratio - 1,
                      "clips/s": config.loop.batch / statistics.median(seconds)})  # fmt: skip
    over = float(table[-1]["above"])
    verdict = f"{100 * over:.1f} % above forward and backward; the bar is {100 * LIMIT:.0f} %"
    return Table(
        f"{config.name} {config.preset}: a step of {config.loop.batch} clips, {trainer.precision}",
        ("step", "ms", "above", "clips/s"),
        table,
        (f"the loop, its optimiser and its bank: {verdict}: {'kept' if over < LIMIT else 'MISSED'}",
         _machine(device), f"{sizes.rounds} rounds of {sizes.steps} steps in turn; medians"),
    )  # fmt: skip


def rates(asked: _Asked) -> Table:
    """Clips a second of forward and backward, by precision and memory format."""
    config, sizes, device = asked.config, asked.sizes, asked.device
    rows = max(sizes.rows, config.loop.batch)
    kinds: dict[str, Callable[[], Any]] = {}
    for name, (precision, last) in FORMS.items():
        trainer = _trainer(config.replace(precision=precision, channels_last=last, steps=10**6), rows, device)
        batch = synthetic(config, config.loop.batch, rows, device)
        if last:
            channels_last(trainer.method)
        else:
            plain = {k: x.contiguous() for k, x in (("video", batch.video), ("audio", batch.audio)) if x is not None}
            batch = replace(batch, **plain)  # type: ignore[arg-type]

        def passes(trainer: Trainer = trainer, batch: Batch = batch) -> None:
            trainer.method.train()
            trainer.optimiser.zero_grad(set_to_none=True)
            with trainer._autocast():
                loss, _ = trainer.contract(batch)
            loss.backward()
            trainer.contract.__dict__.get("_pending", []).clear()

        passes()
        kinds[name] = passes
    times = _in_turn(kinds, sizes.rounds, 1, device, asked.told, "precision")
    first = times[next(iter(FORMS))]
    table = [
        {"form": name, "clips/s": config.loop.batch / statistics.median(seconds),
         "times": statistics.median(b / s for s, b in zip(seconds, first, strict=True))}
        for name, seconds in times.items()
    ]  # fmt: skip
    return Table(
        f"{config.name} {config.preset}: clips a second, forward and backward",
        ("form", "clips/s", "times"), table, (_machine(device), f"{sizes.rounds} rounds in turn; medians"),
    )  # fmt: skip


def _in_turn(
    kinds: dict[str, Callable[[], Any]], rounds: int, steps: int, device: torch.device, told: Progress, what: str
) -> dict[str, list[float]]:
    """Seconds per call of each kind in each round; every other round in reverse."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for k in range(rounds):
        told(what, k, rounds)
        for name in reversed(kinds) if k % 2 else kinds:
            times[name].append(_seconds(kinds[name], steps, device))
    told(what, rounds, rounds)
    return times


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the bank -------------------------------------------------------------------------------------------------------


def memory(asked: _Asked) -> Table:
    """Update of the bank and draw of negatives for a batch of 256, K = 1024, by the number of videos."""
    sizes, device = asked.sizes, asked.device
    batch, negatives = 256, 1024
    table = []
    for k, n in enumerate(sizes.banks):
        asked.told("bank", k, len(sizes.banks))
        bank = MemoryBank(n, DIM, 0).to(device)
        g = torch.Generator().manual_seed(0)
        row = torch.randint(n, (batch,), generator=g).to(device)
        draw, position = torch.zeros_like(row), torch.arange(batch, device=device)
        embedding = F.normalize(torch.randn(batch, 2, DIM, generator=g), dim=-1).to(device)
        mask = torch.ones(batch, 2, dtype=torch.bool, device=device)
        count = min(negatives, n - 1)

        def sample(n: int = n, row: Tensor = row, draw: Tensor = draw, count: int = count) -> Tensor:
            return draw_negatives(n, count, row[:, None], seed=0, epoch=0, row_B=row, draw_B=draw)

        index = sample()
        calls: dict[str, Callable[[], Any]] = {
            "update ms": partial(bank.update, position, row, embedding, mask),
            "draw ms": sample,
            "gather ms": partial(bank.memory.__getitem__, index),
        }
        for call in calls.values():
            call()
        times = _in_turn(calls, sizes.rounds, 10 * sizes.steps, device, lambda *a: None, "bank")
        table.append({"videos": n, "bank MB": bank.memory.numel() * 4 / 1e6,
                      **{name: 1000 * statistics.median(s) for name, s in times.items()}})  # fmt: skip
        del bank, calls, sample, index
    return Table(
        f"Memory bank: a batch of {batch}, K = {negatives}, D = {DIM}",
        ("videos", "bank MB", "update ms", "draw ms", "gather ms"), table,
        ("gather: K x 2 x D floats of each clip, copied for the loss", _machine(device)),
    )  # fmt: skip


# ---- mining ------------------------------------------------------------------------------------------------------


def _classes(n: int, g: torch.Generator) -> int:
    return max(2, min(400, n // 100))


def _random(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, 2, DIM, generator=g)


def _grouped(own: float, shared: float, same: bool) -> Callable[[int, torch.Generator], Tensor]:
    """Both modalities of a class around its two centres; `shared`: what sight and sound of a video have in common."""

    def make(n: int, g: torch.Generator) -> Tensor:
        c, d = _classes(n, g), DIM**-0.5
        labels = [torch.randint(c, (n,), generator=g) for _ in range(2)]
        label = [labels[0]] * 2 if same else labels
        z = torch.randn(n, 32, generator=g) if shared else None
        out = torch.empty(n, 2, DIM)
        for j in range(2):
            centre = F.normalize(torch.randn(c, DIM, generator=g), dim=1)
            out[:, j] = centre[label[j]] + own * d * torch.randn(n, DIM, generator=g)
            if z is not None:
                out[:, j] += shared * d * (z @ (torch.randn(32, DIM, generator=g) / 32**0.5))
        return out

    return make


def _around_one(spread: Callable[[int, torch.Generator], Tensor | float]) -> Callable[[int, torch.Generator], Tensor]:
    """Everything near one direction; `spread` says how near, by row."""

    def make(n: int, g: torch.Generator) -> Tensor:
        centre = F.normalize(torch.randn(1, 2, DIM, generator=g), dim=-1)
        near = spread(n, g)
        return centre + near * DIM**-0.5 * torch.randn(n, 2, DIM, generator=g)

    return make


BANKS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": _random,  # as a bank begins
    "correlated": _grouped(0.4, 0.6, True),  # classes, and within them sight goes with sound
    "class-only": _grouped(0.7, 0.0, True),
    "uncorrelated": _grouped(0.7, 0.0, False),  # classes of sight have nothing to do with those of sound
    "collapsed": _around_one(lambda n, g: 0.02),
    "hubby": _around_one(lambda n, g: torch.exp(0.7 * torch.randn(n, 1, 1, generator=g))),
}


def mining(asked: _Asked) -> Table:
    """CMA's positives on banks of several kinds and sizes, by both engines, and on the bank of a run."""
    sizes, table = asked.sizes, []
    cells = [(n, kind) for n in sizes.mining for kind in asked.kinds or (BANKS if n < MANY else OF_MANY)]
    for k, (n, kind) in enumerate(cells):
        asked.told("mining", k, len(cells) + 1)
        bank = F.normalize(BANKS[kind](n, torch.Generator().manual_seed(n)), dim=-1).to(asked.device)
        table += _mined(kind, bank, None, sizes.queries, asked.device)
        del bank
    if asked.bank is not None:
        asked.told("mining", len(cells), len(cells) + 1)
        name, trained, eligible = trained_bank(asked.bank)
        table += _mined(name, trained.to(asked.device), eligible.to(asked.device), sizes.queries, asked.device)
    return Table(
        f"CMA's {POSITIVES} positives: certified exact in float64, D = {DIM}",
        ("bank", "videos", "engine", "s per 1000", "s in all", "certified at once", "certified", "ties"), table,
        (f"timed on {sizes.queries} queries, scaled to all; certified at once: by the first list, before brute force",
         "ties: within float32's rounding, kept and counted", _machine(asked.device)),
    )  # fmt: skip


def _mined(
    name: str, bank: Tensor, eligible: Tensor | None, queries: int, device: torch.device
) -> list[dict[str, Any]]:
    rows = len(bank) if eligible is None else int(eligible.sum())
    k = min(POSITIVES, rows - 1)
    every = torch.arange(len(bank), device=device) if eligible is None else eligible.nonzero()[:, 0]
    chosen = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:queries].to(device)]
    out = []
    for engine in ("torch", "faiss") if device.type == "cpu" else ("torch",):
        start = time.perf_counter()
        found = mine_positives(bank, k, engine=engine, eligible_N=eligible, query_Q=chosen)
        _wait(device)
        each = (time.perf_counter() - start) / len(chosen)
        out.append({"bank": name, "videos": rows, "engine": engine, "s per 1000": 1000 * each, "s in all": rows * each,
                    "certified at once": found.stats["certified_first"], "certified": found.stats["certified"],
                    "ties": found.ties})  # fmt: skip
    return out


def trained_bank(run: str | Path) -> tuple[str, Tensor, Tensor]:
    """(name, memory (N, 2, D), rows that were ever written in both) of a run's last checkpoint. UsageError where its
    method has no bank."""
    from trainers.checkpoint import read_tensors
    from trainers.run import find_run

    found = find_run(run)
    state = read_tensors(found.checkpoint(), "method.safetensors")
    if not {"bank.memory", "bank.seen"} <= state.keys():
        raise UsageError(f"the run {found.path} has no memory bank", f"{found.config.name} keeps none", "name another")
    return f"{found.config.name}, trained", state["bank.memory"], state["bank.seen"].all(1)


def _machine(device: torch.device) -> str:
    from trainers.checkpoint import environment

    said = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {said['isa']}"
    return f"{name}, {said['threads']} threads, torch {said['torch']}"


def _compiled(asked: _Asked) -> Table:
    from benchmarks.step_compiled import compiled

    return compiled(asked)


PARTS: dict[str, Callable[[_Asked], Table]] = {
    "overhead": overhead, "rates": rates, "compiled": _compiled, "bank": memory, "mining": mining,
}  # fmt: skip
ON_REQUEST = ("compiled",)  # compiling takes minutes on a CPU
