"""The decoder on a device, as far as a CPU goes: PyAV's clock on times alone, the laying, colours, what is unfit, the
way back to PyAV; and DALI itself by its CPU build, where it is installed."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_media import SPEC as SMALL

from avstore import children, crew, dali, decode_dali, decode_pyav, frontends, worker
from avstore.codecs import encode_jpeg
from avstore.decode_dali import Device, Unfit, colour_mix, lay, psnr
from avstore.encode import encode_batch
from avstore.errors import ExtraMissingError, UsageError
from avstore.events import Decoding
from avstore.facts import Facts
from avstore.fit import fit
from avstore.ingest import ingest
from avstore.pictures import SCALER
from avstore.probe import probe
from avstore.spec import Spec
from avstore.store import open as open_store
from tests.media import Kept, make_clip

SPEC = Spec(front_ends=())
DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
with_dali = pytest.mark.skipif(not DALI, reason="DALI is not installed (pip install 'avstore[gpu]')")


class Twin:
    """Stands in for a device's stream: the same pictures in the same shape, decoded by FFmpeg from the same bytes."""

    spent = False
    change: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, where: str = "cpu", extra: int = 0) -> None:
        self.extra = extra

    def pictures(self, data: np.ndarray, count: int, scale: tuple[int, int]) -> Iterator[torch.Tensor]:
        made: list[np.ndarray] = []
        with av.open(io.BytesIO(data.tobytes())) as container:
            for frame in container.decode(video=0):
                small = frame.reformat(*scale, "gbrp", interpolation=SCALER, src_colorspace=5)
                green, blue, red = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width]
                                    for p in small.planes)  # fmt: skip
                made.append(np.stack([red, green, blue], -1))
        if len(made) + self.extra != count:
            raise RuntimeError(f"{len(made) + self.extra} pictures instead of {count}")
        for i in range(0, len(made), dali.SEQUENCE):
            chunk = torch.from_numpy(np.stack(made[i : i + dali.SEQUENCE]))
            yield chunk if Twin.change is None else Twin.change(chunk)


class TwinDevice(Device):
    """A device of the GPU's codecs whose stream is FFmpeg's."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__("dali-cpu")
        self.where, self.extra = "gpu", extra

    def show(self, *args: Any) -> None:
        if self.stream is None:
            self.stream = Twin(extra=self.extra)
        super().show(*args)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    yield
    Twin.change = None


def both(path: Path, device: Device, spec: Spec = SPEC, **how: Any) -> tuple[Facts, Kept, Facts, Kept]:
    slot = ceil(probe(path, how.get("start"), how.get("end"), spec).seconds + Fraction(1, 4))
    a, b = Kept(), Kept()
    mine = decode_dali.decode(path, spec, b, slot_seconds=slot, device=device, **how)
    return decode_pyav.decode(path, spec, a, slot_seconds=slot, **how), a, mine, b


def same(path: Path, device: Device, spec: Spec = SPEC, **how: Any) -> float:
    """Least PSNR over the rows; asserts the same rows, source frames, sound and facts."""
    theirs, a, mine, b = both(path, device, spec, **how)
    assert mine.decoder == "dali" and replace(mine, decoder="pyav") == theirs
    assert a.source == b.source and np.array_equal(a.waveform, b.waveform)
    return min(psnr(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))


# The clock and the laying, without DALI

CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "mp4": (".mp4", {}),
    "b-frames, 29 fps": (".mp4", {"fps": 29, "seconds": 3.0, "gop": 60}),
    "webm": (".webm", {}),
    "mkv, late start": (".mkv", {"start": 1.6}),
    "late sound": (".mkv", {"sound_start": 0.7}),
    "variable rate": (".mkv", {"times": (0.0, 0.1, 0.15, 0.6, 1.1, 1.11, 1.9)}),
    "turned": (".mp4", {"rotation": 90}),
    "flipped": (".mp4", {"hflip": True}),
    "wide pixels": (".mp4", {"aspect": Fraction(4, 3)}),
    "tall": (".mp4", {"size": (128, 96)}),
    "silent": (".mp4", {"audio": False}),
    "transport stream": (".ts", {"fps": 30}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_clock_on_times_alone_is_pyavs(name: str, tmp_path: Path) -> None:
    suffix, how = CLIPS[name]
    path = make_clip(tmp_path / f"clip{suffix}", noise=True, **how)
    assert same(path, TwinDevice()) > 45


@pytest.mark.parametrize("mode", ["pad", "stretch"])
def test_fits(mode: str, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", noise=True, size=(72, 128))
    assert same(path, TwinDevice(), Spec(front_ends=(), fit=mode)) > 45


@pytest.mark.parametrize(("start", "end"), [(None, 1), (Fraction(1, 2), None), (Fraction(1, 3), Fraction(3, 2))])
def test_segments(start: Fraction | None, end: Fraction | None, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", seconds=3.0, noise=True)
    end = None if end is None else Fraction(end)
    assert same(path, TwinDevice(), start=start, end=end) > 45


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 90).map(lambda n: 2 * n),
    st.integers(2, 90).map(lambda n: 2 * n),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["short", "pad", "stretch"]),
)
def test_laying_a_batch_is_laying_each(width: int, height: int, turn: tuple[bool, bool, bool], mode: str) -> None:
    how = fit(width, height, (32, 48), turn=turn, mode=mode)
    w, h = how.scale
    pictures = np.random.default_rng(0).integers(0, 256, (2, h, w, 3), np.uint8)
    each = [how.lay([one[..., c] for c in range(3)]) for one in pictures]
    assert np.array_equal(lay(torch.from_numpy(pictures), how).numpy(), np.stack(each))


def test_colours_of_one_matrix_by_another() -> None:
    assert colour_mix(5) is None
    # BT.709's primaries of luma, by hand: pure Cr of 0.5 is red 2 (1 - Kr) Cr = 0.7874 there, 0.701 in BT.601
    mix = colour_mix(1)
    assert mix is not None
    kr, kb = 0.299, 0.114
    y, cb, cr = 0.5, 0.1, -0.2
    by_601 = np.array([y + 2 * (1 - kr) * cr, 0, y + 2 * (1 - kb) * cb])
    by_601[1] = (y - kr * by_601[0] - kb * by_601[2]) / (1 - kr - kb)
    red, blue = y + 2 * (1 - 0.2126) * cr, y + 2 * (1 - 0.0722) * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / (1 - 0.2126 - 0.0722)
    assert mix @ by_601 == pytest.approx([red, green, blue], abs=1e-6)
    assert mix.sum(1) == pytest.approx([1, 1, 1], abs=1e-6)  # grey stays


def test_hd_is_shown_by_its_own_matrix(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "hd.mp4", size=(720, 960), seconds=0.4, flash=None)
    # the twin, as DALI, makes them by BT.601
    assert same(path, TwinDevice()) > 45


# What is unfit


def unfit(path: Path, device: Device, **how: Any) -> str:
    with pytest.raises(Unfit) as e:
        decode_dali.decode(path, SPEC, Kept(), slot_seconds=60, device=device, **how)
    assert str(path.parent) not in str(e.value)
    return str(e.value)


def test_unfit_files_say_why(tmp_path: Path) -> None:
    def clip(name: str, **how: Any) -> Path:
        return make_clip(tmp_path / name, seconds=0.6, **how)

    gpu, cpu = TwinDevice(), Device("dali-cpu")
    assert "no picture" in unfit(clip("a.wav"), gpu)
    assert "mpeg2video" in unfit(clip("a.mpg"), gpu)
    assert "AVI" in unfit(clip("a.avi"), gpu)
    assert "h264 is not decoded by DALI on the CPU" in unfit(clip("a.mp4"), cpu)
    assert "yuv444p" in unfit(clip("b.mp4", pix_fmt="yuv444p"), gpu)
    far = clip("c.mp4")
    assert "where PyAV seeks" in unfit(far, gpu, start=Fraction(61))
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "0 bytes" in unfit(tmp_path / "empty.mp4", gpu)
    assert unfit(tmp_path / "missing.mp4", gpu)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(clip("d.mkv", noise=True).read_bytes()[:9000])
    assert unfit(cut, gpu)


def test_a_device_that_shows_something_else_is_found_out(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", noise=True)
    Twin.change = lambda x: x.flip(2)
    assert "dB from PyAV's" in unfit(path, TwinDevice())
    Twin.change = lambda x: (x.float() * 0.9).byte()
    assert "dB from PyAV's" in unfit(path, TwinDevice())
    Twin.change = None
    assert "the device failed" in unfit(path, TwinDevice(extra=1))
    # one picture too early: the middle keyframe shows it, though the first is right
    fine = make_clip(tmp_path / "gop.mkv", noise=True, gop=10)
    Twin.change = lambda x: torch.cat([x[:1], x[:-1]])
    assert "dB from PyAV's" in unfit(fine, TwinDevice())


# Through a child and an ingest


class HereWithTwin:
    """The pool of children in this process, with a device whose stream is FFmpeg's."""

    def __init__(self, workers: int, spec: Spec, on_death: object = None, decode: str = "pyav") -> None:
        self.workers, self.spec = workers, spec
        self.device = None if decode == "pyav" else TwinDevice()

    def run(self, jobs: Any, stop: Any) -> Iterator[children.Result]:
        for job in jobs:
            header, body = worker.answer(dict(job.__dict__), self.spec, self.device)
            there = "index" in header
            yield children.Result(job, header, children.Payloads(body, Path(job.spool)) if there else None)

    def hello(self) -> dict[str, str]:
        return worker.load(self.spec)

    def close(self) -> None:
        pass


def test_an_ingest_records_who_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "media"
    source.mkdir()
    make_clip(source / "a.mp4", noise=True)
    make_clip(source / "b.mpg", seconds=1.0)
    make_clip(source / "c.wav", seconds=1.0)
    (source / "d.mp4").write_bytes(b"junk" * 100)
    monkeypatch.setattr(crew, "Pool", HereWithTwin)
    plain = ingest(source, tmp_path / "plain.zarr", **SMALL)
    monkeypatch.setattr(dali, "why_not", lambda kind: None)
    told: list[Any] = []
    done = ingest(source, tmp_path / "dali.zarr", decode="auto", on_event=told.append, **SMALL)
    assert (done.ok, done.failed) == (plain.ok, plain.failed) == (3, 1)
    assert [e.decoder for e in told if isinstance(e, Decoding)] == ["dali"]
    with open_store(tmp_path / "dali.zarr") as mine, open_store(tmp_path / "plain.zarr") as theirs:
        by_key = {v.key: v.facts for v in mine}
        assert by_key["a.mp4"]["decoder"] == "dali" and by_key["a.mp4"]["fallback"] is None
        assert by_key["b.mpg"]["decoder"] == "pyav" and "mpeg2video" in by_key["b.mpg"]["fallback"]
        for video in theirs:
            facts = {**by_key[video.key], "decoder": "pyav", "fallback": None}
            assert facts == video.facts


def test_the_second_try_of_a_file_that_killed_its_child_is_pyavs(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.5)
    spec = Spec(height=32, width=48, fps=8, sample_rate=8000, front_ends=())
    job = {"kind": "decode", "path": str(path), "spool": str(tmp_path / "spool"), "slot": 2, "start": None,
           "end": None, "device": False}  # fmt: skip
    header, _ = worker.answer(job, spec, TwinDevice())
    assert header["facts"]["decoder"] == "pyav" and "ended with this file" in header["facts"]["fallback"]
    header, _ = worker.answer({**job, "device": True}, spec, TwinDevice())
    assert header["facts"]["decoder"] == "dali" and header["facts"]["fallback"] is None


def test_spectrograms_are_computed_where_the_pictures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device for what it decoded, on the CPU for what fell back; a device that fails costs the video one try."""
    name = "crisscross-mel80"
    spec = Spec(height=32, width=48, fps=8, sample_rate=16000, front_ends=(name,))
    asked: list[str] = []
    broken = False
    compute = frontends.spectrogram_rows

    def on(waveform: np.ndarray, front_end: str, rate: int, device: str = "cpu") -> np.ndarray:
        asked.append(device)
        if broken and device != "cpu":
            raise RuntimeError("CUDA error: an illegal memory access")
        return compute(waveform, front_end, rate)

    monkeypatch.setattr(frontends, "spectrogram_rows", on)

    def answer(path: Path, device: Any) -> tuple[dict[str, Any], list[bytes]]:
        job = {"kind": "decode", "path": str(path), "spool": str(tmp_path / "spool"), "slot": 2, "start": None,
               "end": None, "device": True}  # fmt: skip
        header, body = worker.answer(job, spec, device)
        assert body is not None, header
        return header["facts"], [bytes(body[a : a + n]) for a, n in header["index"]["spectrograms"][name]]

    device = TwinDevice()
    device.sound_on = "cuda:3"
    path, old = make_clip(tmp_path / "a.mp4", seconds=0.7), make_clip(tmp_path / "b.mpg", seconds=0.7)
    _, plain = answer(path, None)
    facts, rows = answer(path, device)
    assert facts["decoder"] == "dali" and asked == ["cpu", "cuda:3"] and rows == plain
    facts, _ = answer(old, device)
    assert facts["decoder"] == "pyav" and asked.pop() == "cpu"
    broken = True
    facts, rows = answer(path, device)
    assert facts["decoder"] == "pyav" and rows == plain and asked[-2:] == ["cuda:3", "cpu"]
    assert facts["fallback"] == f"{name} on the device: CUDA error: an illegal memory access"


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dali.choose("pyav") == ("pyav", "")
    with pytest.raises(UsageError, match="cuvid"):
        dali.choose("cuvid")
    monkeypatch.setattr(dali, "why_not", lambda kind: "no device")
    assert dali.choose("auto") == ("pyav", "no device")
    with pytest.raises(ExtraMissingError, match="no device"):
        dali.choose("dali")


def test_jpeg_of_a_batch() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    each = [encode_jpeg(one, 90) for one in pictures]
    assert encode_batch(pictures, 90) == encode_batch(torch.from_numpy(pictures), 90, threads=3) == each
    with pytest.raises(UsageError, match="turbo"):
        encode_batch(pictures, 90, "turbo")
    with pytest.raises(UsageError, match="shape"):
        encode_batch(pictures[0], 90)
    with pytest.raises((ExtraMissingError, UsageError)):
        encode_batch(pictures, 90, "nvimagecodec")


# DALI itself, by its CPU build

CPU_CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "vp9": (".webm", {"vcodec": "libvpx-vp9", "seconds": 0.8}),
    "vp9 in mp4": (".mp4", {"vcodec": "libvpx-vp9", "seconds": 0.8}),
    "vp8": (".webm", {"vcodec": "libvpx"}),
    "mjpeg": (".mkv", {"vcodec": "mjpeg"}),
    "vp9, turned": (".mp4", {"vcodec": "libvpx-vp9", "rotation": 90, "seconds": 0.8}),
    "vp8, 720 lines": (".webm", {"vcodec": "libvpx", "size": (720, 960), "seconds": 0.2}),
    "vp9, variable rate": (".mkv", {"vcodec": "libvpx-vp9", "times": (0.0, 0.1, 0.15, 0.6, 1.1, 1.11, 1.9)}),
    "vp8, 32 pictures": (".webm", {"vcodec": "libvpx", "fps": 16}),  # whole sequences: the pipeline is made anew
}


@pytest.fixture(scope="module")
def device() -> Device:
    """One for all: its pipelines serve file after file, and are made anew after a bad one."""
    return Device("dali-cpu")


@with_dali
@pytest.mark.parametrize("name", CPU_CLIPS)
def test_dali_shows_what_pyav_shows(name: str, tmp_path: Path, device: Device) -> None:
    suffix, how = CPU_CLIPS[name]
    path = make_clip(tmp_path / f"clip{suffix}", noise=True, **how)
    assert same(path, device) > 40


@with_dali
def test_dali_goes_on_after_a_bad_file(tmp_path: Path, device: Device) -> None:
    good = make_clip(tmp_path / "good.webm", noise=True)  # VP8
    bad = tmp_path / "bad.mkv"
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 3])
    assert "truncated" in unfit(bad, device) or "stated end" in unfit(bad, device)
    other = make_clip(tmp_path / "other.mp4", vcodec="libvpx-vp9", noise=True, seconds=0.8)
    damaged = bytearray(other.read_bytes())
    at = damaged.find(b"mdat") + 4
    damaged[at + 20000 : at + 30000] = bytes(10000)  # the index stays: as many packets, some of them nonsense
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    assert unfit(tmp_path / "damaged.mp4", device)
    assert same(good, device) > 40


@with_dali
def test_every_real_file_that_dali_decodes(shared: Path, device: Device) -> None:
    """Same rows, sound and facts, and 45 dB, for each file of the shared media that DALI's CPU build takes."""
    done = []
    for path in sorted(shared.rglob("*")):
        if path.suffix not in (".webm", ".mp4", ".mkv", ".mov", ".avi") or path.parent.name in ("grid", "ucf"):
            continue
        try:
            least = same(path, device)
        except (Unfit, decode_pyav.DecodeFailed):
            continue
        assert least > 45, path.name
        done.append(path.name)
    assert len(done) >= 4, done


@with_dali
@pytest.mark.slow
def test_an_ingest_by_dali_in_children(tmp_path: Path) -> None:
    source = tmp_path / "media"
    source.mkdir()
    make_clip(source / "a.webm", vcodec="libvpx-vp9", noise=True)
    make_clip(source / "b.mp4")
    summary = ingest(source, tmp_path / "s.zarr", decode="dali-cpu", workers=1, **SMALL)
    assert (summary.ok, summary.failed) == (2, 0)
    with open_store(tmp_path / "s.zarr") as store:
        facts = {v.key: (v.facts["decoder"], v.facts["fallback"]) for v in store}
    assert facts["a.webm"] == ("dali", None) and facts["b.mp4"][0] == "pyav" and "h264" in facts["b.mp4"][1]
    record = json.loads(next((tmp_path / "s.zarr" / "commits").glob("*.json")).read_text())
    assert record["versions"]["decode"] == "dali-cpu" and "dali" in record["versions"]
