"""Front-ends: from a waveform to a log-spectrogram, by a recipe (`recipes.py`: plain data, one line per name).

One definition in torch serves CPU and GPU, two ways:
- `spectrogram` cuts nothing short: a batch of waveform windows -> spectrograms, at read time. The reference path.
- `spectrogram_rows` is what a store keeps: the rows of one whole video in float16, holding only what a bounded
  neighbourhood of samples determines. Clip-relative floor, gain and normalisation come later, on the clip.

A slice of stored rows differs from the per-clip spectrogram in the `edge_rows` first and last rows only.
Not here: normalisation constants (statistics of the run's own selection: `BinStatistics`), masks and crops (augment).
Importing this module loads NumPy only, torch comes with the first spectrogram.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import UsageError
from avstore.recipes import FRONT_ENDS, FrontEnd, named

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_SECONDS = 60  # of a whole video at once; part of the recipe of stored rows
SPREAD = 2e-3  # of the logarithm: the most by which a device's rows differ from the CPU's, before float16

__all__ = [
    "FRONT_ENDS",
    "BinStatistics",
    "FrontEnd",
    "apply_clip_floor",
    "gain_rows",
    "named",
    "spectrogram",
    "spectrogram_rows",
]


def spectrogram(waveform: Tensor | np.ndarray, front_end: str | FrontEnd, sample_rate: int) -> Tensor:
    """Waveform windows -> spectrograms, on the waveform's device.

    waveform: (B, samples) or (samples,), torch or NumPy, int16, or floating in [-1, 1), at `sample_rate` Hz.
    Returns float32 (B, rows, bins), or (rows, bins), with rows = front_end.rows(samples, sample_rate): not normalised,
    clip floor applied. Windows of n_fft / 2 samples or fewer are first extended with zeros, as a reflection needs
    more; without samples there are no rows. UsageError for another dtype or shape, or a rate below the recipe's.
    """
    import torch

    recipe = _checked(front_end, sample_rate)
    waveform = torch.as_tensor(waveform)
    if waveform.dim() not in (1, 2):
        raise UsageError(f"a waveform of shape {tuple(waveform.shape)}", "expected (B, samples) or (samples,)")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise UsageError(f"a waveform of {waveform.dtype}", "expected int16, or floating point in [-1, 1)")
    batch = waveform if waveform.dim() == 2 else waveform[None]
    rows = recipe.rows(batch.shape[1], sample_rate)
    scaled = batch.to(torch.float32) / 32768 if batch.dtype == torch.int16 else batch.to(torch.float32)
    signal = _Signal(scaled, recipe, sample_rate)
    out = apply_clip_floor(_rows(signal, recipe, 0, rows), recipe)
    return out if waveform.dim() == 2 else out[0]


def spectrogram_rows(
    waveform: np.ndarray, front_end: str | FrontEnd, sample_rate: int, device: str = "cpu"
) -> np.ndarray:
    """The rows of one whole video as a store keeps them.

    waveform: int16 (samples,), the video's whole waveform from its t = 0. Returns float16 (rows, bins) with
    rows = floor(samples * rows_per_second / sample_rate): no clip floor, no normalisation. Computed in fixed blocks of
    60 s, so that memory is bounded and the bytes depend on the waveform alone; on a CUDA `device` they lie within
    SPREAD and a step of float16 of the CPU's. Raises UsageError as `spectrogram` does, and for a recipe that cannot be
    stored.
    """
    import torch

    recipe = _checked(front_end, sample_rate)
    per_second = recipe.rows_per_second
    waveform = np.asarray(waveform)
    if waveform.dtype != np.int16 or waveform.ndim != 1:
        raise UsageError(f"a waveform of {waveform.dtype} {waveform.shape}", "expected int16 (samples,)")
    rows = recipe.rows(len(waveform), sample_rate)
    out = np.empty((rows, recipe.bins), np.float16)
    source = torch.from_numpy(np.ascontiguousarray(waveform))[None].to(device)
    signal = _Signal(source, recipe, sample_rate, scale=1 / 32768)
    with torch.inference_mode():
        for start in range(0, rows, _BLOCK_SECONDS * per_second):
            stop = min(rows, start + _BLOCK_SECONDS * per_second)
            out[start:stop] = _rows(signal, recipe, start, stop)[0].cpu().numpy()
    return out


def apply_clip_floor(rows: Tensor, front_end: str | FrontEnd) -> Tensor:
    """Raise what lies more than the recipe's `clip_floor_db` below the maximum of its clip.

    rows: floating (..., rows, bins), in the recipe's logarithm; the last two dimensions are a clip. Missing rows (NaN)
    stay NaN and do not count. Returns float32 of the same shape; only the dtype changes for a recipe without a floor.
    """
    import torch

    recipe = named(front_end)
    rows = rows.to(torch.float32)
    if recipe.clip_floor_db is None or not rows.numel():
        return rows
    below = recipe.clip_floor_db if recipe.log == "db" else recipe.clip_floor_db * math.log(10) / 10
    top = torch.nan_to_num(rows, nan=-math.inf).amax(dim=(-2, -1), keepdim=True)
    return torch.where(rows < top - below, top - below, rows)  # a comparison with NaN is false


def gain_rows(rows: Tensor, gain: Tensor | float, front_end: str | FrontEnd) -> Tensor:
    """Log-power as it would be had the waveform been multiplied by `gain`: log(gain^2 (e^s - eps) + eps).

    rows: floating (..., rows, bins) before any clip floor or normalisation; gain: a number or (...,), one per clip,
    an amplitude factor >= 0. Returns float32. Exact up to float16's rounding of stored rows. Raw rows: gain * rows.
    """
    import torch

    recipe = named(front_end)
    factor = torch.as_tensor(gain, dtype=torch.float32, device=rows.device)
    if factor.device.type == "cpu" and bool((factor < 0).any()):  # elsewhere the question would stop the device
        raise UsageError("a negative gain", "gain is an amplitude factor, 0 or more")
    if recipe.scale == "raw":
        return rows.to(torch.float32) * factor[..., None, None]
    unit = math.log(10) / 10 if recipe.log == "db" else 1.0
    power = (torch.exp(rows.to(torch.float32) * unit) - recipe.eps).clamp_min(0)
    return torch.log(factor[..., None, None] ** 2 * power + recipe.eps) / unit


class BinStatistics:
    """Mean and standard deviation of each bin over a run's selection: what normalises its spectrograms.

    Sums are kept in float64 by the parallel formula of Chan, Golub, LeVeque (1983), so that large sets lose no digits.
    """

    def __init__(self, bins: int) -> None:
        self.count, self._mean, self._square = 0, np.zeros(bins), np.zeros(bins)

    def update(self, rows: Any, mask: Any = None) -> None:
        """Take in rows: (..., bins), torch or NumPy, any float dtype. mask: boolean (...,), True counts; a row with a
        NaN never does. Raises UsageError where shapes do not fit or a counted value is infinite."""
        values, keep = _numpy(rows), None if mask is None else _numpy(mask).astype(bool)
        if values.shape[-1:] != self._mean.shape or (keep is not None and keep.shape != values.shape[:-1]):
            raise UsageError(
                f"rows of shape {values.shape} with a mask of shape {None if keep is None else keep.shape}",
                f"expected (..., {len(self._mean)}) and the same without the last dimension",
            )
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        if keep is not None:
            flat = flat[keep.reshape(-1)]
        flat = flat[~np.isnan(flat).any(axis=1)]
        if np.isinf(flat).any():
            raise UsageError("infinite values in a spectrogram", "front-ends never make any: the array is damaged")
        if len(flat):
            mean = flat.mean(axis=0)
            self._join(len(flat), mean, ((flat - mean) ** 2).sum(axis=0))

    def merge(self, other: BinStatistics) -> None:
        """Take in the statistics of another process."""
        if other.count:
            self._join(other.count, other._mean, other._square)

    def _join(self, count: int, mean: np.ndarray, square: np.ndarray) -> None:
        total, step = self.count + count, mean - self._mean
        self._square += square + step**2 * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """float32 (bins,). UsageError before the first row."""
        if not self.count:
            raise UsageError("no spectrogram row has been counted", "the selection holds no sound")
        return self._mean.astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        """float32 (bins,), of the population, plus AVID's 1e-5: never zero."""
        if not self.count:
            raise UsageError("no spectrogram row has been counted", "the selection holds no sound")
        return (np.sqrt(self._square / self.count) + 1e-5).astype(np.float32)


# How it is computed


def _checked(name: str | FrontEnd, sample_rate: int) -> FrontEnd:
    recipe = named(name)
    if sample_rate < recipe.sample_rate:
        raise UsageError(
            f"front-end {recipe.name} needs sound of {recipe.sample_rate} Hz",
            f"the waveform has {sample_rate} Hz: the bands above {sample_rate // 2} Hz are not in it",
            f"ingest with --sample-rate {recipe.sample_rate}, or use another front-end",
        )
    return recipe


class _Signal:
    """A waveform (B, samples) at the recipe's rate, pre-emphasised and padded; only the span asked for is made."""

    def __init__(self, waveform: Tensor, recipe: FrontEnd, sample_rate: int, scale: float = 1.0) -> None:
        from avstore.resample import resampled_length

        self.waveform, self.recipe, self.sample_rate, self.scale = waveform, recipe, sample_rate, scale
        self.length = resampled_length(waveform.shape[1], sample_rate, recipe.sample_rate)
        self.extended = max(self.length, recipe.n_fft // 2 + 1)  # what a reflection of n_fft // 2 samples needs

    def span(self, start: int, stop: int) -> Tensor:
        """float32 (B, stop - start) of the padded signal; start may be negative, stop beyond the end."""
        import torch

        if self.recipe.pad == "reflect":
            left, right = max(-start, 0), max(stop - self.extended, 0)
            # the part to reflect lies within the signal, but maybe not within the span
            low = min(max(start, 0), self.extended - 1 - right if right else self.extended)
            high = max(min(stop, self.extended), left + 1 if left else 0)
            inner = self._emphasised(low, high)
            index = torch.arange(start, stop, device=inner.device).abs()
            index = torch.where(index >= self.extended, 2 * (self.extended - 1) - index, index)
            return inner[:, index - low]
        return self._emphasised(start, stop)

    def _emphasised(self, start: int, stop: int) -> Tensor:
        if not self.recipe.preemphasis:
            return self._plain(start, stop)
        signal = self._plain(start - 1, stop)  # sample -1 is 0, so the first sample stays
        return signal[:, 1:] - self.recipe.preemphasis * signal[:, :-1]

    def _plain(self, start: int, stop: int) -> Tensor:
        """The resampled signal with zeros on both sides."""
        import torch

        from avstore.resample import resample_span

        low, high = min(max(start, 0), self.length), min(max(stop, 0), self.length)
        signal = resample_span(self.waveform, self.sample_rate, self.recipe.sample_rate, low, max(high, low))
        if self.scale != 1.0:
            signal = signal * self.scale
        before = min(max(-start, 0), stop - start)
        return torch.nn.functional.pad(signal, (before, stop - start - before - signal.shape[1]))


def _rows(signal: _Signal, recipe: FrontEnd, start: int, stop: int) -> Tensor:
    """Rows start .. stop-1, float32 (B, rows, bins), before the clip floor."""
    import torch

    batch, device = signal.waveform.shape[0], signal.waveform.device
    if stop <= start or not batch:
        return torch.zeros((batch, max(stop - start, 0), recipe.bins), device=device)
    lead = 0 if recipe.pad == "none" else recipe.n_fft // 2
    begin = start * recipe.hop - lead
    samples = signal.span(begin, begin + (stop - 1 - start) * recipe.hop + recipe.n_fft)
    if recipe.scale == "raw":
        return samples.unfold(-1, recipe.n_fft, recipe.hop).contiguous()
    window = torch.from_numpy(_window(recipe)).to(device, non_blocking=True)
    frames = torch.fft.rfft(samples.unfold(-1, recipe.n_fft, recipe.hop) * window)  # (B, rows, n_fft // 2 + 1)
    power = frames.real.square() + frames.imag.square()
    if recipe.scale == "linear":
        if recipe.average > 1:
            groups = power[..., 1:].unflatten(-1, (-1, recipe.average))
            power = torch.cat([power[..., :1], groups.mean(-1)], dim=-1)
    else:
        # float64: the sums must neither depend on the threads that share them nor be cut to TF32
        power = (power.double() @ torch.from_numpy(_filters(recipe)).to(device, non_blocking=True)).float()
    value = torch.log(power + recipe.eps)
    return value * (10 / math.log(10)) if recipe.log == "db" else value


@functools.lru_cache(maxsize=32)
def _window(recipe: FrontEnd) -> np.ndarray:
    """float32 (n_fft,): the window, in the middle of the FFT's frame (a frame that is not centred begins with it)."""
    n = recipe.window_length
    window = np.ones(n) if recipe.window == "boxcar" else 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    before = 0 if recipe.pad == "none" else (recipe.n_fft - n) // 2
    return np.pad(window, (before, recipe.n_fft - n - before)).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _filters(recipe: FrontEnd) -> np.ndarray:
    """float64 (n_fft // 2 + 1, bins): the mel filter bank, or the interpolation of 'mel-warp'."""
    frequencies = np.arange(recipe.n_fft // 2 + 1) * (recipe.sample_rate / recipe.n_fft)
    low, high = (float(_to_mel(f, recipe.mel)) for f in (recipe.fmin, recipe.fmax))
    if recipe.scale == "mel-warp":
        points = np.minimum(_to_hz(np.linspace(low, high, recipe.bins), recipe.mel), frequencies[-1])
        return np.stack([np.interp(points, frequencies, one) for one in np.eye(len(frequencies))])
    edges = _to_hz(np.linspace(low, high, recipe.bins + 2), recipe.mel)
    if recipe.mel_norm == "bins":
        edges = np.floor((recipe.n_fft + 1) * edges / recipe.sample_rate)
        frequencies = np.arange(recipe.n_fft // 2 + 1.0)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - left) / (centre - left)
    falling = (right - frequencies[:, None]) / (right - centre)
    triangles = np.clip(np.minimum(rising, falling), 0, None)
    return triangles * (2 / (right - left)) if recipe.mel_norm == "slaney" else triangles


def _to_mel(hz: Any, formula: str) -> Any:
    """HTK: 2595 log10(1 + f / 700). Slaney's Auditory Toolbox: 3 f / 200 below 1 kHz, 27 steps per factor 6.4 above."""
    hz = np.asarray(hz, np.float64)
    if formula == "htk":
        return 2595 * np.log10(1 + hz / 700)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _to_hz(mel: Any, formula: str) -> Any:
    if formula == "htk":
        return 700 * (10 ** (np.asarray(mel) / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


def _numpy(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        import torch

        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)
