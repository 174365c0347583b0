"""What several methods' tests ask alike: batches of views, a run that stops and goes on, two processes beside one."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_avid_cma import mine, with_global_norm
from tiny_run import differing, tensors
from torch import Tensor

from avstore.store import Store
from trainers.batch import Batch
from trainers.config import RunConfig
from trainers.loop import train
from trainers.run import Run


def views_batch(
    rows: Any,
    views: int,
    *,
    seed: int = 0,
    sound: Any = None,
    epoch: int = 0,
    dtype: torch.dtype = torch.float32,
    rich: bool = False,
) -> Batch:
    """Clips of 2 frames of 16 x 16 and sounds of 16 x 12, content a fixed function of the row and noise of the seed.

    (B, V, ...) where views > 1. sound: which of the videos have some. rich: every pixel of the content differs, not
    only its tint and its tone.
    """
    rows = torch.as_tensor(rows)
    n, shape = len(rows), (len(rows), views)
    g, noise = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    tint = torch.randn(64, 1, 3, *((2, 16, 16) if rich else (1, 1, 1)), generator=g)
    tone = torch.randn(64, 1, 1, 16 if rich else 1, 12, generator=g)
    video = tint[rows % 64].expand(*shape, 3, 2, 16, 16) + 0.1 * torch.randn(*shape, 3, 2, 16, 16, generator=noise)
    audio = tone[rows % 64].expand(*shape, 1, 16, 12) + 0.1 * torch.randn(*shape, 1, 16, 12, generator=noise)
    has_sound = torch.ones(n, dtype=torch.bool) if sound is None else torch.as_tensor(sound)
    audio = torch.where(has_sound.view(-1, 1, 1, 1, 1), audio, 0)
    share = has_sound[:, None].expand(shape).float()
    if views == 1:
        video, audio, share = video[:, 0], audio[:, 0], share[:, 0]
    return Batch(
        row=rows, position=torch.arange(n), draw=torch.zeros(n, dtype=torch.long), has_sound=has_sound,
        has_picture=torch.ones(n, dtype=torch.bool), epoch=epoch, seed=seed, video=video.to(dtype),
        audio=audio.to(dtype), views=views, sound_share=share,
    )  # fmt: skip


def exact(batch: Batch) -> Batch:
    """The batch in float64: rounding grows tenfold a step, so recorded losses hold on other machines only in it."""
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    floats = {k: x.double() for k, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return replace(batch, **floats)


def trace(
    method: Any, batches: list[Batch], rate: float = 1e-2, kind: type[torch.optim.Optimizer] = torch.optim.SGD
) -> list[float]:
    """Losses of steps on these batches, one a step; a new epoch is begun where a batch is of one."""
    optimiser = kind([p for p in method.parameters() if p.requires_grad], lr=rate)  # type: ignore[call-arg]
    losses, epoch = [], None
    for batch in batches:
        if batch.epoch != epoch:
            method.start_epoch(batch.epoch)
            epoch = batch.epoch
        loss, _ = method(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step()
        losses.append(float(loss.detach()))
    return losses


def goes_on_to_the_bit(name: str, store: Store, config: RunConfig, folder: Path, init: Path | None = None) -> Run:
    """Trains 4 steps; a copy without its last checkpoint goes on from step 2. Asserts that they end equal."""
    c = config.replace(steps=4, checkpoint_every=2, keep_last=10, log_every=1)
    whole = train(name, store, c, folder / f"{name}-whole", init=init).run
    shutil.copytree(whole.path, folder / f"{name}-half")
    shutil.rmtree(folder / f"{name}-half" / "checkpoints" / "step-000004")
    half = train(name, store, c, folder / f"{name}-half", init=init)
    assert half.step == 4 and not half.repeated
    assert not differing(tensors(whole), tensors(half.run))
    assert differing(tensors(whole, 2), tensors(whole, 4)), "nothing was learned"
    return whole


# ---- two processes equal one -----------------------------------------------------------------------------------

ROWS, BATCH, RATE = 40, 12, 2e-3


def two_equal_one(test_module: str, folder: Path) -> dict[str, Tensor]:
    """Runs `test_module.cases()`, {name: (method, views, epochs)}, in one process and in two: float64, batch statistics
    over both, SGD, duplicated videos, some without sound, 7 of 12 clips on the first process. Asserts that losses,
    first gradients, weights and state agree to 1e-12. Returns what one process ended with."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for world in (1, 2):
        multiprocessing.start_processes(_process, (world, str(folder), test_module), nprocs=world, start_method="spawn")
    alone, first, second = (torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert alone.keys() == first.keys() == second.keys() and len(alone) > 20
    far: dict[str, float] = {}
    for name, x in alone.items():
        y = first[name]
        assert torch.equal(y, second[name]), f"the ranks differ in {name}"
        if x.is_floating_point():
            far[name] = float((x - y).abs().max()) / max(1.0, float(x.abs().max()))
        else:
            assert torch.equal(x, y), name
    assert max(far.values()) <= 1e-12, sorted(((x, k) for k, x in far.items()), reverse=True)[:8]
    return alone


def _process(rank: int, world: int, folder: str, test_module: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found: dict[str, Tensor] = {}
    for name, (method, views, epochs) in importlib.import_module(test_module).cases().items():
        _case(name, with_global_norm(method).double(), views, epochs, rank, world, found)
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _case(name: str, method: Any, views: int, epochs: int, rank: int, world: int, found: dict[str, Tensor]) -> None:
    wrapped = torch.nn.parallel.DistributedDataParallel(
        method, find_unused_parameters=getattr(method, "unused_parameters", False)
    )
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=RATE)
    for n in range(2 * epochs):
        if n % 2 == 0:
            method.start_epoch(n // 2)
        g = torch.Generator().manual_seed(n)
        rows = torch.randint(0, ROWS, (BATCH,), generator=g)
        rows[7] = rows[2]
        sound = torch.rand(BATCH, generator=g) < 0.9
        # rich: batch statistics of flat tints magnify rounding tenfold a step, within one process too
        batch = views_batch(rows, views, seed=n, sound=sound, epoch=n // 2, dtype=torch.float64, rich=True)
        batch = replace(batch, draw=torch.arange(BATCH), position=torch.arange(BATCH) + 100)
        loss, metrics = wrapped(mine(batch, rank, world))
        optimiser.zero_grad()
        loss.backward()
        for k, p in method.named_parameters():
            if p.grad is not None and n % 2 == 0:
                found[f"{name}.grad.{n}.{k}"] = p.grad.clone()
        optimiser.step()
        method.after_step()
        for k, x in metrics.items():
            total = torch.as_tensor(x, dtype=torch.float64).clone()
            dist.all_reduce(total)
            found[f"{name}.{k}.{n}"] = total / world
    found.update({f"{name}.{k}": x.clone() for k, x in (method.state_dict() | method.method_state()).items()})
    del wrapped
