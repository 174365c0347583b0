"""What a decoder gives and tells: the sink that takes a video, the facts that its record keeps. No decoding here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from avstore.records import FIELDS


class Sink(Protocol):
    """Takes a video as it is decoded."""

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None:
        """uint8 (H, W, 3) RGB for the next `repeat` >= 1 rows; `source`: ordinal of the frame in the file."""

    def sound(self, samples: np.ndarray) -> None:
        """int16 (n,): the next samples, the first call begins at t = 0; gaps are zeros already."""


@dataclass
class Facts:
    """What a record keeps of a video that is ok; see avstore.records.FIELDS."""

    status: str = "ok"
    reason: str | None = None
    message: str | None = None
    frames: int = 0
    samples: int = 0
    sound_start: int = 0
    sound_end: int = 0
    silent: bool = True
    errors: int = 0
    source_frames: int = 0
    source_fps: str | None = None
    display: list[int] | None = None
    box: list[int] | None = None
    video_stream: int | None = None
    audio_stream: int | None = None
    sound_dropped: int = 0
    decoder: str | None = "pyav"
    fallback: str | None = None

    def to_record(self) -> dict[str, Any]:
        """One value for each key of avstore.records.FIELDS."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


if [f.name for f in fields(Facts)] != list(FIELDS):
    raise TypeError("Facts and records.FIELDS differ")
