"""The demo set: the same bytes for the same seed, resumable, and sight and sound really share their causes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from avstore import errors
from benchmarks import demo_set
from benchmarks.demo_set import CLASSES, FPS, RATE


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (T, H, W, 3) and waveform float (samples,), placed by the timestamps of the file."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    wave = np.zeros(0, np.float32)
    with av.open(str(path)) as file:
        for block in file.decode(audio=0):
            first = round(float(block.pts * block.time_base) * RATE)
            samples = block.to_ndarray()[0][max(0, -first) :]
            first = max(0, first)
            wave = np.pad(wave, (0, max(0, first + samples.size - wave.size)))
            wave[first : first + samples.size] = samples
    return np.stack(frames), wave


def onsets(wave: np.ndarray) -> np.ndarray:
    """How much louder (in e-folds of power) the 20 ms after each hundredth of a second are than the 20 ms before."""
    power = np.convolve(wave.astype(np.float64) ** 2, np.ones(RATE // 50), "valid")[:: RATE // 100]
    level = np.log(power + 1e-3 * power.max())
    return np.pad(np.clip(level[2:] - level[:-2], 0, None), (2, 0))


def near_and_far(values: np.ndarray, rate: int, events: np.ndarray, before: float, after: float) -> tuple[float, float]:
    """Mean of a curve within [event - before, event + after] seconds, and elsewhere."""
    t = np.arange(values.size) / rate
    near = ((t[:, None] >= events - before) & (t[:, None] <= events + after)).any(1)
    return float(values[near].mean()), float(values[~near].mean())


@pytest.fixture(scope="module")
def clips(tiny_media: Path) -> dict[str, tuple[demo_set.Cause, np.ndarray, np.ndarray]]:
    """One clip of each class, decoded from its file."""
    chosen = demo_set.causes(train=8, test=0, seconds=2)
    return {cause.label: (cause, *decode(tiny_media / cause.path)) for cause in chosen}


def test_folders_counts_and_durations(tiny_media: Path) -> None:
    files = contents(tiny_media)
    assert len(files) == 24
    assert {name.split("/")[1] for name in files if name.startswith("train/")} == set(CLASSES)
    assert {name.split("/")[1] for name in files if name.startswith("test/")} == set(CLASSES)
    with av.open(str(tiny_media / "train" / "bounce-drum" / "0000.mp4")) as file:
        picture, sound = file.streams.video[0], file.streams.audio[0]
        assert (picture.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert (picture.width, picture.height, picture.average_rate) == (160, 128, 16)
        assert (sound.rate, sound.channels) == (24_000, 1)


def test_decoded_length(clips) -> None:
    for cause, frames, wave in clips.values():
        assert frames.shape == (32, 128, 160, 3), cause.path
        assert 2 * RATE <= wave.size < 2 * RATE + 1024, cause.path


def test_bytes_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo_set.generate(tmp_path / "a", train=4, test=1, seconds=1, workers=1)
    assert first == [tmp_path / "a" / c.path for c in demo_set.causes(4, 1, seconds=1)]
    demo_set.generate(tmp_path / "b", train=2, test=1, seconds=1, workers=1)
    monkeypatch.setenv("MALLOC_PERTURB_", "85")  # in the children: an encoder that reads unset memory shows
    demo_set.generate(tmp_path / "b", train=4, test=1, seconds=1, workers=2)  # grows, in other processes
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    demo_set.generate(tmp_path / "c", train=4, test=1, seconds=1, seed=1, workers=1)
    assert not set(contents(tmp_path / "a").values()) & set(contents(tmp_path / "c").values())


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    paths = demo_set.generate(tmp_path, train=4, test=0, seconds=1, workers=1)
    before, times = contents(tmp_path), [p.stat().st_mtime_ns for p in paths]
    paths[2].unlink()
    (paths[1].parent / ".0001.mp4.tmp.123").write_bytes(b"half a clip of a killed process")
    told: list[tuple[int, int]] = []
    demo_set.generate(tmp_path, train=4, test=0, seconds=1, workers=1, progress=lambda *now: told.append(now))
    assert contents(tmp_path) == before
    assert [p.stat().st_mtime_ns == t for p, t in zip(paths, times, strict=True)] == [True, True, False, True]
    assert told == [(3, 4), (4, 4)]


@pytest.mark.parametrize("change", [{"seed": 7}, {"seconds": 2}, {"train": 1}])
def test_refuses_to_mix_two_sets(tmp_path: Path, change: dict) -> None:
    asked = {"train": 2, "test": 0, "seconds": 1, "workers": 1}
    demo_set.generate(tmp_path, **asked)
    before = contents(tmp_path)
    with pytest.raises(errors.ConflictError, match="not a clip of this demo set"):
        demo_set.generate(tmp_path, **{**asked, **change})
    assert contents(tmp_path) == before


def test_a_long_video_is_noise_but_for_its_event(tmp_path: Path) -> None:
    """The shape is seen and its notes are heard within the event and nowhere else; it may lie anywhere."""
    chosen = demo_set.causes(8, 4, seconds=8, long=True)
    assert {c.seconds for c in demo_set.causes(1, 0, long=True)} == {20}
    begins = []
    for cause in chosen:
        begin, end = cause.event
        assert 0 <= begin < end <= 8 and 2 <= end - begin <= 3
        assert cause.events[0] <= begin and cause.events[-1] > end >= cause.events[-2]
        begins.append(begin)
    assert np.ptp(begins) > 2
    for cause in chosen[:8:3]:
        begin, end = cause.event
        frames, wave = demo_set.sight(cause), demo_set.sound(cause).astype(np.float64)
        assert frames.shape == (128, 128, 160, 3) and wave.shape == (8 * RATE,)
        t = np.arange(128) / FPS
        inside = (t >= begin) & (t < end)
        coloured = (np.ptp(frames.astype(np.int16), axis=3) > 70).mean((1, 2))  # the ground is nearly grey
        assert coloured[inside].min() > 0.005 > coloured[~inside].max()
        power = (wave**2).reshape(-1, RATE // 100).mean(1)
        s = (np.arange(800) + 0.5) / 100
        heard = (s > begin + 0.05) & (s < end - 0.05)
        quiet = (s < begin - 0.05) | (s > end + 0.05)
        assert power[heard].mean() > 4 * power[quiet].mean() and power[quiet].max() < power[heard].max() / 4
    paths = demo_set.generate(tmp_path, train=1, test=0, seconds=5, workers=1, long=True)
    frames, wave = decode(paths[0])
    assert len(frames) == 80 and 5 * RATE <= wave.size < 5 * RATE + 1024
    with pytest.raises(errors.ConflictError, match="not a clip of this demo set"):  # nor of the short one's
        demo_set.generate(tmp_path, train=1, test=0, seconds=5, workers=1)
    with pytest.raises(errors.UsageError, match="clips of 4 s"):
        demo_set.causes(1, 0, seconds=4, long=True)


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"not made here")
    with pytest.raises(errors.ConflictError, match="holiday"):
        demo_set.generate(tmp_path, train=1, test=0, workers=1)
    assert contents(tmp_path) == {"holiday.mp4": b"not made here"}


@pytest.mark.parametrize(
    "wrong",
    [{"train": -1}, {"train": 0, "test": 0}, {"test": 2.5}, {"train": True}, {"seed": -3}, {"seconds": 0},
     {"seconds": float("nan")}, {"seconds": "3"}, {"workers": 0}, {"train": 10_000}],
)  # fmt: skip
def test_refuses_what_makes_no_set(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(errors.UsageError) as caught:
        demo_set.generate(tmp_path / "set", **wrong)
    assert caught.value.why and caught.value.next
    assert not (tmp_path / "set").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.MachineError, match="cannot make the folder"):
        demo_set.generate(tmp_path / "file" / "set", train=1, test=0)


def test_causes_cover_the_clip_and_keep_their_tempo() -> None:
    for cause in demo_set.causes(40, 40, seed=3):
        gaps = np.diff(cause.events)
        assert cause.events[0] <= 0 and cause.events[-1] > 3 >= cause.events[-2]
        assert np.all(gaps >= 0.93 * cause.period - 1e-9) and np.all(gaps <= 1.07 * cause.period + 1e-9)
        assert 0.25 <= cause.period <= 0.9 and -12 <= cause.semitones <= 12 and 14 <= cause.size <= 34


def test_big_is_low_by_hand() -> None:
    cause = demo_set.Cause(0, "train", 0, 3, CLASSES[0], 1, (), 0)
    assert (cause.size, cause.pitch) == (20, 330)
    high = demo_set.Cause(0, "train", 0, 3, CLASSES[0], 1, (), 12)
    assert (high.size, high.pitch) == (14, 660)  # 20 * 2^-.8 = 11.5, not under 14
    low = demo_set.Cause(0, "train", 0, 3, CLASSES[0], 1, (), -6)
    assert low.size == pytest.approx(20 * 2**0.4) and low.pitch == pytest.approx(330 / 2**0.5)


@pytest.mark.parametrize("label", CLASSES)
def test_every_event_starts_a_note(clips, label: str) -> None:
    cause, _, wave = clips[label]
    near, far = near_and_far(onsets(wave), 100, np.asarray(cause.events), 0.02, 0.02)
    assert near > 5 * far


@pytest.mark.parametrize("label", CLASSES)
def test_every_event_moves_the_picture(clips, label: str) -> None:
    """What the shape does at its events shows in the decoded frames: a jump, the floor, or the end of a swing."""
    cause, frames, _ = clips[label]
    events = np.asarray(cause.events)
    colour = np.ptp(frames.astype(np.int16), axis=3) > 70  # the ground is nearly grey
    y, x = np.mgrid[:128, :160]
    if label == "bounce-drum":
        height = np.array([y[m].mean() for m in colour])
        near, far = near_and_far(height, FPS, events, 0.04, 0.04)
        assert near > far + 5
    elif label == "swing-pluck":
        place = np.array([x[m].mean() for m in colour])
        near, far = near_and_far(np.abs(place - np.median(place)), FPS, events, 0.04, 0.04)
        assert near > far + 5
    else:
        motion = np.abs(np.diff(frames.astype(np.float32), axis=0)).max(3)
        motion = np.append(0.0, np.clip(motion - 24, 0, None).mean((1, 2)))  # frame k against k - 1, above the noise
        quiet = {"shake-buzz": 0.4, "ring-downsweep": 0.3}.get(label, 0.2)
        near, far = near_and_far(motion, FPS, events, 0, min(quiet, 0.6 * cause.period))
        assert near > 1.5 * far


def test_the_bell_sounds_at_the_pitch_of_its_size(tiny_media: Path) -> None:
    bells = [c for c in demo_set.causes(16, 8, seconds=2) if c.label == "pulse-bell"]
    assert len(bells) == 3
    for cause in bells:
        _, wave = decode(tiny_media / cause.path)
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size)))
        hertz = np.fft.rfftfreq(wave.size, 1 / RATE)
        assert hertz[spectrum.argmax()] == pytest.approx(cause.pitch, rel=0.03)


def test_classes_look_and_sound_apart() -> None:
    """A clip's nearest other clip, by hue of the shape, is of its own class: the hue is the class's."""
    chosen = demo_set.causes(32, 0, seconds=1)
    hues = []
    for cause in chosen:
        frames = demo_set.sight(cause).astype(np.float32)
        spread = np.ptp(frames, axis=3)
        red, green, blue = frames[spread > 0.8 * spread.max()].mean(0)
        hues.append(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    gap = np.abs(np.exp(1j * np.array(hues))[:, None] - np.exp(1j * np.array(hues)))
    np.fill_diagonal(gap, np.inf)
    right = [chosen[i].label == chosen[j].label for i, j in enumerate(gap.argmin(1))]
    assert np.mean(right) > 0.9


def test_nuisances_of_one_side_do_not_touch_the_other() -> None:
    one, two = demo_set.causes(9, 0, seconds=1)[0::8]
    assert one.label == two.label
    streams = [c.rng(side).integers(2**62) for c in (one, two) for side in ("cause", "sight", "sound")]
    assert len(set(streams)) == 6
