"""What a method asks of a store. The loop compares it with the store's spec: exact, approximate or impossible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from avstore.errors import UsageError


@dataclass(frozen=True)
class Needs:
    """The clip a method is fed: pictures (frames, fps, size) and sound (seconds, front_end)."""

    frames: int  # pictures in a clip
    fps: int | Literal["native"]  # their rate; native = consecutive distinct source frames
    size: int  # side of the square crop, pixels
    seconds: float  # length of the sound window
    front_end: str | None  # name of the spectrogram recipe; None: no spectrogram
    picture: bool = True  # a video without picture is dropped from the selection
    sound: bool = True  # a video without sound is dropped from the selection
    labels: bool = False
    max_offset: float = 0.0  # seconds by which the pictures may lie outside the sound window
    copies: int = 1  # of each clip, each augmented on its own

    def __post_init__(self) -> None:
        wrong = []
        if self.picture and (self.frames < 1 or self.size < 1):
            wrong.append(f"frames {self.frames} and size {self.size} must be at least 1")
        if self.fps != "native" and (not isinstance(self.fps, int) or self.fps < 1):
            wrong.append(f"fps {self.fps!r} must be a whole number of frames per second or 'native'")
        if self.sound and not self.seconds > 0:
            wrong.append(f"seconds {self.seconds} must be above 0")
        if self.copies < 1:
            wrong.append(f"copies {self.copies} must be at least 1")
        if not self.picture and not self.sound:
            wrong.append("a clip without picture and without sound")
        if self.max_offset < 0:
            wrong.append(f"max_offset {self.max_offset} must not be negative")
        if wrong:
            raise UsageError("the method's needs make no clip", "; ".join(wrong), "correct these fields of its config")
