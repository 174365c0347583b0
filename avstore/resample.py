"""Resampling by a rational factor: one named filter, the same on every device, computable block by block.

The filter `sinc-kaiser-64` is a sinc cut off at 0.955 of the lower of the two Nyquist frequencies under a Kaiser window
(beta 9, about -90 dB) of 64 zero crossings to each side: flat to 0.91, silent from 1.0 of that frequency on. Output
sample n is the band-limited signal at time n / target; beyond its ends the signal counts as zero. Output length is
ceil(samples * target / source). Products are summed in float64, so that TF32 and other short cuts of a device do not
reach the quiet bins of a spectrogram. This module imports torch; nothing at the top level of `avstore` imports it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from avstore.errors import UsageError

FILTER = "sinc-kaiser-64"
_CROSSINGS, _CUTOFF, _BETA = 64, 0.955, 9.0
_GROUP = 128  # outputs, about, that one row of the product yields: twice the arithmetic, few copies


def resampled_length(samples: int, source: int, target: int) -> int:
    """Samples after resampling from `source` to `target` Hz: ceil(samples * target / source). Rates are >= 1."""
    if source < 1 or target < 1:
        raise UsageError(f"cannot resample {source} Hz to {target} Hz", "rates are at least 1 Hz")
    return -(-samples * target // source)


def resample(waveform: Tensor, source: int, target: int) -> Tensor:
    """(..., samples) at `source` Hz -> float32 (..., ceil(samples * target / source)) at `target` Hz.

    Any real dtype; integers are not rescaled. Equal rates return the input as float32. Raises UsageError for rates < 1.
    """
    return resample_span(waveform, source, target, 0, resampled_length(waveform.shape[-1], source, target))


def resample_span(waveform: Tensor, source: int, target: int, start: int, stop: int) -> Tensor:
    """Output samples start .. stop-1 (0 <= start) of `resample(waveform)`, from the neighbourhood they depend on."""
    stop = min(stop, resampled_length(waveform.shape[-1], source, target))
    if source == target:
        return waveform[..., start:stop].to(torch.float32)
    down = source // math.gcd(source, target)
    up = target // math.gcd(source, target)
    matrix, reach, repeats = _matrix(up, down)
    in_step, out_step = down * repeats, up * repeats
    first, last = start // out_step, -(-stop // out_step)  # whole groups, at fixed places of the signal
    if last <= first:
        return waveform.new_zeros((*waveform.shape[:-1], 0), dtype=torch.float32)
    begin, end = first * in_step - reach, (last - 1) * in_step - reach + matrix.shape[1]
    samples = waveform.shape[-1]
    piece = waveform[..., max(begin, 0) : max(min(end, samples), 0)].to(torch.float64)
    piece = torch.nn.functional.pad(piece, (max(-begin, 0), end - max(begin, 0) - piece.shape[-1]))
    windows = piece.unfold(-1, matrix.shape[1], in_step)  # (..., groups, in)
    out = torch.matmul(windows, torch.from_numpy(matrix).to(windows.device, non_blocking=True).T).flatten(-2)
    return out[..., start - first * out_step : stop - first * out_step].to(torch.float32)


@functools.lru_cache(maxsize=16)
def _matrix(up: int, down: int) -> tuple[np.ndarray, int, int]:
    """The filter as a matrix float64 (outputs of a group, inputs they need), its reach to the left, periods in a group.

    Row i of a group that starts at input sample 0 holds h(i * down / up - m) for m = -reach .. ; h is scaled so that a
    constant stays what it is on average over the phases (unit gain at 0 Hz up to the filter's own ripple).
    """
    scale = min(1.0, up / down)  # the lower rate over the source rate
    width = _CROSSINGS / (scale * _CUTOFF)  # half the filter's length in input samples
    reach = math.ceil(width)
    repeats = max(1, round(_GROUP / up))
    centres = np.arange(up * repeats) * (down / up)
    taps = math.ceil(centres[-1]) + 2 * reach + 1
    distance = centres[:, None] - (np.arange(taps)[None, :] - reach)
    bell = np.i0(_BETA * np.sqrt(np.clip(1 - (distance / width) ** 2, 0, None))) / np.i0(_BETA)
    window = np.where(np.abs(distance) <= width, bell, 0.0)
    matrix = scale * _CUTOFF * np.sinc(scale * _CUTOFF * distance) * window
    return matrix, reach, repeats
