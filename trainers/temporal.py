"""Temporally cognizant AVID-CMA: "Enhancing contrastive learning with temporal cognizance for audio-visual
representation generation" (Lavania, Sundaram, Srinivasan, Kirchhoff; no public code).

AVID-CMA knows what is seen and heard together, not what comes before and after. Here T consecutive snippets of a video
go through its two branches, are joined to one token each, and a Transformer has to reconstruct the branch outputs of
those that were masked at its input, from the past and the future around them. Epochs of this reconstruction alternate
with epochs of the contrastive loss, so that nothing has to weigh one against the other.

    avstore train temporal                        # trains `avid`, then `avid-cma`, where there is no such run
    avstore train temporal --preset tiny
    avstore train temporal --set bank_rows=video --set snippets=3

What differs from the paper, and what it leaves open (all of it fields of the config):
* v_t and a_t of eq. 4 are the pooled 512-d outputs of the branches, without gradient as targets: with gradient,
  branches that are constant solve eq. 4. `target=head`, `detach_targets=False` are the other readings.
* Eq. 4 is printed with a norm, not its square; a 1e-12 stands inside the root. `squared=True` for the square.
* T = 5 snippets at a hop of 2 s: with a smaller one the 2-s sound windows overlap, and the neighbours of a masked
  snippet show part of it (`sound_overlap` in the metrics). Masked are max(1, floor(.3 T + .5)) of them, always by one
  learned token (no BERT 80/10/10), the whole joint token at once. Positions are sinusoids of the clip index.
* Eqs. 1-3 are sums; the code of AVID-CMA takes halves. Default: the code's scale (`loss_scale`), as in `avid-cma`,
  with Z as AVID left it and the first 64 negatives for L_M.
* The memory is one per snippet, as the paper defines it; `bank_rows=video` keeps AVID-CMA's one per video (then the
  embeddings of a video's snippets are averaged). It moves only in contrastive steps, where it is scored. No snippet of
  the own video is a negative (`exclude_self`).
* A memory of snippets begins as its video's, T times. While all T are equal, positives are mined over videos and lie at
  the same t: among equal rows 32 of them would be of seven videos. Later they are snippets of any other video;
  `own_positives` for those of the own one too, which the paper neither asks for nor excludes.
* Row t is the t-th snippet of a run that lies anywhere in its video: in one longer than T snippets it is no fixed place
  of the video. `start=centre` fixes the places, and then never shows the others.
* The paper trains on AudioSet's balanced part, from an AVID-CMA of all of it: with `--init RUN` and another store or
  selection, networks and Z are that run's, and its networks embed the new videos once to fill the memory (`memory.py`).
* A snippet whose sound lies outside its video is no token and no target. Runs longer than the video move closer
  together first (`shrunk` in the metrics).
"""

# legend: B videos, T snippets of each, S = B * T, C branch output, W Transformer width, K negatives, P positives,
#         N rows of the bank, D embedding; Gamma: the masked steps of a video

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError, did_you_mean
from avstore.views import Snippets
from avstore.windows import to_samples
from trainers import distributed, draws
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.encoders import encode
from trainers.needs import Needs
from trainers.negatives import draw_negatives
from trainers.positives import AGREEMENTS, Mined, mine_positives
from trainers.spread import feature_std
from trainers.towers import Towers, at_least_float32, unit

MASK = 0x6D61736B  # "mask": the stream of draws that chooses Gamma
EPSILON = 1e-12  # inside the root of eq. 4: its gradient at 0 is 0, not NaN


@dataclass(frozen=True)
class Config:
    """[S0] the paper, [C] the authors' code of AVID-CMA, [ours] what neither says."""

    snippets: int = 5  # [ours] T; [S0] is silent: 5 of 2 s fill a video of 10 s
    hop: float = 2.0  # [ours] seconds from a snippet to the next: no sound is in two of them
    start: Literal["random", "centre"] = "random"  # [ours] where the run of snippets lies in its video
    bank_rows: Literal["snippet", "video"] = "snippet"  # [S0] section 3: S is the set of all snippets in all videos
    alternate: Literal["epoch", "step"] = "epoch"  # [S0] L_rec first, then L_AVID-CMA; step: for runs of few epochs
    mask: float = 0.3  # [S0] section 5, |Gamma| / T
    target: Literal["trunk", "head"] = "trunk"  # [ours] which output of a branch v_t and a_t are
    detach_targets: bool = True  # [ours]
    squared: bool = False  # [S0] eq. 4: a norm
    model_width: int = 512  # [ours] of the Transformer
    heads: int = 8  # [S0] section 5
    layers: int = 2  # [S0] section 5
    feed_forward: int = 2048  # [ours]
    dropout: float = 0.1  # [ours] BERT's
    positives: int = 32  # [S0] section 5, |P_i|
    agreement: Literal["consensus", "union", "video", "audio"] = "consensus"  # [C]
    refresh_epochs: int = 5  # [C] as avid-cma
    engine: Literal["auto", "faiss", "torch"] = "auto"  # candidates of the mining; exact with each [ours]
    weight_cross_instance: float = 0.5  # [C] L_AVID; [S0] 1 (see loss_scale)
    weight_within_positive: float = 0.5  # [C] L_M; [S0] lambda |P| = 1
    loss_scale: Literal["code", "paper"] = "code"  # [C] halves of both directions; paper: eqs. 1-3
    within_negatives: int = 64  # [C] the first so many of the negatives in L_M; 0: all
    exclude_self: bool = True  # [ours] False: snippets of the own video may be drawn as negatives
    own_positives: bool = False  # [ours] True: snippets of the own video may be mined as positives
    negatives: int = 1024  # [C] K
    temperature: float = 0.07  # [C]
    bank_momentum: float = 0.5  # [C]
    video_depth: int = 18  # [S0] section 5
    audio_depth: int = 10  # [S0] "9 layer (2D) CNN"
    width: int = 64  # [C]
    small: bool = False  # [C]
    pool: Literal["max", "avg"] = "max"  # [C]
    hidden: int = 512  # [C]
    dim: int = 128  # [C]
    head_batch_norm: bool = False  # [C]; True in the tiny preset [ours]
    frames: int = 8  # [C] k of [S0], which gives no number for training
    fps: int = 16  # [C]
    size: int = 224  # [S0] section 5
    seconds: float = 2.0  # [S0] 200 x 257 for each snippet
    front_end: str = "avid-linear257"  # [S0] section 5
    learning_rate: float = 1e-4  # [ours] Adam, constant
    warmup_steps: int = 0  # [ours]
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [ours]
    weight_decay: float = 1e-5  # [C]
    batch: int = 32  # [ours] videos of a step: T times as many snippets
    epochs: int = 20  # [ours] ten of each loss
    draws: int = 1  # [ours] runs of snippets per video and epoch
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("start", ("random", "centre")),
            ("bank_rows", ("snippet", "video")),
            ("alternate", ("epoch", "step")),
            ("target", ("trunk", "head")),
            ("agreement", AGREEMENTS),
            ("engine", ("auto", "faiss", "torch")),
            ("loss_scale", ("code", "paper")),
            ("pool", ("max", "avg")),
            ("schedule", ("constant", "cosine", "multistep")),
        ):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}")
        at_least_one = (
            "model_width", "heads", "layers", "feed_forward", "positives", "refresh_epochs", "negatives", "width",
            "hidden", "dim", "batch", "epochs", "draws",
        )  # fmt: skip
        wrong += [f"{n} {getattr(self, n)} must be at least 1" for n in at_least_one if getattr(self, n) < 1]
        wrong += [
            f"{name} {getattr(self, name)} must be above 0"
            for name in ("hop", "temperature", "learning_rate")
            if not getattr(self, name) > 0
        ]
        if self.snippets < 2:
            wrong.append(f"snippets {self.snippets}: a masked one needs at least another to be reconstructed from")
        if not 0 < self.mask < 1:
            wrong.append(f"mask {self.mask} must lie between 0 and 1")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout {self.dropout} must lie in [0, 1)")
        if self.heads > 0 and self.model_width % self.heads:
            wrong.append(f"model_width {self.model_width} does not divide into {self.heads} heads")
        if self.model_width % 2:
            wrong.append(f"model_width {self.model_width} must be even: positions are pairs of sine and cosine")
        if not 0 <= self.within_negatives <= self.negatives:
            wrong.append(f"within_negatives {self.within_negatives} must lie in 0 (all) .. negatives {self.negatives}")
        weights = (self.weight_cross_instance, self.weight_within_positive)
        if min(weights) < 0 or sum(weights) == 0:
            wrong.append(f"weights {weights} must not be negative, nor all zero")
        if wrong:
            raise UsageError("the configuration of temporal does not hold", "; ".join(wrong), "correct it with --set")


# a few hundred clips of 3 s, after a tiny AVID-CMA, whose nets and weights of the terms these are [ours]
TINY = Config(
    snippets=3,
    hop=1.0,
    alternate="step",
    model_width=64,
    feed_forward=128,
    dropout=0.0,
    video_depth=10,
    width=16,
    pool="avg",
    hidden=128,
    head_batch_norm=True,
    frames=8,
    fps=8,
    size=64,
    seconds=1.0,
    negatives=64,
    within_negatives=4,
    weight_cross_instance=0.8,
    weight_within_positive=0.2,
    batch=12,
    learning_rate=5e-4,
    warmup_steps=10,
    schedule="cosine",
    epochs=4,
    refresh_epochs=2,
)
PRESETS = {"paper": Config(), "tiny": TINY}


def snippet_views(config: Config, sample_rate: int) -> Snippets:
    """How the snippets are cut: `snippets` windows, `hop` apart."""
    return Snippets(config.snippets, to_samples(config.hop, sample_rate), config.start == "centre")


# ---- losses: per sample, no state -----------------------------------------------------------------------------


def nce(score_pos_SP: Tensor, score_neg_SK: Tensor, partition: Tensor | float) -> Tensor:
    """L_NCE, mean over the positives of eqs. 1 and 2 (as in `avid_cma.py`): (S,)."""
    c = torch.log(torch.as_tensor(partition, dtype=torch.float64) * score_neg_SK.shape[1]).to(score_neg_SK)
    return -F.logsigmoid(score_pos_SP - c).mean(1) - F.logsigmoid(c - score_neg_SK).sum(1)


def contrast(
    query_SD: Tensor, pos_SPD: Tensor, neg_SKD: Tensor, partition: Tensor | float, temperature: float
) -> Tensor:
    """A term of eq. 1 (one positive, the other modality's memory) or of eq. 2 times lambda = 1 / |P| (own): (S,)."""
    pos_SP = torch.einsum("sd,spd->sp", query_SD, pos_SPD) / temperature
    neg_SK = torch.einsum("sd,skd->sk", query_SD, neg_SKD) / temperature
    return nce(pos_SP, neg_SK, partition)


def reconstruction(guess_BTC: Tensor, target_BTC: Tensor, masked_BT: Tensor, squared: bool = False) -> Tensor:
    """Eq. 4, one of its two terms: (1 / |Gamma|) sum over t in Gamma of || guess_t - target_t ||_2; (B,).

    masked_BT: bool, Gamma of each video; a video without masked steps gives 0. squared: the square of the norm.
    """
    square_BT = (guess_BTC - target_BTC).square().sum(-1)
    far_BT = square_BT if squared else (square_BT + EPSILON).sqrt()
    return torch.where(masked_BT, far_BT, 0).sum(1) / masked_BT.sum(1).clamp(min=1)


# ---- which snippets are positives -------------------------------------------------------------------------------


def of_others(mined: Mined, row_Q: Tensor, snippets: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of more mined rows that are of other videos than the query's: rows (Q, k), ascending, and scores.

    Row r is of video r // snippets. Of k + snippets - 1 or of all rows, the best k that are not the own ones are the
    best k of all others: what was certified stays so.
    """
    own_QM = mined.rows // snippets == (row_Q // snippets)[:, None]
    score_QM, order_QM = torch.where(own_QM, -torch.inf, mined.agreement).sort(dim=1, descending=True, stable=True)
    rows_QK, place_QK = mined.rows.gather(1, order_QM)[:, :k].sort(1)
    return rows_QK, score_QM[:, :k].gather(1, place_QK)


# ---- which steps are masked -------------------------------------------------------------------------------------


def masked_steps(here_BT: Tensor, share: float, bits_BT: Tensor) -> Tensor:
    """Gamma: (B, T) bool, max(1, floor(share * n + 1/2)) of the n steps of each video that are there.

    The steps of the smallest bits are taken, so equal bits give equal masks. At least one step stays visible; a video
    with fewer than two steps has no Gamma.
    """
    n_B = here_BT.sum(1)
    count_B = (share * n_B + 0.5).floor().long().clamp(min=1).minimum(n_B - 1).clamp(min=0)
    order_BT = torch.where(here_BT, bits_BT, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    rank_BT = order_BT.argsort(dim=1, stable=True)
    return (rank_BT < count_B[:, None]) & here_BT


# ---- the Transformer ----------------------------------------------------------------------------------------------


class Context(nn.Module):
    """Projection block, Transformer encoder, split block (Fig. 1). Widths in, inside and out: C + C, W, C + C."""

    def __init__(
        self, video_dim: int, audio_dim: int, width: int, heads: int, layers: int, feed_forward: int, dropout: float
    ) -> None:
        super().__init__()
        self.sizes = (video_dim, audio_dim)
        joint = video_dim + audio_dim
        self.project = nn.Sequential(nn.Linear(joint, width), nn.ReLU(), nn.Linear(width, width))
        self.token = nn.Parameter(0.02 * torch.randn(width))  # what a masked step shows
        layer = nn.TransformerEncoderLayer(
            width, heads, feed_forward, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.split = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, joint))

    def joint(self, v_BTC: Tensor, a_BTC: Tensor, here_BT: Tensor, masked_BT: Tensor | None = None) -> Tensor:
        """Joint representations with their context: (B, T, W). Steps that are not `here` are not attended to."""
        x_BTW = self.project(torch.cat([v_BTC, a_BTC], -1))
        if masked_BT is not None:
            x_BTW = torch.where(masked_BT[..., None], self.token.to(x_BTW.dtype), x_BTW)
        x_BTW = x_BTW + positions(x_BTW.shape[1], x_BTW.shape[2]).to(x_BTW)
        # a video of which nothing is here would have nothing to attend to: its rows are nobody's, but not NaN
        absent_BT = ~here_BT & here_BT.any(1, keepdim=True)
        return self.encoder(x_BTW, src_key_padding_mask=absent_BT)

    def forward(self, v_BTC: Tensor, a_BTC: Tensor, here_BT: Tensor, masked_BT: Tensor) -> tuple[Tensor, Tensor]:
        """v-hat and a-hat of every step: (B, T, C) each."""
        sight, sound = self.split(self.joint(v_BTC, a_BTC, here_BT, masked_BT)).split(self.sizes, -1)
        return sight, sound


def positions(steps: int, width: int) -> Tensor:
    """Sinusoids of the clip index 0 .. steps - 1 (Vaswani et al.), float64 (steps, width): sines, then cosines."""
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(steps, dtype=torch.float64)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


# ---- the method ------------------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """AVID-CMA's towers and bank, and the Transformer. Starts from a trained AVID-CMA: `load_avid_cma`."""

    unused_parameters = True  # heads learn nothing from L_rec, the Transformer nothing from L_AVID-CMA

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__()
        rows = n_rows * config.snippets if config.bank_rows == "snippet" else n_rows
        own = config.snippets if config.bank_rows == "snippet" and not config.own_positives else 1
        if config.positives > rows - own:
            raise UsageError(
                f"{config.positives} positives in a bank of {rows} rows ({n_rows} videos)",
                "each row needs that many others" + (" of other videos" if own > 1 else ""),
                "select more videos, or --set positives=... smaller",
            )
        self.config = config
        self.towers = Towers(
            seed=config.seed,
            video_depth=config.video_depth,
            audio_depth=config.audio_depth,
            width=config.width,
            small=config.small,
            pool=config.pool,
            hidden=config.hidden,
            dim=config.dim,
            head_batch_norm=config.head_batch_norm,
        )
        sizes = (self.towers.video.dim, self.towers.audio.dim) if config.target == "trunk" else (config.dim,) * 2
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.context = Context(
                *sizes, config.model_width, config.heads, config.layers, config.feed_forward, config.dropout
            )
        self.bank = MemoryBank(rows, config.dim, config.seed, config.bank_momentum)
        self.partition: Tensor | None = None  # Z, AVID's, never changed
        self.positives: Tensor | None = None  # (N, P) int64, ascending; -1: the row has none
        self.refreshed = -1  # epoch of the last mining
        self.steps = 0  # optimiser steps so far, for alternate=step
        self.needs = Needs(
            frames=config.frames,
            fps=config.fps,
            size=config.size,
            seconds=config.seconds,
            front_end=config.front_end,
        )
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Temporal:
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self.positives = None if self.positives is None else fn(self.positives)
        return self

    def load_avid_cma(self, weights: dict[str, Tensor], method_state: dict[str, Tensor]) -> None:
        """Start from an AVID-CMA checkpoint: towers, bank and Z. A bank of snippets takes their video's memory each.

        Raises ConflictError where the nets or the selection differ, or where that run has no partition constant.
        """
        mine = {f"towers.{name}": x for name, x in self.towers.state_dict().items()}
        differing = sorted(
            name
            for name in mine.keys() | weights.keys()
            if name not in mine or name not in weights or mine[name].shape != weights[name].shape
        )
        if differing:
            raise ConflictError(
                f"the AVID-CMA run has other networks: {len(differing)} tensors differ, first {differing[0]}",
                "the branches go on with its weights",
                "use the same depth, width, head and preset for both",
            )
        if "partition" not in method_state:
            raise ConflictError(
                "the run to start from has no partition constant", "it never took a step", "train it first"
            )
        self.towers.load_state_dict({name.removeprefix("towers."): x for name, x in weights.items()})
        bank = {k.removeprefix("bank."): x for k, x in method_state.items() if k.startswith("bank.")}
        if self.config.bank_rows == "snippet":
            bank = {k: x.repeat_interleave(self.config.snippets, 0) for k, x in bank.items()}
        self.bank.load_state(bank)
        self.partition = method_state["partition"].to(self.bank.memory.device, torch.float64).clone()
        self.positives, self.refreshed, self.steps = None, -1, 0

    def reconstructs(self, epoch: int) -> bool:
        """Whether this epoch (or step) learns by L_rec: the first does, then every other."""
        return (epoch if self.config.alternate == "epoch" else self.steps) % 2 == 0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """This rank's loss (world * local sum / global count) and detached metrics of the same scale."""
        video_S, audio_S, mask_BT2 = self._snippets(batch)
        if self.reconstructs(batch.epoch):
            return self._reconstruct(batch, video_S, audio_S, mask_BT2)
        return self._contrast(batch, video_S, audio_S, mask_BT2)

    def _snippets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (S, 3, T', H, W), sounds (S, 1, F, M) of all snippets, and which are there: bool (B, T, 2)."""
        c = self.config
        if batch.video is None or batch.audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        if batch.video.dim() != 6 or batch.video.shape[1] != c.snippets:
            raise UsageError(
                f"a batch of shape {tuple(batch.video.shape)}", f"it wants {c.snippets} snippets of each video"
            )
        sound_BT = batch.has_sound[:, None].expand(-1, c.snippets)
        if batch.sound_share is not None:
            sound_BT = sound_BT & (batch.sound_share > 0)
        mask_BT2 = torch.stack([batch.has_picture[:, None].expand(-1, c.snippets), sound_BT], -1)
        return batch.video.flatten(0, 1), batch.audio.flatten(0, 1), mask_BT2

    def _reconstruct(
        self, batch: Batch, video_S: Tensor, audio_S: Tensor, mask_BT2: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Eq. 4. A step is a token where its sound is there (and its picture, where the video has one)."""
        c, t = self.config, self.towers
        here_BT = mask_BT2.any(-1) & (mask_BT2[..., 1] | ~batch.has_sound[:, None])
        if c.target == "head":
            v_SC, a_SC = t(video_S, audio_S, mask_BT2[..., 0].flatten(), mask_BT2[..., 1].flatten())
        else:
            v_SC = at_least_float32(encode((t.video,), video_S, mask_BT2[..., 0].flatten()))
            a_SC = at_least_float32(encode((t.audio,), audio_S, mask_BT2[..., 1].flatten()))
        v_BTC, a_BTC = (x.unflatten(0, here_BT.shape) for x in (v_SC, a_SC))
        bits_BT = draws.bits(draws.key(batch.seed, MASK, batch.epoch), [batch.row, batch.draw], c.snippets)
        masked_BT = masked_steps(here_BT, c.mask, bits_BT)
        guess_v, guess_a = self.context(v_BTC, a_BTC, here_BT, masked_BT)
        with torch.autocast(v_BTC.device.type, enabled=False):
            target_v, target_a = (x.detach() if c.detach_targets else x for x in (v_BTC, a_BTC))
            loss_2B = torch.stack(
                [
                    reconstruction(at_least_float32(guess_v), target_v, masked_BT, c.squared),
                    reconstruction(at_least_float32(guess_a), target_a, masked_BT, c.squared),
                ]
            )
            some_B = masked_BT.any(1)
            mean_2 = distributed.global_means(
                loss_2B, torch.stack([some_B & batch.has_picture, some_B & batch.has_sound])
            )
            loss = mean_2.sum()
        sight, sound = mean_2.detach().unbind()
        metrics: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "reconstruction": loss.detach(),
            "reconstruction_video": sight,
            "reconstruction_audio": sound,
        }
        return loss, metrics | self._spread(v_SC, a_SC, mask_BT2)

    def _contrast(
        self, batch: Batch, video_S: Tensor, audio_S: Tensor, mask_BT2: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Eq. 3 over every snippet."""
        c = self.config
        if self.positives is None or self.partition is None:
            raise UsageError(
                "the temporal model has no positives to learn from",
                "it starts from a trained AVID-CMA and mines positives",
                "call load_avid_cma and start_epoch first",
            )
        mask_S2 = mask_BT2.flatten(0, 1)
        v_SD, a_SD = self.towers(video_S, audio_S, *mask_S2.unbind(1))
        index_T = torch.arange(c.snippets, device=batch.row.device)
        row_BT = self._rows(batch.row)
        if self.training:
            position_S = (batch.position[:, None] * c.snippets + index_T).flatten()
            embedding = torch.stack([v_SD, a_SD], 1).detach()
            self._pending.append((position_S, row_BT.flatten(), embedding, mask_S2))
        with torch.autocast(v_SD.device.type, enabled=False):
            memory, row_S = self.bank.memory, row_BT.flatten()
            positive_SP = self.positives[row_S]
            negative_SK = self.draw(batch, row_BT, positive_SP.unflatten(0, row_BT.shape))
            own_S2D, neg_SK2D = memory[row_S], memory[negative_SK]
            pos_SP2D = memory[positive_SP.clamp(min=0)]
            few_SK2D = neg_SK2D[:, : c.within_negatives] if c.within_negatives else neg_SK2D
            both_S, mined_S = mask_S2.all(1), (positive_SP >= 0).all(1)
            z, t = self.partition, c.temperature
            loss_4S = torch.stack(
                [
                    contrast(v_SD, own_S2D[:, None, 1], neg_SK2D[:, :, 1], z, t),  # eq. 1, first term
                    contrast(a_SD, own_S2D[:, None, 0], neg_SK2D[:, :, 0], z, t),  # eq. 1, second term
                    contrast(v_SD, pos_SP2D[:, :, 0], few_SK2D[:, :, 0], z, t),  # eq. 2, first term
                    contrast(a_SD, pos_SP2D[:, :, 1], few_SK2D[:, :, 1], z, t),  # eq. 2, second term
                ]
            )
            mask_4S = torch.stack([both_S, both_S, mask_S2[:, 0] & mined_S, mask_S2[:, 1] & mined_S])
            each = 0.5 if c.loss_scale == "code" else 2.0  # eq. 3: L_AVID + lambda L_M, with weights of one half: x 2
            avid, cma = (each * distributed.global_means(loss_4S, mask_4S)).view(2, 2).sum(1).unbind()
            loss = c.weight_cross_instance * avid + c.weight_within_positive * cma
        metrics: dict[str, float | Tensor] = {
            "loss": loss.detach(),
            "contrastive": loss.detach(),
            "cross_instance": avid.detach(),
            "within_positive": cma.detach(),
        }
        return loss, metrics | self._spread(v_SD, a_SD, mask_BT2)

    def _rows(self, row_B: Tensor) -> Tensor:
        """(B, T) bank rows of the snippets."""
        index_T = torch.arange(self.config.snippets, device=row_B.device)
        if self.config.bank_rows == "snippet":
            return row_B[:, None] * self.config.snippets + index_T
        return row_B[:, None].expand(-1, self.config.snippets)

    def draw(self, batch: Batch, row_BT: Tensor, positive_BTP: Tensor) -> Tensor:
        """(S, K) negatives: never a positive, and no snippet of the own video unless `exclude_self` is off."""
        c = self.config
        excluded_SE = positive_BTP.flatten(0, 1)
        if c.exclude_self:
            own_BE = row_BT if c.bank_rows == "snippet" else row_BT[:, :1]
            own_SE = own_BE[:, None].expand(-1, c.snippets, -1).flatten(0, 1)
            # excluded rows must be distinct: a positive that is of the own video counts once
            again_SP = (excluded_SE[:, :, None] == own_SE[:, None]).any(-1)
            excluded_SE = torch.cat([own_SE, torch.where(again_SP, -1, excluded_SE)], 1)
        index_S = torch.arange(c.snippets, device=row_BT.device).repeat(len(row_BT))
        return draw_negatives(
            len(self.bank),
            c.negatives,
            excluded_SE,
            seed=batch.seed,
            epoch=batch.epoch,
            row_B=batch.row.repeat_interleave(c.snippets) * c.snippets + index_S,
            draw_B=batch.draw.repeat_interleave(c.snippets),
        )

    def _spread(self, v_SC: Tensor, a_SC: Tensor, mask_BT2: Tensor) -> dict[str, float | Tensor]:
        """Feature deviation of both branches: see `spread.py`."""
        sight, sound = mask_BT2.flatten(0, 1).unbind(1)
        return {
            "feature_std_video": feature_std(unit(v_SC), sight),
            "feature_std_audio": feature_std(unit(a_SC), sound),
        }

    def after_step(self) -> dict[str, float]:
        """Move the bank by the embeddings of every contrastive `step` since the last call; count the step."""
        self.steps += 1
        if not self._pending:
            return {}
        position, row, embedding, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        return self.bank.update(position, row, embedding, mask)

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Mine the positives, where this epoch needs them and they are missing or `refresh_epochs` old.

        Called again for an epoch already begun (a resumed run) it does nothing: the bank has moved on since.
        """
        c = self.config
        stats = {"sound_overlap": max(0.0, 1 - c.hop / c.seconds)} if epoch == 0 else {}
        needed = c.alternate == "step" or not self.reconstructs(epoch)
        if needed and (self.positives is None or epoch - self.refreshed >= c.refresh_epochs):
            stats |= self.refresh(epoch)
        return stats

    def refresh(self, epoch: int) -> dict[str, float]:
        """Positives from the bank as it is; ranks share the rows and gather them."""
        c, steps = self.config, self.config.snippets if self.config.bank_rows == "snippet" else 1
        distributed.require_equal(self.bank.checksum(), "the memory bank")
        memory, complete = self.bank.memory, self.bank.complete()
        equal = steps > 1 and self._snippets_are_equal()
        over_videos = equal and int(complete[::steps].sum()) > c.positives
        if over_videos:
            memory, complete = memory[::steps].contiguous(), complete[::steps]
        own = 0 if over_videos or c.own_positives else steps - 1  # rows to pass over
        n, world, rank = len(memory), distributed.world(), distributed.rank()
        if own:
            there_N = complete.view(-1, steps).sum(1).repeat_interleave(steps)
            others = int(complete.sum()) - int(torch.where(complete, there_N, 0).max())
            if others < c.positives:
                raise UsageError(
                    f"{c.positives} positives among {others} snippets of other videos",
                    "each needs that many with sight and sound in the bank",
                    "ask for fewer (--set positives=...), or --set own_positives=true",
                )
        share = torch.arange(n * rank // world, n * (rank + 1) // world, device=memory.device)
        mined = mine_positives(
            memory,
            min(c.positives + own, int(complete.sum()) - 1) if own else c.positives,
            agreement=c.agreement,
            engine=c.engine,
            eligible_N=complete,
            query_Q=share,
        )
        rows_QP, score_QP = (mined.rows, mined.agreement) if not own else of_others(mined, share, steps, c.positives)
        rows_NP = distributed.all_gather_rows(rows_QP)
        if over_videos:  # each snippet's are the snippets of the same t
            step_T = torch.arange(steps, device=rows_NP.device)[:, None]
            rows_NP = torch.where(rows_NP[:, None] < 0, -1, rows_NP[:, None] * steps + step_T).flatten(0, 1)
        self.positives, self.refreshed = rows_NP, epoch
        part = len(share) - mined.left_out
        agreement = float(score_QP[complete[share]].mean()) if part else 0.0
        counts = [part, mined.certified * part, mined.ties, mined.left_out, agreement * part]
        sums = distributed.all_reduce_sum(torch.tensor(counts, dtype=torch.float64, device=share.device)).tolist()
        return {
            "positives/certified": sums[1] / max(sums[0], 1),
            "positives/ties": sums[2],
            "positives/left_out": sums[3],
            "positives/agreement": sums[4] / max(sums[0], 1),
            "positives/faiss": mined.stats["faiss"],
        }

    def _snippets_are_equal(self) -> bool:
        """Whether each video's snippets still have one memory, that of AVID-CMA."""
        return all(
            bool((x == x[:, :1]).all())
            for x in (y.unflatten(0, (-1, self.config.snippets)) for y in self.bank.state().values())
        )

    def method_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `state_dict()`: bank, Z, positives, epoch of the mining, steps."""
        state = {f"bank.{name}": x for name, x in self.bank.state().items()}
        for name in ("partition", "positives"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return state | {"refreshed": torch.tensor(self.refreshed), "steps": torch.tensor(self.steps)}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. Raises ConflictError for a bank or positives of another shape."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        device, wanted = self.bank.memory.device, (len(self.bank), self.config.positives)
        table, z = state.get("positives"), state.get("partition")
        if table is not None and tuple(table.shape) != wanted:
            raise ConflictError(
                f"the saved table of positives is {tuple(table.shape)}, this run's {wanted}",
                "it was mined with another configuration",
                "use that configuration, or start a new run with --run",
            )
        self.positives = None if table is None else table.to(device).clone()
        self.partition = None if z is None else z.to(device, torch.float64).clone()
        self.refreshed, self.steps = int(state["refreshed"]), int(state["steps"])
        self._pending.clear()

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """Towers `video`, `audio` (unit length) and `video-trunk`, `audio-trunk`. See `Towers.embed`."""
        return self.towers.embed(video, audio)

    def joint(self, v_BTC: Tensor, a_BTC: Tensor, here_BT: Tensor | None = None) -> Tensor:
        """F_1 ... F_T with their context, nothing masked: (B, T, W), from the branch outputs of consecutive snippets
        (`video-trunk`, `audio-trunk`; with target=head `video`, `audio`). here_BT: bool, False where there is none.

        The audio-visual features of Table 2. Any T; the model was trained on `snippets` of them, `hop` apart.
        """
        for x, size, name in ((v_BTC, self.context.sizes[0], "sight"), (a_BTC, self.context.sizes[1], "sound")):
            if x.dim() != 3 or x.shape[2] != size:
                raise UsageError(
                    f"{name} of shape {tuple(x.shape)}", f"the model joins (videos, snippets, {size}) of each modality"
                )
        here = torch.ones(v_BTC.shape[:2], dtype=torch.bool, device=v_BTC.device) if here_BT is None else here_BT
        return at_least_float32(self.context.joint(v_BTC, a_BTC, here))
