"""Embeddings: which clip a second is, what is on the tape, and that a strange file gives what the store would hold."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from tiny_run import config, store_in
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.augment import centre_crop
from avstore.errors import AvstoreError, ConflictError, NotFoundError, UsageError
from avstore.frontends import spectrogram
from avstore.store import Store
from avstore.windows import Extents
from trainers import embed as e
from trainers.checkpoint import load_encoder
from trainers.loop import train
from trainers.run import Run
from trainers.seconds import ListedOrder, SecondView

TOWERS = ["audio", "audio-trunk", "video", "video-trunk"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Run]:
    folder = tmp_path_factory.mktemp("embed")
    store = store_in(folder, codec="jpeg")
    return store, train("avid", store, config("steps=2"), folder / "runs" / "mine").run


def test_a_second_s_clip_is_centred_on_it_and_stays_inside() -> None:
    """Video of 5 s of pictures at 1000 samples a second, sound of 4 s; pictures of 1 s, sound of 2 s."""
    extents = Extents(np.full(5, 5000), np.zeros(5, np.int64), np.full(5, 4000))
    cut = SecondView(1000).starts(extents, None, np.arange(5), 1000, 2000)
    assert cut.picture.tolist() == [0, 1000, 2000, 3000, 4000]
    assert cut.sound.tolist() == [0, 500, 1500, 2000, 2000]  # -500 and 2500, 3500 would stick out
    short = SecondView(1000).starts(
        Extents(np.array([700]), np.array([0]), np.array([300])), None, np.array([0]), 1000, 2000
    )
    assert (short.picture.tolist(), short.sound.tolist()) == ([0], [0])


def test_the_listed_order_gives_each_pair_once() -> None:
    rows, seconds = np.array([0, 0, 2, 3, 3]), np.array([0, 1, 0, 0, 7])
    order = ListedOrder(4, rows, seconds, 2)
    got = [(order.at(s).rows.tolist(), order.at(s).draws.tolist()) for s in range(order.batches)]
    assert got == [([0, 0], [0, 1]), ([2, 3], [0, 0]), ([3], [7])]


def test_what_lies_on_the_tape(trained: tuple[Store, Run]) -> None:
    store, run = trained
    events: list[e.Event] = []
    done = e.embed(run, store, on_event=events.append)
    # eight videos of 2 s, four of 1.25 s: two begun seconds each
    assert (sorted(done.towers), done.seconds, done.complete, done.step) == (TOWERS, 24, True, 2)
    assert events[-1] == e.Event(24, 24)
    group = zarr.open_group(store.path, mode="r")
    for tower, size in (("video", 8), ("audio", 8), ("video-trunk", 32), ("audio-trunk", 32)):
        array = group[f"embeddings/mine/{tower}"]
        rows = np.asarray(array[:])
        assert rows.shape == (store.tape_seconds, size) and rows.dtype == np.float16
        there = np.zeros(len(rows), bool)
        for n in store.numbers:
            there[store.places[n] : store.places[n] + 2] = True
        assert np.isfinite(rows[there]).all() and np.isnan(rows[~there]).all()
        assert array.attrs["avstore"]["checkpoint"] == run.checkpoint().digest
        assert array.attrs["avstore"]["step"] == 2
    rows = np.asarray(group["embeddings/mine/video"][:], np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows[there], axis=1), 1, atol=1e-3)

    # one row by hand: second 1 of a video of 2 s: 4 pictures of 8 a second from 1.25 s, half a second of sound there
    n = int(store.numbers[1])
    assert store.seconds(n) == 2
    clip = store.clip(n, Fraction(5, 4), 4, 8, seconds=Fraction(1, 2))
    method = run.load()
    assert clip.frames is not None and clip.box is not None
    video = centre_crop(torch.from_numpy(clip.frames)[None], np.array([clip.box]), 32)
    s = run.snapshot.statistics
    assert s is not None
    audio = spectrogram(torch.from_numpy(clip.waveform)[None], "avid-linear129", 24000)
    audio = (audio - torch.tensor(s["mean"])) / torch.tensor(s["std"])
    with torch.no_grad():
        expected = method.embed(video=video, audio=audio[:, None])  # type: ignore[operator]
    for tower in TOWERS:
        got = np.asarray(group[f"embeddings/mine/{tower}"][store.places[n] + 1], np.float32)
        np.testing.assert_allclose(got, expected[tower][0].numpy(), atol=2e-3 * float(expected[tower].abs().max()))


def same(folder: Path, before: dict[str, bytes]) -> None:
    """The same files; a shard embedded alone goes through the nets in other batches, which moves the last bit."""
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.keys() == before.keys() and after["zarr.json"] == before["zarr.json"]
    for name in after.keys() - {"zarr.json"}:
        rows, expected = (np.frombuffer(x[name][:-4], "<f2").astype(np.float32) for x in (after, before))
        np.testing.assert_allclose(rows, expected, atol=2e-3)


def test_repeating_fills_what_is_missing_and_nothing_else(trained: tuple[Store, Run]) -> None:
    store, run = trained
    e.embed(run, store, name="again", towers=["video"])
    folder = store.path / "embeddings" / "again" / "video"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert e.embed(run, store, name="again", towers=["video"]).shards == 0
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    (folder / "c.1.0").unlink()
    assert e.embed(run, store, name="again", towers=["video"]).shards == 1
    same(folder, before)
    # killed half way: a dotted folder with one shard done
    dotted = folder.with_name(".video")
    shutil.copytree(folder, dotted)
    shutil.rmtree(folder)
    (dotted / "c.0.0").unlink()
    assert e.embed(run, store, name="again", towers=["video"]).shards == 1
    same(folder, before)
    assert not dotted.exists()


def test_another_checkpoint_under_the_same_name(trained: tuple[Store, Run], tmp_path: Path) -> None:
    store, run = trained
    e.embed(run, store, name="one", towers=["audio"], every=2)
    other = train("avid", store, config("steps=1"), tmp_path / "other").run
    with pytest.raises(ConflictError, match="another checkpoint") as error:
        e.embed(other, store, name="one", towers=["audio"])
    assert "every is 2 there, 1 now" in error.value.why
    assert e.embed(other, store, name="one", towers=["audio"], replace=True).seconds == 24
    attrs = zarr.open_group(store.path, mode="r")["embeddings/one/audio"].attrs["avstore"]
    assert attrs["checkpoint"] == other.checkpoint().digest
    assert sorted(p.name for p in (store.path / "embeddings" / "one").iterdir()) == ["audio", "zarr.json"]


def test_videos_without_sound_have_no_row_there(trained: tuple[Store, Run], tmp_path: Path) -> None:
    _, run = trained
    videos = [Tiny(2.0, sound=None), Tiny(2.0, picture=False), Tiny(2.0, sound_start=1.5), Tiny(2.0)]
    store = avstore.open(make_store(tmp_path / "some.zarr", videos, default_spec(sample_rate=24000)))
    e.embed(run, store, towers=["video", "audio"])
    group = zarr.open_group(store.path, mode="r")
    there = {
        t: [np.isfinite(group[f"embeddings/mine/{t}"][p : p + 2]).all(1).tolist() for p in store.places.tolist()]
        for t in ("video", "audio")
    }
    assert there["video"] == [[True, True], [False, False], [True, True], [True, True]]
    assert there["audio"] == [[False, False], [True, True], [False, True], [True, True]]
    means = e.video_means(store, "mine", "audio", np.array([3, 1]))
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-6)
    rows = np.asarray(group["embeddings/mine/audio"][store.places[1] : store.places[1] + 2], np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(means[1], unit.sum(0) / np.linalg.norm(unit.sum(0)), atol=1e-6)
    with pytest.raises(NotFoundError, match="the first is 0"):
        e.video_means(store, "mine", "audio", np.array([3, 0]))


def test_vectors_that_are_not_finite_are_refused(trained: tuple[Store, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = trained
    honest = Run.load

    def broken(self: Run, which: str | int = "latest") -> torch.nn.Module:
        method = honest(self, which)
        with torch.no_grad():
            next(method.parameters()).fill_(torch.nan)
        return method

    monkeypatch.setattr(Run, "load", broken)
    with pytest.raises(AvstoreError, match="not finite"):
        e.embed(run, store, name="broken")
    assert not (store.path / "embeddings" / "broken" / "video").exists()


def test_wrong_names(trained: tuple[Store, Run]) -> None:
    store, run = trained
    with pytest.raises(UsageError, match="did you mean video"):
        e.embed(run, store, towers=["vidoe"])
    with pytest.raises(NotFoundError, match="there is: 2"):
        e.embed(run, store, 77)
    with pytest.raises(UsageError):
        e.embed(run, store, name="../x")


def test_encoders_load_alone(trained: tuple[Store, Run]) -> None:
    _, run = trained
    method = run.load()
    for name in ("video", "audio"):
        encoder = load_encoder(run, name)
        mine, theirs = encoder.state_dict(), getattr(method.towers, name).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert not encoder.training
    with pytest.raises(NotFoundError, match="video"):
        load_encoder(run, "vido")


def test_random_control_and_checkpoint_in_memory(trained: tuple[Store, Run]) -> None:
    store, run = trained
    a, b = (e.embed_random(run, store, store.numbers[:3], seed=s) for s in (0, 1))
    again = e.embed_random(run, store, store.numbers[:3], seed=0)
    assert sorted(a) == TOWERS and a["video"][1].tolist() == sorted(store.numbers[:3].tolist())
    np.testing.assert_array_equal(a["video"][0], again["video"][0])
    assert np.abs(a["video"][0] - b["video"][0]).max() > 0.01
    assert np.abs(e.embed_checkpoint(run, store, store.numbers[:3])["video"][0] - a["video"][0]).max() > 0


def test_a_file_that_was_never_ingested(trained: tuple[Store, Run], tmp_path: Path) -> None:
    """The rows of a file are those that the store holds once it is ingested."""
    from benchmarks import demo_set

    _, run = trained
    demo_set.generate(tmp_path / "media", train=1, test=0, seconds=2, workers=1)
    file = next((tmp_path / "media").rglob("*.mp4"))
    spec = {"size": (64, 96), "sample_rate": 24000, "front_ends": (), "shard_seconds": 16}
    avstore.ingest(tmp_path / "media", tmp_path / "media.zarr", workers=1, **spec)
    store = avstore.open(tmp_path / "media.zarr")
    e.embed(run, store)
    found = e.embed_file(run, store, file)
    group = zarr.open_group(store.path, mode="r")
    place = int(store.places[0])
    for tower in TOWERS:
        kept = np.asarray(group[f"embeddings/mine/{tower}"][place : place + len(found[tower])], np.float32)
        np.testing.assert_array_equal(kept, found[tower].astype(np.float16).astype(np.float32))
    with pytest.raises(NotFoundError, match="no file"):
        e.embed_file(run, store, tmp_path / "none.mp4")
    (tmp_path / "words.mp4").write_text("not a video")
    with pytest.raises(UsageError, match="cannot be decoded"):
        e.embed_file(run, store, tmp_path / "words.mp4")
