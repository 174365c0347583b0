"""A batch as the loader hands it out: arrays over one of its slots, and how they become tensors on a device.

Everything is as stored: uint8, int16. Crops, colour and normalisation are the trainer's (`avstore.augment`); what a
training method is given is `trainers.batch`. Imports torch when tensors are asked for, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.errors import UsageError
from avstore.packed import Decode, unpack

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """One rank's share of a global batch: arrays over a slot of the loader, valid until `release`, which the loader
    calls by itself when `hold` later batches have been asked for. B pairs; `...` is (V,) where the views cut V > 1
    clips of each pair, and nothing otherwise.

    frames: uint8 (B, ..., T, H, W, 3) RGB. waveform: int16 (B, ..., samples). spectrogram: float16 (B, ..., R, bins),
    stored rows. source: int32 (B, ..., T), ordinal in the file of each frame. Those not asked for are None.
    row: int64 (B,), place of the video in the selection. video: its number. draw: which of its clips of this epoch.
    position: place in the epoch's global order. box: int64 (B, 4), y, x, height, width of the picture in the frame.
    offset, sound_offset: int64 (B, ...), where the pictures and the sound start, in samples of the tape.
    valid_frames, valid_samples: int64 (B, ...), how many come from the video; the rest loops / is zero.
    has_picture, has_sound: bool (B, ...), whether the window shows or sounds anything; else it is all zeros.
    shrunk: bool (B,), windows moved closer together than asked. wait: seconds that the trainer waited for this batch.
    jpeg: only where the loader has a `decode`: int32 (B, ..., T), bytes of the JPEG at the beginning of each row of
    `frames` (`avstore.packed`); `tensors` makes pixels of them.
    """

    step: int
    epoch: int
    index: int  # of the global batch in its epoch
    row: np.ndarray
    video: np.ndarray
    draw: np.ndarray
    position: np.ndarray
    box: np.ndarray
    offset: np.ndarray
    sound_offset: np.ndarray
    valid_frames: np.ndarray
    valid_samples: np.ndarray
    has_picture: np.ndarray
    has_sound: np.ndarray
    shrunk: np.ndarray
    frames: np.ndarray | None = None
    waveform: np.ndarray | None = None
    spectrogram: np.ndarray | None = None
    source: np.ndarray | None = None
    jpeg: np.ndarray | None = None
    wait: float = 0.0
    _slot: int = field(default=-1, repr=False)
    _give_back: Callable[[int], None] | None = field(default=None, repr=False)  # the loader's; None once released
    _decode: Decode | None = field(default=None, repr=False)
    _copied: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def slot(self) -> int:
        """The slot of the loader that it lies in; -1 after `release`."""
        return -1 if self._give_back is None else self._slot

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are arrays, by name."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, np.ndarray)}

    def tensors(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The arrays as tensors. On a CPU (or None): views of the slot, valid as long as the batch. On another device:
        copies, started without waiting; the slot is not used again before they are done. Where the loader has a
        `decode`, `frames` are what it makes of their JPEGs on the device, and `jpeg` is left out."""
        import torch

        arrays = self.arrays()
        lengths = arrays.pop("jpeg", None)
        coded = arrays.pop("frames") if lengths is not None else None
        out = {name: torch.from_numpy(array) for name, array in arrays.items()}
        device = torch.device("cpu" if device is None else device)
        on_cpu = device.type == "cpu"
        if not on_cpu:
            out = {name: tensor.to(device, non_blocking=True) for name, tensor in out.items()}
        if lengths is not None and coded is not None:
            if self._give_back is None or self._decode is None:
                raise UsageError("this batch was released", "its pictures are in its slot", "call `tensors` before")
            out["frames"] = unpack(coded, lengths, self._decode, device)
        if on_cpu:
            return out
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))
        return out

    def release(self) -> None:
        """Gives the slot back. Its arrays must not be used any more."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            if self._copied is not None:
                self._copied.synchronize()
            give_back(self._slot)
