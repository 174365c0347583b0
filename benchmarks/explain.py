"""What a network looks at and listens to, and how its two spaces lie together.

    seen = saliency(run, store, pairs)              # maps over frames and spectrograms (CrissCross Fig. 4, AVCL Fig. 2)
    points = feature_map(run, store, numbers)       # 2-D projection and cosines (CrissCross Fig. 3, left)

Maps (clips-and-protocols.md 3, ours): Grad-CAM (Selvaraju et al. 2017, eqs. 1-2) without classes. The score is the
cosine s of the clip's v and a; with the maps A_c of a block, w_c = mean over places of ds/dA_c and
L = ReLU(sum_c w_c A_c), linearly enlarged over the clip, divided by its maximum. form "product" leaves the mean out,
L = ReLU(sum_c ds/dA_c A_c) place by place (HiResCAM, Draelos and Carin 2020): behind a maximum over places, as in AVID,
that is where the maxima were. Both show what speaks for the match of sight and sound; where nothing does, L is zero.

Not here: class activation maps of a fine-tuned head (`head.py`), and the page of it all (`explain_page.py`).
"""

# legend: B clips, C channels, T frames, H x W pixels, F spectrogram frames, M bins

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.augment import IMAGENET_MEAN, IMAGENET_STD
from avstore.errors import ConflictError, ExtraMissingError, UsageError, did_you_mean
from benchmarks.card import coloured
from trainers.data import open_loader
from trainers.embed import embed_checkpoint
from trainers.embedder import Embedder
from trainers.encoders import BLOCKS, Encoder
from trainers.seconds import ListedOrder, SecondView

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run

FORMS = ("grad-cam", "product")
PROJECTIONS = ("pca", "tsne", "umap")
TILE = 112  # pixels of a frame in a picture of saliency
FRAMES = 6  # of a clip that are shown
Embed = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Saliency:
    """One clip of one run. frames: uint8 (T, H, W, 3), what the network got; sight: float32 (T, H, W) in [0, 1];
    rows: float32 (F, M), the normalised spectrogram; sound: float32 (F, M) in [0, 1]; cosine of v and a, or the class'
    probability, and then `told` says so. Empty arrays where a network takes no pictures, or no sound."""

    run: str
    video: int
    second: int
    cosine: float
    frames: np.ndarray
    sight: np.ndarray
    rows: np.ndarray
    sound: np.ndarray
    told: str = ""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Of one run: for n videos with sight and sound their numbers, points float64 (n, 2) of each, cosines float64 (n,)
    of own sight and sound, and `others` float64: of sight and sound of different videos."""

    run: str
    how: str
    numbers: np.ndarray
    video: np.ndarray
    audio: np.ndarray
    cosine: np.ndarray
    others: np.ndarray

    @property
    def above(self) -> float:
        """Share of (own pair, other pair) in which the own cosine is larger, ties half: 0.5 is chance."""
        order = np.sort(self.others)
        left, right = (np.searchsorted(order, self.cosine, side=s) for s in ("left", "right"))
        return float((left + right).mean() / 2 / len(order)) if len(order) else float("nan")


# ---- saliency ---------------------------------------------------------------------------------------------------


def attend(
    method: nn.Module, embed: Embed, video: Tensor, audio: Tensor, block: str = "conv4x", form: str = "grad-cam"
) -> tuple[Tensor, ...]:
    """(cosine (B,), maps of sight (B, T, H, W), of sound (B, F, M)), maps in [0, 1].

    video (B, 3, T, H, W), audio (B, 1, F, M); `embed(video, audio)` gives 'video' and 'audio' of one width. The maps
    are those of the encoders that `embed` calls. UsageError for another block, ConflictError for a method whose two
    vectors cannot be compared, or whose vectors do not come from such maps.
    """
    if block not in BLOCKS:
        raise UsageError(f"no block {block!r}", did_you_mean(block, BLOCKS))
    with torch.enable_grad(), _watched(method, block) as seen:
        found = embed(video, audio)
        v, a = found.get("video"), found.get("audio")
        if v is None or a is None or v.shape != a.shape:
            raise ConflictError(
                f"{type(method).__name__} has no cosine of sight and sound",
                f"its towers: {', '.join(f'{k} {tuple(x.shape)}' for k, x in found.items())}",
                "saliency needs a method that compares the two, such as avid-cma",
            )
        cosine = F.cosine_similarity(v.float(), a.float(), dim=1)
        every = [x for of in seen.values() for x in of]
        if not every or not cosine.requires_grad:
            raise ConflictError(f"{type(method).__name__} has no maps behind its vectors", "there is nothing to show")
        slopes = iter(torch.autograd.grad(cosine.sum(), every, allow_unused=True))
    out = []
    for modality, size in (("v", video.shape[2:]), ("a", audio.shape[2:])):
        maps = [(x, g) for x, g in zip(seen[modality], (next(slopes) for _ in seen[modality]), strict=True)]
        used = [(x.detach(), g) for x, g in maps if g is not None]
        if not used:
            raise ConflictError(
                f"{type(method).__name__}: its {'video' if modality == 'v' else 'audio'} vectors come from no {block}",
                "the score does not depend on any such map",
            )
        out.append(cam(*used[0], tuple(size), form))
    return cosine.detach(), out[0], out[1]


def cam(maps: Tensor, slopes: Tensor, size: tuple[int, ...], form: str = "grad-cam") -> Tensor:
    """Maps and d score / d maps (B, C, ...) -> (B, *size) in [0, 1], each clip divided by its maximum. See FORMS."""
    if form not in FORMS:
        raise UsageError(f"no form of saliency {form!r}", did_you_mean(form, FORMS))
    maps, slopes = maps.float(), slopes.float()
    if form == "grad-cam":
        slopes = slopes.flatten(2).mean(2).reshape(*slopes.shape[:2], *[1] * (slopes.dim() - 2))
    found = F.relu((slopes * maps).sum(1, keepdim=True))
    mode = "trilinear" if len(size) == 3 else "bilinear"
    large = F.interpolate(found, size, mode=mode, align_corners=False)[:, 0]
    most = large.flatten(1).amax(1)
    return large / torch.where(most > 0, most, 1).reshape(-1, *[1] * len(size))


@contextmanager
def _watched(method: nn.Module, block: str) -> Iterator[dict[str, list[Tensor]]]:
    """While it is open, the maps of `block` that any encoder in the method computes: of pictures 'v', of sound 'a'."""
    seen: dict[str, list[Tensor]] = {"v": [], "a": []}
    nets: list[Any] = [m for m in method.modules() if isinstance(m, Encoder)]

    def watch(net: Any) -> None:
        original = net.forward_blocks

        def forward_blocks(x: Tensor) -> dict[str, Tensor]:
            maps: dict[str, Tensor] = original(x)
            if maps[block].requires_grad:  # what is frozen on purpose takes no part in the score
                seen["v" if maps[block].dim() == 5 else "a"].append(maps[block])
            return maps

        net.forward_blocks = forward_blocks

    for net in nets:
        watch(net)
    try:
        yield seen
    finally:
        for net in nets:
            del net.forward_blocks


def saliency(
    run: Run,
    store: Store,
    pairs: Sequence[tuple[int, int]],
    *,
    block: str = "conv4x",
    form: str = "grad-cam",
    which: str | int = "latest",
    device: str = "auto",
    method: nn.Module | None = None,
) -> list[Saliency]:
    """Maps of the clips centred on (video number, second), by a run's checkpoint (or `method`: its module, with
    whatever weights). UsageError where a video lacks sight or sound."""
    if block not in BLOCKS:
        raise UsageError(f"no block {block!r}", did_you_mean(block, BLOCKS))
    if form not in FORMS:
        raise UsageError(f"no form of saliency {form!r}", did_you_mean(form, FORMS))
    for number, second in pairs:
        number = store[number].number
        if not (store.has_picture[number] and store.has_sound[number]):
            raise UsageError(f"video {number} ({store.key(number)}) lacks picture or sound", "saliency needs both")
        if not 0 <= second < float(store.seconds(number)):
            raise UsageError(f"second {second} of video {number}", f"it lasts {float(store.seconds(number)):.2f} s")
    if not pairs:
        return []
    embedder = Embedder(method or run.load(which), run, store.spec.sample_rate, device)
    if not embedder.needs.picture or embedder.normaliser.mean is None:
        raise ConflictError(f"{run.config.name} does not take pictures and sound", "there is no cosine of the two")
    for p in embedder.method.parameters():
        p.requires_grad_(True)
    numbers, rows = np.unique(np.array([n for n, _ in pairs], np.int64), return_inverse=True)
    seconds = np.array([s for _, s in pairs], np.int64)
    order = ListedOrder(len(numbers), rows, seconds, 1)  # one clip at a time: gradients hold all maps
    mean, std = (torch.tensor(x).reshape(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    out = []
    view = SecondView(store.spec.sample_rate)
    with open_loader(store, numbers, embedder.needs, order, view, device=embedder.device) as loader:
        for raw in loader.steps(0, order.batches):
            on = raw.tensors(embedder.device)
            here = np.ones(len(raw), bool)
            video = embedder.normaliser.video(on["frames"], raw.box, here, on["has_picture"])
            audio = embedder.normaliser.audio(on["waveform"], here, on["has_sound"])
            share = on["valid_samples"] / on["waveform"].shape[1] if embedder.wants_share else None
            embed = partial(_embedded, embedder, share)
            cosine, sight, sound = attend(embedder.method, embed, video, audio, block, form)
            shown = ((video[0].float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            out.append(
                Saliency(
                    run.name,
                    int(raw.video[0]),
                    int(raw.draw[0]),
                    float(cosine[0]),
                    shown.permute(1, 2, 3, 0).contiguous().numpy(),
                    sight[0].float().cpu().numpy(),
                    audio[0, 0].float().cpu().numpy(),
                    sound[0].float().cpu().numpy(),
                )
            )
    return out


def _embedded(embedder: Embedder, share: Tensor | None, video: Tensor, audio: Tensor) -> dict[str, Tensor]:
    return embedder._embed(video, audio, share)


def overlaid(base: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) with the map (...) in [0, 1] over it in colour: what counts for nothing turns grey and dark."""
    grey = base.astype(float) @ np.array([0.299, 0.587, 0.114])
    strength = np.clip(heat, 0, 1)[..., None] * 0.7
    return np.rint(grey[..., None] * 0.75 * (1 - strength) + coloured(heat) * strength).clip(0, 255).astype(np.uint8)


def strip(found: Saliency, overlay: bool) -> np.ndarray:
    """uint8 (TILE, width, 3): FRAMES frames of the clip and its spectrogram, low notes below, with or without maps."""
    gap, parts = np.full((TILE, 4, 3), 255, np.uint8), []
    if len(found.frames):
        at = np.unique(np.linspace(0, len(found.frames) - 1, FRAMES).round().astype(int))
        frames = overlaid(found.frames[at], found.sight[at]) if overlay else found.frames[at]
        parts += [x for f in frames for x in (_resized(f, TILE, TILE), gap)]
    if found.rows.size:
        low, high = np.percentile(found.rows, [5, 99.5])
        grey = np.rint(np.clip((found.rows.T[::-1] - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
        heard = np.repeat(grey[..., None], 3, axis=-1)
        parts += [gap, _resized(overlaid(heard, found.sound.T[::-1]) if overlay else heard, TILE, 2 * TILE)]
    return np.concatenate(parts, axis=1)


def saliency_picture(of_runs: Sequence[Saliency]) -> np.ndarray:
    """uint8 (height, width, 3) of one clip: for each run what its network got, and under it the maps over it."""
    if not of_runs:
        raise UsageError("no maps to draw", "saliency of one run at least")
    lines = [strip(s, overlay) for s in of_runs for overlay in (False, True)]
    width = max(x.shape[1] for x in lines)
    padded = [np.pad(x, ((0, 4), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in lines]
    return np.concatenate(padded)


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    y = F.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    return y.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


# ---- maps of features -------------------------------------------------------------------------------------------


def project(x: np.ndarray, how: str = "pca", seed: int = 0) -> np.ndarray:
    """float64 (n, 2) of rows (n, D): PCA (by SVD; signs so that each axis' largest coefficient is positive), t-SNE
    (scikit-learn, started from PCA) or UMAP (extra viz). n >= 3."""
    if how not in PROJECTIONS:
        raise UsageError(f"no projection {how!r}", did_you_mean(how, PROJECTIONS))
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 3 or x.shape[1] < 2:
        raise UsageError(f"a projection of {x.shape} values", "at least 3 rows of 2 values")
    if not np.isfinite(x).all():
        raise UsageError("features that are not finite", "", "embed an earlier checkpoint")
    if how == "umap":
        _require("umap", "umap-learn")
        import umap

        neighbours = min(15, len(x) - 1)
        return np.asarray(umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(x), np.float64)
    if how == "tsne":
        from sklearn.manifold import TSNE

        made = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=seed)
        return np.asarray(made.fit_transform(x.astype(np.float32)), np.float64)
    centred = x - x.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    return centred @ axes.T


def feature_map(
    run: Run,
    store: Store,
    numbers: np.ndarray,
    *,
    how: str = "pca",
    seed: int = 0,
    which: str | int = "latest",
    device: str = "auto",
) -> FeatureMap:
    """Mean embeddings of those of `numbers` that have sight and sound, projected together, and their cosines.
    ConflictError for a method whose two towers differ in width; UsageError for fewer than 3 videos."""
    if how not in PROJECTIONS:
        raise UsageError(f"no projection {how!r}", did_you_mean(how, PROJECTIONS))
    found = embed_checkpoint(run, store, np.asarray(numbers, np.int64), which, device=device)
    if "video" not in found or "audio" not in found or found["video"][0].shape[1] != found["audio"][0].shape[1]:
        raise ConflictError(
            f"{run.config.name} has no common space of sight and sound", f"its towers: {', '.join(found)}"
        )
    return mapped(run.name, *found["video"], *found["audio"], how=how, seed=seed)


def mapped(
    run: str, v: np.ndarray, vn: np.ndarray, a: np.ndarray, an: np.ndarray, *, how: str = "pca", seed: int = 0
) -> FeatureMap:
    """`feature_map` of unit vectors v (n, D) of the videos vn, a (m, D) of an."""
    both = np.intersect1d(vn, an)
    if len(both) < 3:
        raise UsageError(f"{len(both)} videos with sight and sound", "a map needs 3 at least", "widen the selection")
    v, a = v[np.searchsorted(vn, both)].astype(np.float64), a[np.searchsorted(an, both)].astype(np.float64)
    every = v @ a.T
    points = project(np.concatenate([v, a]), how, seed)
    others = every[~np.eye(len(both), dtype=bool)]
    return FeatureMap(run, how, both, points[: len(both)], points[len(both) :], np.diag(every).copy(), others)


def write_parquet(path: Path, maps: Sequence[FeatureMap], store: Store, label: str = "label") -> None:
    """One row per run, video and modality: run, number, key, label, modality, x, y, cosine (of own sight and sound).
    ExtraMissingError without pyarrow."""
    from avstore.durable import write_atomic

    require_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {k: [] for k in ("run", "number", "key", "label", "modality", "x", "y", "cosine")}
    for m in maps:
        labels = store.column(label, m.numbers) if label in store.columns else [None] * len(m.numbers)
        for modality, points in (("video", m.video), ("audio", m.audio)):
            columns["run"] += [m.run] * len(m.numbers)
            columns["number"] += m.numbers.tolist()
            columns["key"] += [store.key(int(n)) for n in m.numbers]
            columns["label"] += [None if x is None else str(x) for x in labels]
            columns["modality"] += [modality] * len(m.numbers)
            columns["x"] += points[:, 0].tolist()
            columns["y"] += points[:, 1].tolist()
            columns["cosine"] += m.cosine.tolist()
    kinds = {"number": pa.int64(), "x": pa.float64(), "y": pa.float64(), "cosine": pa.float64()}
    table = pa.table({k: pa.array(v, kinds.get(k, pa.string())) for k, v in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def require_parquet() -> None:
    """ExtraMissingError without pyarrow: told before anything is computed."""
    _require("pyarrow", "pyarrow")


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ExtraMissingError(
            f"{package} is not installed", "it belongs to the extra viz", "pip install 'avstore[viz]'"
        )
