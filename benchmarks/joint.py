"""Joint features: sight and sound of each second, in the context of the seconds around it.

    rows = joint_rows(store, "temporal", run, numbers)      # float32 (S, W), one row per second of the tape, NaN: none

Of methods with a model over several snippets (`temporal`: the Transformer's outputs, S0 Table 2's audio-visual
features), from the embeddings of its branches in the store: the row of second s is the middle one of as many snippets
as the model was trained on, as far apart as then; those outside the video, and seconds without picture or sound, count
as not there, and have no row of their own. Declared: the paper does not say which of a window's outputs it takes.
Not here: joint towers that `embed` writes by itself (AVCL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from avstore.durable import read_json
from avstore.errors import ConflictError
from avstore.index import read_rows

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

BATCH = 256  # windows at a time


def joint_rows(store: Store, name: str, run: Run, numbers: NDArray[np.integer]) -> NDArray[np.float32]:
    """Rows of the videos `numbers` from the embeddings `name`, which `run` made. ConflictError for a method without
    such a model, embeddings of another checkpoint or not of every second; NotFoundError without its branches' towers.
    """
    config: Any = run.config.method
    if not all(hasattr(config, k) for k in ("snippets", "hop")):
        raise ConflictError(
            f"{run.config.name} has no model over several snippets",
            "joint features are the outputs of one",
            "--tower video --tower audio puts sight and sound side by side",
        )
    towers = ("video", "audio") if getattr(config, "target", "") == "head" else ("video-trunk", "audio-trunk")
    sight, sound = (read_rows(store, name, t) for t in towers)
    said = read_json(store.path / "embeddings" / name / towers[0] / "zarr.json")["attributes"].get("avstore", {})
    if said.get("every", 1) != 1:
        raise ConflictError(
            f"embeddings {name} are of every {said['every']} seconds", "", f"avstore embed {run.path} {store.path}"
        )
    found = {c.step: c.digest for c in run.checkpoints()}
    step = int(said.get("step", -1))
    if found.get(step) != said.get("checkpoint"):
        raise ConflictError(
            f"{run.path} does not hold the checkpoint that made the embeddings {name}",
            f"step {step} of digest {said.get('checkpoint')}",
            f"avstore embed {run.path} {store.path} --replace",
        )
    method: Any = run.load(step).float().eval()
    count = int(config.snippets)
    steps = np.round((np.arange(count) - count // 2) * float(config.hop)).astype(np.int64)
    out: NDArray[np.float32] | None = None
    for number in np.asarray(numbers, np.int64).tolist():
        seconds, place = int(-(-store.seconds(number) // 1)), int(store.places[number])
        v, a = (x[place : place + seconds].astype(np.float32) for x in (sight, sound))
        if len(v) < seconds:
            continue  # it came after the last embed: whoever reads the rows names it
        there = np.asarray(np.isfinite(np.concatenate([v, a], 1)).all(1))
        at = np.arange(seconds)[:, None] + steps[None, :]
        inside = (at >= 0) & (at < seconds)
        at = np.where(inside, at, 0)
        here = inside & there[at]
        mine = np.flatnonzero(there)
        for start in range(0, len(mine), BATCH):
            part = mine[start : start + BATCH]
            v_BTC, a_BTC = (torch.from_numpy(np.where(here[part][..., None], x[at[part]], 0)) for x in (v, a))
            with torch.no_grad():
                joined = method.joint(v_BTC, a_BTC, torch.from_numpy(here[part]))[:, count // 2].float().numpy()
            if out is None:
                out = np.full((len(sight), joined.shape[1]), np.nan, np.float32)
            out[place + part] = joined
    return np.full((len(sight), 1), np.nan, np.float32) if out is None else out
