"""Fine-tuning: one network, one training part, one test part, one seed. What `bench finetune` repeats.

    recipe = make_recipe("ucf", "v", frames=32)
    tuned = tune(method, run, store, train=(numbers, labels), test=(numbers, labels), classes=101, recipe=recipe)

AVID's protocol (methods.md 6.1, its code read): pooled feature, dropout 0.5, linear; five epochs in which only the
classifier learns, *before* the schedule, then everything; Adam; training clips are random windows with the run's
augmentation; batch normalisation learns throughout, as there. Test: softmax averaged over evenly spaced, centre-cropped
clips. Preset `avcl` is S1's (clips-and-protocols.md 3).

AVID's line of single clips is of 25 of each test video, apart from the 10 that are averaged (recipe.alone).
Everything is a pure function of (weights, recipe, parts, seed) on one machine. Not here: recipes (`recipe.py`), who is
trained on and tested, what is kept, tables (`finetune.py`).
"""

# legend: B clips of a batch, n videos, K clips of each, C classes, D features

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore import draws
from avstore.augment import SOUND_NUMBERS, VideoAugment, mask_bands, sound_gain
from avstore.durable import machine_errors, write_atomic
from avstore.errors import AvstoreError, ConflictError, CorruptError, UsageError
from avstore.sampler import Order, SequentialOrder
from avstore.views import RandomView, UniformView, Views
from avstore.windows import to_samples
from benchmarks.blocks import trunk
from benchmarks.rank import folds
from benchmarks.recipe import Recipe
from trainers.batch import Batch
from trainers.data import Normaliser, open_loader
from trainers.draws import key
from trainers.fit import needs_of, policy_of
from trainers.foreign import load_tensors_only
from trainers.needs import Needs
from trainers.process import choose_device, choose_precision
from trainers.run import Run

if TYPE_CHECKING:
    from avstore.store import Store

HEAD, DROPOUT = 40, 41  # what a seed is for, beside `trainers.pair`'s small numbers
Progress = Callable[[int, int], None]


# ---- clips -------------------------------------------------------------------------------------------------------


def needs_for(run: Run, store: Store, recipe: Recipe) -> Needs:
    """The run's clip, with the recipe's frames, rate and modality. ConflictError where run or store cannot give it."""
    needs = needs_of(run.config)
    picture, sound = "v" in recipe.modality, "a" in recipe.modality
    for asked, there, word in ((picture, needs.picture, "pictures"), (sound, needs.sound, "sound")):
        if asked and not there:
            raise ConflictError(f"{run.path} was trained without {word}", f"modality {recipe.modality} needs them",
                                "choose another --modality or another run")  # fmt: skip
    if picture and recipe.fps != "native" and recipe.fps > store.spec.fps:
        raise ConflictError(
            f"{recipe.fps} frames a second are asked, {store.path} has {store.spec.fps}",
            "frames that were not kept cannot be read",
            f"--fps {store.spec.fps}, or ingest into another store with --fps {recipe.fps}",
        )
    if picture and recipe.size and recipe.size > store.spec.height:
        raise ConflictError(
            f"pictures of {recipe.size} pixels are asked, {store.path} has {store.spec.height}",
            "pixels that were not kept cannot be read",
            f"--size {store.spec.height * 7 // 8}, or ingest into another store with --profile 224",
        )
    return Needs(
        frames=recipe.frames if picture else 0,
        fps=recipe.fps,
        size=(recipe.size or needs.size) if picture else 0,
        seconds=needs.seconds if sound else 0.0,
        front_end=needs.front_end if sound else None,
        picture=picture,
        sound=sound,
    )


def clips(
    run: Run,
    store: Store,
    numbers: np.ndarray,
    needs: Needs,
    order: Order | SequentialOrder,
    device: torch.device,
    *,
    epochs: int = 1,
    first: int = 0,
    seed: int | None = None,
    blur: float | None = None,
) -> Iterator[Batch]:
    """Batches of `epochs` epochs, from epoch `first` on. seed: random windows with the run's augmentation (blur: its
    chance, None: the run's); None: evenly spaced, centred."""
    loop, rate = run.config.loop, store.spec.sample_rate
    whole = bool(getattr(policy_of(run.config, rate), "whole_sound", False))
    views: Views = UniformView(order.draws, together=not whole) if seed is None else RandomView(whole_sound=whole)
    normaliser = Normaliser(needs, run.snapshot.statistics, rate, device, torch.float32)
    samples = to_samples(needs.seconds, rate) if needs.sound else 0
    augment = None
    if needs.picture:
        augment = VideoAugment(
            size=needs.size, crop=loop.crop, area=loop.crop_area, flip=loop.flip, brightness=loop.brightness,
            contrast=loop.contrast, saturation=loop.saturation, hue=loop.hue, grey=loop.gray,
            blur=loop.blur if blur is None else blur, cutout=loop.cutout,
        )  # fmt: skip
    loader = open_loader(store, numbers, needs, order, views, seed=seed or 0, threads=loop.decode_threads,
                         in_process=loop.in_process, device=device)  # fmt: skip
    with loader:
        for raw in loader.steps(first * order.batches, epochs * order.batches):
            on = raw.tensors(device)
            video = audio = share = None
            if needs.picture:
                crop = None
                if seed is not None:
                    assert augment is not None
                    u = augment.draw(seed, raw.epoch, raw.row, raw.draw)

                    def crop(x: Tensor, boxes: Any, u: np.ndarray = u) -> Tensor:
                        return augment(x, boxes, u)

                video = normaliser.video(on["frames"], raw.box, raw.has_picture, on["has_picture"], crop)
            if needs.sound:
                gain = mask = None
                if seed is not None and (loop.sound_gain or loop.time_mask or loop.freq_mask):
                    w = draws.uniform(seed, "augment-sound", raw.epoch, raw.row, raw.draw, SOUND_NUMBERS)
                    gain = torch.from_numpy(sound_gain(w[..., 0], loop.sound_gain)).to(device)

                    def mask(rows: Tensor, w: np.ndarray = w) -> Tensor:
                        return mask_bands(rows, w[..., 1:], loop.time_mask, loop.freq_mask)

                audio = normaliser.audio(on["waveform"], raw.has_sound, on["has_sound"], gain, None, mask)
                share = torch.where(on["has_sound"], on["valid_samples"].to(torch.float32) / samples, 0)
            yield Batch(
                row=on["row"].clone(), position=on["position"].clone(), draw=on["draw"].clone(),
                has_picture=on["has_picture"].clone(), has_sound=on["has_sound"].clone(), epoch=raw.epoch,
                seed=seed or 0, video=video, audio=audio, sound_share=share,
            )  # fmt: skip


# ---- the network -------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The pooled features of a method's encoders, and a new classifier on them.

    av: [v, a]; of a method with a fusion (AVCL): [f_v, f_a], fusion included. The encoders are the method's own, so
    they change with the training. ConflictError where the method lacks an encoder.
    """

    def __init__(self, method: nn.Module, classes: int, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({m: trunk(method, m) for m in ("v", "a") if m in recipe.modality})
        if recipe.pool != "run":
            for net in self.nets.values():
                net.pool = recipe.pool  # type: ignore[assignment]
        self.fusion = getattr(method, "amfm", None) if recipe.modality == "av" else None
        self.hear: Any = getattr(method, "hear", None)  # its spectrogram as its sound network wants it
        width = sum(int(net.dim) for net in self.nets.values())  # type: ignore[arg-type,misc]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(seed, HEAD) & (2**63 - 1))
            layers: list[nn.Module] = [nn.Dropout(recipe.dropout)]
            if recipe.hidden:
                layers = [nn.Linear(width, recipe.hidden), nn.ReLU(), *layers]
            self.head = nn.Sequential(*layers, nn.Linear(recipe.hidden or width, classes))

    def features(self, batch: Batch) -> Tensor:
        """(B, D)."""
        found = {}
        if "v" in self.nets:
            found["v"] = self.nets["v"](batch.video)
        if "a" in self.nets:
            x = batch.audio
            if self.hear is not None:
                x = self.hear(x, batch.sound_share, batch if self.training else None)
            found["a"] = self.nets["a"](x)
        if self.fusion is not None:
            return torch.cat(self.fusion(found["v"].float(), found["a"].float()), 1)
        return torch.cat(list(found.values()), 1)

    def forward(self, batch: Batch, frozen: bool = False) -> Tensor:
        """(B, C) logits, float32. frozen: no gradient reaches the encoders."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = self.features(batch)
        return self.head(x.float()).float()


# ---- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """Shares of test videos (scores averaged over their clips) and of single test clips that are right: the same ones,
    or those of recipe.alone, after the last epoch or the one chosen. `epoch`: after which
    epoch of the schedule, from 1; `best`: the largest of all epochs on the test part, of select=best. `epochs`: loss
    and accuracy on the training clips of each epoch, warm-up first. `right`: 1 or 0 for each test video in order, as
    `video` counts them (of results kept by versions that did not note it: nothing)."""

    video: float
    clip: float
    epoch: int
    best: float | None
    best_epoch: int | None
    epochs: tuple[dict[str, float], ...]
    seconds: float
    right: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "epochs": list(self.epochs), "right": list(self.right)}


Part = tuple[np.ndarray, np.ndarray]  # numbers of videos in the store, their labels; both int64 (n,)


def tune(
    method: nn.Module,
    run: Run,
    store: Store,
    train: Part,
    test: Part,
    classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    scratch: bool = False,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
    keep: Callable[[Classifier], None] | None = None,
    val: Part | None = None,
    state: Path | None = None,
) -> Tuned:
    """Trains `method`'s encoders (in place) with a classifier, and tests them.

    val: what select=validation chooses the epoch by; None: a tenth of each class of `train`, held out. It is not
    trained on. state: a file that holds all that an epoch leaves to the next; where it is there, it goes on from it, to
    the same bits, and it is gone at the end.

    scratch: everything learns from the first epoch on, for as many epochs: a frozen random network would waste the
    warm-up. keep: called with the network that was tested. AvstoreError at the first loss that is not finite;
    UsageError where select=validation finds a class with one training video only, and no `val`.
    """
    began = time.monotonic()
    needs, on = needs_for(run, store, recipe), choose_device(device)
    held: Part | None = None
    if recipe.select == "validation":
        if val is None:
            train, held = _hold_out(store, train, seed)
        else:
            held = val
    net = Classifier(method, classes, recipe, seed).to(on)
    for name, x in net.nets.items():
        x.to(memory_format=torch.channels_last_3d if name == "v" else torch.channels_last)  # type: ignore[call-overload]
    low = choose_precision(recipe.precision, on) == "bf16"

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(on.type, torch.bfloat16) if low else contextlib.nullcontext()

    order = Order(len(train[0]), recipe.draws, seed=seed, batch_size=min(recipe.batch, len(train[0]) * recipe.draws))
    labels = torch.from_numpy(train[1]).to(on)
    warm, total = recipe.warm_up, recipe.warm_up + recipe.epochs
    optimiser = _optimiser(net.parameters() if scratch or not warm else net.head.parameters(), recipe)
    log: list[dict[str, float]] = []
    best: tuple[float, int] | None = None
    chosen: tuple[float, dict[str, Tensor], int] | None = None
    done, before = 0, 0.0
    there = _read_state(state) if state is not None else None
    if there is not None:
        done, before, log, best, chosen = (there[k] for k in ("done", "seconds", "log", "best", "chosen"))
        net.load_state_dict(there["net"])
        if done > warm and warm and not scratch:
            optimiser = _optimiser(net.parameters(), recipe)
        optimiser.load_state_dict(there["optimiser"])
    feed = clips(run, store, train[0], needs, order, on, epochs=total, first=done, seed=seed, blur=recipe.blur)
    with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []), contextlib.closing(feed):  # type: ignore[type-var]
        torch.manual_seed(key(seed, DROPOUT) & (2**63 - 1))  # dropout's
        if there is not None:
            torch.set_rng_state(there["random"])
            if on.type == "cuda":
                torch.cuda.set_rng_state(there["random on the device"], on)
        for epoch in range(done, total):
            if state is not None and epoch > done:
                value = {"done": epoch, "seconds": before + time.monotonic() - began, "log": log, "best": best,
                         "chosen": chosen, "net": net.state_dict(), "optimiser": optimiser.state_dict(),
                         "random": torch.get_rng_state()}  # fmt: skip
                if on.type == "cuda":
                    value["random on the device"] = torch.cuda.get_rng_state(on)
                _write_state(state, value)
            frozen = epoch < warm and not scratch
            if epoch == warm and warm and not scratch:
                optimiser = _optimiser(net.parameters(), recipe)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * recipe.decay ** sum(epoch - warm >= m for m in recipe.milestones)
            net.train()
            loss_sum, right, count = 0.0, 0, 0
            for step in range(order.batches):
                batch = next(feed)
                y = labels[batch.row]
                with autocast():
                    logits = net(batch, frozen)
                loss = F.cross_entropy(logits, y)
                now_loss = float(loss.detach())
                if not np.isfinite(now_loss):
                    what = f"the loss is {now_loss} in epoch {epoch + 1}"
                    raise AvstoreError(what, f"seed {seed}, rate {recipe.rate:g}", "a smaller --rate")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                loss_sum, count = loss_sum + now_loss * len(y), count + len(y)
                right += int((logits.detach().argmax(1) == y).sum())
                progress(epoch * order.batches + step + 1, total * order.batches)
            log.append({"loss": loss_sum / count, "accuracy": right / count})
            if epoch < warm:
                continue
            if recipe.select == "best":
                tested = scores(net, run, store, test[0], needs, recipe, on, autocast)
                now = _accuracy(tested, test[1])
                log[-1] |= {"test": now[0], "test clips": now[1]}
                if best is None or now[0] > best[0]:
                    best = (now[0], epoch - warm + 1)
            elif held is not None:
                now = _accuracy(scores(net, run, store, held[0], needs, recipe, on, autocast), held[1])
                log[-1]["validation"] = now[0]
                if chosen is None or now[0] > chosen[0]:
                    chosen = (now[0], {k: v.detach().clone() for k, v in net.state_dict().items()}, epoch - warm + 1)
    at = recipe.epochs
    if chosen is not None:
        net.load_state_dict(chosen[1])
        at = chosen[2]
    if recipe.select != "best":  # else the last epoch has just been tested
        tested = scores(net, run, store, test[0], needs, recipe, on, autocast)
    video, clip = _accuracy(tested, test[1])
    if recipe.alone:
        single = dataclasses.replace(recipe, clips=recipe.alone)
        clip = _accuracy(scores(net, run, store, test[0], needs, single, on, autocast), test[1])[1]
    if keep is not None:
        keep(net)
    seconds = round(before + time.monotonic() - began, 1)
    if state is not None:
        state.unlink(missing_ok=True)
    hits = tuple(int(r) for r in tested.mean(1).argmax(1) == test[1])
    return Tuned(video, clip, at, best and best[0], best and best[1], tuple(log), seconds, hits)


def _write_state(path: Path, value: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save(value, data)
    with machine_errors(path):
        write_atomic(path, data.getvalue())


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    again = "remove it: its fine-tuning starts again"
    try:
        value = load_tensors_only(path)
    except (ConflictError, CorruptError) as e:
        raise CorruptError(f"{path} is damaged", f"{e.what}: {e.why}", again) from e
    if not isinstance(value, dict) or not {"done", "net", "optimiser", "random"} <= set(value):
        raise CorruptError(f"{path} is damaged", "it lacks what an epoch leaves to the next", again)
    return value


@torch.no_grad()
def scores(
    net: Classifier,
    run: Run,
    store: Store,
    numbers: np.ndarray,
    needs: Needs,
    recipe: Recipe,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> np.ndarray:
    """Softmax of evenly spaced, centre-cropped clips: float32 (n, K, C). The network is put in eval mode."""
    net.eval()
    order = SequentialOrder(len(numbers), recipe.clips, batch_size=recipe.batch)
    out: np.ndarray | None = None
    for batch in clips(run, store, numbers, needs, order, device):
        with autocast():
            found = net(batch)
        p = found.softmax(1).cpu().numpy()
        if not np.isfinite(p).all():
            raise AvstoreError("scores are not finite", "the fine-tuning diverged", "a smaller --rate")
        if out is None:
            out = np.empty((len(numbers), recipe.clips, p.shape[1]), np.float32)
        out[batch.row.cpu().numpy(), batch.draw.cpu().numpy()] = p
    if out is None:
        raise UsageError("nobody to test", "the part has no video")
    return out


def _accuracy(p: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(of videos, of clips)."""
    return float((p.mean(1).argmax(1) == labels).mean()), float((p.argmax(2) == labels[:, None]).mean())


def _optimiser(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=recipe.rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=recipe.rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _hold_out(store: Store, train: Part, seed: int) -> tuple[Part, Part]:
    """Training without a tenth of each class, and that tenth."""
    numbers, labels = train
    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    if smallest < 2:
        raise UsageError("a class has one training video only", "none is left to choose the epoch by", "--select last")
    held = folds([store.key(int(n)) for n in numbers], labels.tolist(), min(10, smallest), seed) == 0
    return (numbers[~held], labels[~held]), (numbers[held], labels[held])
