"""What one step of a method is given: clips with their identity. Tensors live on the method's device."""

# legend: B clips (videos of the batch), V views of each, T frames, H x W pixels, F spectrogram frames, M bins

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    A clip without picture or sound holds zeros *after* normalisation and a False in its mask, never NaN. Where V > 1,
    view v * copies + c is copy c (an augmentation of its own) of window v; a mask is True where every view of the
    video shows, or sounds, something.
    """

    row: Tensor  # (B,) int64: bank row of the video = its place in the selection
    position: Tensor  # (B,) int64: place in the epoch's global order, distinct over all ranks
    draw: Tensor  # (B,) int64: which of the epoch's clips of that video
    has_picture: Tensor  # (B,) bool
    has_sound: Tensor  # (B,) bool
    epoch: int
    seed: int
    video: Tensor | None = None  # (B, 3, T, H, W), or (B, V, 3, T, H, W) where V > 1; float, normalised
    audio: Tensor | None = None  # (B, 1, F, M), or (B, V, 1, F, M); float, normalised
    labels: Tensor | None = None  # (B,) int64: places in the sorted class names of the run's snapshot, -1: none
    views: int = 1  # V
    sound_share: Tensor | None = None  # (B,) or (B, V): share of the sound window inside the video; then comes padding
