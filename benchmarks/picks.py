"""Features of a run's networks at the frames that a summariser samples, from videos in a store; nothing is written.

    features_of(store, run, "latest", annotations)        # {video: float32 (n_picks, D)} for `bench summarize`

As `avstore export --layout eccv16 --annotations` writes them of embeddings (`export.py`: the pick's row is that of the
second in which the tape shows the frame nearest to it; several towers side by side, each of unit length), but of any
checkpoint, and not rounded to half precision. Not here: joint features, which want embeddings (`joint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avstore.errors import NotFoundError, UsageError, did_you_mean
from benchmarks.annotations import Annotations
from benchmarks.export import matched, require_film, rows_of_picks, source_frames, zeroed
from benchmarks.kept import Kept

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run


def features_of(
    store: Store,
    run: Run,
    which: str | int,
    annotations: Annotations,
    towers: Sequence[str] = ("video",),
    *,
    kept: Kept | None = None,
    device: str = "auto",
) -> dict[str, NDArray[np.float32]]:
    """For each annotated video, by its name in `annotations.videos`, the features of its picks.

    A silent video has zeros for what is made of sound (`export.zeroed`). NotFoundError where an annotated video is not
    in the store once, or lacks seconds; ConflictError for another film than was annotated; UsageError for towers that
    are named twice or that the run does not have.
    """
    from benchmarks.blocks import key_of
    from trainers.embed import embed_videos

    if not towers or len(set(towers)) < len(towers):
        raise UsageError(f"towers {', '.join(towers) or 'none'}", "each once, one at least", "--tower video")
    found = matched(store, np.asarray(store.numbers, np.int64), annotations)
    shown = {}
    for number, said in found:
        assert said is not None
        shown[number], frames = source_frames(store, number)
        require_film(store.key(number), frames, said)
    numbers, method = np.array([n for n, _ in found], np.int64), run.load(which)

    def computed() -> dict[str, np.ndarray]:
        vectors = embed_videos(method, run, store, numbers, device=device)
        for tower in towers:
            if tower not in vectors:
                joint = tower == "joint"
                why = "joint features want embeddings: avstore export" if joint else did_you_mean(tower, vectors)
                raise UsageError(f"run {run.name} has no {tower!r} of these videos", why, f"--tower {min(vectors)}")
        return {f"{t} {i}": x for t in towers for i, x in enumerate(vectors[t])}

    x = (kept or Kept(None)).arrays(key_of(method, run, store, numbers, picks=list(towers)), computed)
    out = {}
    for name, (number, said) in zip(annotations.videos, found, strict=True):
        assert said is not None
        second = rows_of_picks(shown[number], said.picks) // store.spec.fps
        parts = [np.zeros((len(second), x[f"{t} 0"].shape[1]), np.float32) if zeroed(store, number, t)
                 else _at(x[f"{t} 0"], x[f"{t} 1"], x[f"{t} 2"], number, second) for t in towers]  # fmt: skip
        bad = [t for t, p in zip(towers, parts, strict=True) if not np.isfinite(p).all()]
        if bad:
            raise NotFoundError(f"{store.key(number)} has no {bad[0]} of each of its seconds", "pictures or sound lack",
                                "another --tower, or annotations without this video")  # fmt: skip
        if len(parts) > 1:
            parts = [p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12) for p in parts]
        out[name] = (np.concatenate(parts, 1) / np.sqrt(len(parts))).astype(np.float32)
    return out


def _at(
    vectors: np.ndarray, video: np.ndarray, seconds: np.ndarray, number: int, wanted: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The rows of the `wanted` seconds of a video; NaN where it has none."""
    mine = {int(s): i for i, s in enumerate(seconds) if video[i] == number}
    at = np.array([mine.get(int(s), -1) for s in wanted], np.int64)
    return np.where((at >= 0)[:, None], vectors[at], np.nan).astype(np.float32)
