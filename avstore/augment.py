"""Crops, flips, colour and normalisation of a batch of clips, on its device: one draw per clip, all its frames alike.

Every random number comes from `avstore.draws`, keyed by (seed, "augment", epoch, video, draw), so a clip looks the same
whatever batch, process or thread it comes in: bit by bit on a CPU, to one grey level on an accelerator. All decisions
are taken on the host, in NumPy; the device is never waited for. A crop is drawn inside the picture's box and resized by
the antialiased triangle filter of PIL, rounded to whole grey levels as PIL (so AVID's loader) does; what lies outside
the box never shows. Colours follow torchvision's ColorJitter: blends clamped to [0, 1], in an order drawn anew for each
clip. Sound: its gain, bands of a spectrogram that are blanked, and random resized crops of it. Not here: anything that
needs the network. Imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avstore import draws
from avstore.errors import UsageError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROPS = ("resized", "random")
_TRIES = 10  # of a random resized crop, as torchvision's
_ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, in torchvision's digits
_CHUNK = 16  # clips at once on an accelerator: bounds the memory of the float frames

Boxes = NDArray[np.int64]


@dataclass(frozen=True)
class VideoAugment:
    """Training's augmentation; the defaults are AVID's (methods.md 2.4). Jitters are half-widths, 0 turns one off.

    crop "resized": of any `area` and `ratio`. "random": of evaluation's scale, at any place ("112 of 128x171": VCOP,
    IIC, AVCL); area and ratio then count for nothing. CrissCross adds grey=0.2, blur=0.5 (probabilities) and cutout=20
    (the largest side of its square, in pixels); a run's settings call them gray, blur and cutout.
    """

    size: int = 112
    crop: str = "resized"
    area: tuple[float, float] = (0.08, 1.0)  # of the box
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2  # of the colour circle
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, SimCLR's
    cutout: int = 0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    NUMBERS = 2 * _TRIES + 14  # uniform numbers per clip; a new one goes to the end, the places of the others stay

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(
                f"crops of size {self.size}, area {self.area}, ratio {self.ratio}",
                "expected a size of 1 or more, 0 < area <= 1 and 0 < ratio, each from low to high",
            )
        if self.crop not in CROPS:
            raise UsageError(f"no crop is called {self.crop!r}", did_you_mean(self.crop, CROPS))
        if not all(
            0 <= p <= 1 for p in (self.flip, self.grey, self.blur, self.brightness, self.contrast, self.saturation)
        ):
            raise UsageError("an augmentation out of range", "probabilities and colour jitters lie in [0, 1]")
        if not 0 <= self.hue <= 0.5 or not 0 <= self.cutout <= self.size:
            raise UsageError(
                f"hue {self.hue}, cutout {self.cutout}", "hue lies in [0, 0.5], the cutout inside the crop"
            )

    def draw(self, seed: int, epoch: draws.Ints, video: draws.Ints, draw: draws.Ints) -> NDArray[np.float64]:
        """The uniform numbers of clips (video, draw), each (B,): float64 (B, NUMBERS)."""
        return np.atleast_2d(draws.uniform(seed, "augment", epoch, video, draw, self.NUMBERS))

    def crops(self, boxes: Any, u: NDArray[np.float64]) -> Boxes:
        """Random crops inside boxes (B, 4) [y, x, h, w]: int64 (B, 4). Resized ones by torchvision's algorithm (10
        tries at an area and a log-uniform ratio, then the largest centre crop of an allowed ratio)."""
        boxes = _host(boxes)
        if self.crop == "random":
            side = evaluated_side(boxes)
            y, x = (draws.integers(u[:, 2 * _TRIES + 1 - k], 0, boxes[:, 2 + k] - side) for k in (0, 1))
            return np.stack([boxes[:, 0] + y, boxes[:, 1] + x, side, side], -1)
        height, width = boxes[:, 2, None], boxes[:, 3, None]
        area = (self.area[0] + (self.area[1] - self.area[0]) * u[:, 0 : 2 * _TRIES : 2]) * (height * width)
        low, high = np.log(self.ratio[0]), np.log(self.ratio[1])
        ratio = np.exp(low + (high - low) * u[:, 1 : 2 * _TRIES : 2])
        w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
        first, clips = fits.argmax(1), np.arange(len(boxes))
        w, h, some = w[clips, first], h[clips, first], fits.any(1)
        height, width = boxes[:, 2], boxes[:, 3]
        widest = np.clip(width / height, *self.ratio)  # the nearest allowed ratio; one side then fills the box
        w = np.where(some, w, np.clip(np.rint(height * widest), 1, width).astype(np.int64))
        h = np.where(some, h, np.clip(np.rint(width / widest), 1, height).astype(np.int64))
        x = np.where(some, draws.integers(u[:, 2 * _TRIES], 0, width - w), (width - w) // 2)
        y = np.where(some, draws.integers(u[:, 2 * _TRIES + 1], 0, height - h), (height - h) // 2)
        return np.stack([boxes[:, 0] + y, boxes[:, 1] + x, h, w], -1)

    def __call__(
        self, frames: Tensor, boxes: Any, u: NDArray[np.float64], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """uint8 (B, T, H, W, 3), boxes int (B, 4) [y, x, h, w], u of `draw` -> (B, 3, T, size, size), normalised.

        Raises UsageError for other shapes or types and for boxes that reach outside the frame.
        """
        boxes = _checked(frames, boxes)
        u = np.asarray(u, np.float64)
        if u.shape != (len(boxes), self.NUMBERS):
            raise UsageError(f"uniform numbers of shape {u.shape}", f"expected ({len(boxes)}, {self.NUMBERS})")
        crops, rest = self.crops(boxes, u), u[:, 2 * _TRIES + 2 :]
        flips = rest[:, 0] < self.flip
        out = torch.empty(_shape(frames, self.size), dtype=dtype, device=frames.device)
        step = 1 if frames.device.type == "cpu" else _CHUNK  # a single clip stays in a core's cache
        for start in range(0, len(boxes), step):
            part = slice(start, start + step)
            clips = resize(frames[part], crops[part], self.size, flips[part]).float().div_(255)
            clips = self._blur(self._colours(clips, rest[part]), rest[part])
            out[part] = self._cut(_normalise(clips, self.mean, self.std), rest[part])
        return out

    def _colours(self, clips: Tensor, u: NDArray[np.float64]) -> Tensor:
        widths = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        factors = widths * (2 * u[:, 1:5] - 1) + (1, 1, 1, 0)
        orders = _ORDERS[draws.integers(u[:, 5], 0, len(_ORDERS) - 1)]
        device_factors = there(factors.astype(np.float32), clips.device)
        for step in range(4):
            for kind in np.flatnonzero(widths):
                which = np.flatnonzero(orders[:, step] == kind)
                if len(which) == len(clips):
                    clips = _COLOURS[kind](clips, device_factors[:, kind])
                elif len(which):
                    index = there(which, clips.device)
                    clips[index] = _COLOURS[kind](clips[index], device_factors[index, kind])
        grey = u[:, 6] < self.grey
        if grey.any():
            keep = there(~grey, clips.device)
            clips = torch.where(keep[:, None, None, None, None], clips, _luma(clips))
        return clips

    def _blur(self, clips: Tensor, u: NDArray[np.float64]) -> Tensor:
        """Gaussian, separable, reflected at the edges, as wide as a tenth of the picture (SimCLR; 11 taps of 112)."""
        which = np.flatnonzero(u[:, 7] < self.blur)
        if not len(which):
            return clips
        sigma = self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * u[which, 8]
        reach = min(max(self.size // 20, 1), self.size - 1)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma[:, None]) ** 2)
        # as a matrix: every edge's reflection is folded in once, and the blur is two products
        source = np.abs(np.arange(self.size)[:, None] + np.arange(-reach, reach + 1))
        source = np.where(source >= self.size, 2 * (self.size - 1) - source, source)
        matrix = np.zeros((len(which), self.size, self.size))
        rows = np.broadcast_to(np.arange(self.size)[:, None], source.shape)
        for clip, weights in enumerate(taps / taps.sum(1, keepdims=True)):
            np.add.at(matrix[clip], (rows, source), np.broadcast_to(weights, source.shape))
        kernel = there(matrix.astype(np.float32), clips.device)[:, None, None]
        index = there(which, clips.device)
        clips[index] = kernel @ clips[index] @ kernel.transpose(-1, -2)
        return clips

    def _cut(self, clips: Tensor, u: NDArray[np.float64]) -> Tensor:
        """CrissCross' cut-out, of normalised clips: a side is drawn in 1 .. cutout, halved and rounded down to what
        lies on each side of a centre drawn anywhere; what lies in the picture of that square is multiplied, in every
        frame, by the mean of the clip's first frame (which is what its code does where it means to fill)."""
        if self.cutout:
            half = draws.integers(u[:, 11:12], 1, self.cutout)[..., None] // 2
            centre = draws.integers(u[:, 9:11], 0, self.size - 1)[..., None]
            at = np.arange(self.size)
            inside = (at >= centre - half) & (at < centre + half)
            hole = there(inside[:, 0, :, None] & inside[:, 1, None, :], clips.device)
            mean = clips[:, :, 0].mean((1, 2, 3))
            clips = torch.where(hole[:, None, None], clips * _wide(mean), clips)
        return clips


def centre_crop(
    frames: Tensor,
    boxes: Any,
    size: int,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Evaluation's crop: the centre square of 7/8 of the box' shorter side ("centre 224 of 256", "112 of 128").

    Shapes, types and errors as `VideoAugment`. Where that square has `size` pixels to a side, pixels are copied.
    """
    boxes = _checked(frames, boxes)
    side = evaluated_side(boxes)
    crops = np.stack([boxes[:, 0] + (boxes[:, 2] - side) // 2, boxes[:, 1] + (boxes[:, 3] - side) // 2, side, side], -1)
    out = torch.empty(_shape(frames, size), dtype=dtype, device=frames.device)
    step = 1 if frames.device.type == "cpu" else _CHUNK
    for start in range(0, len(boxes), step):
        part = slice(start, start + step)
        out[part] = _normalise(resize(frames[part], crops[part], size).float().div_(255), mean, std)
    return out


def evaluated_side(boxes: Boxes) -> Boxes:
    """int64 (B,): the side of evaluation's square in boxes (B, 4), 7/8 of the shorter one (112 of 128), at least 1."""
    return np.maximum((7 * boxes[:, 2:].min(1) + 4) // 8, 1)


def resize(frames: Tensor, crops: Boxes, size: int, flips: NDArray[np.bool_] | None = None) -> Tensor:
    """Cut a box out of each clip and resize it: uint8 (B, T, H, W, 3), int (B, 4) -> uint8 (B, 3, T, S, S).

    flips: boolean (B,), mirrored left to right. On a CPU by torch's fixed-point uint8 kernel (measured 3 to 7 times as
    fast as its float kernel, grid_sample or a product), elsewhere as two products; they agree to one grey level.
    """
    if flips is None:
        flips = np.zeros(len(crops), np.bool_)
    if frames.device.type != "cpu":
        return _resize_by_products(frames, crops, size, flips)
    out = frames.new_empty(_shape(frames, size))
    for clip, (y, x, h, w) in enumerate(crops.tolist()):
        cut = frames[clip, :, y : y + h, x : x + w].permute(0, 3, 1, 2)  # channels last, as the fast kernel wants it
        if (h, w) != (size, size):
            cut = torch.nn.functional.interpolate(cut, (size, size), mode="bilinear", antialias=True)
        out[clip] = (cut.flip(-1) if flips[clip] else cut).transpose(0, 1)
    return out


def sound_gain(u: NDArray[np.float64], amount: float = 0.1) -> NDArray[np.float32]:
    """Amplitude factors, uniform in [1 - amount, 1 + amount] (AVID 0.1, CrissCross 0.2); u: in [0, 1), any shape.

    Multiply a waveform by it, or pass it to `frontends.gain_rows` for stored spectrograms.
    """
    if not 0 <= amount <= 1:
        raise UsageError(f"a gain of +- {amount}", "the amount lies in [0, 1]")
    return (1 + amount * (2 * np.asarray(u, np.float64) - 1)).astype(np.float32)


SOUND_NUMBERS = 9  # uniform numbers per clip of stream "augment-sound": the gain, then two of each mask
CROP_NUMBERS = 4  # and behind them, in the same call: size and place of a crop
CANVAS = 1.5  # times the spectrogram's length: where a crop may lie. BYOL-A's; in frequency it is the spectrogram


def mask_bands(rows: Tensor, u: NDArray[np.float64], time: float = 0.0, freq: float = 0.0) -> Tensor:
    """SpecAugment's masks: two bands of spectrogram rows and two of bins are set to 0 (the mean, once normalised).

    rows: (B, F, M), normalised; returned as it is where nothing is masked, else a new tensor. u: (B, 8) in [0, 1), a
    width and a place for each band. A band of `time` is narrower than that share of the F rows, one of `freq` than that
    share of the M bins, widths and places uniform (CrissCross: fewer than 20 of 200 rows and 10 of 80 bins, so 0.1 and
    0.125); they may overlap. Raises UsageError for shares outside [0, 1] and other shapes.
    """
    if not (0 <= time <= 1 and 0 <= freq <= 1):
        raise UsageError(f"masks of {time} of the rows and {freq} of the bins", "both are shares in [0, 1]")
    u = np.asarray(u, np.float64)
    if rows.dim() != 3 or u.shape != (len(rows), 8):
        raise UsageError(
            f"a spectrogram of shape {tuple(rows.shape)} and uniform numbers of shape {u.shape}",
            "expected (B, rows, bins) and (B, 8)",
        )
    if not time and not freq:
        return rows
    blank = _bands(u[:, :4], rows.shape[1], time)[:, :, None] | _bands(u[:, 4:], rows.shape[2], freq)[:, None, :]
    return rows.masked_fill(there(blank, rows.device), 0)


def crop_rows(rows: Tensor, u: NDArray[np.float64], scale: Sequence[float] = (0.6, 1.5)) -> Tensor:
    """BYOL-A's random resized crop of a spectrogram (Niizumi et al., IJCNN 2021), as CrissCross' code takes it.

    rows: floating (B, F, M), normalised, so that 0 is the mean; u: (B, 4) in [0, 1): length, height, and their place.
    The spectrogram lies in the middle of a canvas of zeros, CANVAS times as long and as high as itself. A crop of
    U(scale) F rows and U(scale) M bins, at most the canvas, rounded down, is placed uniformly in it and resized to
    (F, M), bicubic, corner on corner, without smoothing. Returns a new tensor like rows. UsageError for other shapes
    or an empty scale.
    """
    low, high = scale
    if not 0 < low <= high:
        raise UsageError(f"crops of {low} to {high} of a spectrogram", "two shares above 0, the least first")
    u = np.asarray(u, np.float64)
    if rows.dim() != 3 or u.shape != (len(rows), CROP_NUMBERS):
        raise UsageError(
            f"a spectrogram of shape {tuple(rows.shape)} and uniform numbers of shape {u.shape}",
            f"expected (B, rows, bins) and (B, {CROP_NUMBERS})",
        )
    # products of taps, not of matrices: each clip is what it is in any batch, to the bit
    rows = _tapped(rows, 1, *_crop_taps(u[:, 0::2], rows.shape[1], int(CANVAS * rows.shape[1]), low, high))
    return _tapped(rows, 2, *_crop_taps(u[:, 1::2], rows.shape[2], rows.shape[2], low, high))


def _crop_taps(
    u: NDArray[np.float64], n: int, canvas: int, low: float, high: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """From a line of n values in the middle of a canvas of zeros to a crop of it at n points: places and weights, each
    (4, B, n). u: (B, 2), length and place.

    Bicubic with a = -3/4, the crop's first and last value on the first and last point (torch's align_corners, which
    BYOL-A and CrissCross take), taps beyond the crop's ends at its ends; weight 0 for what lies on the empty canvas.
    """
    length = np.clip(np.floor((low + (high - low) * u[:, :1]) * n).astype(np.int64), 1, canvas)
    first = draws.integers(u[:, 1:], 0, canvas - length) - (canvas - n) // 2  # in the line's own places
    at = np.arange(n) * (length - 1) / max(n - 1, 1)
    whole = np.floor(at).astype(np.int64)
    tap = np.arange(-1, 3)[:, None, None]
    d, a = np.abs(at - whole - tap), -0.75
    weight = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4))
    place = first + np.clip(whole + tap, 0, length - 1)
    inside = (place >= 0) & (place < n)
    return np.clip(place, 0, n - 1), np.where(inside, weight, 0.0)


def _tapped(rows: Tensor, dim: int, place: NDArray[np.int64], weight: NDArray[np.float64]) -> Tensor:
    """rows (B, F, M) along `dim`, 1 or 2: the weighted sums of the values at these places, (4, B, length) each."""
    at, by = (there(x, rows.device).unsqueeze(4 - dim) for x in (place, weight.astype(np.float32)))
    out = torch.zeros_like(rows)
    for k in range(len(place)):
        out += rows.gather(dim, at[k].expand_as(rows)) * by[k]
    return out


def _bands(u: NDArray[np.float64], n: int, share: float) -> NDArray[np.bool_]:
    """bool (B, n), True in two bands: u (B, 4), width and place of each."""
    widest = max(int(np.ceil(round(share * n, 9))) - 1, 0)  # rounded: 0.1 * 200 is not 20 in every arithmetic
    width = draws.integers(u[:, ::2], 0, widest)
    first = draws.integers(u[:, 1::2], 0, n - width)
    at = np.arange(n)[None, None, :]
    return np.asarray(((at >= first[..., None]) & (at < (first + width)[..., None])).any(1))


def _resize_by_products(frames: Tensor, crops: Boxes, size: int, flips: NDArray[np.bool_]) -> Tensor:
    """The same filter as matrices: rows, then columns; weights outside a crop are zero."""
    device, (batch, time, height, width, _) = frames.device, frames.shape
    box = there(crops, device).to(torch.float32)
    mirrored = there(flips, device)
    down = _triangle(box[:, 0], box[:, 2], height, size)
    across = _triangle(box[:, 1], box[:, 3], width, size)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    rows = down[:, None] @ frames.reshape(batch, time, height, width * 3).float()  # (B, T, S, W * 3)
    planes = rows.view(batch, time, size, width, 3).permute(0, 4, 1, 2, 3)
    return (planes @ across[:, None, None].transpose(-1, -2)).round_().clamp_(0, 255).to(torch.uint8)


def _triangle(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (B, size, pixels) of PIL's antialiased bilinear filter for the stretch [start, start + length)."""
    scale = (length / size)[:, None, None]
    at = torch.arange(pixels, device=start.device)[None, None, :] + 0.5 - start[:, None, None]
    centre = (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    weights = (1 - (at - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * ((at > 0) & (at < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


# Colour: clips float32 (B, 3, T, S, S) in [0, 1], factors (B,)


def _brightness(clips: Tensor, factor: Tensor) -> Tensor:
    return (clips * _wide(factor)).clamp_(0, 1)


def _contrast(clips: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(clips).mean(dim=(-2, -1), keepdim=True)  # of each frame, as torchvision's
    return _blend(clips, mean, factor)


def _saturation(clips: Tensor, factor: Tensor) -> Tensor:
    return _blend(clips, _luma(clips), factor)


def _hue(clips: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue of HSV by factor of the circle: channel(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6."""
    red, green, blue = clips.unbind(1)
    value = clips.amax(1)
    chroma = value - clips.amin(1)
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    from_red = (green - blue).mul_(inverse)
    from_green = (blue - red).mul_(inverse).add_(2)
    from_blue = (red - green).mul_(inverse).add_(4)
    sector = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue))
    sector.add_(6 * factor[:, None, None, None])
    out = torch.empty_like(clips)
    for channel, n in enumerate((5, 3, 1)):
        k = sector + n
        k.sub_(k.mul(1 / 6).floor_().mul_(6))  # mod 6; torch.remainder is not vectorised on CPUs
        out[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


_COLOURS = (_brightness, _contrast, _saturation, _hue)


def _luma(clips: Tensor) -> Tensor:
    red, green, blue = clips.split(1, dim=1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _blend(clips: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, clips, _wide(factor)).clamp_(0, 1)  # factor * clips + (1 - factor) * other


def _wide(factor: Tensor) -> Tensor:
    return factor[:, None, None, None, None]


def _normalise(clips: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, spread = (there(np.array(x, np.float32), clips.device)[:, None, None, None] for x in (mean, std))
    return (clips - centre) / spread


def there(array: Any, device: torch.device) -> Tensor:
    """A NumPy array on `device`, not waited for: CUDA takes pageable memory over before the call returns, and a plain
    `.to(device)` would wait for all that the stream has still to do."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _shape(frames: Tensor, size: int) -> tuple[int, int, int, int, int]:
    return frames.shape[0], 3, frames.shape[1], size, size


def _host(boxes: Any) -> Boxes:
    if isinstance(boxes, Tensor):
        boxes = boxes.cpu().numpy()
    return np.asarray(boxes, np.int64).reshape(-1, 4)


def _checked(frames: Tensor, boxes: Any) -> Boxes:
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
        raise UsageError(f"frames of {frames.dtype} {tuple(frames.shape)}", "expected uint8 (B, T, H, W, 3)")
    boxes = _host(boxes)
    if len(boxes) != len(frames):
        raise UsageError(f"{len(boxes)} boxes for {len(frames)} clips", "every clip has the box of its picture")
    ends = boxes[:, :2] + boxes[:, 2:]
    if (boxes[:, :2] < 0).any() or (boxes[:, 2:] < 1).any() or (ends > np.array(frames.shape[2:4])).any():
        raise UsageError(
            "a picture's box reaches outside its frame",
            f"frames are {frames.shape[2]}x{frames.shape[3]}; boxes are [y, x, height, width] in their pixels",
        )
    return boxes
