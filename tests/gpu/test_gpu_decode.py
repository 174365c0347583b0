"""Pictures from NVDEC are PyAV's: rows, sources, sound and facts alike, pictures within 35 dB, whole ingests too."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from avstore import dali, decode_dali, decode_pyav
from avstore.decode_dali import LEAST_PSNR, Device, Unfit, psnr
from avstore.frontends import SPREAD
from avstore.ingest import ingest
from avstore.probe import probe
from avstore.spec import Spec
from avstore.store import open as open_store
from tests.media import Kept, make_clip

SPEC = Spec(front_ends=())
CLIPS = {"h264": (".mp4", {}), "hevc": (".mp4", {"vcodec": "libx265"}), "vp9": (".webm", {"vcodec": "libvpx-vp9"}),
         "720 lines": (".mp4", {"size": (720, 960), "seconds": 0.6}), "turned": (".mp4", {"rotation": 90}),
         "variable rate": (".mkv", {"times": (0.0, 0.1, 0.15, 0.6, 1.1, 1.11, 1.9)})}  # fmt: skip


@pytest.fixture(scope="module")
def nvdec() -> Device:
    missing = dali.why_not("dali")
    if missing:
        pytest.skip(missing)
    return Device("dali")


def least(path: Path, device: Device) -> float:
    slot = ceil(probe(path, None, None, SPEC).seconds + Fraction(1, 4))
    a, b = Kept(), Kept()
    mine = decode_dali.decode(path, SPEC, b, slot_seconds=slot, device=device)
    theirs = decode_pyav.decode(path, SPEC, a, slot_seconds=slot)
    assert replace(mine, decoder="pyav") == theirs
    assert a.source == b.source and np.array_equal(a.waveform, b.waveform)
    return min(psnr(x, y) for x, y in zip(a.pictures, b.pictures, strict=True))


@pytest.mark.parametrize("name", CLIPS)
def test_nvdec_shows_what_pyav_shows(name: str, tmp_path: Path, nvdec: Device) -> None:
    suffix, how = CLIPS[name]
    path = make_clip(tmp_path / f"clip{suffix}", noise=True, **how)  # type: ignore[arg-type]
    assert least(path, nvdec) > LEAST_PSNR


def test_every_real_file_that_nvdec_takes(shared: Path, nvdec: Device) -> None:
    done: list[str] = []
    back: dict[str, str] = {}
    for path in sorted(shared.rglob("*")):
        if path.suffix not in (".webm", ".mp4", ".mkv", ".mov", ".avi", ".flv", ".3gp"):
            continue
        try:
            assert least(path, nvdec) > 30, path.name
            done.append(path.name)
        except (Unfit, decode_pyav.DecodeFailed) as e:
            back[path.name] = str(e)
    assert len(done) > 60, back


def test_an_ingest_on_the_device(tmp_path: Path, nvdec: Device) -> None:
    source = tmp_path / "media"
    source.mkdir()
    make_clip(source / "a.mp4", noise=True)
    make_clip(source / "b.mpg")
    (source / "c.mp4").write_bytes(b"junk" * 50)
    done = ingest(source, tmp_path / "s.zarr", decode="dali")
    assert (done.ok, done.failed) == (2, 1)
    ingest(source, tmp_path / "cpu.zarr")
    with open_store(tmp_path / "s.zarr") as store, open_store(tmp_path / "cpu.zarr") as cpu:
        for name in store.front_ends:  # computed on the device, within the stated distance of the CPU's
            for v in store:
                other = cpu.stored_spectrogram(int(cpu.find([v.key])[0]), name)
                mine = store.stored_spectrogram(v.number, name)
                step = np.spacing(np.abs(other).astype(np.float16)).astype(np.float32)
                assert np.all(np.abs(mine - other) <= SPREAD + step)
        assert {v.key: v.facts["decoder"] for v in store} == {"a.mp4": "dali", "b.mpg": "pyav"}
