"""The feed: views and copies with draws of their own, what does not depend on the batch, and the shares of sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.errors import ConflictError
from avstore.store import Store
from avstore.views import AvidView, RandomView, ShiftedSound, Snippets, TwoViews
from trainers import fit, methods
from trainers.config import RunConfig, resolve
from trainers.data import Feed, Plan
from trainers.methods import Method, MethodFile
from trainers.needs import Needs
from trainers.snapshot import take_snapshot

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    policy: str = "two"
    copies: int = 1
    frames: int = 3
    fps: int = 8
    size: int = 32
    seconds: float = 0.5
    front_end: str = "avid-linear129"
    batch: int = 4


POLICIES = {
    "two": lambda c, rate: TwoViews("mild"),
    "snippets": lambda c, rate: Snippets(3, rate // 4),
    "shifted": lambda c, rate: ShiftedSound(),
    "whole": lambda c, rate: RandomView(whole_sound=True),
    "avid": lambda c, rate: AvidView(rate // 2),
    "one": lambda c, rate: RandomView(),
}


@pytest.fixture(autouse=True)
def _method(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> MethodFile:
        clips = lambda c, rate: POLICIES[c.policy](c, rate)  # noqa: E731
        return MethodFile(Config, {"paper": Config(), "tiny": Config()}, lambda *a: None, clips=clips)

    monkeypatch.setitem(methods.METHODS, "probe", Method(load, "", "", views=2))
    monkeypatch.setitem(methods.METHODS, "labelled", Method(load, "", "", labels=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = [Tiny(3.0 - 0.25 * i, key=f"{i}.mp4", label=None if i == 5 else "abc"[i % 3]) for i in range(6)]
    made.append(Tiny(2.0, key="6.mp4", sound=0.25, label="a"))
    path = tmp_path_factory.mktemp("feed") / "tiny.zarr"
    return avstore.open(make_store(path, made, default_spec(sample_rate=24000)))


def config(*sets: str, name: str = "probe") -> RunConfig:
    return resolve(name, sets=["in_process=true", "statistics_clips=8", "steps=4", "precision=fp32", *sets])


def batches(store: Store, c: RunConfig, start: int = 0) -> Iterator[Any]:
    snapshot = take_snapshot(store, c)
    feed = Feed(store, snapshot, c, DEVICE, Plan(len(snapshot.numbers), c), start)
    try:
        yield from (f.batch for f in feed)
    finally:
        feed.close()


def clips(store: Store, c: RunConfig) -> dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]]:
    """(epoch, row, draw) -> what that clip became."""
    return {
        (b.epoch, int(r), int(d)): (b.video[i].clone(), b.audio[i].clone())
        for b in batches(store, c)
        for i, (r, d) in enumerate(zip(b.row, b.draw, strict=True))
    }


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def test_shapes_strides_and_order_of_views(store: Store) -> None:
    first = next(batches(store, config("copies=2", "policy=snippets")))
    assert first.views == 6 and first.video.shape == (4, 6, 3, 3, 32, 32) and first.audio.shape[:3] == (4, 6, 1)
    assert first.sound_share.shape == (4, 6) and first.has_sound.shape == (4,)
    flat = first.video.flatten(0, 1)
    assert flat.data_ptr() == first.video.data_ptr() and flat.is_contiguous(memory_format=torch.channels_last_3d)
    assert first.audio.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    plain = config("copies=2", "policy=snippets", "crop_area=1,1", "flip=0", "brightness=0", "contrast=0",
                   "saturation=0", "hue=0", "sound_gain=0")  # fmt: skip
    b = next(batches(store, plain))  # nothing drawn but windows and where in the picture: copies hear alike
    assert torch.equal(b.audio[:, 0], b.audio[:, 1]) and torch.equal(b.audio[:, 2], b.audio[:, 3])
    assert not torch.equal(b.audio[:, 1], b.audio[:, 2])


def test_each_view_has_a_draw_of_its_own(store: Store) -> None:
    b = next(batches(store, config("copies=2", "sound_gain=0.5", "time_mask=0.5", "freq_mask=0.5")))
    for i in range(4):
        for j in range(i):
            assert not torch.equal(b.video[:, i], b.video[:, j]) and not torch.equal(b.audio[:, i], b.audio[:, j])


@pytest.mark.parametrize("extra", [(), ("gray=0.5", "blur=0.5", "cutout=8", "time_mask=0.3", "freq_mask=0.3")])
def test_clips_are_a_function_of_what_names_them(store: Store, extra: tuple[str, ...]) -> None:
    one = clips(store, config("copies=2", "draws=2", "batch=7", "steps=2", *extra))
    other = clips(store, config("copies=2", "draws=2", "batch=2", "steps=7", *extra))
    assert len(one) == 14 and same(one, other)
    again = clips(store, config("copies=2", "draws=2", "batch=7", "steps=2", "seed=1", *extra))
    assert one.keys() == again.keys() and not same(one, again)


def test_going_on_in_the_middle(store: Store) -> None:
    c = config("copies=2", "time_mask=0.2")
    whole, rest = list(batches(store, c)), list(batches(store, c, start=2))
    assert len(whole) == 4 and len(rest) == 2
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio) and torch.equal(a.row, b.row)


def test_one_view_is_what_it_always_was(store: Store) -> None:
    """Masks change what they mask and nothing else: numbers of earlier augmentations keep their places."""
    plain = clips(store, config("policy=whole", "batch=7", "steps=1"))
    masked = clips(store, config("policy=whole", "batch=7", "steps=1", "time_mask=0.3"))
    for k, (video, audio) in plain.items():
        assert torch.equal(video, masked[k][0])
        kept = masked[k][1] != 0
        assert torch.equal(audio[kept], masked[k][1][kept]) and bool(kept.any())
    assert not same(plain, masked)


def test_what_the_sound_shares(store: Store) -> None:
    """Video 6 sounds for a quarter of a second of two; a window of 0.5 s from its start is half padding."""
    for b in batches(store, config("policy=whole", "batch=7", "steps=1")):
        by_row = dict(zip(b.row.tolist(), b.sound_share.tolist(), strict=True))
        assert by_row[6] == pytest.approx(0.5) and by_row[0] == 1 and b.sound_share.dtype == torch.float32


def test_labels_are_places_in_the_sorted_names(store: Store) -> None:
    c = config("policy=whole", "batch=7", "steps=1", name="labelled")
    snapshot = take_snapshot(store, c)
    assert snapshot.labels == ("a", "b", "c")
    for b in batches(store, c):
        assert dict(zip(b.row.tolist(), b.labels.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: -1, 6: 0}


def test_what_a_store_makes_of_views_labels_and_whole_sounds(store: Store, tmp_path: Path) -> None:
    _, notes = fit.fit(config("seconds=1.5"), store)
    short = [n for n in notes if "too short for the 2 windows" in n]
    # mild: a window of 1.5 s and another 0.75 s later need 2.25 s: 3.0, 2.75, 2.5, 2.25 have them, 2.0, 1.75 and the
    # quarter of a second do not
    assert short == ["approximate: 3 of 7 videos are too short for the 2 windows asked: they move closer together"]
    _, notes = fit.fit(config("policy=whole", "seconds=2.6"), store)
    assert "approximate: the sound of 2 of 7 videos is longer than 2.6 s and cut" in notes
    _, notes = fit.fit(config("policy=whole", name="labelled"), store)
    assert "approximate: 1 of 7 videos have no label and teach nothing" in notes
    spec = default_spec(sample_rate=24000)
    alone = avstore.open(make_store(tmp_path / "one.zarr", [Tiny(1.0, key="a.mp4", label="a")], spec))
    with pytest.raises(ConflictError, match="1 class"):
        fit.fit(config("policy=whole", "size=32", name="labelled"), alone)


@pytest.mark.parametrize("policy", ["avid", "one", "two", "snippets", "whole"])
def test_clips_longer_than_their_video_are_told_and_counted(store: Store, policy: str) -> None:
    """Rules 4 and 13: 20 frames at 8 a second want 2.4 s of the seven videos (3.0 ... 1.75, and 2.0 of which a quarter
    sounds), and 2.1 s of sound; the last frame looks at what is there 2.375 s after the first."""
    c = config(f"policy={policy}", "frames=20", "seconds=2.1", "batch=7", "steps=1")
    notes = [n for n in fit.fit(c, store)[1] if n.startswith("approximate: of 7")]
    looped, sound = "the pictures of 4 are shorter than 20 frames and loop", ""
    if policy != "whole":
        sound = ", the sound of 3 is shorter than 2.1 s and ends in zeros"
    assert notes == [f"approximate: of 7 videos {looped}{sound}"]
    feed = Feed(store, take_snapshot(store, c), c, DEVICE, Plan(7, c))
    try:
        fed = next(feed)
    finally:
        feed.close()
    assert (fed.looped, fed.padded) == (pytest.approx(4 / 7), pytest.approx(3 / 7 if sound else 0))
    enough = config(f"policy={policy}", "frames=3", "seconds=0.25")
    assert not [n for n in fit.fit(enough, store)[1] if n.startswith("approximate: of 7")]


def test_needs_come_from_the_configuration_s_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config("copies=3")
    assert fit.needs_of(c).copies == 3 and fit.views_of(c) == 6

    @dataclass(frozen=True)
    class Deaf(Config):
        def needs(self) -> Needs:
            return Needs(4, 8, 32, 0.0, None, sound=False)

    assert not fit.needs_of(dataclasses.replace(c, method=Deaf())).sound
