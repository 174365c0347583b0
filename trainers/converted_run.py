"""A run of converted weights: what `avstore embed`, `query`, `bench` and `train --init` work with.

made, notes = make_run(read_published(["AVID-CMA_Audioset.pth.tar"]), "runs/avid-published", store)
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from avstore.errors import UsageError
from avstore.frontends import named
from trainers import checkpoint as checkpoints
from trainers.config import resolve
from trainers.convert import Found
from trainers.fit import fit
from trainers.memory import fill_memory
from trainers.run import OpenRun, Run, build
from trainers.snapshot import take_snapshot

if TYPE_CHECKING:
    from avstore.store import Store

# CrissCross' mean and deviation of its log-mel spectrograms, of all bins alike (methods.md 2.3)
CRISSCROSS_MEAN, CRISSCROSS_STD = -5.3688107, 4.410007


def make_run(
    found: Found,
    run: str | os.PathLike[str],
    store: Store,
    *,
    bank: bool = False,
    device: str = "auto",
    **selection: Any,
) -> tuple[Run, list[str]]:
    """A finished run of step 0 that holds these weights, on a selection of `store`; and its notes, one text each.

    AVID's networks with their heads become a run of `avid`, from which `train avid-cma --init` starts; all others a run
    of `published`. Bins are normalised by the statistics of the selection (CrissCross: by its own constants), as its
    authors' are not shipped. bank: fill AVID's memory with the embeddings of the selection, one mean per video, which
    CMA's mining needs: one pass over the store. Repeating the call leaves a run as it is.

    ConflictError where the folder holds another run, or the store cannot serve the clips.
    """
    if bank and not found.is_avid:
        raise UsageError(
            "these weights have no memory bank", "only AVID's networks with their heads do", "leave it away"
        )
    values = {f.name: getattr(found.config, f.name) for f in dataclasses.fields(found.config)}
    if found.is_avid:
        c = found.config
        depth = int(str(c.video_net).rpartition("-")[2])
        base = resolve("avid").replace(
            video_depth=depth, width=c.video_width, hidden=c.video_head[0], dim=c.video_head[2], pool=c.video_pool
        )
    else:
        base = resolve("published").replace(**values)
    config, notes = fit(base, store)
    notes = [*notes, f"weights of {found.config.source}, converted"]
    if found.config.audio_net is not None and "crisscross-audio" not in found.families:
        notes.append("bins are normalised by the statistics of this selection, not by its authors'")
    with OpenRun(run) as folder:
        if not folder.start(config):
            snapshot = take_snapshot(store, config, notes, selection=selection)
            snapshot = dataclasses.replace(snapshot, unknown=(f"the weights {found.config.source}",))
            if "crisscross-audio" in found.families and snapshot.statistics is not None:
                recipe = named(found.config.front_end)
                constants = {"mean": [CRISSCROSS_MEAN] * recipe.bins, "std": [CRISSCROSS_STD] * recipe.bins, "rows": 0}
                snapshot = dataclasses.replace(snapshot, statistics={**snapshot.statistics, **constants})
            folder.write_snapshot(snapshot)
        made = folder.run
        if not made.checkpoints():
            method = build(config, made.snapshot, len(made.snapshot.numbers))
            prefix = "towers." if found.is_avid else ""
            method.load_state_dict({f"{prefix}{k}": x for k, x in found.state.items()})
            contract: Any = method.eval()
            if found.is_avid and found.partition is not None:
                contract.partition = torch.tensor(found.partition, dtype=torch.float64)
            if bank:
                contract.bank.memory, contract.bank.seen = fill_memory(
                    method, made, store, contract.bank.memory, device=device
                )
            state = {"total_steps": 0, "epoch": 0, "method": config.name, "config": config.digest, "precision": "fp32"}
            optimiser = torch.optim.SGD(method.cpu().parameters())
            checkpoints.save(made.folder, 0, method, optimiser, contract.method_state(), state)
    return made, list(made.snapshot.notes)
