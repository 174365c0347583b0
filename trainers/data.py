"""From a run's snapshot to batches on the device.

    for fed in Feed(store, snapshot, config, device, Plan(len(snapshot.numbers), config)): fed.batch

The reader process hands over whole frames in uint8 and int16 sound; cropping, colour, the front-end and normalisation
run here, on the batch, on the device. A clip without picture or sound is zeros after normalisation, and a False mask.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avstore import draws
from avstore.augment import (
    CROP_NUMBERS,
    SOUND_NUMBERS,
    VideoAugment,
    centre_crop,
    crop_rows,
    mask_bands,
    sound_gain,
    there,
)
from avstore.errors import ConflictError, UsageError
from avstore.frontends import apply_clip_floor, gain_rows, named, spectrogram
from avstore.loader import Loader
from avstore.packed import Decode
from avstore.sampler import Order, SequentialOrder
from avstore.selection import Selection
from avstore.views import RandomView, Views
from avstore.windows import to_samples
from trainers import jpeg_choice
from trainers.batch import Batch
from trainers.config import RunConfig
from trainers.fit import needs_of, policy_of
from trainers.needs import Needs

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.snapshot import Snapshot

Crop = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Plan:
    """How many steps a run has and which clips each takes: the counter's arithmetic. `order` is of micro-batches."""

    order: Order
    accumulate: int
    total_steps: int

    def __init__(self, n_videos: int, config: RunConfig, world: int = 1, rank: int = 0) -> None:
        loop = config.loop
        order = Order(
            n_videos,
            loop.draws,
            seed=loop.seed,
            batch_size=loop.batch // loop.accumulate,
            drop_last=loop.drop_last,
            world=world,
            rank=rank,
            distinct=loop.distinct,
        )
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "accumulate", loop.accumulate)
        object.__setattr__(self, "total_steps", loop.steps or max(1, loop.epochs * order.batches // loop.accumulate))

    @property
    def steps_per_epoch(self) -> float:
        return self.order.batches / self.accumulate


@dataclass(frozen=True)
class Fed:
    """A batch on the device; `wait`: seconds for the reader; `shrunk`: share of clips whose windows had to move closer;
    `clips`: how many it holds; `looped`, `padded`: share of its windows whose pictures loop, of those whose sound ends
    in zeros, since the video is shorter (of windows with any)."""

    batch: Batch
    wait: float
    shrunk: float
    clips: int
    looped: float = 0.0
    padded: float = 0.0


class Normaliser:
    """What turns a reader's clips into the tensors of a `Batch`: crop or augment, front-end, normalise, blank."""

    def __init__(
        self,
        needs: Needs,
        statistics: dict[str, Any] | None,
        sample_rate: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.needs, self.sample_rate, self.device, self.dtype = needs, sample_rate, device, dtype
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        if needs.sound and needs.front_end is not None:
            if statistics is None:
                raise UsageError("no statistics of the spectrogram's bins", "the run's snapshot should hold them")
            if statistics["hash"] != named(needs.front_end).hash:
                raise ConflictError(
                    f"front-end {needs.front_end} is another recipe than when this run began",
                    f"{statistics['hash']} then, {named(needs.front_end).hash} now",
                    "use the avstore that made the run",
                )
            self.mean = torch.tensor(statistics["mean"], device=device)
            self.std = torch.tensor(statistics["std"], device=device)

    def video(self, frames: Tensor, boxes: Any, here: np.ndarray, present: Tensor, crop: Crop | None = None) -> Tensor:
        """uint8 (B, T, H, W, 3) on the device -> (B, 3, T, size, size), channels last; zeros where not present.

        crop: (frames, boxes) -> normalised crops; None: the centre crop of evaluation. here, present: (B,) bool, the
        same mask on the host and on the device.
        """
        out = centre_crop(frames, boxes, self.needs.size) if crop is None else crop(frames, boxes)
        if not here.all():
            out = torch.where(present[:, None, None, None, None], out, 0)
        return out.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)

    def audio(
        self,
        waveform: Tensor,
        here: np.ndarray,
        present: Tensor,
        gain: Tensor | None = None,
        stored: Tensor | None = None,
        mask: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """int16 (B, samples) on the device -> (B, 1, F, M); zeros where not present. gain: (B,), amplitude.

        stored: float16 (B, F, M), rows of the store to use instead of the waveform. mask: what becomes of the
        normalised rows (B, F, M).
        """
        name = self.needs.front_end
        if name is None or self.mean is None or self.std is None:
            raise UsageError("no front-end", "this method hears nothing")
        if stored is not None:
            rows = apply_clip_floor(gain_rows(stored, 1.0 if gain is None else gain, name), name)
        else:
            wave = waveform.to(torch.float32) / 32768
            rows = spectrogram(wave if gain is None else wave * gain[:, None], name, self.sample_rate)
        rows = (rows - self.mean) / self.std
        if mask is not None:
            rows = mask(rows)
        if not here.all():
            rows = torch.where(present[:, None, None], rows, 0)
        return rows[:, None].to(self.dtype).contiguous(memory_format=torch.channels_last)


class Feed(Iterator[Fed]):
    """Training's batches from optimiser step `start` on. `close` ends its reader.

    Windows are cut by the method's policy (`avstore.views`); each is augmented `needs.copies` times. View k of a clip
    with V views draws as clip (video, draw * V + k): so every view has numbers of its own, and with one view they are
    those of (video, draw).

    jpeg: who decoded the pictures of the checkpoint that the run goes on from; `self.jpeg` says who does now
    (`jpeg_choice.Choice`). decoders: instead of those of `device_jpeg.available`, by name.
    """

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        config: RunConfig,
        device: torch.device,
        plan: Plan,
        start: int = 0,
        *,
        jpeg: str | None = None,
        decoders: dict[str, Decode | str] | None = None,
    ) -> None:
        needs, loop, rate = needs_of(config), config.loop, store.spec.sample_rate
        policy = policy_of(config, rate)
        self.windows, self.views = policy.views, policy.views * needs.copies
        self.copies, self.samples = needs.copies, to_samples(needs.seconds, rate) if needs.sound else 0
        self.frames = needs.frames if needs.picture else 0
        self.whole = isinstance(policy, RandomView) and policy.whole_sound  # as long as the video: nothing to pad
        self.device, self.order, self.loop = device, plan.order, loop
        self.normaliser = Normaliser(needs, snapshot.statistics, rate, device, dtype_of(loop.precision))
        self.augment = None
        if needs.picture:
            self.augment = VideoAugment(
                size=needs.size,
                crop=loop.crop,
                area=loop.crop_area,
                flip=loop.flip,
                brightness=loop.brightness,
                contrast=loop.contrast,
                saturation=loop.saturation,
                hue=loop.hue,
                grey=loop.gray,
                blur=loop.blur,
                cutout=loop.cutout,
            )
        self.labels = None
        if needs.labels:
            names = {name: i for i, name in enumerate(snapshot.labels or ())}
            self.labels = np.array([names.get(str(x), -1) for x in store.column("label", snapshot.numbers)], np.int64)
        opens = partial(
            open_loader,
            store,
            snapshot.numbers,
            needs,
            plan.order,
            policy,
            seed=loop.seed,
            threads=loop.decode_threads,
            in_process=loop.in_process,
            stored=loop.stored_spectrograms,
            device=device,
        )
        first = start * plan.accumulate

        def measure(decode: Decode | None) -> float:
            with opens(decode=decode) as loader:
                return clips_per_second(loader, device, first)

        unfit = None if not needs.picture else why_not_coded(store, needs)
        self.jpeg = jpeg_choice.choose(
            loop.jpeg if needs.picture else "cpu", device, measure, unfit=unfit, kept=jpeg, candidates=decoders
        )
        self.loader = opens(decode=self.jpeg.decode)
        self._steps = self.loader.steps(start * plan.accumulate, plan.total_steps * plan.accumulate)

    def __next__(self) -> Fed:
        raw = next(self._steps)
        on = raw.tensors(self.device)
        # a clip counts where all its windows do, on the host and on the device
        masks = {"has_picture": raw.has_picture, "has_sound": raw.has_sound}
        here: dict[str, np.ndarray] = {k: np.asarray(x if x.ndim == 1 else x.all(1)) for k, x in masks.items()}
        has = {k: on[k].clone() if on[k].dim() == 1 else on[k].all(1) for k in here}
        video = audio = share = None
        if self.augment is not None:
            video = self._each(lambda k: self._picture(raw, on, k, here["has_picture"], has["has_picture"]))
        if self.normaliser.mean is not None:
            audio = self._each(lambda k: self._sound(raw, on, k, here["has_sound"], has["has_sound"]))
        if self.samples:
            share = on["valid_samples"].to(torch.float32) / self.samples
            share = torch.where(on["has_sound"], share, 0)
            if self.views > 1:
                share = share.reshape(len(raw), self.windows).repeat_interleave(self.copies, 1)
        labels = None if self.labels is None else there(self.labels[raw.row], self.device)
        batch = Batch(
            row=on["row"].clone(),
            # positions go on over the epochs, so that the parts of one optimiser step never share one
            position=on["position"] + raw.epoch * self.order.length,
            draw=on["draw"].clone(),
            has_picture=has["has_picture"],
            has_sound=has["has_sound"],
            epoch=raw.epoch,
            seed=self.loop.seed,
            video=video,
            audio=audio,
            labels=labels,
            views=self.views,
            sound_share=share,
        )
        looped = short(raw.valid_frames, self.frames, raw.has_picture)
        padded = 0.0 if self.whole else short(raw.valid_samples, self.samples, raw.has_sound)
        return Fed(batch, raw.wait, float(raw.shrunk.mean()) if len(raw) else 0.0, len(raw), looped, padded)

    def _each(self, make: Callable[[int], Tensor]) -> Tensor:
        """One view as it is; several side by side, (B, V, ...), in a memory whose `flatten(0, 1)` is free and keeps
        the strides that convolutions want."""
        if self.views == 1:
            return make(0)
        first = make(0)
        last = first.movedim(1, -1)  # channels last
        out = last.new_empty((len(last), self.views, *last.shape[1:]))
        out[:, 0] = last
        for k in range(1, self.views):
            out[:, k] = make(k).movedim(1, -1)
        return out.movedim(-1, 2)

    def _picture(self, raw: Any, on: dict[str, Tensor], k: int, here: np.ndarray, present: Tensor) -> Tensor:
        assert self.augment is not None
        augment, u = self.augment, self.augment.draw(self.loop.seed, raw.epoch, raw.row, raw.draw * self.views + k)
        frames = self._window(on["frames"], k)
        return self.normaliser.video(frames, raw.box, here, present, lambda x, b: augment(x, b, u))

    def _sound(self, raw: Any, on: dict[str, Tensor], k: int, here: np.ndarray, present: Tensor) -> Tensor:
        loop, gain, mask = self.loop, None, None
        if loop.sound_gain or loop.time_mask or loop.freq_mask or loop.sound_crop:
            draw = raw.draw * self.views + k
            u = draws.uniform(loop.seed, "augment-sound", raw.epoch, raw.row, draw, SOUND_NUMBERS + CROP_NUMBERS)
            if loop.sound_gain:
                gain = there(sound_gain(u[..., 0], loop.sound_gain), self.device)
            if loop.time_mask or loop.freq_mask or loop.sound_crop:

                def mask(rows: Tensor) -> Tensor:
                    rows = mask_bands(rows, u[..., 1:SOUND_NUMBERS], loop.time_mask, loop.freq_mask)
                    return crop_rows(rows, u[..., SOUND_NUMBERS:], loop.sound_crop) if loop.sound_crop else rows

        stored = on.get("spectrogram")
        return self.normaliser.audio(
            self._window(on["waveform"], k),
            here,
            present,
            gain,
            None if stored is None else self._window(stored, k),
            mask,
        )

    def _window(self, x: Tensor, k: int) -> Tensor:
        return x if self.windows == 1 else x[:, k // self.copies]

    def close(self) -> None:
        self.loader.close()


def open_loader(
    store: Store,
    numbers: np.ndarray,
    needs: Needs,
    order: Order | SequentialOrder,
    views: Views,
    *,
    seed: int = 0,
    threads: int = 0,
    in_process: bool = False,
    stored: bool = False,
    device: torch.device | None = None,
    decode: Decode | None = None,
) -> Loader:
    """A loader of the clips that `needs` asks for. Frames are decoded at the smallest of the stored size's halvings
    whose centre crop still has `size` pixels. threads 0: one per spare core, at most 8. decode: pictures stay JPEG
    until they are on the device (`avstore.packed`)."""
    spec = store.spec
    frames = needs.frames if needs.picture else 0
    size = None
    if frames and spec.codec == "jpeg":
        scale = scale_of(spec.height, needs.size)
        size = (spec.height // scale, spec.width // scale)
    samples = to_samples(needs.seconds, spec.sample_rate) if needs.sound else 0
    if stored and needs.front_end is not None and needs.front_end not in store.front_ends:
        raise ConflictError(
            f"front-end {needs.front_end} is not stored in {store.path}",
            "stored_spectrograms reads it from there",
            f"avstore derive {needs.front_end}, or leave stored_spectrograms away: it is computed from the sound",
        )
    return Loader(
        store,
        Selection(np.asarray(numbers, np.int64), "", ""),
        views,
        order=order,
        frames=frames,
        fps=needs.fps,
        samples=samples,
        size=size,
        front_end=needs.front_end if stored else None,
        seed=seed,
        threads=threads or max(1, min(8, (os.cpu_count() or 1) - 1)),
        in_process=in_process,
        device=device,
        decode=decode,
    )


def scale_of(height: int, size: int) -> int:
    """The largest of 1, 2, 4, 8 by which frames of `height` lines can be divided for crops of `size` pixels."""
    return max(k for k in (1, 2, 4, 8) if k == 1 or height // k * 7 >= size * 8)


def why_not_coded(store: Store, needs: Needs) -> str | None:
    """Why the pictures of this store cannot go to a device as JPEG; None where they can."""
    if store.spec.codec != "jpeg":
        return f"the frames of {store.path} are stored {store.spec.codec}"
    scale = scale_of(store.spec.height, needs.size)
    if scale > 1:
        return f"frames of {store.spec.height} lines are read at 1/{scale} of their size: only the CPU's decoder can"
    return None


def short(valid: np.ndarray, asked: int, here: np.ndarray) -> float:
    """Share of the windows with anything in them (`here`) of which less than `asked` comes from the video; 0 of none.

    valid: int64 (B, ...), here: bool (B, ...), of `avstore.batch.Batch`.
    """
    return float(np.mean(valid[here] < asked)) if asked and bool(np.any(here)) else 0.0


MEASURED = 6  # batches of each way to decode; the first only warms up


def clips_per_second(loader: Loader, device: torch.device, first: int = 0) -> float:
    """Clips a second that come out of a loader and lie on `device` as tensors: the batches from `first` on, the device
    waited for at each."""
    clips, began = 0, 0.0
    for k, batch in enumerate(loader.steps(first, first + MEASURED)):
        batch.tensors(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k:
            clips += len(batch)
        else:
            began = time.perf_counter()
    return clips / max(time.perf_counter() - began, 1e-9)


def dtype_of(precision: str) -> torch.dtype:
    """Of what a method is given: float64 for fp64, else float32 (bf16 is autocast's)."""
    return torch.float64 if precision == "fp64" else torch.float32
