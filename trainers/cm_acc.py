"""CM-ACC: cross-modal active contrastive coding (Ma, Zeng, McDuff, Song; ICLR 2021).

Contrast with momentum encoders and a dictionary of keys per modality, like MoCo's; but what enters a dictionary is
chosen. From a pool of keys that it does not hold yet, those are taken whose *gradients* would differ most from one
another: uncertain and diverse negatives, instead of ten of the same guitar.

    avstore train cm-acc --preset tiny
    avstore train cm-acc --preset tiny --set sampling=random        # the same pool, drawn blindly

A candidate's gradient embedding is (p - onehot(argmax p)) x key, with p its softmax over the other modality's
dictionary: the gradient of its loss with respect to the last layer, had it the label it believes in. k-means++ on these
outer products (never formed: inner products factorise) picks `1 / candidates` of the pool.

What differs from the paper and its code (a research dump), and why:
* The paper draws a pool of 10 batches of unseen videos at each step and runs the key encoders on all of it. Here the
  pool is the keys of the last 10 steps, none of which the dictionary holds: each video is a candidate once, and one
  in ten enters, at a tenth of the cost; the dictionary turns over ten times slower.
* Each modality chooses its own; a dictionary is at most a quarter of the videos, and own keys are left out of the
  denominator, as in `moco`.
* k-means++ starts at the longest gradient and then draws by squared distance, from counter hashes.
* The code compares the pooled 512 features themselves, batch-normalised but neither projected nor of unit length,
  without a temperature; here two layers lead to unit vectors of 128 numbers, and the temperature is recalled.
* The rest of the recipe (rate, epochs, dictionary of 3840) is recalled or declared.
"""

# legend: B clips of this rank, n those with picture and sound, Q dictionary, P pool, D embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers import draws
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.keys import KeyQueue, in_order
from trainers.momentum import follow, momentum_copy
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, not_above, present, seeded, spread
from trainers.projectors import Norm, Projector
from trainers.towers import unit

__all__ = ["PRESETS", "CmAcc", "Config", "clips", "gradient_factor", "info_nce", "kmeans_plus_plus"]

CHOICE = 0x70696B6B  # stream of `trainers.draws`: "pikk"
SAMPLING = ("active", "random")


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: CM-ACC as its code and memory give it; what is not here is `pair.PairConfig`'s."""

    sampling: Literal["active", "random"] = "active"  # [C]; random: the paper's baseline [M]
    candidates: int = 10  # [C] batches from which one is chosen
    dictionary: int = 3840  # [M] 30 x 128; [C] 3 x 128. Never more than a quarter of the videos
    key_momentum: float = 0.9  # [C]
    temperature: float = 0.07  # [M]
    hidden: int = 512  # [ours]
    dim: int = 128  # [ours]; [C] none: the pooled 512
    head_batch_norm: bool = False  # [ours]; True in the tiny preset
    video_net: str = "r3d-18"  # [C] 3D-ResNet-18
    audio_net: str = "resnet-18"  # [ours]; [C] a ResNet-18 along time alone
    width: int = 64  # [C] 512 at the end
    pool: Literal["max", "avg"] = "avg"  # [C]
    frames: int = 16  # [C]
    fps: int | Literal["native"] = "native"  # [C] consecutive
    size: int = 112  # [C]
    seconds: float = 2.0  # [ours]
    front_end: str = "crisscross-mel80"  # [ours]; [C] 80 bands too
    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"  # [C]
    learning_rate: float = 0.03  # [ours] MoCo's; [C] 0.01 for unbounded scores
    momentum: float = 0.9  # [ours]
    weight_decay: float = 1e-4  # [ours] MoCo's
    batch: int = 128  # [C] its Kinetics run
    epochs: int = 200  # [ours]
    crop: Literal["resized", "random"] = "resized"  # [ours] see crop_area
    crop_area: tuple[float, float] = (0.25, 1.0)  # [ours] for the code's corner crops at five scales, 1 to .5 of a side
    flip: float = 0.5  # [C]
    brightness: float = 0.0  # [C] none
    contrast: float = 0.0  # [C] none
    saturation: float = 0.0  # [C] none
    hue: float = 0.0  # [C] none
    sound_gain: float = 0.0  # [ours]

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 1, "candidates", "dictionary", "hidden", "dim")
        wrong += not_above(self, 0, "temperature")
        if self.sampling not in SAMPLING:
            wrong.append(f"sampling {self.sampling!r}: {did_you_mean(self.sampling, SAMPLING)}")
        if not 0 <= self.key_momentum < 1:
            wrong.append(f"key_momentum {self.key_momentum} must lie in [0, 1)")
        return wrong


# in 400 steps a copy at .999 would hardly leave its start, and a dictionary that turns over in 31 steps ages
PRESETS = {
    "paper": Config(),
    "tiny": Config(**{**TINY, "hidden": 128, "head_batch_norm": True, "key_momentum": 0.98, "candidates": 4}),
}


# ---- loss --------------------------------------------------------------------------------------------------------


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_QD: Tensor, own_BQ: Tensor, temperature: float) -> Tensor:
    """CM-ACC eq. 1 (MoCo's): - log( exp(q . k+ / t) / (exp(q . k+ / t) + sum over the dictionary of exp(q . k / t)) ).

    (B,). own_BQ: keys that are of the query's own video; they are left out of the sum.
    """
    positive_B = (query_BD * key_BD).sum(1) / temperature
    noise_BQ = (query_BD @ queue_QD.T / temperature).masked_fill(own_BQ, -torch.inf)
    return torch.cat([positive_B[:, None], noise_BQ], 1).logsumexp(1) - positive_B


# ---- what enters the dictionary ----------------------------------------------------------------------------------


def gradient_factor(key_PD: Tensor, other_QD: Tensor, own_PQ: Tensor, temperature: float) -> Tensor:
    """p - onehot(argmax p): (P, Q), p the softmax of a candidate over the other modality's dictionary."""
    score_PQ = (key_PD @ other_QD.T / temperature).masked_fill(own_PQ, -torch.inf)
    p_PQ = score_PQ.softmax(1)
    return p_PQ - F.one_hot(p_PQ.argmax(1), p_PQ.shape[1]).to(p_PQ)


def kmeans_plus_plus(factor_PQ: Tensor, key_PD: Tensor, count: int, u_C: Tensor) -> Tensor:
    """(count,) int64: rows chosen by k-means++ among the outer products factor x key, which are not formed.

    First the longest one; then each row with a probability proportional to its squared distance from the nearest chosen
    one, by the uniform numbers `u_C` (one for each choice). Where all distances are 0, the first unchosen row.
    Raises UsageError for more than there are.
    """
    if not 0 < count <= len(key_PD) or len(u_C) < count:
        raise UsageError(f"{count} of a pool of {len(key_PD)} keys", f"with {len(u_C)} random numbers")
    f, x = factor_PQ.double(), key_PD.double()
    norm_P = f.square().sum(1) * x.square().sum(1)
    chosen = [int(norm_P.argmax())]
    nearest_P = torch.full_like(norm_P, torch.inf)
    for n in range(1, count):
        last = chosen[-1]
        distance_P = norm_P + norm_P[last] - 2 * (f @ f[last]) * (x @ x[last])
        nearest_P = torch.minimum(nearest_P, distance_P.clamp(min=0))
        nearest_P[chosen] = 0
        sums_P = nearest_P.cumsum(0)
        if float(sums_P[-1]) > 0:
            pick = int(torch.searchsorted(sums_P, u_C[n].double() * sums_P[-1], right=True))
            pick = min(pick, len(x) - 1)
            while float(nearest_P[pick]) == 0:  # a sum's rounding may end beyond the last candidate
                pick -= 1
        else:
            free_P = torch.ones_like(norm_P, dtype=torch.bool)
            free_P[chosen] = False
            pick = int(free_P.nonzero()[0, 0])
        chosen.append(pick)
    return torch.tensor(chosen, device=key_PD.device)


# ---- the method --------------------------------------------------------------------------------------------------


class CmAcc(Pair):
    """Two trunks and projectors, their momentum copies, two dictionaries, the pool. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        norm: Norm = "hidden" if config.head_batch_norm else "none"
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), norm)
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), norm)
        self.key_video, self.key_video_head = momentum_copy(self.video), momentum_copy(self.video_head)
        self.key_audio, self.key_audio_head = momentum_copy(self.audio), momentum_copy(self.audio_head)
        length = max(1, min(config.dictionary, n_rows // 4))
        self.video_keys = KeyQueue(length, config.dim, config.seed, 0)
        self.audio_keys = KeyQueue(length, config.dim, config.seed, 1)
        self.updates = 0  # steps whose keys went into a pool, over all
        self._pool: list[tuple[Tensor, Tensor]] = []  # rows (b,) and keys (b, 2, D) of a global batch each
        self._pending: list[tuple[Tensor, ...]] = []

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """NCE(v, sound keys) + NCE(a, picture keys); keeps the keys for `after_step`."""
        both_B = batch.has_picture & batch.has_sound
        video, audio = self.inputs(batch)
        v_nD = unit(present((self.video, self.video_head), video, both_B))
        a_nD = unit(present((self.audio, self.audio_head), audio, both_B))
        with torch.no_grad():
            key_v_nD = unit(present((self.key_video, self.key_video_head), video, both_B))
            key_a_nD = unit(present((self.key_audio, self.key_audio_head), audio, both_B))
        row_n = batch.row[both_B]
        if self.training:
            self._pending.append((batch.position[both_B], row_n, torch.stack([key_v_nD, key_a_nD], 1)))
        with torch.autocast(v_nD.device.type, enabled=False):
            t, v_keys, a_keys = self.config.temperature, self.video_keys, self.audio_keys
            loss_Tn = torch.stack(
                [
                    info_nce(v_nD, key_a_nD, a_keys.keys, row_n[:, None] == a_keys.rows, t),
                    info_nce(a_nD, key_v_nD, v_keys.keys, row_n[:, None] == v_keys.rows, t),
                ]
            )
            v_to_a, a_to_v = global_means(loss_Tn, torch.ones_like(loss_Tn, dtype=torch.bool))
            loss = v_to_a + a_to_v
        return loss, {
            "loss": loss.detach(),
            "video_to_audio": v_to_a.detach(),
            "audio_to_video": a_to_v.detach(),
            "dictionary": float(len(v_keys)),
            "filled": v_keys.filled(),
            "feature_std_video": spread(v_nD),
            "feature_std_audio": spread(a_nD),
        }

    def after_step(self) -> dict[str, float]:
        """Moves the copies, and the keys into the pool; a full one gives its choice to the dictionaries; collective."""
        if not self._pending:
            return {}
        row, key = in_order(*(torch.cat(x) for x in zip(*self._pending, strict=True)))
        self._pending.clear()
        for name in ("video", "video_head", "audio", "audio_head"):
            follow(self.get_submodule(f"key_{name}"), self.get_submodule(name), self.config.key_momentum)
        self._pool.append((row, key))
        self.updates += 1
        return self._choose() if len(self._pool) >= self.config.candidates else {}

    @torch.no_grad()
    def _choose(self) -> dict[str, float]:
        row_P, key_P2D = (torch.cat(x) for x in zip(*self._pool, strict=True))
        self._pool.clear()
        count = len(row_P) // self.config.candidates
        if not count:
            return {}
        queues = (self.video_keys, self.audio_keys)
        picks = []
        for modality, other in ((0, 1), (1, 0)):
            # the same on every rank: all hold the same pool and dictionaries
            update = torch.tensor([self.updates], device=row_P.device)
            word = draws.bits(draws.key(self.config.seed, CHOICE, modality), [update], len(row_P))[0]
            if self.config.sampling == "random":
                picks.append(word.argsort()[:count])
                continue
            key_PD, there = key_P2D[:, modality], queues[other]
            own = row_P[:, None] == there.rows
            factor = gradient_factor(key_PD, there.keys.to(key_PD), own, self.config.temperature)
            u = draws.below(word, 2**30).double() / 2**30
            picks.append(kmeans_plus_plus(factor, key_PD, count, u))
        for modality, queue in enumerate(queues):
            queue.push(row_P[picks[modality]], key_P2D[picks[modality], modality])
        return {"chosen": float(count), "pool": float(len(row_P))}

    def method_state(self) -> dict[str, Tensor]:
        """Both dictionaries, the pool, and how often it was fed. The copies are weights, in `state_dict()`."""
        state = {"updates": torch.tensor(self.updates)}
        for name in ("video_keys", "audio_keys"):
            state |= {f"{name}.{k}": x for k, x in getattr(self, name).state().items()}
        for n, (row, key) in enumerate(self._pool):
            state |= {f"pool.{n:03d}.rows": row, f"pool.{n:03d}.keys": key}
        return state

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. ConflictError for dictionaries of another selection or width."""
        for name in ("video_keys", "audio_keys"):
            part = {k.removeprefix(f"{name}."): x for k, x in state.items() if k.startswith(f"{name}.")}
            getattr(self, name).load_state(part)
        device = self.video_keys.keys.device
        fed = sorted(k.removesuffix(".rows") for k in state if k.startswith("pool.") and k.endswith(".rows"))
        self._pool = [(state[f"{k}.rows"].to(device).clone(), state[f"{k}.keys"].to(device).clone()) for k in fed]
        self.updates = int(state["updates"])
        self._pending.clear()
