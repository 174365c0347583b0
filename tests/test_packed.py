"""Pictures that stay JPEG until `tensors`: the same pixels as the ordinary path to the bit, with libjpeg-turbo as the
device; a fake nvImageCodec shows what the device's decoder is given."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from avstore import device_jpeg
from avstore.codecs import encode_jpeg
from avstore.errors import CorruptError, ExtraMissingError, UsageError
from avstore.loader import Loader
from avstore.packed import AGAIN, PIXELS, unpack
from avstore.sampler import Order
from avstore.views import AvidView, TwoViews
from tests.tiny_store import Tiny, default_spec, make_store

CPU = torch.device("cpu")
VIDEOS = [
    Tiny(3.0),
    Tiny(0.4),  # shorter than a clip: pictures loop
    Tiny(40.0),  # over three shards
    Tiny(4.0, picture=False),
    Tiny(6.0, repeat=4),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("packed") / "s.zarr", VIDEOS, default_spec(codec="jpeg"))


def loader(path: Path, views: Any = None, **more: Any) -> Loader:
    given = {"frames": 8, "fps": 16, "samples": 4000, "in_process": True, **more}
    return Loader(path, None, views or AvidView(2000), order=Order(len(VIDEOS), 3, seed=7, batch_size=4), **given)


@pytest.mark.parametrize("how", [{}, {"views": TwoViews()}, {"fps": "native"}, {"in_process": False}])
def test_the_same_tensors_as_without(path: Path, how: dict[str, Any]) -> None:
    decode = device_jpeg.make("cpu", CPU)
    with loader(path, **how) as plain, loader(path, decode=decode, **how) as coded:
        kinds: set[int] = set()
        for a, b in zip(plain.epoch(0), coded.epoch(0), strict=True):
            assert b.jpeg is not None and b.jpeg.dtype == np.int32
            kinds |= {int(np.sign(k)) for k in np.unique(b.jpeg)}
            mine, theirs = b.tensors("cpu"), a.tensors("cpu")
            assert mine.keys() == theirs.keys()
            for name, x in theirs.items():
                assert torch.equal(mine[name], x), name
        assert {0, 1} <= kinds  # videos without a picture lie there as pixels
        assert plain.layout.fields["frames"] == coded.layout.fields["frames"]


def test_a_slot_carries_jpegs_not_pixels(path: Path) -> None:
    with loader(path, decode=device_jpeg.make("cpu", CPU)) as coded:
        batch = next(coded.epoch(0))
        assert batch.jpeg is not None and batch.frames is not None
        for i in np.argwhere(batch.jpeg > 0).tolist():
            body = batch.frames[tuple(i)].reshape(-1)[: batch.jpeg[tuple(i)]]
            assert body[:2].tolist() == [0xFF, 0xD8] and body[-2:].tolist() == [0xFF, 0xD9]
            assert simplejpeg.decode_jpeg(body).shape == (64, 96, 3)


def test_a_picture_shown_again_is_decoded_once(path: Path) -> None:
    given: list[int] = []
    inner = device_jpeg.make("cpu", CPU)

    def decode(jpegs: Any, height: int, width: int) -> torch.Tensor:
        given.append(len(jpegs))
        return inner(jpegs, height, width)

    with loader(path, decode=decode, fps=4, frames=8) as coded, loader(path, fps=4, frames=8) as plain:
        for a, b in zip(plain.epoch(0), coded.epoch(0), strict=True):
            assert b.jpeg is not None
            assert torch.equal(b.tensors()["frames"], a.tensors()["frames"])
            assert given.pop() == int((b.jpeg > 0).sum())
    rows = np.zeros((4, 16, 16, 3), np.uint8)
    lengths = np.array([PIXELS, AGAIN, PIXELS, AGAIN], np.int32)
    rows[0], rows[2] = 5, 9
    got = unpack(rows, lengths, decode)
    assert got[:, 0, 0, 0].tolist() == [5, 5, 9, 9] and not given


def test_a_jpeg_longer_than_its_pixels_is_decoded_by_the_reader(tmp_path: Path) -> None:
    spec = default_spec(codec="jpeg", height=16, width=16, quality=100)  # the header alone is 600 bytes of the 768
    store = make_store(tmp_path / "s.zarr", [Tiny(2.0)], spec)
    order = Order(1, 2, seed=0, batch_size=2)
    how: dict[str, Any] = {"order": order, "frames": 4, "fps": 16, "in_process": True}
    with Loader(store, None, AvidView(0), **how) as plain:
        wanted = next(plain.epoch(0)).tensors()["frames"].clone()
    with Loader(store, None, AvidView(0), decode=device_jpeg.make("cpu", CPU), **how) as coded:
        batch = next(coded.epoch(0))
        assert batch.jpeg is not None and (batch.jpeg == PIXELS).any()
        assert torch.equal(batch.tensors()["frames"], wanted)


def test_damage_is_named_before_the_device_sees_it(path: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(path, tmp_path / "s.zarr"))
    shard = sorted((broken / "frames").glob("c.0.*"))[0]
    data = bytearray(shard.read_bytes())
    for place in range(200, len(data) // 2, 400):  # every picture of video 0, its index at the end left alone
        data[place] ^= 0xFF
    shard.write_bytes(bytes(data))
    with loader(broken, decode=device_jpeg.make("cpu", CPU)) as coded, pytest.raises(CorruptError, match="video 0"):
        for _ in coded.epoch(0):
            pass


def test_what_a_decoder_may_not_do(path: Path) -> None:
    def small(jpegs: Any, height: int, width: int) -> torch.Tensor:
        return torch.zeros(len(jpegs), height // 2, width, 3, dtype=torch.uint8)

    def refuses(jpegs: Any, height: int, width: int) -> torch.Tensor:
        raise ValueError("no such marker")

    with loader(path, decode=small) as coded:
        batch = next(coded.epoch(0))
        with pytest.raises(UsageError, match="decoder gave"):
            batch.tensors()
    with loader(path, decode=refuses) as coded:
        batch = next(coded.epoch(0))
        with pytest.raises(CorruptError, match="no such marker"):
            batch.tensors()
        batch.release()
        with pytest.raises(UsageError, match="released"):
            batch.tensors()


def test_only_whole_jpegs(path: Path, tmp_path: Path) -> None:
    decode = device_jpeg.make("cpu", CPU)
    raw = make_store(tmp_path / "raw.zarr", VIDEOS, default_spec())
    for where, more in ((raw, {}), (path, {"size": (32, 48)}), (path, {"frames": 0})):
        with pytest.raises(UsageError, match="decoder of JPEG"):
            loader(where, decode=decode, **more)


def test_decoders_say_what_is_missing() -> None:
    with pytest.raises(UsageError, match="nvimagecodec"):
        device_jpeg.why_not("nvimgcodec", CPU)
    for name in ("nvimagecodec", "torchvision"):
        with pytest.raises(ExtraMissingError, match="CUDA device"):
            device_jpeg.make(name, CPU)
    found = device_jpeg.available(CPU)
    assert set(found) == {"nvimagecodec", "torchvision"} and all(isinstance(x, str) for x in found.values())


def test_a_decoder_that_gives_other_pictures_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: Any) -> Any:
        return lambda jpegs, h, w: torch.zeros(len(jpegs), h, w, 3, dtype=torch.uint8)

    monkeypatch.setitem(device_jpeg.MAKERS, "cpu", wrong)
    with pytest.raises(ExtraMissingError, match="levels off"):
        device_jpeg.make("cpu", CPU)


def test_nvimagecodec_is_asked_for_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with nvImageCodec 0.9's names (checked against its own signatures): no backend of the CPU, our stream,
    and a picture that it could not decode is an error, not a hole."""
    asked: dict[str, Any] = {}

    class Decoder:
        def __init__(self, device_id: int, backends: list[Any], options: str) -> None:
            asked.update(device=device_id, backends=backends, options=options)

        def decode(self, streams: list[Any], *, params: Any, cuda_stream: int) -> list[Any]:
            asked.update(params=params, stream=cuda_stream)
            return [None if s[1] is None else torch.from_numpy(simplejpeg.decode_jpeg(s[1])) for s in streams]

    fake = types.SimpleNamespace(
        HW_GPU_ONLY="hw", GPU_ONLY="gpu", HYBRID_CPU_GPU="hybrid", Backend=lambda kind: kind, Decoder=Decoder,
        CodeStream=lambda data: ("stream", bytes(data) if data.size > 3 else None),
        DecodeParams=lambda apply_exif_orientation: {"exif": apply_exif_orientation},
    )  # fmt: skip
    package = types.ModuleType("nvidia")
    package.nvimgcodec = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia", package)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    decode = device_jpeg._nvimagecodec(torch.device("cpu", 0))
    jpeg = np.frombuffer(encode_jpeg(np.full((16, 32, 3), 90, np.uint8), 90), np.uint8)
    out = decode([jpeg, jpeg], 16, 32)
    assert tuple(out.shape) == (2, 16, 32, 3) and abs(int(out.float().mean()) - 90) < 3
    assert asked["device"] == 0 and asked["backends"] == ["hw", "gpu", "hybrid"] and asked["stream"] == 77
    assert asked["params"] == {"exif": False}
    with pytest.raises(ValueError, match="1 of 2"):
        decode([jpeg, jpeg[:2]], 16, 32)
