"""Raw controls of retrieval: what pixels and spectrograms give without any learning.

Each video is its centre window: 32 frames at 16 fps (2 s; the tape's rate where that is lower), centre-cropped to a
square and averaged down to 16x16 (raw pixels: every other frame), and the spectrogram of the 2 s of sound. All are
compared as the learned features are (cosine), after the gallery's mean was taken off each dimension, which makes them
stronger.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from avstore.store import Store

FRAMES, FPS, SECONDS, SIDE = 32, 16, 2, 16
FRONT_END = "avid-linear257"
STEP_ROWS = 4  # spectrogram rows averaged into one for the raw spectrogram

# name -> (pair of modalities, field of Raw)
SIGHT = {
    "raw pixels 16x16": "pixels",
    "mean frame": "mean_frame",
    "mean abs. difference": "difference",
    "motion energy": "motion",
}
SOUND = {"raw spectrogram": "spectrogram", "spectrogram mean": "spectrum", "spectrogram mean + sd": "spectrum_sd"}
BOTH = "motion and loudness"  # across: the motion curve against the sound's


@dataclass(frozen=True)
class Raw:
    """Feature name -> float32 (n, D), for the videos `numbers` that have it: int64 (n,) each."""

    features: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]


def raw_features(
    store: Store, numbers: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None
) -> Raw:
    """All raw features of the videos; sight's for those with a picture, sound's for those with sound."""
    seen = numbers[store.has_picture[numbers]]
    heard = numbers[store.has_sound[numbers]]
    both = np.intersect1d(seen, heard)
    sight: dict[int, dict[str, np.ndarray]] = {}
    sound: dict[int, np.ndarray] = {}
    done, total = 0, len(seen) + len(heard)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for n, value in zip(seen.tolist(), pool.map(lambda n: of_pictures(store, int(n)), seen), strict=True):
            sight[n] = value
            done += 1
            progress(done, total)
    for i in range(0, len(heard), 64):
        block = heard[i : i + 64].tolist()
        for n, rows in zip(block, spectrograms(store, block), strict=True):
            sound[n] = rows
        done += len(block)
        progress(done, total)
    features: dict[str, np.ndarray] = {}
    who: dict[str, np.ndarray] = {}
    for name, field in SIGHT.items():
        if len(seen):
            features[name], who[name] = np.stack([sight[n][field] for n in seen.tolist()]), seen
    if len(heard):
        stack = np.stack([sound[n] for n in heard.tolist()])  # (n, rows, bins)
        n, rows, bins = stack.shape
        coarse = stack[:, : rows // STEP_ROWS * STEP_ROWS].reshape(n, rows // STEP_ROWS, STEP_ROWS, bins).mean(axis=2)
        features["raw spectrogram"] = coarse.reshape(n, -1)
        features["spectrogram mean"] = stack.mean(axis=1)
        features["spectrogram mean + sd"] = np.concatenate([stack.mean(axis=1), stack.std(axis=1)], axis=1)
        who.update(dict.fromkeys(SOUND, heard))
    if len(both):
        features[f"{BOTH}:v"] = np.stack([sight[n]["curve"] for n in both.tolist()])
        features[f"{BOTH}:a"] = np.stack([loudness(sound[n], len(sight[n]["curve"])) for n in both.tolist()])
        who[f"{BOTH}:v"] = who[f"{BOTH}:a"] = both
    return Raw(features, who)


def window(store: Store, number: int) -> tuple[Fraction, Fraction]:
    """(offset, fps) of a video's centre window of 2 s, or of all of it where it is shorter."""
    fps = Fraction(min(FPS, store.spec.fps))
    length = store.seconds(number)
    return max(Fraction(0), (length - SECONDS) / 2), fps


def of_pictures(store: Store, number: int) -> dict[str, np.ndarray]:
    """Features of the pictures of one video, float32 vectors in [0, 1] units."""
    offset, fps = window(store, number)
    n = int(FRAMES * fps / FPS)
    clip = store.clip(number, offset, n=n, fps=fps, seconds=0)
    assert clip.frames is not None and clip.box is not None
    y, x, h, w = clip.box
    side = min(h, w)
    y, x = y + (h - side) // 2, x + (w - side) // 2
    small = np.stack([shrunk(f[y : y + side, x : x + side]) for f in clip.frames])  # (n, 16, 16, 3)
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    change = np.abs(np.diff(grey, axis=0)) if n > 1 else np.zeros((1, SIDE, SIDE), np.float32)
    curve = change.mean(axis=(1, 2))
    return {
        "pixels": grey[::2].reshape(-1),
        "mean_frame": small.mean(axis=0).reshape(-1),
        "difference": change.mean(axis=0).reshape(-1),
        # how strongly, how evenly and how fast it moves, whatever the phase: sorted values and spectrum of the curve,
        # in logarithms (on demo clips R@1 .44 against .23 of the plain curve)
        "motion": np.log(np.concatenate([np.sort(curve), np.abs(np.fft.rfft(curve))]) + 1e-3).astype(np.float32),
        "curve": curve.astype(np.float32),
    }


def shrunk(picture: np.ndarray) -> np.ndarray:
    """uint8 (s, s, 3) -> float32 (16, 16, 3) in [0, 1], by averaging areas (their edges rounded to pixels)."""
    edges = np.round(np.linspace(0, len(picture), SIDE + 1)).astype(int)
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float32), edges[:-1], axis=0), edges[:-1], axis=1)
    sizes = np.diff(edges).astype(np.float32)
    return sums / (sizes[:, None, None] * sizes[None, :, None] * 255)


def spectrograms(store: Store, numbers: list[int]) -> np.ndarray:
    """float32 (n, rows, bins): log-spectrograms of the centre windows, zeros behind sound that is shorter."""
    from avstore.frontends import spectrogram

    waves = [store.waveform(n, window(store, n)[0], SECONDS)[0] for n in numbers]
    return spectrogram(np.stack(waves), FRONT_END, store.spec.sample_rate).numpy()


def loudness(rows: np.ndarray, steps: int) -> np.ndarray:
    """float32 (steps,): the mean log-spectrum around each step between two frames."""
    edges = np.round(np.linspace(0, len(rows), steps + 2)).astype(int)
    level = rows.mean(axis=1)
    means = np.array([level[a:b].mean() for a, b in itertools.pairwise(edges)])
    return np.maximum(np.diff(means), 0).astype(np.float32)  # onsets: what a movement that begins would cause
