"""Others read a store: zarr-python, xarray, tensorstore and imagecodecs, each against avstore's own cutter."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import avstore
from avstore.cut import cut_frames, cut_rows
from avstore.errors import NotFoundError
from avstore.spec import embedding_array
from tests.small_stores import small_store
from tests.tiny_store import Tiny, default_spec, make_store

# Listing a group's members, zarr names the folders that are none of its business (docs/format.md says so).
pytestmark = pytest.mark.filterwarnings(r"ignore:Object at (plans|commits|logs) is not recognized as a component")
MEL = "crisscross-mel80"
# Shards of 16 s: three videos and a hole of 4 s; one video without sound, so no waveform file; one video over three.
VIDEOS = [
    Tiny(3),
    Tiny(4.6),
    Tiny(2),
    Tiny(15.7, sound=None),
    Tiny(41),
    Tiny(3, status="failed"),
    Tiny(2, picture=False),
]


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> avstore.Store:
    spec = default_spec(codec=request.param, sample_rate=16000, front_ends=(MEL,), height=32, width=48)
    path = make_store(tmp_path_factory.mktemp(request.param) / "s.zarr", VIDEOS, spec)
    assert not (path / "waveform" / "c.1").exists() and (path / "frames" / "c.1.0.0.0").exists()
    (path / "waveform" / "c.3").unlink()  # a shard that is missing altogether
    return avstore.open(path)


def whole(store: avstore.Store, array: str) -> np.ndarray:
    """A whole array by our own cutter, the fill value where nothing is stored."""
    spec = store.arrays[array]
    rows = store.tape_seconds * spec.rate
    out = np.full((rows, *spec.row), np.nan if spec.fill == "NaN" else spec.fill, spec.dtype)
    per = store.spec.shard_seconds
    for shard in range(store.tape_seconds // per):
        if not (store.path / spec.key(shard)).exists():
            continue
        first = shard * per * spec.rate
        part = out[first : first + per * spec.rate]
        if array == "frames":
            table = store.reader.index(spec.key(shard), 0, per * spec.rate, per * spec.rate)
            there = np.flatnonzero(table[:, 0] != np.uint64(2**64 - 1))
            frames = np.empty((len(there), *spec.row), np.uint8)
            cut_frames(store.reader, spec, per * spec.rate, first + there, frames)
            part[there] = frames
        elif array == "source":
            part[:] = store._rows_of_source(np.arange(first, first + len(part)))
        else:
            cut_rows(store.reader, spec, per, first, part)
    return out


def test_zarr_reads_every_array(store: avstore.Store) -> None:
    group = zarr.open_group(store.path, mode="r")
    assert dict(group.attrs)["avstore"]["fingerprint"] == store.fingerprint
    names = {"frames", "source", "waveform", f"spectrograms/{MEL}"}
    assert {name for name, _ in group.members(max_depth=None)} == names | {"spectrograms", "embeddings"}
    for name in names:
        array, expected = group[name], whole(store, name)
        assert isinstance(array, zarr.Array) and array.shape == expected.shape and array.dtype == expected.dtype
        np.testing.assert_array_equal(array[:], expected)
        hole = {"frames": 0, "source": -1, "waveform": 0}.get(name, np.nan)
        rate = store.arrays[name].rate
        np.testing.assert_array_equal(array[12 * rate : 13 * rate], np.full((rate, *expected.shape[1:]), hole))


def test_zarr_slices_across_shards(store: avstore.Store) -> None:
    group = zarr.open_group(store.path, mode="r")
    place = int(store.places[4])
    assert place % 16 == 0 and store.slots[4] > 32
    frames = group["frames"]
    assert isinstance(frames, zarr.Array)
    clip = store.clip(4, 14, n=48, fps=12, seconds=0)
    assert clip.frames is not None and len(set((clip.rows // 256).tolist())) == 2
    np.testing.assert_array_equal(frames.oindex[clip.rows.tolist()], clip.frames)
    over = store.clip(4, 250 / 16, n=12, seconds=0).frames
    assert over is not None
    part = frames[place * 16 + 250 : place * 16 + 262, 8:24, ::2]
    np.testing.assert_array_equal(part, over[:, 8:24, ::2])
    rows = store.stored_spectrogram(4, MEL, 1590, 20)
    np.testing.assert_array_equal(group[f"spectrograms/{MEL}"][place * 100 + 1590 : place * 100 + 1610], rows)  # type: ignore[index]
    with pytest.raises(NotFoundError):  # ours tells the missing shard of a video that is ok; zarr gives its zeros
        store.waveform(4)
    sound = np.asarray(group["waveform"][(place + 14) * 16000 : (place + 18) * 16000])  # type: ignore[index]
    assert sound[:32000].all() and not sound[32000:].any()


def test_a_real_store_in_zarr(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> None:
    store = avstore.open(small_store(tmp_path_factory, tiny_media, front_ends=("avid-linear257", MEL)))
    group = zarr.open_group(store.path, mode="r")
    for video in store:
        fps, rate = store.spec.fps, store.spec.sample_rate
        if video.has_picture:
            clip = store.clip(video.number, 0, n=video.frames, fps=fps)
            rows = slice(video.place * fps, video.place * fps + video.frames)
            np.testing.assert_array_equal(group["frames"][rows], clip.frames)  # type: ignore[index]
            np.testing.assert_array_equal(group["source"][rows], clip.source)  # type: ignore[index]
        rows = slice(video.place * rate, video.place * rate + video.samples)
        np.testing.assert_array_equal(group["waveform"][rows], store.waveform(video.number)[0])  # type: ignore[index]
        stored = store.stored_spectrogram(video.number, MEL)
        first = video.place * 100
        np.testing.assert_array_equal(group[f"spectrograms/{MEL}"][first : first + len(stored)], stored)  # type: ignore[index]


WITHOUT_US = """
import hashlib, importlib.abc, importlib.metadata, sys
real = importlib.metadata.entry_points
class Hidden:  # an interpreter in which neither package was ever installed
    groups = real().groups
    def select(self, **how):
        keep = [e for e in real(**how) if e.value.split(".")[0] not in ("avstore", "imagecodecs")]
        return importlib.metadata.EntryPoints(keep)
importlib.metadata.entry_points = lambda **how: Hidden().select(**how) if how else Hidden()
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("avstore", "imagecodecs"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import zarr
group = zarr.open_group(sys.argv[1], mode="r")
for name in ("source", "waveform", "spectrograms/crisscross-mel80"):
    print(name, hashlib.sha256(group[name][:].tobytes()).hexdigest())
try:
    group["frames"][0]
    print("frames opened")
except Exception as e:
    print("frames:", e)
"""


def test_without_avstore_everything_but_frames_opens(store: avstore.Store) -> None:
    command = [sys.executable, "-c", WITHOUT_US, str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ("source", "waveform", f"spectrograms/{MEL}"), strict=False):
        assert line == f"{name} {hashlib.sha256(whole(store, name).tobytes()).hexdigest()}"
    assert ("imagecodecs_jpeg" in lines[3]) if store.spec.codec == "jpeg" else lines[3] == "frames opened"


def test_xarray_names_the_dimensions(store: avstore.Store) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(store.path, engine="zarr", consolidated=False, decode_cf=False) as data:
        assert {name: data[name].dims for name in data.data_vars} == {
            "frames": ("frame", "y", "x", "rgb"), "source": ("frame",), "waveform": ("sample",)}  # fmt: skip
        np.testing.assert_array_equal(data["source"].values, whole(store, "source"))
        np.testing.assert_array_equal(data["frames"][16:24].values, whole(store, "frames")[16:24])
    with xarray.open_dataset(
        store.path, engine="zarr", group="spectrograms", consolidated=False, decode_cf=False
    ) as data:
        assert data[MEL].dims == (f"{MEL}.row", f"{MEL}.bin")
        np.testing.assert_array_equal(data[MEL].values, whole(store, f"spectrograms/{MEL}"))


def test_xarray_and_zarr_read_embeddings(store: avstore.Store) -> None:
    xarray = pytest.importorskip("xarray")
    from avstore.codecs import encode_rows
    from avstore.durable import canonical_json

    folder = store.path / "embeddings" / "run"
    (folder / "video").mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    array = embedding_array("run", "video", 8)
    (folder / "video" / "zarr.json").write_bytes(canonical_json(array.metadata(16, store.tape_seconds)))
    rows = np.arange(128, dtype=np.float16).reshape(16, 8)
    (store.path / array.key(1)).write_bytes(encode_rows(rows))
    found = zarr.open_group(store.path, mode="r")["embeddings/run/video"]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(found[16:32], rows)
    assert np.isnan(np.asarray(found[:16])).all() and found.shape == (store.tape_seconds, 8)
    with xarray.open_dataset(folder, engine="zarr", consolidated=False, decode_cf=False) as data:
        assert data["video"].dims == ("run.video.second", "run.video.dimension")


def test_tensorstore_reads_all_but_jpeg(store: avstore.Store) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    names = ["source", "waveform", f"spectrograms/{MEL}", *(["frames"] if store.spec.codec == "raw" else [])]
    for name in names:
        kvstore: dict[str, Any] = {"driver": "file", "path": str(store.path / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        np.testing.assert_array_equal(np.asarray(array.read().result()), whole(store, name))


def test_a_frame_decodes_with_imagecodecs(store: avstore.Store) -> None:
    if store.spec.codec != "jpeg":
        pytest.skip("raw frames are no JPEG")
    imagecodecs = pytest.importorskip("imagecodecs")
    spec = store.arrays["frames"]
    (offset, length), *_ = store.reader.index(spec.key(0), 5, 1, 256).tolist()
    payload = (store.path / spec.key(0)).read_bytes()[offset : offset + length - 4]
    theirs = imagecodecs.jpeg8_decode(payload)
    ours = store.clip(0, 5 / 16, n=1).frames
    assert ours is not None and theirs.shape == ours[0].shape
    assert np.abs(theirs.astype(int) - ours[0]).max() <= 2  # another build of libjpeg-turbo may round otherwise
    from imagecodecs.numcodecs import Jpeg

    inner = json.loads((store.path / "frames" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert inner[0]["name"] == Jpeg(level=90).codec_id
