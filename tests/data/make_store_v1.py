"""Made `store-v1` and `store-v1.json`, once, with the avstore that introduced format 1: `python make_store_v1.py`.

The store is a fixture: it must stay readable as it is, so never run this again to make a test pass. Synthetic media:
a clip with sound, sound alone, a segment of it from a list, a silent clip at half the tape's rate, a broken file, and
one that failed at first and was good when it was tried again. Two plans. Lock and logs are no part of a store.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avstore.ingest import ingest
from tests.test_format import content

HERE = Path(__file__).parent
RATE = 16000
OPTIONS = {"size": (32, 48), "fps": 8, "sample_rate": RATE, "front_ends": ("l2l-mel40",), "shard_seconds": 4}


def sound(seconds: float, pitch: float) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    return (9000 * np.sin(2 * np.pi * pitch * t) * (t % 0.5 < 0.3)).astype(np.int16)


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(RATE)
        f.writeframes(samples.astype("<i2").tobytes())


def write_video(path: Path, frames: int, fps: int, samples: np.ndarray | None) -> None:
    """48x32 frames, a bright bar that moves; sound as 16-bit PCM in Matroska."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=fps)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        video.bit_rate = 400_000
        if samples is not None:
            audio = out.add_stream("pcm_s16le", rate=RATE)
            audio.layout = "mono"
        for k in range(frames):
            picture = np.full((32, 48, 3), (40, 60 + 8 * k, 120), np.uint8)
            picture[:, 3 * k : 3 * k + 12] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if samples is not None:
            heard = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = RATE, 0, Fraction(1, RATE)
            out.mux(audio.encode(heard))
            out.mux(audio.encode(None))


def main() -> None:
    store = HERE / "store-v1"
    if store.exists():
        raise SystemExit(f"{store} is there: a fixture is not made again")
    with tempfile.TemporaryDirectory() as temporary:
        media = Path(temporary) / "media"
        (media / "train" / "bar").mkdir(parents=True)
        write_video(media / "train" / "bar" / "a.mkv", 8, 8, sound(1, 440))
        write_wav(media / "b.wav", sound(0.9, 880))
        write_video(media / "slow.mkv", 6, 4, None)
        (media / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
        (media / "later.mkv").write_bytes(b"no media")
        ingest(media, store, workers=1, **OPTIONS)
        write_video(media / "later.mkv", 4, 8, None)
        (media / "cut.csv").write_text("path,start,end,label\nb.wav,0.25,0.75,cut\nlater.mkv,,,again\n")
        ingest(media / "cut.csv", store, workers=1, retry_failed=True, **OPTIONS)
    (store / "lock").unlink()
    shutil.rmtree(store / "logs")
    (HERE / "store-v1.json").write_text(json.dumps(content(store), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
