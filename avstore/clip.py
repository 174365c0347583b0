"""A clip: a window of one video, cut at read time, with frames, sound and what is known about both."""

from __future__ import annotations

import html
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Clip:
    """What `Store.clip` returns.

    frames: uint8 (n, H, W, 3) RGB, None in an audio store. waveform: int16 (samples,) mono at the tape's rate.
    spectrogram: float32 (rows, bins) of the front-end asked for, or None. rows: int64 (n,), the tape rows shown.
    source: int32 (n,), the ordinal in the file of each frame. box: (y, x, height, width) of the picture inside the
    frame. valid_frames / valid_samples: how many come from the video (the rest loops / is zero).
    """

    video: int
    offset: Fraction
    fps: Fraction | str
    frames: np.ndarray | None
    waveform: np.ndarray
    spectrogram: np.ndarray | None
    rows: np.ndarray
    source: np.ndarray | None
    box: tuple[int, int, int, int] | None
    valid_frames: int
    valid_samples: int
    has_picture: bool
    has_sound: bool
    sample_rate: int

    def _repr_html_(self) -> str:
        """A strip of frames and a player of the sound, for notebooks."""
        import base64
        import io
        import wave

        parts = [f"<p>video {self.video}, {float(self.offset):.3f} s, {html.escape(str(self.fps))} fps</p>"]
        if self.frames is not None and len(self.frames):
            from avstore.codecs import encode_jpeg

            strip = np.concatenate(list(self.frames[:: max(1, len(self.frames) // 8)]), axis=1)
            data = base64.b64encode(encode_jpeg(np.ascontiguousarray(strip), 85)).decode()
            parts.append(f'<img alt="frames" style="max-width:100%" src="data:image/jpeg;base64,{data}">')
        if self.has_sound and len(self.waveform):
            file = io.BytesIO()
            with wave.open(file, "wb") as w:
                w.setnchannels(1)
                w.setsampwidth(2)
                w.setframerate(self.sample_rate)
                w.writeframes(self.waveform.astype("<i2").tobytes())
            parts.append(
                f'<audio controls src="data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"></audio>'
            )
        return "".join(parts)


@dataclass(frozen=True)
class Video:
    """One video of a store: its columns and what its record says (`Store[number]`)."""

    number: int
    key: str
    path: str
    status: str  # ok | failed | pending
    reason: str | None
    message: str | None
    start: str | None
    end: str | None
    place: int
    slot_seconds: int
    seconds: float  # true length on the video's clock
    frames: int
    samples: int
    has_picture: bool
    has_sound: bool
    columns: dict[str, str | None]
    facts: dict[str, object]  # every field of the record
    clock: str

    def to_json(self) -> dict[str, object]:
        """All of it as JSON values: `{"number": ..., "key": ..., "label": ..., ...}`."""
        out: dict[str, object] = {
            k: getattr(self, k)
            for k in (
                "number",
                "key",
                "path",
                "status",
                "reason",
                "message",
                "start",
                "end",
                "place",
                "slot_seconds",
                "seconds",
                "frames",
                "samples",
                "has_picture",
                "has_sound",
            )
        }
        return {**self.facts, **self.columns, **out}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in self.to_json().items()
        )
        return f"<table>{rows}</table>"
