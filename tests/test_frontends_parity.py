"""Every front-end against librosa, and against DALI's operators where DALI is installed (its CPU build will do).

The signal is at the recipe's own rate, so that resampling (tested elsewhere) plays no part. Compared are logarithms of
power well above rounding: power below 1e-9 of the clip's loudest bin is float32's noise in all three.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from avstore.frontends import FRONT_ENDS, FrontEnd, spectrogram

# raw rows are the waveform (tests/test_frontends.py): nobody else has an opinion on them
SPECTRAL = [name for name, recipe in FRONT_ENDS.items() if recipe.scale != "raw"]
DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def signal(recipe: FrontEnd, seconds: float = 2.0) -> np.ndarray:
    """float32 (samples,): a chirp, noise that swells, a silence and a click."""
    rate = recipe.sample_rate
    n = int(seconds * rate)
    t = np.arange(n) / rate
    rng = np.random.default_rng(0)
    x = 0.3 * np.sin(2 * np.pi * (200 * t + 0.2 * rate / seconds * t**2 / 2))
    x += 0.05 * rng.standard_normal(n) * (1.1 + np.sin(2 * np.pi * t))
    x[n // 2 : n // 2 + n // 20] = 0
    x[n // 2 + n // 40] = 0.9
    return x.astype(np.float32)


def window(recipe: FrontEnd) -> np.ndarray:
    n = recipe.window_length
    return np.ones(n) if recipe.window == "boxcar" else 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def between_bins(recipe: FrontEnd) -> np.ndarray:
    """(bins, bins of the FFT): python_speech_features' triangles between whole bins, which nobody else here has."""
    top = 2595 * np.log10(1 + recipe.fmax / 700)
    hz = 700 * (10 ** (np.linspace(0, top, recipe.bins + 2) / 2595) - 1)
    edges = np.floor((recipe.n_fft + 1) * hz / recipe.sample_rate)
    k = np.arange(recipe.n_fft // 2 + 1)
    return np.stack([np.interp(k, edges[m : m + 3], [0.0, 1.0, 0.0]) for m in range(recipe.bins)])


def finished(power: np.ndarray, recipe: FrontEnd, filters: Any) -> np.ndarray:
    """(bins of the FFT, rows) power -> (rows, bins) in the recipe's logarithm, without eps' neighbourhood."""
    if recipe.scale == "linear":
        if recipe.average > 1:
            rest = power[1:].reshape(-1, recipe.average, power.shape[1]).mean(1)
            power = np.concatenate([power[:1], rest])
    else:
        power = filters(power)
    value = np.log(power.T + recipe.eps)
    if recipe.log == "db":
        value *= 10 / np.log(10)
        assert recipe.clip_floor_db is not None
        value = np.maximum(value, value.max() - recipe.clip_floor_db)
    return value


def compare(ours: np.ndarray, theirs: np.ndarray, recipe: FrontEnd, least_rows: int) -> None:
    rows = min(len(ours), len(theirs))
    assert rows >= least_rows and ours.shape[1] == theirs.shape[1] == recipe.bins
    unit = 10 / np.log(10) if recipe.log == "db" else 1.0
    loud = theirs[:rows] > max(theirs.max() - unit * np.log(1e9), unit * np.log(recipe.eps * 10))
    assert loud.mean() > 0.5
    off = np.abs(ours[:rows] - theirs[:rows])[loud] / unit
    assert off.max() < 0.02 and np.median(off) < 1e-4, (off.max(), np.median(off))


@pytest.mark.parametrize("name", SPECTRAL)
def test_against_librosa(name: str) -> None:
    librosa = pytest.importorskip("librosa")
    recipe = FRONT_ENDS[name]
    x = signal(recipe)
    ours = spectrogram(x, name, recipe.sample_rate).numpy()
    y = x.astype(np.float64)
    shape = window(recipe)
    if recipe.pad == "none":  # librosa centres a short window in its frame; here the frame begins with it
        y = np.concatenate([y, np.zeros(recipe.n_fft)])  # first the zeros after the end, then the pre-emphasis
    if recipe.preemphasis:
        y = np.concatenate([y[:1], y[1:] - recipe.preemphasis * y[:-1]])
    if recipe.pad == "none":
        shape = np.pad(shape, (0, recipe.n_fft - len(shape)))
    spectrum = librosa.stft(
        y, n_fft=recipe.n_fft, hop_length=recipe.hop, win_length=len(shape), window=shape,
        center=recipe.pad != "none", pad_mode=recipe.pad if recipe.pad != "none" else "constant",
    )  # fmt: skip

    def filters(power: np.ndarray) -> np.ndarray:
        if recipe.mel_norm == "bins":
            return between_bins(recipe) @ power
        if recipe.scale == "mel":
            bank = librosa.filters.mel(
                sr=recipe.sample_rate, n_fft=recipe.n_fft, n_mels=recipe.bins, fmin=recipe.fmin, fmax=recipe.fmax,
                htk=recipe.mel == "htk", norm="slaney" if recipe.mel_norm == "slaney" else None, dtype=np.float64,
            )  # fmt: skip
            return bank @ power
        bands = librosa.fft_frequencies(sr=recipe.sample_rate, n_fft=recipe.n_fft)
        points = librosa.mel_frequencies(
            n_mels=recipe.bins, fmin=recipe.fmin, fmax=recipe.fmax, htk=recipe.mel == "htk"
        )
        return np.stack([np.interp(points, bands, column) for column in power.T], axis=1)

    compare(ours, finished(np.abs(spectrum) ** 2, recipe, filters), recipe, len(ours))


@pytest.mark.skipif(not DALI, reason="DALI is not installed (pip install 'avstore[gpu]'); its CPU build is enough")
@pytest.mark.parametrize("name", SPECTRAL)
def test_against_dali(name: str) -> None:
    import nvidia.dali.fn as fn
    from nvidia.dali.pipeline import Pipeline

    recipe = FRONT_ENDS[name]
    x = signal(recipe)
    ours = spectrogram(x, name, recipe.sample_rate).numpy()
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        wave = fn.external_source(name="wave", device="cpu")
        if recipe.preemphasis:
            wave = fn.preemphasis_filter(wave, preemph_coeff=recipe.preemphasis, border="zero")
        power = fn.spectrogram(
            wave, nfft=recipe.n_fft, window_length=recipe.window_length, window_step=recipe.hop, power=2,
            window_fn=window(recipe).astype(np.float32).tolist(), center_windows=recipe.pad != "none",
            reflect_padding=recipe.pad == "reflect",
        )  # fmt: skip
        outputs = [power]
        if recipe.scale == "mel":
            outputs.append(
                fn.mel_filter_bank(
                    power,
                    sample_rate=recipe.sample_rate,
                    nfilter=recipe.bins,
                    freq_low=recipe.fmin,
                    freq_high=recipe.fmax,
                    mel_formula=recipe.mel,
                    normalize=recipe.mel_norm == "slaney",
                )
            )
        pipe.set_outputs(*outputs)
    pipe.build()
    pipe.feed_input("wave", [x])
    got = [np.array(o[0]).astype(np.float64) for o in pipe.run()]

    def filters(power: np.ndarray) -> np.ndarray:
        if recipe.mel_norm == "bins":
            return between_bins(recipe) @ power
        if recipe.scale == "mel":
            return got[1]
        bands = np.arange(recipe.n_fft // 2 + 1) * (recipe.sample_rate / recipe.n_fft)  # DALI has no such operator
        mel = np.linspace(0, 2595 * np.log10(1 + recipe.fmax / 700), recipe.bins)
        points = np.minimum(700 * (10 ** (mel / 2595) - 1), bands[-1])
        return np.stack([np.interp(points, bands, column) for column in power.T], axis=1)

    # without centring, DALI makes no row that would end beyond the signal
    compare(ours, finished(got[0], recipe, filters), recipe, len(ours) - (3 if recipe.pad == "none" else 0))
