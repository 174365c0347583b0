"""avstore.frontends and avstore.resample: against librosa, SciPy and hand-worked numbers; stored rows against clips."""

import dataclasses
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import signal

from avstore import frontends, resample
from avstore.errors import UsageError
from avstore.frontends import FRONT_ENDS, BinStatistics, apply_clip_floor, gain_rows, spectrogram, spectrogram_rows

SR = 24000
STORABLE = [name for name, recipe in FRONT_ENDS.items() if recipe.storable]


def noise(seconds, rate=SR, seed=0, level=3000):
    """Noise whose loudness rises and falls, so that rows differ."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rate)
    swell = 0.05 + np.abs(np.sin(np.arange(n) * (2 * np.pi / rate)))
    return (rng.standard_normal(n) * level * swell).clip(-32768, 32767).astype(np.int16)


def tone(hz, seconds, rate=SR):
    return torch.from_numpy(0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).float()


def test_recipes_need_no_torch():
    code = "import sys, avstore.frontends as f; f.FRONT_ENDS['avid-linear257'].hash; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "rows", "bins", "seconds"),
    [
        ("avid-linear257", 200, 257, 2),  # the 201st frame dropped
        ("avid-linear129", 100, 129, 2),
        ("crisscross-mel80", 200, 80, 2),  # likewise
        ("gdt-fbank40", 100, 40, 1),
        ("avcl-mel256", 1000, 256, 10),
        ("avcl-mel256-5ms", 256, 256, 1.28),
        ("avcl-raw", 128, 240, 1.28),
        ("l2l-mel40", 100, 40, 1),
        ("l3-linear257", 199, 257, 1),
    ],
)
def test_shapes_of_the_papers(name, rows, bins, seconds):
    rate = max(SR, FRONT_ENDS[name].sample_rate)
    out = spectrogram(torch.from_numpy(np.stack([noise(seconds, rate)] * 2)), name, rate)
    assert out.shape == (2, rows, bins) and out.dtype == torch.float32
    assert FRONT_ENDS[name].rows(int(seconds * rate), rate) == rows
    assert torch.isfinite(out).all() and out.std() > (0.05 if name == "avcl-raw" else 0.1)


def test_edge_rows_and_rates_by_hand():
    edges = {"avid-linear257": 3, "crisscross-mel80": 4, "l3-linear257": 2}
    assert {name: FRONT_ENDS[name].edge_rows for name in edges} == edges
    assert FRONT_ENDS["l3-linear257"].rate == Fraction(48000, 242)
    with pytest.raises(UsageError, match="cannot be stored"):
        _ = FRONT_ENDS["l3-linear257"].rows_per_second
    assert FRONT_ENDS["avid-linear129"].rows_per_second == 50


def test_a_tone_lands_where_the_formula_says():
    recipe = FRONT_ENDS["avid-linear257"]
    fft_bin = round(1000 / (recipe.sample_rate / recipe.n_fft))
    assert (fft_bin, math.ceil(fft_bin / 2)) == (43, 22)
    out = spectrogram(tone(1000, 2), recipe, SR)
    assert (out[5:-5].argmax(-1) == math.ceil(fft_bin / 2)).all()
    # amplitude 1/2, periodic Hann of sum n / 2: the line's power is at most (n / 8)^2, in a mean of two bins
    assert 10 * math.log10((1024 / 8) ** 2 / 2) - 3 < out.max() < 10 * math.log10((1024 / 8) ** 2)


def test_avid_against_librosa():
    import librosa

    wave = noise(2) / np.float32(32768)
    power = np.abs(librosa.stft(wave, n_fft=1024, hop_length=240, window="hann", center=True, pad_mode="reflect")) ** 2
    assert power.shape == (513, 201)
    pairs = np.concatenate([power[:1], power[1:].reshape(256, 2, -1).mean(1)])
    expected = librosa.power_to_db(pairs, ref=1.0, amin=1e-10, top_db=100.0).T[:200]
    got = spectrogram(torch.from_numpy(wave), "avid-linear257", SR).numpy()
    assert np.abs(got - expected).max() < 0.01


def test_crisscross_against_librosa():
    import librosa

    wave = noise(2, 16000) / np.float32(32768)
    mel = librosa.feature.melspectrogram(
        y=wave, sr=16000, n_fft=1024, hop_length=160, n_mels=80, fmin=0, fmax=8000, pad_mode="reflect"
    )
    assert mel.shape == (80, 201)  # as its code has it; a clip takes rate * duration rows, whoever reads it
    got = spectrogram(torch.from_numpy(wave), "crisscross-mel80", 16000).numpy()
    assert np.abs(got - np.log(mel + np.finfo(np.float32).eps).T[:200]).max() < 1e-3


@pytest.mark.parametrize("name", ["l2l-mel40", "crisscross-mel80"])
def test_filter_banks_against_librosa(name):
    import librosa

    recipe = FRONT_ENDS[name]
    expected = librosa.filters.mel(
        sr=recipe.sample_rate, n_fft=recipe.n_fft, n_mels=recipe.bins, fmin=recipe.fmin, fmax=recipe.fmax,
        htk=recipe.mel == "htk", norm=None if recipe.mel_norm == "none" else "slaney",
    )  # fmt: skip
    assert np.abs(frontends._filters(recipe).T - expected).max() < 1e-6


def test_gdt_filters_lie_between_whole_bins():
    """python_speech_features: HTK mels, edges at floor((n_fft + 1) f / rate); each filter rises from 0 to 1 and falls
    to 0 again, bin by bin."""
    top = 2595 * math.log10(1 + 12000 / 700)
    edge = [math.floor(1025 * 700 * (10 ** (top * k / 41 / 2595) - 1) / 24000) for k in range(42)]
    assert edge[:6] == [0, 2, 4, 7, 9, 12] and edge[-1] == 512
    expected = np.zeros((513, 40))
    for m, (left, centre, right) in enumerate(zip(edge, edge[1:], edge[2:], strict=False)):
        for k in range(left, right + 1):
            expected[k, m] = (k - left) / (centre - left) if k <= centre else (right - k) / (right - centre)
    found = frontends._filters(FRONT_ENDS["gdt-fbank40"])
    assert np.abs(found - expected).max() < 1e-12
    assert found[:, 0].nonzero()[0].tolist() == [1, 2, 3] and found[[1, 2, 3], 0].tolist() == [0.5, 1, 0.5]
    unrounded = frontends._filters(dataclasses.replace(FRONT_ENDS["gdt-fbank40"], mel_norm="none"))
    assert 0.2 < np.abs(found - unrounded).max() < 0.5, "another bank, and so another recipe"
    assert FRONT_ENDS["gdt-fbank40"].hash != dataclasses.replace(FRONT_ENDS["gdt-fbank40"], mel_norm="none").hash


def test_gdt_row_by_hand():
    wave = noise(1) / np.float32(32768)
    emphasised = np.append(wave[0], wave[1:] - 0.97 * wave[:-1])
    row = np.abs(np.fft.rfft(emphasised[240 * 7 : 240 * 7 + 480], 1024)) ** 2
    expected = np.log(row @ frontends._filters(FRONT_ENDS["gdt-fbank40"]) + 1e-10)
    assert np.abs(spectrogram(torch.from_numpy(wave), "gdt-fbank40", SR)[7].numpy() - expected).max() < 1e-3


def test_half_the_hop_is_every_second_row():
    """avcl-mel256-5ms at its even rows is avcl-mel256: window, bins and logarithm are the same."""
    wave = noise(2)
    fine, coarse = spectrogram(wave, "avcl-mel256-5ms", SR), spectrogram(wave, "avcl-mel256", SR)
    assert fine.shape == (400, 256) and torch.allclose(fine[::2], coarse, atol=1e-5)


def test_raw_rows_are_the_waveform():
    wave = noise(1.003)
    rows = spectrogram(wave, "avcl-raw", SR)
    assert rows.shape == (100, 240) and torch.equal(rows.flatten(), torch.from_numpy(wave[:24000]) / 32768)
    twice = spectrogram(torch.from_numpy(np.stack([wave, wave])), "avcl-raw", SR)
    assert torch.equal(twice[1], rows)
    assert torch.equal(gain_rows(rows, 0.5, "avcl-raw"), rows / 2)
    recipe = FRONT_ENDS["avcl-raw"]
    assert not recipe.storable and recipe.floor == 0
    with pytest.raises(UsageError, match="waveform, which is stored"):
        spectrogram_rows(wave, "avcl-raw", SR)
    other = spectrogram(noise(1, 48000), "avcl-raw", 48000)  # by way of the resampler
    expected = resample.resample(torch.from_numpy(noise(1, 48000) / np.float32(32768))[None], 48000, SR)
    assert torch.allclose(other.flatten(), expected[0], atol=1e-6)


def test_warped_bins_interpolate():
    matrix = frontends._filters(FRONT_ENDS["avcl-mel256"])
    assert matrix.shape == (256, 256)
    assert np.allclose(matrix.sum(0), 1) and (matrix >= 0).all()  # no empty band, which is why there are no triangles
    centres = np.arange(256) @ matrix
    assert (np.diff(centres) > 0).all() and centres[0] == 0


@pytest.mark.parametrize("name", STORABLE)
def test_stored_rows_equal_the_clips(name):
    recipe, wave = FRONT_ENDS[name], noise(130)  # longer than two blocks
    stored = spectrogram_rows(wave, name, SR)
    rate = recipe.rows_per_second
    assert stored.shape == (130 * rate, recipe.bins) and stored.dtype == np.float16 and np.isfinite(stored).all()
    edge = recipe.edge_rows
    for second in (0, 59, 119, 128):  # the start, across both blocks' ends, the end
        clip = spectrogram(wave[second * SR : (second + 2) * SR], name, SR).numpy()
        part = apply_clip_floor(torch.from_numpy(stored[second * rate : (second + 2) * rate]), name).numpy()
        error = np.abs(part - clip).max(1)
        tolerance = 2 * np.abs(part).max() * 2**-11 + 2e-3  # float16's rounding
        assert error[edge:-edge].max() < tolerance
        # where the clip ends with the video, its edge is the video's
        assert error[:edge].max() < tolerance or second != 0
        if recipe.pad != "none":
            assert error[:edge].max() > tolerance or second == 0  # so there is an edge, and the test can see it
        assert error[-edge:].max() < tolerance or second != 128


def test_stored_rows_hold_no_clip_floor():
    wave = np.concatenate([noise(1, level=9000), np.zeros(SR, np.int16)])
    stored = spectrogram_rows(wave, "avid-linear257", SR)
    recipe = FRONT_ENDS["avid-linear257"]
    assert stored[150:].min() == np.float16(recipe.floor) == -100
    floored = apply_clip_floor(torch.from_numpy(stored), recipe)
    assert floored.min() == pytest.approx(float(stored.max()) - 100) and floored.min() > -95


def test_stored_bytes_do_not_depend_on_threads_or_on_what_follows():
    wave = noise(61)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = spectrogram_rows(wave, "crisscross-mel80", SR)
        torch.set_num_threads(2)
        two = spectrogram_rows(wave.copy(), "crisscross-mel80", SR)
    finally:
        torch.set_num_threads(before)
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("samples", [0, 1, 100, 239, 240, 511, 512, 513, 1025])
def test_tiny_waveforms(samples):
    for name, recipe in FRONT_ENDS.items():
        out = spectrogram(torch.from_numpy(noise(1, 48000)[:samples]), name, 48000)
        assert out.shape == (recipe.rows(samples, 48000), recipe.bins) and torch.isfinite(out).all()
        if recipe.storable:
            rows = spectrogram_rows(noise(1)[:samples], name, SR)
            assert rows.shape == (recipe.rows(samples, SR), recipe.bins) and np.isfinite(rows).all()
    assert spectrogram(torch.zeros((0, SR)), "avid-linear257", SR).shape == (0, 100, 257)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_silence_and_full_scale_are_finite(name):
    rate = max(SR, FRONT_ENDS[name].sample_rate)
    silent = spectrogram(torch.zeros(1, rate, dtype=torch.int16), name, rate)
    assert torch.allclose(silent, torch.tensor(FRONT_ENDS[name].floor), atol=1e-4)
    loud = torch.tensor([-32768, 32767], dtype=torch.int16).repeat(rate // 2)
    assert spectrogram(loud, name, rate).half().isfinite().all()


def test_int16_and_float_agree():
    wave = noise(1)
    for name in STORABLE:
        a = spectrogram(torch.from_numpy(wave), name, SR)
        assert torch.allclose(a, spectrogram(torch.from_numpy(wave / np.float64(32768)), name, SR), atol=1e-4)


def test_a_clip_does_not_depend_on_its_batch():
    batch = torch.from_numpy(np.stack([noise(2, seed=s) for s in range(4)]))
    for name in ("avid-linear257", "crisscross-mel80"):
        together = spectrogram(batch, name, SR)
        for i in range(4):
            assert torch.allclose(together[i], spectrogram(batch[i], name, SR), atol=1e-4)


@pytest.mark.parametrize("name", ["avid-linear257", "crisscross-mel80"])
def test_gain_is_that_of_the_waveform(name):
    wave = torch.from_numpy(np.stack([noise(2), noise(2, seed=1, level=2)])) / 32768
    recipe = dataclasses.replace(FRONT_ENDS[name], clip_floor_db=None)
    gains = torch.tensor([1.1, 0.5])
    expected = spectrogram(wave * gains[:, None], recipe, SR)
    got = gain_rows(spectrogram(wave, recipe, SR), gains, recipe)
    assert (got - expected).abs().max() < 5e-3
    unit = 10 / math.log(10) if recipe.log == "db" else 1
    added = spectrogram(wave, recipe, SR) + 2 * unit * torch.log(gains)[:, None, None]
    assert (added - expected).abs().max() > 0.1  # why it is no addition
    assert torch.isfinite(gain_rows(spectrogram(wave, recipe, SR), 0.0, recipe)).all()
    with pytest.raises(UsageError):
        gain_rows(got, -1.0, recipe)


def test_clip_floor_is_each_clips_own_and_keeps_holes():
    rows = torch.tensor([[[0.0, -150.0]], [[-60.0, -150.0]]])
    assert apply_clip_floor(rows, "avid-linear257").tolist() == [[[0, -100]], [[-60, -150]]]
    holed = torch.tensor([[0.0, -150.0], [math.nan, math.nan]])
    out = apply_clip_floor(holed, "avid-linear257")
    assert out[0].tolist() == [0, -100] and out[1].isnan().all()
    assert apply_clip_floor(holed.half(), "crisscross-mel80").dtype == torch.float32


def test_the_hash_covers_every_parameter():
    recipe = FRONT_ENDS["avid-linear257"]
    hashes = {recipe.hash}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        other = value + "x" if isinstance(value, str) else 7.5 if value is None else value + 1
        hashes.add(dataclasses.replace(recipe, **{field.name: other}).hash)
    assert len(hashes) == 1 + len(dataclasses.fields(recipe))
    assert len({r.hash for r in FRONT_ENDS.values()}) == len(FRONT_ENDS)
    assert all(name == r.name and r.resample == resample.FILTER and len(r.hash) == 16 for name, r in FRONT_ENDS.items())


def test_misuse_is_refused():
    with pytest.raises(UsageError, match="did you mean avid-linear257"):
        spectrogram(torch.zeros(10), "avid-linear", SR)
    with pytest.raises(UsageError, match="--sample-rate 48000"):
        spectrogram(torch.zeros(10), "l3-linear257", SR)
    with pytest.raises(UsageError, match="int32"):
        spectrogram(torch.zeros(10, dtype=torch.int32), "avid-linear257", SR)
    with pytest.raises(UsageError, match="shape"):
        spectrogram(torch.zeros(1, 1, 10), "avid-linear257", SR)
    with pytest.raises(UsageError, match="int16"):
        spectrogram_rows(np.zeros(10, np.float32), "avid-linear257", SR)


def test_bin_statistics():
    rng = np.random.default_rng(0)
    rows = rng.normal(-50, 20, (6, 40, 5)) * np.array([1, 1, 1, 1, 0])
    mask = rng.random((6, 40)) < 0.7
    rows[0, 3, 2] = np.nan
    kept = rows[mask & ~np.isnan(rows).any(-1)]
    halves = [BinStatistics(5), BinStatistics(5)]
    for i in range(6):
        halves[i % 2].update(torch.from_numpy(rows[i]) if i < 3 else rows[i], mask[i])
    halves[0].merge(halves[1])
    assert halves[0].count == len(kept)
    assert np.allclose(halves[0].mean, kept.mean(0), rtol=1e-6)
    assert np.allclose(halves[0].std, kept.std(0) + 1e-5, rtol=1e-6) and halves[0].std[4] == np.float32(1e-5)
    assert halves[0].mean.dtype == halves[0].std.dtype == np.float32
    big = BinStatistics(1)  # a naive sum of squares would lose the deviation
    big.update(1e8 + np.array([[-1.0], [1.0]] * 500))
    assert big.std[0] == pytest.approx(1.00001)
    big.update(np.zeros((4, 1)), np.zeros(4, bool))
    assert big.count == 1000
    with pytest.raises(UsageError, match="no spectrogram row"):
        _ = BinStatistics(3).mean
    with pytest.raises(UsageError):
        big.update(np.zeros((4, 2)))
    with pytest.raises(UsageError, match="infinite"):
        big.update(np.full((1, 1), -np.inf))


# Resampling


@pytest.mark.parametrize(("source", "target"), [(24000, 16000), (48000, 24000), (16000, 24000), (44100, 16000)])
def test_resampling_against_scipy(source, target):
    rng = np.random.default_rng(0)
    n = source // 2
    spectrum = np.zeros(n // 2 + 1, complex)
    top = int(0.8 * min(source, target) / 2 * n / source)  # band-limited to 0.8 of the lower Nyquist frequency
    spectrum[1:top] = rng.standard_normal(top - 1) + 1j * rng.standard_normal(top - 1)
    wave = np.fft.irfft(spectrum, n)
    wave /= np.abs(wave).max()
    got = resample.resample(torch.from_numpy(wave), source, target).numpy()
    assert len(got) == math.ceil(n * target / source) == resample.resampled_length(n, source, target)
    up, down = (x // math.gcd(source, target) for x in (target, source))
    half = 128 * max(up, down)  # SciPy's default filter is too short to compare with: give it a longer one
    taps = signal.firwin(2 * half + 1, 0.95 / max(up, down), window=("kaiser", 10.0))
    expected = signal.resample_poly(wave, up, down, window=taps)
    inner = slice(len(got) // 8, -len(got) // 8)
    assert np.abs(got - expected)[inner].max() < 2e-4
    exact = np.fft.irfft(spectrum * np.exp(0j), n)  # a periodic band-limited signal has an exact answer
    times = np.arange(len(got)) * source / target
    at = times[inner][:50]
    k = np.arange(len(spectrum))
    value = (2 * (spectrum[None] * np.exp(2j * np.pi * k * at[:, None] / n)).real.sum(1)) / n
    assert np.abs(got[inner][:50] - value / np.abs(exact).max()).max() < 1e-4


def test_resampling_keeps_out_what_would_alias():
    high = tone(9000, 1)  # above 8 kHz, half of 16 kHz
    assert resample.resample(high, 24000, 16000)[500:-500].abs().max() < 1e-4
    low = resample.resample(tone(6000, 1), 24000, 16000)
    assert torch.allclose(low[500:-500], tone(6000, 1, 16000)[500:-500], atol=1e-4)


@pytest.mark.parametrize(("source", "target"), [(24000, 16000), (44100, 24000), (24000, 24000)])
def test_spans_equal_the_whole(source, target):
    wave = torch.from_numpy(noise(0.3, source))[None]
    whole = resample.resample(wave, source, target)
    for start, stop in ((0, 1), (17, 1000), (1000, 1000), (whole.shape[1] - 5, whole.shape[1])):
        part = resample.resample_span(wave, source, target, start, stop)
        assert torch.allclose(part, whole[:, start:stop], atol=1e-3)  # of int16 units
    assert resample.resample(wave[:, :0], source, target).shape == (1, 0)
    with pytest.raises(UsageError):
        resample.resample(wave, 0, 16000)
