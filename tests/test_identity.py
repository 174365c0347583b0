"""Which media a store holds: equal for a copy and for a store that grew, another for other media under equal names."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_store
from tiny_run import config, store_in
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.identity import identity
from benchmarks import blocks, finetune
from benchmarks.recipe import make_recipe
from benchmarks.vectors import Networks
from trainers.loop import train


def other_media(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """From here on tiny stores hold other sound, or other pictures, of the same lengths."""
    plain = getattr(tiny_store, what)
    monkeypatch.setattr(tiny_store, what, lambda number, *more: plain(number + 1, *more))


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
@pytest.mark.parametrize("what", ["tone", "picture"])
def test_other_media_of_equal_names_and_lengths_are_others(tmp_path, monkeypatch, codec, what):
    videos = [Tiny(2.0, key=f"{i}.mp4", sound=None if i == 3 else -1.0, picture=i != 4) for i in range(9)]
    spec = default_spec(codec=codec)
    store = avstore.open(make_store(tmp_path / "a.zarr", videos[:8], spec))
    found = identity(store, store.numbers)
    shutil.copytree(store.path, tmp_path / "moved.zarr")
    assert identity(avstore.open(tmp_path / "moved.zarr"), store.numbers) == found
    assert identity(avstore.open(make_store(tmp_path / "grown.zarr", videos, spec)), store.numbers) == found
    assert len({found, identity(store, store.numbers[1:]), identity(store, store.numbers[::-1])}) == 3
    assert identity(store, np.zeros(0, np.int64)) != found
    other_media(monkeypatch, what)
    other = avstore.open(make_store(tmp_path / "b.zarr", videos[:8], spec))
    assert other.fingerprint == store.fingerprint and other.keys == store.keys
    assert identity(other, store.numbers) != found


def test_what_is_kept_of_one_store_does_not_serve_another(tmp_path, monkeypatch):
    """A run fits both stores; features, vectors and fine-tunings in one work folder are each store's own."""
    a = store_in(tmp_path / "a", codec="jpeg")
    run = train("avid", a, config("steps=1"), tmp_path / "run").run
    other_media(monkeypatch, "tone")
    other_media(monkeypatch, "picture")
    b = store_in(tmp_path / "b", codec="jpeg")
    run.snapshot.require_fits(b)
    method = blocks.with_weights(run)
    assert blocks.key_of(method, run, a, a.numbers) != blocks.key_of(method, run, b, b.numbers)
    keys = [Networks(run, s, s.numbers)._key("x", m) for s in (a, b) for m in ("va", "v", "a")]
    assert len({str(k) for k in keys}) == 6
    recipe = make_recipe("ucf", "a", epochs=1, warm_up=0, batch=8, draws=1, clips=1)
    made: list[Any] = []
    real = finetune.tune
    monkeypatch.setattr(finetune, "tune", lambda *x, **more: made.append(x[2]) or real(*x, **more))
    for store, count in ((a, 1), (a, 1), (b, 2), (b, 2), (a, 2)):
        finetune.bench(store, [run], recipe=recipe, scratch=False, work=tmp_path / "work")
        assert len(made) == count
    assert made == [a, b]


def run_of(name: str, *sets: str) -> Any:
    from trainers.config import resolve

    return SimpleNamespace(config=resolve(name, preset="tiny", sets=list(sets)), snapshot=None, path=name)


def test_networks_that_hear_other_sound_have_controls_of_their_own(tmp_path):
    """AVCL whole, 1.2s and raw: equal weights at random, three inputs of sound, one of pictures."""
    runs = [run_of("avcl", f"audio={x}") for x in ("whole", "1.2s", "raw")]
    whole = finetune.weights_digest(blocks.with_weights(runs[0], "random"))
    assert all(finetune.weights_digest(blocks.with_weights(r, "random")) == whole for r in runs)
    assert len({blocks.same_networks(r, "a") for r in runs}) == len({blocks.same_networks(r, "av") for r in runs}) == 3
    assert len({blocks.same_networks(r, "v") for r in runs}) == 1
    assert blocks.same_networks(run_of("avcl", "learning_rate=0.1"), "av") == blocks.same_networks(runs[0], "av")
    store = store_in(tmp_path, codec="jpeg")
    names = ["whole", "short", "raw"]
    for modality, rows in (("a", 3), ("av", 3), ("v", 1)):
        frames = {} if modality == "a" else {"frames": 4, "fps": 8}
        found = finetune.from_scratch(store, runs, names, make_recipe("ucf", modality, **frames))
        asked = ["from scratch", "from scratch, networks of short", "from scratch, networks of raw"][:rows]
        assert list(found.items()) == list(zip(asked, runs[:rows], strict=True))
