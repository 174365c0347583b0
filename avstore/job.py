"""The job of a reader: all that it must know to make batches. What one of them is, is a function of its step.

Made here of what a loader is asked; nothing here plans (`avstore.steps`) or reads. The reader process unpickles its job
from this file, which therefore imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import NotFoundError, UsageError, did_you_mean
from avstore.frontends import FRONT_ENDS
from avstore.sampler import Order, SequentialOrder
from avstore.slots import Layout
from avstore.spec import ArraySpec, spectrogram_array
from avstore.views import Views
from avstore.windows import clip_samples, frame_rows

if TYPE_CHECKING:
    from avstore.store import Store

# One row per video of the selection, int64, shared with the reader.
COLUMNS = ("number", "place", "frames", "samples", "sound_start", "sound_end", "y", "x", "height", "width")


@dataclass(frozen=True)
class Job:
    """All that the reader must know; what one batch is, as a function of the step."""

    root: str
    arrays: dict[str, ArraySpec]  # those that are read: frames, source, waveform, spectrogram
    shard_seconds: int
    tape_fps: int
    sample_rate: int
    order: Order | SequentialOrder
    views: Views
    seed: int
    frames: int  # of a clip; 0: no pictures
    fps: Fraction | None  # None: native
    picture: int  # length of the pictures, samples
    samples: int  # length of the sound; 0: none
    spectrogram: int  # rows; 0: none
    silence: float  # a spectrogram's value where there is no sound
    scale: int  # 1, 2, 4, 8: the stored frame size divided
    check: bool
    threads: int
    slots: int
    layout: Layout


def make_job(
    store: Store, views: Views, order: Order | SequentialOrder, share: int, frames: int, fps: Any, samples: int,
    size: tuple[int, int] | None, front_end: str | None, source: bool, seed: int, threads: int, slots: int, check: bool,
    packed: bool,
) -> Job:  # fmt: skip
    """The job that a loader's arguments ask for, see `avstore.loader.Loader`. share: pairs of this rank in a batch.
    packed: pictures stay JPEG in the slots. UsageError or NotFoundError where the arguments do not fit.
    """
    from avstore.store import as_fraction  # not above: the reader process needs no store

    spec = store.spec
    require_whole("frames", frames, 0)
    require_whole("samples", samples, 0)
    if not frames and not samples:
        raise UsageError("a clip without frames and samples", "nothing would be read", "frames=16, samples=48000")
    if frames and not spec.picture:
        raise UsageError("this store has no pictures", f"{store.path} is an audio store", "Loader(..., frames=0)")
    if source and not frames:
        raise UsageError("source without frames", "`source` tells which file frame each picture is", "frames=16")
    rate = None if fps == "native" else as_fraction("fps", fps)
    picture = 0
    if frames:
        frame_rows(0, frames, spec.fps if rate is None else rate, spec.fps, spec.sample_rate)  # UsageError
        picture = clip_samples(frames, spec.fps if rate is None else rate, spec.sample_rate)
    scale = 1
    if size is not None and frames:
        scales = {(spec.height // k, spec.width // k): k for k in ((1, 2, 4, 8) if spec.codec == "jpeg" else (1,))}
        if tuple(size) not in scales:
            raise UsageError(
                f"frames of {size[0]}x{size[1]} from a store of {spec.height}x{spec.width}",
                f"its {spec.codec} frames decode to {', '.join(f'{h}x{w}' for h, w in scales)}",
                "resize the batch on the device, or ingest with --size",
            )
        scale = scales[size[0], size[1]]
    if packed and (not frames or spec.codec != "jpeg" or scale != 1):
        raise UsageError(
            f"{frames} frames of codec {spec.codec} at 1/{scale} of their size for a decoder of JPEG on the device",
            "it takes JPEG pictures as they are stored; only the CPU decodes at half scale", "leave decode away",
        )  # fmt: skip
    views_n = views.views
    shape: tuple[int, ...] = (share,) if views_n == 1 else (share, views_n)
    fields: dict[str, tuple[tuple[int, ...], str]] = {"size": ((1,), "int64")}
    fields |= {name: ((share,), "int64") for name in ("row", "video", "draw", "position")}
    fields |= {"box": ((share, 4), "int64"), "shrunk": ((share,), "bool")}
    fields |= {name: (shape, "int64") for name in ("offset", "sound_offset", "valid_frames", "valid_samples")}
    fields |= {name: (shape, "bool") for name in ("has_picture", "has_sound")}
    read = {"waveform": store.arrays["waveform"]}
    if frames:
        read["frames"] = store.arrays["frames"]
        fields["frames"] = ((*shape, frames, spec.height // scale, spec.width // scale, 3), "uint8")
        if packed:
            fields["jpeg"] = ((*shape, frames), "int32")
        if source or rate is None:
            read["source"] = store.arrays["source"]
        if source:
            fields["source"] = ((*shape, frames), "int32")
    if samples:
        fields["waveform"] = ((*shape, samples), "int16")
    rows, silence = 0, 0.0
    if front_end is not None:
        if front_end not in store.front_ends:
            raise NotFoundError(
                f"front-end {front_end!r} is not stored here", did_you_mean(front_end, store.front_ends),
                "avstore derive stores it; avstore.frontends.spectrogram computes it from batch.waveform",
            )  # fmt: skip
        store._require_recipe(front_end)
        array = spectrogram_array(front_end)
        if not samples or samples * array.rate % spec.sample_rate:
            raise UsageError(
                f"{samples} samples are no whole number of rows of {front_end}",
                f"it has {array.rate} rows a second at {spec.sample_rate} samples",
                f"samples must be a positive multiple of {spec.sample_rate // np.gcd(spec.sample_rate, array.rate)}",
            )
        rows, silence = samples * array.rate // spec.sample_rate, FRONT_ENDS[front_end].floor
        read["spectrogram"] = array
        fields["spectrogram"] = ((*shape, rows, *array.row), "float16")
    return Job(
        str(Path(store.path).absolute()), read, spec.shard_seconds, spec.fps, spec.sample_rate, order, views, seed,
        frames, rate, picture, samples, rows, silence, scale, check, threads, slots, Layout(fields),
    )  # fmt: skip


def video_columns(store: Store, numbers: np.ndarray) -> np.ndarray:
    """int64 (videos, len(COLUMNS)): what the reader must know of these videos."""
    return np.ascontiguousarray(
        np.column_stack([numbers, store.places[numbers], store.frames[numbers], store.samples[numbers],
                         store.sound[numbers], store.boxes[numbers]]).astype(np.int64)
    )  # fmt: skip


def require_whole(name: str, value: int, least: int) -> None:
    """UsageError unless `value` is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name} = {value!r}", f"a whole number from {least}")
