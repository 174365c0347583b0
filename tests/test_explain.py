"""Saliency of planted networks, Grad-CAM by hand, projections, cosines, and the folder that the command writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from benchmarks.explain import Saliency, attend, cam, mapped, overlaid, project, saliency, saliency_picture
from benchmarks.explain_page import _dark
from cli.main import invoke
from tests import tiny_run
from trainers.encoders import Encoder


class Sees(Encoder):
    """Maps of its input at an eighth: for each of its channels, how much of it is there."""

    dim, pool = 3, "avg"

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward_blocks(self, x: Tensor) -> dict[str, Tensor]:
        small = F.avg_pool3d(x, (1, 8, 8)) if x.dim() == 5 else F.avg_pool2d(x, 8)
        return dict.fromkeys(("conv2x", "conv3x", "conv4x", "conv5x"), F.relu(small * self.gain))


class Planted(nn.Module):
    """Its video vector is (red, green) of the clip; its sound vector (low, high) of the spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes, self.ears = Sees(), Sees()

    def embed(self, video: Tensor, audio: Tensor) -> dict[str, Tensor]:
        v = self.eyes(video)[:, :2]
        maps = self.ears.forward_blocks(audio)["conv5x"]
        half = maps.shape[-1] // 2
        a = torch.stack([maps[..., :half].mean((1, 2, 3)), maps[..., half:].mean((1, 2, 3))], 1)
        return {"video": v, "audio": a}


def planted_clip() -> Tensor:
    """Red square top left in the first half of the clip, green bottom right in all of it; blue everywhere."""
    video = torch.zeros(1, 3, 4, 64, 64)
    video[:, 2] = 1
    video[:, 0, :2, 8:24, 8:24] = 1
    video[:, 1, :, 40:56, 40:56] = 1
    return video


def low_sound(bins: slice) -> Tensor:
    audio = torch.zeros(1, 1, 32, 64)
    audio[..., bins] = 1
    audio[..., 0:1, :] += 0.01  # so that no vector is zero
    return audio


def centre(x: Tensor) -> tuple[float, ...]:
    """Where the weight of a map lies."""
    total = x.sum()
    return tuple(float((x.sum([d for d in range(x.dim()) if d != k]) * torch.arange(s)).sum() / total)
                 for k, s in enumerate(x.shape))  # fmt: skip


def test_a_planted_network_lights_up_where_it_looks() -> None:
    net, video = Planted(), planted_clip()
    for bins, place, early in ((slice(0, 16), 15.5, True), (slice(48, 64), 47.5, False)):
        cosine, sight, sound = attend(net, net.embed, video, low_sound(bins))
        assert sight.shape == (1, 4, 64, 64) and sound.shape == (1, 32, 64)
        assert 0 < float(cosine) < 1 and float(sight.max()) == pytest.approx(1) and float(sight.min()) >= 0
        t, y, x = centre(sight[0])
        assert y == pytest.approx(place, abs=1) and x == pytest.approx(place, abs=1)
        assert (t < 0.8) == early  # red: first half only
        other = slice(40, 56) if early else slice(8, 24)
        assert float(sight[0, :, other, other].max()) == 0  # the other square speaks against the match


def test_the_map_of_sound_is_where_the_matching_notes_are() -> None:
    class Notes(Planted):
        def embed(self, video: Tensor, audio: Tensor) -> dict[str, Tensor]:
            halves = torch.stack([torch.arange(64) < 32, torch.arange(64) >= 32])
            return {"video": self.eyes(video)[:, :2], "audio": self.ears(audio * halves[None, :, None])}

    net, audio = Notes(), torch.zeros(1, 1, 32, 64)
    audio[:, :, 8:16, 4:12] = 1  # low, early
    audio[:, :, 20:28, 50:58] = 1  # high, late
    only_red = planted_clip()
    only_red[:, 1] = 0
    _, _, sound = attend(net, net.embed, only_red, audio)
    row, column = centre(sound[0])
    assert row == pytest.approx(11.5, abs=1) and column == pytest.approx(7.5, abs=4.5)
    assert float(sound[0, 18:, 44:].max()) == 0


def test_gradcam_by_hand() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]]])
    slopes = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[-8.0, 0.0], [0.0, 0.0]]]])
    # weights 1 and -2: [[1 - 2, 2], [3, 4]] -> ReLU [[0, 2], [3, 4]] / 4
    assert torch.allclose(cam(maps, slopes, (2, 2)), torch.tensor([[[0.0, 0.5], [0.75, 1.0]]]))
    assert float(cam(maps, -slopes.abs(), (2, 2)).abs().max()) == 0  # nothing speaks for it: no map, no NaN
    assert cam(maps, slopes, (8, 6)).shape == (1, 8, 6)
    # product: [[1 - 8, 2], [3, 4]], and where only one place has a slope, that place alone
    assert torch.allclose(cam(maps, slopes, (2, 2), "product"), torch.tensor([[[0.0, 0.5], [0.75, 1.0]]]))
    once = torch.zeros(1, 2, 2, 2)
    once[0, 0, 1, 0] = 0.3
    assert cam(maps, once, (2, 2), "product").tolist() == [[[0, 0], [1, 0]]]
    assert cam(maps, once, (2, 2)).tolist() == [[[0.25, 0.5], [0.75, 1]]]
    with pytest.raises(UsageError, match="grad-cam"):
        cam(maps, once, (2, 2), "gradcam")


def test_attend_refuses_what_it_cannot_show() -> None:
    net = Planted()
    with pytest.raises(UsageError, match="no block"):
        attend(net, net.embed, planted_clip(), low_sound(slice(0, 8)), "conv9x")
    with pytest.raises(ConflictError, match="no cosine"):
        attend(net, lambda v, a: {"video": net.eyes(v)}, planted_clip(), low_sound(slice(0, 8)))
    with pytest.raises(ConflictError, match="come from no"):
        attend(net, lambda v, a: {"video": net.eyes(v)[:, :2], "audio": torch.ones(1, 2)}, planted_clip(),
               low_sound(slice(0, 8)))  # fmt: skip
    with pytest.raises(ConflictError, match="no maps"):
        attend(nn.Linear(1, 1), lambda v, a: {"video": torch.ones(1, 2), "audio": torch.ones(1, 2)}, planted_clip(),
               low_sound(slice(0, 8)))  # fmt: skip
    assert "forward_blocks" not in vars(net.eyes)  # nothing stays behind


def test_two_groups_come_apart_and_pca_is_the_svd() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(20, 6)) * 0.1, rng.normal(size=(20, 6)) * 0.1 + 1])
    for how in ("pca", "tsne"):
        y = project(x, how, seed=1)
        apart = np.linalg.norm(y[:20].mean(0) - y[20:].mean(0))
        assert y.shape == (40, 2) and apart > 2 * max(y[:20].std(0).max(), y[20:].std(0).max())
    from sklearn.decomposition import PCA

    assert np.allclose(np.abs(project(x)), np.abs(PCA(2).fit_transform(x)))
    for bad in (np.zeros((2, 5)), np.full((5, 5), np.nan)):
        with pytest.raises(UsageError):
            project(bad)
    with pytest.raises(UsageError, match="no projection"):
        project(x, "pac")


def test_cosines_by_hand() -> None:
    v = np.eye(3, dtype=np.float32)
    a = np.eye(3, dtype=np.float32)[[1, 0, 2]]  # videos 4 and 5 have each other's sound
    found = mapped("r", v, np.array([4, 5, 9]), a, np.array([4, 5, 9]))
    assert found.cosine.tolist() == [0, 0, 1] and sorted(found.others) == [0, 0, 0, 0, 1, 1]
    # own 0: ties with four, below two: 2/6 each; own 1: above four, ties with two: 5/6
    assert found.above == pytest.approx((2 / 6 + 2 / 6 + 5 / 6) / 3)
    more = mapped("r", v, np.array([4, 5, 9]), np.eye(3)[[0, 1, 2, 0]], np.array([4, 5, 9, 12]))
    assert more.numbers.tolist() == [4, 5, 9] and more.above == 1.0
    with pytest.raises(UsageError, match="0 videos"):
        mapped("r", v, np.array([1, 2, 3]), a, np.array([4, 5, 9]))


def test_a_picture_shows_the_runs_under_each_other() -> None:
    frames = np.full((4, 32, 32, 3), 200, np.uint8)
    hot = np.zeros((4, 32, 32), np.float32)
    hot[:, :16] = 1
    one = Saliency("r", 0, 0, 0.5, frames, hot, np.random.default_rng(0).normal(size=(50, 20)), np.zeros((50, 20)))
    picture = saliency_picture([one, one])
    assert picture.shape[0] == 4 * 116 and np.array_equal(picture[:232], picture[232:])
    upper, lower = picture[116 + 20, 40].astype(int), picture[116 + 90, 40].astype(int)
    assert np.ptp(upper) > 40 and np.ptp(lower) <= 30  # coloured where it is hot, near grey where not
    assert np.array_equal(overlaid(frames, hot)[0, 31, 5], np.full(3, 150))
    with pytest.raises(UsageError):
        saliency_picture([])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny store and two runs of two steps."""
    from trainers.loop import train

    folder = tmp_path_factory.mktemp("explain")
    store = tiny_run.store_in(folder)
    for i in range(2):
        train("avid", store, tiny_run.config("steps=2", f"seed={i}"), folder / f"r{i}")
    return folder


def test_the_command_writes_pictures_a_page_and_parquet(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out = trained / "explain"
    command = ["explain", str(trained / "tiny.zarr"), "--run", str(trained / "r0"), "--run", str(trained / "r1"),
               "-o", str(out), "--count", "2", "--json"]  # fmt: skip
    assert invoke(command) == 0
    table = json.loads(capsys.readouterr().out)
    assert [r["run"] for r in table["rows"]] == ["r0", "r1"] and all(-1 <= r["own"] <= 1 for r in table["rows"])
    names = sorted(p.name for p in out.iterdir())
    assert sum(n.startswith("saliency-") for n in names) == 2
    assert {"explain.html", "map.parquet", "map-r0.svg", "cosines-r1.svg"} <= set(names)
    rows = pq.read_table(out / "map.parquet").to_pylist()
    videos = len({r["number"] for r in rows})
    assert len(rows) == 2 * 2 * videos and {r["modality"] for r in rows} == {"video", "audio"}
    own = [r["cosine"] for r in rows if r["run"] == "r0" and r["modality"] == "video"]
    assert np.mean(own) == pytest.approx(table["rows"][0]["own"])
    text = (out / "explain.html").read_text()
    assert text.count("data:image/png") == 2 and "Feature map" in text


def test_a_runs_map_agrees_with_its_embedding_and_has_the_clips_shape(trained: Path) -> None:
    import avstore
    from trainers.embed import embed_videos
    from trainers.run import Run

    store, run = avstore.open(trained / "tiny.zarr"), Run(trained / "r0")
    found = saliency(run, store, [(3, 1), (1, 0)], block="conv4x")
    vectors = embed_videos(run.load(), run, store, np.array([1, 3]))
    for s in found:
        (v,), (a,) = (x[(n == s.video) & (t == s.second)] for x, n, t in (vectors["video"], vectors["audio"]))
        assert s.cosine == pytest.approx(float(v @ a), abs=1e-5)
        assert s.frames.shape == (4, 32, 32, 3) and s.sight.shape == (4, 32, 32) and s.sound.shape == s.rows.shape
        assert s.sight.min() >= 0 and s.sight.max() <= 1 and np.isfinite(s.sound).all()
    assert [(s.video, s.second) for s in found] == [(3, 1), (1, 0)]
    with pytest.raises(UsageError, match="it lasts"):
        saliency(run, store, [(1, 9)])


def test_explain_says_what_is_missing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(trained / "tiny.zarr")
    assert invoke(["explain", store]) == 2
    assert invoke(["explain", store, "--run", str(trained / "r0"), "--run", str(trained / "r0")]) == 2
    assert invoke(["explain", store, "--run", str(trained / "none")]) == 4
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "pyarrow" else real(n, *a))
    assert invoke(["explain", store, "--run", str(trained / "r0"), "-o", str(trained / "x")]) == 1
    assert not (trained / "x").exists()


def test_dark_maps_are_told() -> None:
    """A map without a bright place is said to have none; a sense that a network lacks is not spoken of."""
    x, none = np.ones((2, 4, 4), np.float32), np.zeros((0,), np.float32)
    clip = Saliency("avid", 0, 1, 0.5, np.zeros((2, 4, 4, 3), np.uint8), x, x[0], x[0])
    assert _dark(clip) == "" and _dark(dataclasses.replace(clip, sight=none, sound=none)) == ""
    assert _dark(dataclasses.replace(clip, sight=0 * x)) == " (nothing of sight speaks for it)"
    assert "sight and sound" in _dark(dataclasses.replace(clip, sight=0 * x, sound=0 * x[0]))
