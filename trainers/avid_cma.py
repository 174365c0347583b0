"""AVID-CMA: AVID with cross-modal agreement (Morgado, Vasconcelos, Misra; CVPR 2021, arXiv 2004.12943), as printed in
"Enhancing contrastive learning with temporal cognizance" (Lavania et al.), eqs. 1-3.

AVID knows one positive per video. CMA looks into the trained memory for other videos that agree in sight *and* in
sound, and pulls a video towards the sights and the sounds of these positives, each within its own modality, beside
the cross-modal task. Agreement in both senses is what makes a wrong positive rare; they are mined anew every few
epochs.

    avstore train avid-cma                        # trains `avid` first where there is no such run
    avstore train avid-cma --preset tiny
    avstore train avid-cma --set within_negatives=0

What differs from the paper or the authors' code, and why:
* Eq. 3 is a plain sum with lambda = 1/32; the code that made the numbers takes halves. Default: the code's scale;
  `loss_scale=paper` gives L_AVID + lambda L_M with lambda = 1 / |P|, that is the mean over P either way.
* Eq. 2 leaves N_i open; the code contrasts positives with the first 64 of the negatives. `within_negatives=0`: all.
* The code excludes only the positives from the negatives, so a video can be its own (K draws among N - 32 rows: 0.4 %
  of the samples on Kinetics, most on a small set); we exclude it. `exclude_self=False` is the published way.
* Positives are exact in float64 with a certificate (`positives.py`); the code takes fp32 top-33 and drops rank 0,
  which an exact duplicate can occupy. Videos without a complete memory have no positives and are nobody's.
* In the code "Joint + CMA" is a no-op by a bug: here `weight_within_instance` adds that term.
"""

# legend: B batch, K negatives, P positives, N videos of the selection, D embedding
# v, a: embeddings of this batch; memory tensors (..., 2, D): index 0 sight (v-bar), index 1 sound (a-bar)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError, did_you_mean
from trainers import distributed
from trainers.bank import MemoryBank
from trainers.batch import Batch
from trainers.needs import Needs
from trainers.negatives import MODES, draw_negatives, nearest
from trainers.positives import AGREEMENTS, mine_positives
from trainers.spread import feature_std
from trainers.towers import Towers


@dataclass(frozen=True)
class Config:
    """Defaults: the Kinetics-400 run. [S0] paper, [C] the authors' code, [ours] declared choice."""

    positives: int = 32  # [S0] section 5, |P_i|
    agreement: Literal["consensus", "union", "video", "audio"] = "consensus"  # [C] min of the two similarities
    refresh_epochs: int = 5  # [C] Kinetics; 10 on AudioSet
    engine: Literal["auto", "faiss", "torch"] = "auto"  # [ours] of the mining; auto: by rows; exact with each
    weight_cross_instance: float = 0.5  # [C] L_AVID; [S0] 1 (see loss_scale)
    weight_within_instance: float = 0.0  # [C] off
    weight_cross_positive: float = 0.0  # [C] off
    weight_within_positive: float = 0.5  # [C] L_M; [S0] lambda |P| = 1
    loss_scale: Literal["code", "paper"] = "code"  # [C] halves of both directions; paper: eqs. 1-3, weights doubled too
    within_negatives: int = 64  # [C] the first so many of the negatives in the within-positive term; 0: all
    exclude_self: bool = True  # [ours] False: as published, a video may be drawn as its own negative
    negatives: int = 1024  # [C] K
    negative_mode: Literal["uniform", "hard", "mixed"] = "uniform"  # [C] uniform
    hard_pool: int = 128  # nearest rows per modality from which hard negatives are drawn [ours]
    temperature: float = 0.07  # [C]
    bank_momentum: float = 0.5  # [C]
    video_depth: int = 18  # [S0] section 5
    audio_depth: int = 10  # [S0] "9 layer (2D) CNN"
    width: int = 64  # [C]
    small: bool = False  # [C] True: the ablations' stems
    pool: Literal["max", "avg"] = "max"  # [C]
    hidden: int = 512  # [C]
    dim: int = 128  # [C]
    head_batch_norm: bool = False  # [C]; True in the tiny preset [ours]
    frames: int = 8  # [C]
    fps: int = 16  # [C]
    size: int = 224  # [S0, C]
    seconds: float = 2.0  # [C]
    front_end: str = "avid-linear257"  # [S0, C] 200 x 257
    max_offset: float = 0.5  # [C]
    learning_rate: float = 2e-4  # [C] Adam, constant; 1e-4 on AudioSet
    warmup_steps: int = 0  # [C]
    schedule: Literal["constant", "cosine", "multistep"] = "constant"  # [C]
    weight_decay: float = 1e-5  # [C]
    batch: int = 256  # [C] per node, as AVID
    epochs: int = 20  # [C]; 40 on AudioSet
    draws: int = 10  # [C] clips per video and epoch; 5 on AudioSet
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("agreement", AGREEMENTS),
            ("engine", ("auto", "faiss", "torch")),
            ("loss_scale", ("code", "paper")),
            ("negative_mode", MODES),
            ("pool", ("max", "avg")),
            ("schedule", ("constant", "cosine", "multistep")),
        ):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}")
        wrong += [
            f"{name} {getattr(self, name)} must be at least 1"
            for name in (
                "positives",
                "refresh_epochs",
                "negatives",
                "hard_pool",
                "width",
                "hidden",
                "dim",
                "batch",
                "epochs",
                "draws",
            )
            if getattr(self, name) < 1
        ]
        wrong += [
            f"{name} {getattr(self, name)} must be above 0"
            for name in ("temperature", "learning_rate")
            if not getattr(self, name) > 0
        ]
        if not 0 <= self.within_negatives <= self.negatives:
            wrong.append(f"within_negatives {self.within_negatives} must lie in 0 (all) .. negatives {self.negatives}")
        weights = (
            self.weight_cross_instance,
            self.weight_within_instance,
            self.weight_cross_positive,
            self.weight_within_positive,
        )
        if min(weights) < 0 or sum(weights) == 0:
            wrong.append(f"weights {weights} must not be negative, nor all zero")
        if wrong:
            raise UsageError("the configuration of avid-cma does not hold", "; ".join(wrong), "correct it with --set")


# a few hundred clips, after a tiny AVID [ours]. Few and weak within-modal negatives: among so few videos a tenth of any
# draw is of the video's own kind, and 64 of them pushed apart what AVID had brought together (docs/decisions.md)
TINY = Config(
    video_depth=10,
    width=16,
    pool="avg",
    hidden=128,
    head_batch_norm=True,
    frames=8,
    fps=8,
    size=64,
    positives=32,
    negatives=64,
    within_negatives=4,
    weight_cross_instance=0.8,
    weight_within_positive=0.2,
    batch=24,
    learning_rate=5e-4,
    schedule="cosine",
    epochs=3,
    refresh_epochs=2,
    draws=2,
)
PRESETS = {"paper": Config(), "tiny": TINY}


# ---- losses: per sample, no state -----------------------------------------------------------------------------


def nce(score_pos_BP: Tensor, score_neg_BK: Tensor, partition: Tensor | float) -> Tensor:
    """L_NCE, mean over the positives of eqs. 1 and 2: (B,).

    - mean_p log P(data | s_p) - sum_k log(1 - P(data | s_k)) with P = e^s / (e^s + K Z). The noise does not depend on
    p, so lambda sum_p L_NCE(.; p, N_i) of eqs. 2-3 with lambda = 1 / |P| is this very mean.
    """
    c = torch.log(torch.as_tensor(partition, dtype=torch.float64) * score_neg_BK.shape[1]).to(score_neg_BK)
    return -F.logsigmoid(score_pos_BP - c).mean(1) - F.logsigmoid(c - score_neg_BK).sum(1)


def _one_way(
    query_BD: Tensor, pos_BPD: Tensor, neg_BKD: Tensor, partition: Tensor | float, temperature: float
) -> Tensor:
    pos_BP = torch.einsum("bd,bpd->bp", query_BD, pos_BPD) / temperature
    neg_BK = torch.einsum("bd,bkd->bk", query_BD, neg_BKD) / temperature
    return nce(pos_BP, neg_BK, partition)


def cross_instance(
    v_BD: Tensor, a_BD: Tensor, own_B12D: Tensor, neg_BK2D: Tensor, partition: Tensor | float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Eq. 1, L_AVID: L_NCE(v_i; a-bar_i, N_i) and L_NCE(a_i; v-bar_i, N_i)."""
    return (
        _one_way(v_BD, own_B12D[:, :, 1], neg_BK2D[:, :, 1], partition, temperature),
        _one_way(a_BD, own_B12D[:, :, 0], neg_BK2D[:, :, 0], partition, temperature),
    )


def within_instance(
    v_BD: Tensor, a_BD: Tensor, own_B12D: Tensor, neg_BK2D: Tensor, partition: Tensor | float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Self-AVID beside CMA (not in the paper's loss): L_NCE(v_i; v-bar_i, N_i) and L_NCE(a_i; a-bar_i, N_i)."""
    return (
        _one_way(v_BD, own_B12D[:, :, 0], neg_BK2D[:, :, 0], partition, temperature),
        _one_way(a_BD, own_B12D[:, :, 1], neg_BK2D[:, :, 1], partition, temperature),
    )


def cross_positive(
    v_BD: Tensor, a_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, partition: Tensor | float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Positives across modalities (the code's option): mean over p of L_NCE(v_i; a-bar_p) and L_NCE(a_i; v-bar_p)."""
    return cross_instance(v_BD, a_BD, pos_BP2D, neg_BK2D, partition, temperature)


def within_positive(
    v_BD: Tensor, a_BD: Tensor, pos_BP2D: Tensor, neg_BK2D: Tensor, partition: Tensor | float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Eq. 2, L_M, times lambda = 1 / |P|: mean over p of L_NCE(v_i; v-bar_p, N_i) and of L_NCE(a_i; a-bar_p, N_i)."""
    return within_instance(v_BD, a_BD, pos_BP2D, neg_BK2D, partition, temperature)


# ---- the method ------------------------------------------------------------------------------------------------


class AvidCma(nn.Module):
    """Towers, bank, partition constant and a table of positives. Starts from a trained AVID: `load_avid`."""

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__()
        if config.positives >= n_rows:
            raise UsageError(
                f"{config.positives} positives in a selection of {n_rows} videos",
                "each video needs that many others",
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
        self.bank = MemoryBank(n_rows, config.dim, config.seed, config.bank_momentum)
        self.partition: Tensor | None = None  # Z, AVID's, never changed
        self.positives: Tensor | None = None  # (N, P) int64, ascending; -1: the row has none
        self.hard: Tensor | None = None  # (N, 2 * hard_pool) int32, only with hard or mixed negatives
        self.refreshed = -1  # epoch of the last mining
        self.needs = Needs(
            frames=config.frames,
            fps=config.fps,
            size=config.size,
            seconds=config.seconds,
            front_end=config.front_end,
            max_offset=config.max_offset,
        )
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AvidCma:
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        self.positives = None if self.positives is None else fn(self.positives)
        self.hard = None if self.hard is None else fn(self.hard)
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`step`, so that DistributedDataParallel sees the pass."""
        return self.step(batch)

    def load_avid(self, weights: dict[str, Tensor], method_state: dict[str, Tensor]) -> None:
        """Start from an AVID checkpoint: `state_dict()` (towers), bank and Z of `method_state()`.

        Raises ConflictError where the nets or the selection differ, or where that run has no partition constant.
        """
        mine = self.state_dict()
        differing = sorted(
            name
            for name in mine.keys() | weights.keys()
            if name not in mine or name not in weights or mine[name].shape != weights[name].shape
        )
        if differing:
            raise ConflictError(
                f"the AVID run has other networks: {len(differing)} tensors differ, first {differing[0]}",
                "AVID-CMA goes on with AVID's weights",
                "use the same depth, width, head and preset for both",
            )
        if "partition" not in method_state:
            raise ConflictError(
                "the AVID run has no partition constant",
                "it never took a step, or was trained with form=softmax",
                "train it with form=nce (the default) first",
            )
        self.load_state_dict(weights)
        self.bank.load_state({k.removeprefix("bank."): x for k, x in method_state.items() if k.startswith("bank.")})
        self.partition = method_state["partition"].to(self.bank.memory.device, torch.float64).clone()
        self.positives, self.hard, self.refreshed = None, None, -1

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """This rank's loss (world * local sum / global count) and detached metrics of the same scale."""
        if self.positives is None or self.partition is None:
            raise UsageError(
                "AVID-CMA has no positives to learn from",
                "it starts from a trained AVID and mines positives",
                "call load_avid and start_epoch first",
            )
        c = self.config
        v_BD, a_BD = self.towers(batch.video, batch.audio, batch.has_picture, batch.has_sound)
        mask_B2 = torch.stack([batch.has_picture, batch.has_sound], 1)
        if self.training:
            self._pending.append((batch.position, batch.row, torch.stack([v_BD, a_BD], 1).detach(), mask_B2))
        with torch.autocast(v_BD.device.type, enabled=False):
            memory = self.bank.memory
            positive_BP = self.positives[batch.row]
            negative_BK = self.draw(batch, positive_BP)
            own_B12D, neg_BK2D = memory[batch.row][:, None], memory[negative_BK]
            pos_BP2D = memory[positive_BP.clamp(min=0)]
            few_BK2D = neg_BK2D[:, : c.within_negatives] if c.within_negatives else neg_BK2D
            both_B, mined_B = mask_B2.all(1), (positive_BP >= 0).all(1)
            z, t = self.partition, c.temperature
            loss_TB: list[Tensor] = []
            mask_TB: list[Tensor] = []
            names: list[str] = []
            weights: list[float] = []
            each = 0.5 if c.loss_scale == "code" else 2.0  # eq. 3: L_AVID + lambda L_M, with weights of one half: x 2
            if c.weight_cross_instance:
                loss_TB += cross_instance(v_BD, a_BD, own_B12D, neg_BK2D, z, t)
                mask_TB += [both_B, both_B]
                names.append("cross_instance")
                weights.append(c.weight_cross_instance)
            if c.weight_within_instance:
                loss_TB += within_instance(v_BD, a_BD, own_B12D, neg_BK2D, z, t)
                mask_TB += [batch.has_picture, batch.has_sound]
                names.append("within_instance")
                weights.append(c.weight_within_instance)
            if c.weight_cross_positive:
                loss_TB += cross_positive(v_BD, a_BD, pos_BP2D, neg_BK2D, z, t)
                mask_TB += [batch.has_picture & mined_B, batch.has_sound & mined_B]
                names.append("cross_positive")
                weights.append(c.weight_cross_positive)
            if c.weight_within_positive:
                loss_TB += within_positive(v_BD, a_BD, pos_BP2D, few_BK2D, z, t)
                mask_TB += [batch.has_picture & mined_B, batch.has_sound & mined_B]
                names.append("within_positive")
                weights.append(c.weight_within_positive)
            ways_T2 = distributed.global_means(torch.stack(loss_TB), torch.stack(mask_TB)).view(-1, 2)
            term_T = each * ways_T2.sum(1)
            loss = (term_T * term_T.new_tensor(weights)).sum()
        metrics: dict[str, float | Tensor] = {"loss": loss.detach()}
        metrics |= dict(zip(names, term_T.detach().unbind(), strict=True))
        metrics["feature_std_video"] = feature_std(v_BD, batch.has_picture)
        metrics["feature_std_audio"] = feature_std(a_BD, batch.has_sound)
        return loss, metrics

    def draw(self, batch: Batch, positive_BP: Tensor) -> Tensor:
        """(B, K) negatives: never a positive, and never the video itself unless `exclude_self` is off."""
        c = self.config
        excluded = torch.cat([batch.row[:, None], positive_BP], 1) if c.exclude_self else positive_BP
        pool_BH = None
        if c.negative_mode != "uniform":
            if self.hard is None:
                raise UsageError("no pool of hard negatives", "it is made at an epoch's start", "call start_epoch")
            pool_BH = self.hard[batch.row]
        return draw_negatives(
            len(self.bank),
            c.negatives,
            excluded,
            seed=batch.seed,
            epoch=batch.epoch,
            row_B=batch.row,
            draw_B=batch.draw,
            mode=c.negative_mode,
            pool_BH=pool_BH,
        )

    def after_step(self) -> dict[str, float]:
        """Move the bank by the embeddings of every `step` since the last call (several with accumulation)."""
        if not self._pending:
            return {}
        position, row, embedding, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        return self.bank.update(position, row, embedding, mask)

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Mine the positives where none are there, or `refresh_epochs` after the last time; stats of the mining.

        Called again for an epoch already begun (a resumed run) it does nothing: the bank has moved on since.
        """
        due = self.positives is None or epoch - self.refreshed >= self.config.refresh_epochs
        return self.refresh(epoch) if due else {}

    def refresh(self, epoch: int) -> dict[str, float]:
        """Positives (and the pool of hard negatives) from the bank as it is; ranks share the rows and gather them."""
        c, n = self.config, len(self.bank)
        distributed.require_equal(self.bank.checksum(), "the memory bank")
        memory, complete = self.bank.memory, self.bank.complete()
        world, rank = distributed.world(), distributed.rank()
        share = torch.arange(n * rank // world, n * (rank + 1) // world, device=memory.device)
        mined = mine_positives(
            memory, c.positives, agreement=c.agreement, engine=c.engine, eligible_N=complete, query_Q=share
        )
        self.positives = distributed.all_gather_rows(mined.rows)
        if c.negative_mode != "uniform":
            self.hard = nearest(memory, c.hard_pool, self.positives, complete, c.engine)
        self.refreshed = epoch
        # shares are of rows that take part, so ranks are weighed by how many of theirs do
        part = len(share) - mined.left_out
        sums = distributed.all_reduce_sum(
            torch.tensor(
                [
                    part,
                    mined.certified_first * part,
                    mined.certified * part,
                    mined.ties,
                    mined.left_out,
                    mined.stats["agreement"] * part,
                ],
                dtype=torch.float64,
                device=memory.device,
            )
        ).tolist()
        whole = max(sums[0], 1)
        return {
            "positives/certified_first": sums[1] / whole,
            "positives/certified": sums[2] / whole,
            "positives/ties": sums[3],
            "positives/left_out": sums[4],
            "positives/agreement": sums[5] / whole,
            "positives/faiss": mined.stats["faiss"],  # the same on every rank: it hangs on the bank's rows
        }

    def method_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside `state_dict()`: bank, Z, positives, hard pool, epoch of the mining."""
        state = {f"bank.{name}": x for name, x in self.bank.state().items()}
        for name in ("partition", "positives", "hard"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return state | {"refreshed": torch.tensor(self.refreshed)}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. Raises ConflictError for a bank or positives of another shape."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        device = self.bank.memory.device
        wanted = {
            "positives": (len(self.bank), self.config.positives),
            "hard": (len(self.bank), 2 * self.config.hard_pool),
        }
        for name, shape in wanted.items():
            table = state.get(name)
            if table is not None and tuple(table.shape) != shape:
                raise ConflictError(
                    f"the saved table of {name} is {tuple(table.shape)}, this run's {shape}",
                    "it was mined with another configuration",
                    "use that configuration, or start a new run with --run",
                )
            setattr(self, name, None if table is None else table.to(device).clone())
        z = state.get("partition")
        self.partition = None if z is None else z.to(device, torch.float64).clone()
        self.refreshed = int(state["refreshed"])
        self._pending.clear()

    def embed(self, video: Tensor | None = None, audio: Tensor | None = None) -> dict[str, Tensor]:
        """Towers `video`, `audio` (unit length) and `video-trunk`, `audio-trunk`. See `Towers.embed`."""
        return self.towers.embed(video, audio)
