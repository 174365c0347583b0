"""Data on a device: pinned slots that are not used again too early, augmentation, spectrograms, search, mining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import store_in

from avstore import device_jpeg
from avstore.augment import VideoAugment
from avstore.frontends import FRONT_ENDS, SPREAD, spectrogram, spectrogram_rows
from avstore.loader import Loader
from avstore.sampler import Order
from avstore.views import AvidView
from benchmarks.gpu_search import bank_of
from trainers.positives import mine_positives
from trainers.search import faiss_flavour, nearest_rows


def test_pinned_slots_are_copied_before_they_are_used_again(tmp_path: Path, device: torch.device) -> None:
    store = store_in(tmp_path)
    order = Order(len(store.select()), 4, seed=0, batch_size=4)
    how = {"order": order, "frames": 4, "fps": 8, "samples": 12000, "slots": 2, "hold": 1}
    with Loader(store, None, AvidView(0), **how) as plain:
        expected = [(b.frames.copy(), b.waveform.copy()) for b in plain.steps(0, 12)]  # type: ignore[union-attr]
    with Loader(store, None, AvidView(0), device=device, **how) as loader:
        assert loader._live is not None and loader._live.pinned
        # the device is kept busy, so that a copy starts long after it was asked for
        a = torch.randn(4096, 4096, device=device)
        got = []
        for batch in loader.steps(0, 12):
            for _ in range(20):
                a = torch.nn.functional.normalize(a @ a)
            on = batch.tensors(device)
            got.append((on["frames"], on["waveform"]))
    for (frames, sound), (f, s) in zip(expected, got, strict=True):
        assert np.array_equal(frames, f.cpu().numpy()) and np.array_equal(sound, s.cpu().numpy())


@pytest.mark.parametrize("name", list(device_jpeg.PACKAGES))
def test_pictures_decoded_on_the_device_are_the_cpus(name: str, tmp_path: Path, device: torch.device) -> None:
    """Whole batches, from slots that carry JPEGs and are used again at once: within two levels on average (another
    inverse transform), and as often right as they are decoded."""
    missing = device_jpeg.why_not(name, device)
    if missing:
        pytest.skip(missing)
    decode = device_jpeg.make(name, device)
    store = store_in(tmp_path, codec="jpeg")
    order = Order(len(store.select()), 8, seed=0, batch_size=4)
    how = {"order": order, "frames": 4, "fps": 8, "slots": 2, "hold": 1}
    with Loader(store, None, AvidView(0), **how) as plain, Loader(
        store, None, AvidView(0), device=device, decode=decode, **how
    ) as coded:
        got = []
        for a, b in zip(plain.steps(0, 20), coded.steps(0, 20), strict=True):
            got.append((torch.from_numpy(a.frames.copy()), b.tensors(device)["frames"]))  # type: ignore[union-attr]
    for wanted, pictures in got:
        off = (pictures.cpu().float() - wanted.float()).abs()
        assert pictures.is_cuda and float(off.mean()) < 2 and float((off > 24).float().mean()) < 0.01


def test_stored_spectrograms_from_the_device_are_the_cpus(device: torch.device) -> None:
    sound = np.random.default_rng(0).integers(-9000, 9000, 70 * 24000).astype(np.int16)  # more than a block of 60 s
    sound[24000:48000] = 0
    for name in ("crisscross-mel80", "avid-linear257"):
        a, b = (spectrogram_rows(sound, name, 24000, where) for where in ("cpu", str(device)))
        step = np.spacing(np.abs(a)).astype(np.float32)  # float16's
        assert np.all(np.abs(a.astype(np.float32) - b.astype(np.float32)) <= SPREAD + step)


def test_augmentation_on_the_device_is_the_cpus(device: torch.device) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 48, 64, 3), np.uint8))
    boxes = np.array([[0, 0, 48, 64]] * 4)
    augment = VideoAugment(size=32)
    u = augment.draw(0, 0, np.arange(4), np.zeros(4, np.int64))
    a, b = augment(frames, boxes, u), augment(frames.to(device), boxes, u)
    assert torch.allclose(a, b.cpu(), atol=2e-3)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_spectrograms_on_the_device_are_the_cpus(name: str, device: torch.device) -> None:
    rate = max(24000, FRONT_ENDS[name].sample_rate)
    sound = torch.from_numpy(np.random.default_rng(0).integers(-9000, 9000, (3, rate), np.int16))
    a, b = spectrogram(sound, name, rate), spectrogram(sound.to(device), name, rate)
    assert b.is_cuda and torch.allclose(a, b.cpu(), atol=2e-3)


def test_search_on_the_device_is_the_cpus(device: torch.device) -> None:
    keys = bank_of(20000, "cpu")[:, 0].contiguous()
    expected = nearest_rows(keys[:200], keys, 32, "torch")
    for engine in ("torch", *(("faiss",) if faiss_flavour() == "gpu" else ())):
        got = nearest_rows(keys[:200].to(device), keys.to(device), 32, engine)
        decided = expected.slack > 1e-9
        assert torch.equal(got.rows.cpu()[decided], expected.rows[decided]), engine


def test_mining_on_the_device_is_certified_and_the_cpus(device: torch.device) -> None:
    memory = bank_of(5000, "cpu")
    a, b = mine_positives(memory, 16), mine_positives(memory.to(device), 16)
    assert b.certified > 0.99 and a.certified > 0.99
    assert float((a.rows == b.rows.cpu()).all(1).double().mean()) > 0.99
