"""Features of evaluation clips: the maps of a trained network, pooled to a grid, for several clips of each video.

    method, _ = with_weights(run, "latest")         # or "random": the same networks at initialisation
    found = sound_blocks(method, run, store, numbers, clips=10, grids=SOUND_GRIDS)["conv5x"]     # (n, clips, D)

Networks are in eval mode, float32, unchanged. AVID pools conv2x ... conv5x of sound to 12, 8, 6, 4 cells a side by mean
(the SVMs on ESC and DCASE), and of pictures to 12, 8, 6, 4 and one step of time by maximum (the linear probes).

Not here: what is learned on them (`svm.py`, `linear.py`, `knn.py`).
"""

# legend: n videos, K clips of each, D values of a pooled map

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore import draws
from avstore.durable import canonical_json
from avstore.errors import AvstoreError, ConflictError, UsageError
from avstore.identity import identity
from avstore.sampler import Order, SequentialOrder
from avstore.views import UniformView
from trainers.data import Normaliser, open_loader
from trainers.encoders import BLOCKS, Encoder
from trainers.fit import needs_of
from trainers.process import choose_device
from trainers.run import Run, build

if TYPE_CHECKING:
    from avstore.store import Store

SOUND_GRIDS = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}
PICTURE_GRIDS = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}
Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """Tells nobody."""


def with_weights(run: Run, which: str | int = "latest", seed: int = 0) -> nn.Module:
    """The run's method in eval mode: of a checkpoint ("latest", a step), or "random": its networks at initialisation
    with `seed`."""
    if which == "random":
        return build(run.config.replace(seed=seed), run.snapshot, None).float().eval()
    return run.load(which).float().eval()


def same_networks(run: Run, modality: Literal["a", "v", "av"]) -> str:
    """What decides the random networks of a run and the clip that they are shown: runs that agree in it share them.
    ConflictError where a modality has none."""
    method = with_weights(run, "random")
    nets = [str(trunk(method, m)) for m in ("a", "v") if m in modality]  # type: ignore[arg-type]
    needs = needs_of(run.config)
    clip = [needs.seconds, needs.front_end] if "a" in modality else []
    clip += [needs.frames, needs.fps, needs.size] if "v" in modality else []
    return hashlib.sha256(canonical_json([nets, clip])).hexdigest()[:16]


def key_of(method: nn.Module, run: Run, store: Store, numbers: np.ndarray, **made: Any) -> dict[str, Any]:
    """What decides the features of these videos, for `kept.py`; `made`: how they are made."""
    from benchmarks.finetune import weights_digest

    statistics = hashlib.sha256(canonical_json(run.snapshot.statistics)).hexdigest()[:16]
    return {"weights": weights_digest(method), "config": run.config.digest, "statistics": statistics,
            "media": identity(store, numbers), **made}  # fmt: skip


def trunk(method: nn.Module, modality: Literal["v", "a"]) -> Encoder:
    """The encoder of sight or sound inside a method. ConflictError where it has none."""
    holder = getattr(method, "towers", method)
    net = getattr(holder, {"v": "video", "a": "audio"}[modality], None)
    if not isinstance(net, Encoder):
        raise ConflictError(
            f"{type(method).__name__} has no network of {'pictures' if modality == 'v' else 'sound'}",
            "there are no maps to take features from",
            "choose another --modality or another run",
        )
    return net


def norms_of(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations of a network."""
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def pooled(maps: Mapping[str, Tensor], grids: Mapping[str, int], how: Literal["avg", "max"]) -> dict[str, Tensor]:
    """Each map (B, C, F, M) or (B, C, T, H, W) to a grid of at most g x g cells (time to one step): (B, C * cells).

    A side that has fewer cells than g keeps them: nothing is repeated.
    """
    out = {}
    for name, g in grids.items():
        x = maps[name]
        size = min(g, x.shape[-2]), min(g, x.shape[-1])
        if x.dim() == 5:
            x = F.adaptive_max_pool3d(x, (1, *size)) if how == "max" else F.adaptive_avg_pool3d(x, (1, *size))
        else:
            x = F.adaptive_max_pool2d(x, size) if how == "max" else F.adaptive_avg_pool2d(x, size)
        out[name] = x.flatten(1)
    return out


def sound_starts(length: int, window: int, clips: int, *, tiled: bool = True) -> np.ndarray:
    """int64 (clips,): evenly spaced starts in samples. tiled: AVID's, from 0 to just before the end, the recording
    going on with its beginning; else from 0 to the last that fits."""
    last = length - max(1, length // 50) if tiled else max(0, length - window)  # 4.9 of ESC's 5 s
    return np.round(np.linspace(0, last, clips)).astype(np.int64) if clips > 1 else np.zeros(1, np.int64)


def sound_windows(wave: np.ndarray, starts: np.ndarray, window: int) -> np.ndarray:
    """int16 (clips, window) of a recording (samples,) that goes on with its beginning. UsageError without a sample."""
    if not len(wave):
        raise UsageError("a recording without a sample", "there is nothing to tile")
    return wave[(starts[:, None] + np.arange(window)[None, :]) % len(wave)]


@torch.no_grad()
def sound_blocks(
    method: nn.Module,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    *,
    clips: int = 10,
    grids: Mapping[str, int] = SOUND_GRIDS,
    how: Literal["avg", "max"] = "avg",
    augment_seed: int | None = None,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, np.ndarray]:
    """{block: float32 (n, clips, D)} of recordings, tiled as AVID does on ESC-50 and DCASE.

    augment_seed: clips at random places with random loudness (x 1/2 .. 2), as for training recordings; None: the evenly
    spaced ones of testing. UsageError where a video has no sound, AvstoreError for features that are not finite.
    """
    needs = needs_of(run.config)
    net = trunk(method, "a")
    on = choose_device(device)
    method.to(on).eval()
    normaliser = Normaliser(needs, run.snapshot.statistics, store.spec.sample_rate, on, torch.float32)
    window = round(needs.seconds * store.spec.sample_rate)
    out: dict[str, list[np.ndarray]] = {name: [] for name in grids}
    hear: Any = getattr(method, "hear", lambda x: x)
    for i, number in enumerate(np.asarray(numbers, np.int64).tolist()):
        wave, _ = store.waveform(number)
        if not store.has_sound[number] or not len(wave):
            raise UsageError(
                f"{store.key(number)} has no sound", "the probes of sound need it", "--where has_sound=true"
            )
        gain = None
        if augment_seed is None:
            starts = sound_starts(len(wave), window, clips)
        else:
            u = draws.uniform(augment_seed, "probe", 0, number, np.arange(clips), 2)
            starts = (u[:, 0] * len(wave)).astype(np.int64)
            gain = torch.from_numpy(2.0 ** (2 * u[:, 1] - 1)).to(on, torch.float32)
        x = torch.from_numpy(np.ascontiguousarray(sound_windows(wave, starts, window))).to(on)
        here = np.ones(clips, bool)
        audio = normaliser.audio(x, here, torch.ones(clips, dtype=torch.bool, device=on), gain)
        found = pooled(net.forward_blocks(hear(audio)), grids, how)
        for name, value in found.items():
            out[name].append(_finite(value, store, number))
        progress(i + 1, len(numbers))
    return {name: np.stack(rows) for name, rows in out.items()}


@torch.no_grad()
def picture_blocks(
    method: nn.Module,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    *,
    clips: int = 10,
    grids: Mapping[str, int] = PICTURE_GRIDS,
    how: Literal["avg", "max"] = "max",
    frames: int | None = None,
    moving: int | None = None,
    device: str = "auto",
    batch: int = 16,
    progress: Progress = quiet,
) -> dict[str, np.ndarray]:
    """{block: float32 (n, clips, D)} of `clips` evenly spaced, centre-cropped clips of each video.

    frames: of a clip (None: as in pre-training). moving: a seed; clips then come shuffled by it, and the batch
    normalisations of the network use and move their statistics as in training (`train_mode.py`). UsageError where a
    video has no picture, AvstoreError for features that are not finite.
    """
    import dataclasses

    needs = dataclasses.replace(needs_of(run.config), sound=False, front_end=None)
    if frames is not None:
        needs = dataclasses.replace(needs, frames=frames)
    net = trunk(method, "v")
    on = choose_device(device)
    method.to(on).eval()
    normaliser = Normaliser(needs, None, store.spec.sample_rate, on, torch.float32)
    numbers = np.asarray(numbers, np.int64)
    order: SequentialOrder | Order = SequentialOrder(len(numbers), clips, batch_size=batch)
    if moving is not None:
        order = Order(len(numbers), clips, seed=moving, batch_size=batch)
        for norm in norms_of(net):
            norm.train()
    out: dict[str, list[np.ndarray]] = {name: [] for name in grids}
    place: list[tuple[np.ndarray, np.ndarray]] = []
    with open_loader(store, numbers, needs, order, UniformView(clips), device=on) as loader:
        for raw in loader.steps(0, order.batches):
            if not raw.has_picture.all():
                number = int(raw.video[~raw.has_picture][0])
                raise UsageError(
                    f"{store.key(number)} has no picture", "the probes of pictures need it", "--where has_picture=true"
                )
            t = raw.tensors(on)
            video = normaliser.video(t["frames"], raw.box, raw.has_picture, t["has_picture"])
            found = pooled(net.forward_blocks(video), grids, how)
            for name, value in found.items():
                out[name].append(_finite(value, store, int(raw.video[0])))
            place.append((raw.row.copy(), raw.draw.copy()))
            progress(sum(len(r) for r, _ in place), order.length)
    row, draw = (np.concatenate(p) for p in zip(*place, strict=True))
    result = {}
    for name, parts in out.items():
        x = np.concatenate(parts)
        full = np.empty((len(numbers), clips, x.shape[1]), np.float32)
        full[row, draw] = x
        result[name] = full
    return result


def raw_sound(store: Store, numbers: np.ndarray, *, clips: int = 10, seconds: float = 2.0) -> np.ndarray:
    """A control: float32 (n, clips, D), the log-mel spectrogram of the same windows, averaged to 20 steps of time."""
    from avstore.frontends import spectrogram

    window = round(seconds * store.spec.sample_rate)
    rows = []
    for number in np.asarray(numbers, np.int64).tolist():
        wave, _ = store.waveform(number)
        x = sound_windows(wave, sound_starts(len(wave), window, clips), window).astype(np.float32) / 32768
        spec = spectrogram(torch.from_numpy(x), "crisscross-mel80", store.spec.sample_rate)
        rows.append(F.adaptive_avg_pool2d(spec[:, None].float(), (20, 80)).flatten(1).numpy())
    return np.stack(rows)


def raw_pictures(store: Store, numbers: np.ndarray, *, clips: int = 10) -> np.ndarray:
    """A control: float32 (n, clips, D), 16 x 16 colour pictures of the middle of evenly spaced windows and how they
    change within an eighth of a second."""
    from benchmarks.raw import shrunk

    rows = []
    for number in np.asarray(numbers, np.int64).tolist():
        length = float(store.seconds(number))
        starts = np.linspace(0, max(0.0, length - 0.25), clips)
        parts = []
        for start in starts:
            clip = store.clip(number, start, n=2, fps=min(8, store.spec.fps), seconds=0)
            assert clip.frames is not None and clip.box is not None
            y, x, h, w = clip.box
            side = min(h, w)
            y, x = y + (h - side) // 2, x + (w - side) // 2
            a, b = (shrunk(f[y : y + side, x : x + side]) for f in clip.frames)
            parts.append(np.concatenate([a.reshape(-1), np.abs(b - a).reshape(-1)]))
        rows.append(np.stack(parts))
    return np.stack(rows).astype(np.float32)


def _finite(x: Tensor, store: Store, number: int) -> np.ndarray:
    if not torch.isfinite(x).all():
        raise AvstoreError(
            f"features of {store.key(number)} are not finite",
            "the run diverged: a probe of them would be meaningless",
            "take an earlier --checkpoint",
        )
    return x.float().cpu().numpy()


__all__ = ["BLOCKS", "PICTURE_GRIDS", "SOUND_GRIDS", "key_of", "norms_of", "picture_blocks", "pooled", "raw_pictures",
           "raw_sound", "same_networks", "sound_blocks", "sound_starts", "sound_windows", "trunk",
           "with_weights"]  # fmt: skip
