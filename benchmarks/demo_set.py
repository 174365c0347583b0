"""The demo set: short clips made on the spot, in which what is seen and what is heard share hidden causes.

Eight classes, each a motion, a shape, a hue and a timbre; and for each clip its own tempo, phase and size, which link
sight and sound as well: every event of the picture starts a note, and what is big sounds low. Everything else
(background, texture, place, drift, pixel noise, detune, decay, tilt, sound noise, level) is drawn apart for each side.
Real H.264 and AAC in mp4: 160 x 128 pixels at 16 frames/s, 24 kHz mono. A clip is a pure function of
(seed, split, number, seconds), whatever the number of workers or of clips.

`long=True` makes untrimmed videos of it: 20 s of ground and hiss in which the shape is seen and its notes are heard for
2 to 3 s only, at a place of its own; nothing else in the video tells the class.

It writes media files and nothing else; `causes` tells what lies behind them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from avstore import errors

CLASSES = ("bounce-drum", "pulse-bell", "spin-snare", "slide-upsweep",
           "flash-click", "shake-buzz", "ring-downsweep", "swing-pluck")  # fmt: skip
SPLITS = ("train", "test")
WIDTH, HEIGHT, FPS, RATE = 160, 128, 16, 24_000
SHAKE_HZ = 6.3
LONG, EVENT = 20, (2.0, 3.0)  # seconds of an untrimmed video, and from/to of what happens in it
VERSION = 1  # of the recipe; a folder made by another one is not mixed with this one's

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cause:
    """What lies behind one clip: all that sight and sound have in common, and the seed of all they have not."""

    seed: int
    split: str
    number: int
    seconds: float
    label: str
    period: float  # seconds between events, on average
    events: tuple[float, ...]  # seconds; the first lies at or before 0, the last beyond the end
    semitones: float  # -12 (big, low) to 12 (small, high)
    event: tuple[float, float] | None = None  # seconds, from and to, in which there is anything; None: all of the clip

    @property
    def path(self) -> str:
        """Where the clip lies under the set's folder."""
        return f"{self.split}/{self.label}/{self.number:04d}.mp4"

    @property
    def size(self) -> float:
        """Radius of the shape in pixels: big = low."""
        return float(np.clip(20 * 2 ** (-0.8 * self.semitones / 12), 14, 34))

    @property
    def pitch(self) -> float:
        """Fundamental in Hz."""
        return float(330 * 2 ** (self.semitones / 12))

    @property
    def mark(self) -> str:
        """Identity of the clip; written into the file, so that a finished one is known again."""
        long = "" if self.event is None else " long"
        return f"avstore demo set {VERSION}{long}: seed={self.seed} seconds={self.seconds:g} {self.path}"

    def rng(self, side: str) -> np.random.Generator:
        """The nuisances of one side (`cause`, `sight` or `sound`), independent of the other's."""
        stream = ("cause", "sight", "sound").index(side)
        return np.random.default_rng([VERSION, self.seed, SPLITS.index(self.split), self.number, stream])


def causes(
    train: int = 300, test: int = 100, seed: int = 0, seconds: float | None = None, long: bool = False
) -> list[Cause]:
    """The causes of every clip of a set, train first, classes in turn. seconds: default 3, of long ones 20, at least
    5. Raises UsageError."""
    seconds = (LONG if long else 3) if seconds is None else seconds
    for name, value, least in (("train", train, 0), ("test", test, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise errors.UsageError(f"{name} = {value!r} makes no set", "a whole number, 0 or more", f"give --{name} N")
    if train + test < 1:
        raise errors.UsageError("a set of no clips", "train and test are both 0", "ask for one clip at least")
    if max(train, test) > 9999:
        raise errors.UsageError(f"{max(train, test)} clips in one split", "a name has four digits", "ask for fewer")
    shortest = 5 if long else 0.5
    if not isinstance(seconds, (int, float)) or not shortest <= seconds <= 60:
        what = "a long clip" if long else "a clip"
        fitting = f"give --seconds {LONG if long else 3}"
        raise errors.UsageError(f"clips of {seconds!r} s", f"{what} lasts {shortest:g} to 60 s", fitting)
    frames = round(seconds * FPS)
    return [_cause(seed, split, number, frames / FPS, long)
            for split, count in zip(SPLITS, (train, test), strict=True) for number in range(count)]  # fmt: skip


def _cause(seed: int, split: str, number: int, seconds: float, long: bool = False) -> Cause:
    blank = Cause(int(seed), split, number, seconds, CLASSES[number % len(CLASSES)], 1.0, (), 0.0)
    rng = blank.rng("cause")
    period = float(np.exp(rng.uniform(np.log(0.25), np.log(0.9))))
    semitones = float(rng.uniform(-12, 12))
    before = float(rng.uniform(0, 1)) * period
    begin, end = 0.0, seconds
    if long:
        lasts = float(rng.uniform(*EVENT))
        begin = float(rng.uniform(0, seconds - lasts))
        end = begin + lasts
    times = [begin - before]
    while times[-1] <= end:
        times.append(times[-1] + period * float(rng.uniform(0.93, 1.07)))
    event = (begin, end) if long else None
    return Cause(blank.seed, split, number, seconds, blank.label, period, tuple(times), semitones, event)


# ---- sight


def sight(cause: Cause) -> Array:
    """Frames uint8 (T, 128, 160, 3), RGB; frame k shows time k / 16 s."""
    rng = cause.rng("sight")
    kind = CLASSES.index(cause.label)
    count = round(cause.seconds * FPS)
    begin, end = cause.event or (0.0, cause.seconds)
    first, stop = int(np.ceil(begin * FPS)), min(count, int(np.ceil(end * FPS)))
    t = np.arange(first, stop) / FPS
    events = np.asarray(cause.events)
    last = np.searchsorted(events, t, side="right") - 1
    tau = t - events[last]  # seconds since the last event
    u = tau / np.diff(events)[last]  # the same as a part of its interval

    pose = _pose(kind, t - begin, tau, u, last, rng)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    dx = x - pose["x"].astype(np.float32)[:, None, None]
    dy = y - pose["y"].astype(np.float32)[:, None, None]
    cos, sin = (f(pose["angle"]).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    size = (cause.size * pose["scale"]).astype(np.float32)[:, None, None]
    distance = _shape(kind % 4, cos * dx + sin * dy, cos * dy - sin * dx, size)
    if kind >= 4:  # hollow
        distance = np.abs(distance + 0.16 * size) - 0.16 * size
    cover = np.clip(0.5 - distance, 0, 1)
    if kind == CLASSES.index("ring-downsweep"):
        radius = (cause.size * 0.9 + 150 * tau)[:, None, None].astype(np.float32)
        ring = np.clip(4.0 - np.abs(np.hypot(dx, dy) - radius), 0, 1) * np.clip(1.15 - u, 0, 1)[:, None, None]
        cover = np.maximum(cover, ring.astype(np.float32))

    hue = (kind / len(CLASSES) + rng.normal(0, 0.02)) % 1
    colour = 255 * _rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.75, 1))
    ink = colour + (255 - colour) * pose["white"][:, None]  # (T, 3)
    ground = _ground(x, y, rng)
    frames = np.empty((count, HEIGHT, WIDTH, 3), np.float32)
    frames[:] = ground
    frames[first:stop] = ground + cover[..., None] * (ink[:, None, None].astype(np.float32) - ground)
    # one pass of noise, shifted for each frame: as good to a codec and much cheaper than a pass for each
    noise = rng.normal(0, rng.uniform(1, 4), (2 * HEIGHT, 2 * WIDTH)).astype(np.float32)
    for k, (down, right) in enumerate(rng.integers((HEIGHT, WIDTH), size=(count, 2))):
        frames[k] += noise[down : down + HEIGHT, right : right + WIDTH, None]
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def _pose(kind: int, t: Array, tau: Array, u: Array, last: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Centre (pixels), angle (radians), scale and whiteness of the shape, each (T,)."""
    amplitude, glide = rng.uniform(0.75, 1.25), np.clip(tau / 0.2, 0, 1)
    glide = glide * glide * (3 - 2 * glide)
    drift = rng.uniform(-3, 3, 2)  # pixels/s
    x = WIDTH / 2 + rng.uniform(-18, 18) + drift[0] * t
    y = HEIGHT / 2 + rng.uniform(-8, 8) + drift[1] * t
    angle = np.full(t.size, rng.uniform(-0.25, 0.25))
    scale, white = np.ones(t.size), np.zeros(t.size)
    side = np.where(last % 2 == 0, 1.0, -1.0)
    name = CLASSES[kind].split("-")[0]
    if name == "bounce":  # touches the floor at each event
        y = y + 24 - amplitude * 48 * 4 * u * (1 - u)
    elif name == "pulse":
        scale = 1 + 0.8 * amplitude * np.exp(-tau / 0.12)
    elif name == "spin":
        angle = angle + np.pi / 2 * (last + glide)
    elif name == "slide":
        x = x + amplitude * 30 * side * (2 * glide - 1)
    elif name == "flash":
        white = np.exp(-tau / 0.09)
        scale = 1 + 0.15 * white
    elif name == "shake":
        x = x + amplitude * 16 * np.sin(2 * np.pi * SHAKE_HZ * tau) * _gate(tau, u)
    elif name == "swing":  # turns back at each event
        lean = amplitude * 0.75 * side * np.cos(np.pi * u)
        x, y, angle = x + 50 * np.sin(lean), y - 34 + 50 * np.cos(lean), angle - lean
    return {"x": x, "y": y, "angle": angle, "scale": scale, "white": white}


def _gate(tau: Array, u: Array) -> Array:
    """1 while the shake and its buzz last, after each event."""
    return ((tau < 0.4) & (u < 0.65)).astype(np.float64)


def _shape(which: int, x: Array, y: Array, size: Array) -> Array:
    """Signed distance in pixels (negative inside) to a square, triangle, bar or cross of radius `size`."""
    if which == 0:
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * size
    if which == 1:
        return np.maximum(y, 0.866 * np.abs(x) - 0.5 * y) - 0.6 * size
    if which == 2:
        return np.maximum(np.abs(x) - 1.25 * size, np.abs(y) - 0.42 * size)
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 1.1 * size, ay - 0.38 * size), np.maximum(ax - 0.38 * size, ay - 1.1 * size))


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """HSV to RGB, all in 0-1: one formula for the three channels."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def _ground(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A gradient between two slightly tinted greys with a sine texture, float32 (H, W, 3)."""
    greys = rng.uniform(15, 235, (2, 1)) + rng.normal(0, 6, (2, 3))
    turn = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + ((x - WIDTH / 2) * np.cos(turn) + (y - HEIGHT / 2) * np.sin(turn)) / np.hypot(WIDTH, HEIGHT)
    turn, length = rng.uniform(0, np.pi), rng.uniform(6, 40)
    wave = np.sin(2 * np.pi / length * (x * np.cos(turn) + y * np.sin(turn)) + rng.uniform(0, 2 * np.pi))
    ground = greys[0] + ramp[..., None] * (greys[1] - greys[0]) + rng.uniform(0, 14) * wave[..., None]
    return np.asarray(ground, dtype=np.float32)


# ---- sound


def sound(cause: Cause) -> Array:
    """Waveform int16 (samples,), mono at 24 kHz; every event starts a note."""
    rng = cause.rng("sound")
    kind = CLASSES.index(cause.label)
    length = round(cause.seconds * RATE)
    events = np.asarray(cause.events)
    decay = rng.uniform(0.8, 1.25)
    begin, end = cause.event or (0.0, cause.seconds)
    opens, closes = round(begin * RATE), round(end * RATE)
    dry = np.zeros(length)
    for start, interval in zip(events[:-1], np.diff(events), strict=True):
        pitch = cause.pitch * 2 ** (rng.normal(0, 0.15) / 12)
        note = rng.uniform(0.7, 1.0) * _note(kind, pitch, interval, decay, rng)
        first = round(start * RATE)
        note = note[max(0, opens - first) : closes - first]
        dry[max(opens, first) : max(opens, first) + note.size] += note
    if cause.event is not None:  # an edge would click
        near = np.minimum(np.arange(closes - opens), np.arange(closes - opens)[::-1])
        dry[opens:closes] *= np.clip(near / (0.005 * RATE), 0, 1)

    hertz = np.fft.rfftfreq(length, 1 / RATE)
    wet = np.fft.irfft(np.fft.rfft(dry) * (hertz + 50) ** rng.uniform(-0.5, 0.5), length)
    hiss = np.fft.irfft(np.fft.rfft(rng.normal(size=length)) * (hertz + 50) ** -rng.uniform(0, 1), length)
    wet /= max(float(np.sqrt(np.mean(wet[opens:closes] ** 2))), 1e-9)
    wet += hiss / np.sqrt(np.mean(hiss**2)) * 10 ** (-rng.uniform(8, 25) / 20)
    return np.round(wet / np.abs(wet).max() * rng.uniform(0.2, 0.9) * 32767).astype(np.int16)


def _note(kind: int, f: float, interval: float, decay: float, rng: np.random.Generator) -> Array:
    """One note of a class's timbre at pitch f (Hz), float64, about 1 at its loudest; all within 1.2 s."""
    t = np.arange(round(1.2 * RATE)) / RATE
    name = CLASSES[kind].split("-")[1]
    attack = np.clip(t / 0.002, 0, 1)
    if name == "drum":  # falls from 2 f to f / 2
        return attack * np.sin(_phase(f / 2 + 1.5 * f * np.exp(-t / 0.05))) * np.exp(-t / (0.16 * decay))
    if name == "bell":
        return attack * _partials(t, f, (1, 2.76, 5.4, 8.93), (0.45, 0.28, 0.17, 0.10), 0.45 * decay, 0.5)
    if name == "snare":  # noise around 8 f over a short body
        noise = rng.normal(size=t.size) * 0.35
        band = np.convolve(noise, np.ones(6) / 6, "same") * 2.4 * np.cos(2 * np.pi * min(8 * f, 6000) * t)
        return attack * (band + 0.35 * np.sin(2 * np.pi * f * t) * np.exp(-t / 0.05)) * np.exp(-t / (0.09 * decay))
    if name == "upsweep":
        return _sweep(t, f, 4 * f, 0.28 * decay)
    if name == "click":  # woodblock: two inharmonic partials, gone at once
        return attack * _partials(t, 3 * f, (1, 2.42), (0.7, 0.3), 0.03 * decay, 1.0)
    if name == "buzz":
        last = min(0.4, 0.65 * interval)
        harmonics = np.arange(1, 21)
        saw = _partials(t, f / 2, harmonics, 0.5 / np.sqrt(harmonics), np.inf, 0.0)
        return np.clip(np.minimum(t, last - t) / 0.004, 0, 1) * saw * 0.4
    if name == "downsweep":
        return _sweep(t, 4 * f, f, 0.28 * decay)
    harmonics = np.arange(1, 14)  # pluck
    return attack * _partials(t, f, harmonics, 0.4 / harmonics, 0.35 * decay, 0.8)


def _phase(hertz: Array) -> Array:
    return 2 * np.pi * np.cumsum(hertz) / RATE


def _sweep(t: Array, low: float, high: float, last: float) -> Array:
    """A glide between two pitches with three harmonics, over `last` seconds."""
    part = np.clip(t / last, 0, 1)
    phase = _phase(low * (high / low) ** part)
    tone = np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)
    return 0.6 * tone * np.clip(np.minimum(t / 0.01, (last - t) / 0.05), 0, 1)


def _partials(t: Array, f: float, ratios: Any, gains: Any, decay: float, faster: float) -> Array:
    """Sum of sines at f * ratio below 11 kHz; a partial dies after decay / ratio ** faster seconds."""
    total = np.zeros(t.size)
    for ratio, gain in zip(ratios, gains, strict=True):
        if f * ratio < 11_000:
            total += gain * np.sin(2 * np.pi * f * ratio * t) * np.exp(-t * ratio**faster / decay)
    return total


# ---- files


def write_clip(path: Path, cause: Cause) -> None:
    """Render one clip and encode it as H.264 and AAC in mp4; the final name appears only when it is whole."""
    import av

    frames, waveform = sight(cause), sound(cause)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        # bitexact: no library versions and no dates in the header
        with av.open(str(partial), "w", format="mp4", container_options={"fflags": "+bitexact"}) as file:
            file.metadata["comment"] = cause.mark
            # mbtree off: with AVX-512 it reads memory that was never set, and the same frames give other bytes
            options = {"preset": "veryfast", "crf": "26", "threads": "1", "x264-params": "mbtree=0"}
            pictures = file.add_stream("libx264", rate=FPS, options=options)
            pictures.width, pictures.height, pictures.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            sounds = file.add_stream("aac", rate=RATE, layout="mono", options={"b": "64k", "threads": "1"})
            for k, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, FPS)
                file.mux(pictures.encode(frame))
            file.mux(pictures.encode())
            for first in range(0, waveform.size, 1024):
                block = av.AudioFrame.from_ndarray(
                    waveform[None, first : first + 1024].astype(np.float32) / 32768, format="fltp", layout="mono"
                )
                block.sample_rate, block.pts, block.time_base = RATE, first, Fraction(1, RATE)
                file.mux(sounds.encode(block))
            file.mux(sounds.encode())
        os.replace(partial, path)
    except OSError as error:
        raise errors.MachineError(f"cannot write {path}", str(error), "free space or give another folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def generate(
    folder: str | os.PathLike[str],
    train: int = 300,
    test: int = 100,
    seed: int = 0,
    seconds: float | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    long: bool = False,
) -> list[Path]:
    """Write the set as `<folder>/<train|test>/<class>/<number>.mp4` and return the paths, train first.

    Clips that are there already are kept, so repeating the call goes on where the last one stopped, and a larger
    number of clips adds to a smaller one. `progress(done, total)` is called after each clip, those kept included.
    Files of another seed, another length or another origin in the folder raise ConflictError: nothing is overwritten.
    Other errors: UsageError, MachineError. Child processes are spawned, so a script that calls this with
    `workers` > 1 needs its `if __name__ == "__main__":`.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise errors.UsageError(f"workers = {workers!r}", "a whole number, 1 or more", "give --workers 2")
    wanted = causes(train, test, seed, seconds, long)
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.MachineError(f"cannot make the folder {root}", str(error), "give another folder") from error
    kept = _kept(root, {cause.path: cause for cause in wanted})
    todo = [cause for cause in wanted if cause.path not in kept]
    done = len(kept)
    if progress and done:
        progress(done, len(wanted))
    for _ in _written(root, todo, workers):
        done += 1
        if progress:
            progress(done, len(wanted))
    return [root / cause.path for cause in wanted]


def _written(root: Path, todo: list[Cause], workers: int) -> Iterator[None]:
    """Write the clips, one by one in this process or in spawned ones, and yield after each."""
    if min(workers, len(todo)) < 2:
        for cause in todo:
            write_clip(root / cause.path, cause)
            yield
        return
    pool = ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C is this process's to handle: the clips under way are finished, no more
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from pool.map(write_clip, [root / cause.path for cause in todo], todo)
    except BrokenProcessPool as error:
        raise errors.MachineError(
            "a process that makes clips was killed",
            "out of memory, by hand, or the calling script lacks its `if __name__ == \"__main__\":`",
            "repeat the command: it goes on from here; --workers 1 takes less memory",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _kept(root: Path, wanted: dict[str, Cause]) -> set[str]:
    """The clips that are there and right; sweeps what a killed run left, refuses whatever is not of this set."""
    import av

    kept = set()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            continue
        if path.name.startswith(".") and ".mp4.tmp." in path.name:
            path.unlink()
            continue
        try:
            with av.open(str(path), metadata_errors="ignore") as file:
                mark = file.metadata.get("comment", "")
        except av.error.FFmpegError:
            mark = ""
        if name not in wanted or mark != wanted[name].mark:
            raise errors.ConflictError(
                f"{path} is not a clip of this demo set",
                f"it says {mark!r}" if mark else "it was not made by this command",
                "remove it, give another folder, or the same seed, seconds and at least as many clips as before",
            )
        kept.add(name)
    return kept
