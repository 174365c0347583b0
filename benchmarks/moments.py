"""What a preview of long videos is given of a run: moments of each video, and of a student of Listen to Look its Psi.

    given = of_store(store, "listen-to-look", {"label": "label"})      # from the embeddings (avstore embed)
    given.features[0]                                                   # (moments, D) of the first probed video

A moment is a second: trunk vectors of the picture and sound side by side, heads where a run has no trunks. Where the
run is a student of Listen to Look, the preview asks in the terms of its fusion Psi (frozen), and starts from its
classifier where both tell the same classes apart; the run's folder is looked for in runs/ here and beside the store,
and `told` says what was found. Choosing moments is `trainers/preview.py`, measuring the choice `untrimmed.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.durable import canonical_json
from avstore.errors import NotFoundError
from benchmarks import probing, unseen
from trainers.preview import Moments

if TYPE_CHECKING:
    from torch import nn

    from avstore.store import Store
    from benchmarks.kept import Kept
    from trainers.projectors import Projector
    from trainers.run import Run

TOWERS = ("video-trunk", "audio-trunk", "video", "audio")


@dataclass(frozen=True, eq=False)
class Given:
    """Of one run: `moments` of each probed video in order, `widths` of each tower's part of them, Psi and the
    classifier of a student, or None; told: notes, in words."""

    run: str
    probed: probing.Probed
    moments: list[Moments]
    towers: tuple[str, ...]
    widths: tuple[int, ...]
    fusion: Projector | None
    classifier: nn.Linear | None
    told: tuple[str, ...]

    @property
    def features(self) -> list[np.ndarray]:
        """float32 (n_i, D) of each video."""
        return [m.features for m in self.moments]

    def digest(self) -> str:
        """16 hex digits of all that a run decides of a preview: the moments, their towers' widths, Psi, classifier."""
        from benchmarks.finetune import weights_digest

        h = hashlib.sha256(canonical_json([list(self.towers), list(self.widths)]))
        for x in self.features:
            h.update(f"{x.shape}".encode() + np.ascontiguousarray(x, "<f4").tobytes())
        for net in (self.fusion, self.classifier):
            h.update(b"none" if net is None else weights_digest(net).encode())
        return h.hexdigest()[:16]


def of_store(store: Store, name: str, choice: dict[str, Any]) -> Given:
    """From the embeddings `name` in the store; choice: keywords of `probing.choose`. NotFoundError where the run has
    none, or a video has no moment."""
    from avstore.durable import read_json
    from avstore.index import embedded_runs
    from benchmarks.lineage import trainers_of

    towers = towers_of(embedded_runs(store).get(name, ()))
    if not towers:
        raise NotFoundError(f"run {name} has no embeddings in {store.path}", "", f"avstore embed {name} {store.path}")
    probed = probing.choose(store, modality=_modality(towers), **choice)
    made, widths = stored(store, name, probed.numbers, towers)
    whole = (name, probed, made, tuple(towers), widths)
    found, _ = trainers_of(store, [name])
    if not found:
        told = f"{name}: its run is not in runs/ here or beside the store: no Psi of a student is used, if it is one"
        return Given(*whole, None, None, (told,))
    seen = unseen.told(store, found[0], probed.numbers, probed.parts)
    if found[0].config.name != "listen-to-look":
        return Given(*whole, None, None, seen)
    step = read_json(store.path / "embeddings" / name / towers[0] / "zarr.json")["attributes"]["avstore"]["step"]
    try:
        method = found[0].load(step)
    except NotFoundError as e:  # the checkpoint, or its teacher
        told = f"{name} is a student whose checkpoint cannot be loaded ({e.what}): its Psi and classifier are not used"
        return Given(*whole, None, None, (told, *seen))
    fusion, classifier, notes = student(method, towers, probed.classes, name)
    return Given(*whole, fusion, classifier, (*notes, *seen))


def of_checkpoint(
    store: Store, run: Run, which: str | int, device: str, choice: dict[str, Any], kept: Kept | None = None
) -> Given:
    """From what a checkpoint's networks give now; nothing is written but to `kept`. NotFoundError as `of_store`."""
    from benchmarks.blocks import key_of
    from trainers.embed import embed_videos
    from trainers.embedder import Embedder

    method = run.load(which)
    sizes = Embedder(method, run, store.spec.sample_rate, device).sizes()
    towers = towers_of(list(sizes))
    if not towers:
        raise NotFoundError(f"{run.path} has no towers of pictures or sound", f"it has {', '.join(sizes)}")
    probed = probing.choose(store, modality=_modality(towers), **choice)

    def computed() -> dict[str, np.ndarray]:
        vectors = embed_videos(method, run, store, probed.numbers, device=device)
        return {f"{t} {i}": x for t in towers for i, x in enumerate(vectors[t])}

    key = key_of(method, run, store, probed.numbers, moments=list(towers))
    x = computed() if kept is None else kept.arrays(key, computed)
    found = {t: (x[f"{t} 0"], x[f"{t} 1"], x[f"{t} 2"]) for t in towers}
    fusion, classifier, notes = student(method, towers, probed.classes, run.name)
    made = joined([found[t] for t in towers], probed.numbers)
    widths = tuple(sizes[t] for t in towers)
    return Given(run.name, probed, made, tuple(towers), widths, fusion, classifier,
                 (*notes, *unseen.told(store, run, probed.numbers, probed.parts)))  # fmt: skip


def towers_of(there: Sequence[str]) -> list[str]:
    """Of the towers that are there: trunks where there are some, else heads; pictures before sound."""
    towers = [t for t in TOWERS if t in there]
    return [t for t in towers if t.endswith("-trunk")] or towers[:2]


def _modality(towers: Sequence[str]) -> str:
    return "".join(m for m, t in (("v", "video"), ("a", "audio")) if any(x.startswith(t) for x in towers))


def student(
    method: nn.Module, towers: Sequence[str], classes: Sequence[str], name: str
) -> tuple[Projector | None, nn.Linear | None, tuple[str, ...]]:
    """(Psi, classifier, notes) of a student of Listen to Look; (None, None, ()) of any other run. The classifier is
    None where it tells other classes apart; its rows come in the order of `classes`."""
    import torch
    from torch import nn

    from trainers.listen_to_look import ListenToLook

    if not isinstance(method, ListenToLook) or tuple(towers) != ("video-trunk", "audio-trunk"):
        return None, None, ()
    own = [str(c) for c in method.classes]
    if set(own) != set(classes):
        told = f"{name} is a student: its Psi fuses the moments; its classifier knows other classes, and is not used"
        return method.fusion.cpu(), None, (told,)
    rows = torch.tensor([own.index(c) for c in classes])
    classifier = nn.Linear(method.classifier.in_features, len(rows))
    with torch.no_grad():
        classifier.weight.copy_(method.classifier.weight[rows])
        classifier.bias.copy_(method.classifier.bias[rows])
    return method.fusion.cpu(), classifier, (f"{name} is a student: its Psi fuses the moments, for the preview and for "
                                             "the classifier of all selectors, and the preview starts from its "
                                             "classifier",)  # fmt: skip


def stored(store: Store, run: str, numbers: np.ndarray, towers: Sequence[str]) -> tuple[list[Moments], tuple[int, ...]]:
    """(moments of each video, width of each tower), from the embeddings in the store."""
    from avstore.durable import read_json
    from trainers import preview

    found = preview.moments(store, run, numbers, towers)
    empty = [int(n) for n in numbers if int(n) not in found or not len(found[int(n)].features)]
    if empty:
        raise NotFoundError(
            f"{len(empty)} videos have no moment in the embeddings of {run}, e.g. {store.key(empty[0])}",
            "they came after the last embed, or lack a modality",
            f"avstore embed {run} {store.path}",
        )
    folder = store.path / "embeddings" / run
    widths = tuple(int(read_json(folder / t / "zarr.json")["shape"][1]) for t in towers)
    return [found[int(n)] for n in numbers], widths


def joined(towers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], numbers: np.ndarray) -> list[Moments]:
    """Moments of each video, D = the towers' widths together: every second of the first tower, with that of the others
    beside it, zeros where they have none. towers: (vectors, video numbers, seconds) of each."""
    places = [{(int(n), int(s)): i for i, (n, s) in enumerate(zip(video, second, strict=True))}
              for _, video, second in towers]  # fmt: skip
    seconds_of: dict[int, list[int]] = {}
    for n, s in sorted(places[0]):
        seconds_of.setdefault(n, []).append(s)
    out = []
    for n in numbers.tolist():
        seconds = seconds_of[n]
        parts = [np.stack([x[at[n, s]] if (n, s) in at else np.zeros(x.shape[1], x.dtype) for s in seconds])
                 for (x, _, _), at in zip(towers, places, strict=True)]  # fmt: skip
        out.append(Moments(np.concatenate(parts, 1).astype(np.float32), np.array(seconds, np.int64)))
    return out
