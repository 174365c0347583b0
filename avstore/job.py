"""The job of a reader: all that it must know to make batches. What one of them is, is a function of its step.

Nothing here reads or plans. The reader process unpickles its job from this file, which therefore imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from avstore.sampler import Order, SequentialOrder
from avstore.slots import Layout
from avstore.spec import ArraySpec
from avstore.views import Views

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
