"""IIC: inter-intra contrast (Tao, Wang, Yamasaki; ACM MM 2020), as AVCL compares it (S1, Table 4), across sight and
sound.

Contrast between videos can be solved by appearance, so IIC adds negatives made of the *same* video with its time
destroyed: one frame repeated, or two of the clip's four quarters exchanged (`intra=shuffle`). An embedding must then
tell a video from what it would be without its motion. Sound takes the place of IIC's second view (residual frames or
optical flow).

    avstore train iic --preset tiny
    avstore train iic --preset tiny --set intra=shuffle

What differs from the papers, and why:
* Cross-modal: a picture's positive is its video's remembered sound, a sound's its picture (IIC: two views of sight).
* A sound's time is destroyed by shuffling 16 blocks of its spectrogram (repeating one column would leave no sound).
* K = 1024 bank entries of the other modality and the one intra-negative share one NCE, as AVID runs it: the noise count
  is K + 1, its constant Z that of the first batch. The intra-negative is of this step, and takes a gradient. IIC's code
  defaults to a softmax (NCE by option), and keeps the timeless clips in a third memory, of which the own row and K more
  are negatives: 2 K + 2 candidates, none with a gradient.
* Half of each direction; the code sums both. It compares the networks' 512 features, which here are projected to 128.
* A sound meets its own video's timeless picture, a picture its own timeless sound: negatives of the modality of the
  positive.
* Random choices are counter hashes: the same on any number of processes and after a restart.
"""

# legend: B clips of this rank, n those with picture and sound, K negatives, D embedding, F spectrogram frames

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avstore.errors import UsageError, did_you_mean
from trainers import draws
from trainers.bank import MemoryBank, estimate_partition
from trainers.batch import Batch
from trainers.distributed import global_means
from trainers.negatives import draw_negatives
from trainers.pair import TINY, Metrics, Pair, PairConfig, below, clips, not_above, present, seeded, spread
from trainers.projectors import Norm, Projector
from trainers.towers import unit

__all__ = ["PRESETS", "Config", "Iic", "clips", "nce", "repeat_frame", "scores", "shuffle_blocks", "swap_quarters"]

FRAMES, BLOCKS = 0x6672616D, 0x626C6F63  # streams of `trainers.draws`: "fram", "bloc"
INTRA = ("repeat", "shuffle")


@dataclass(frozen=True)
class Config(PairConfig):
    """Defaults: S1's comparison with IIC's contrast; what is not here is `pair.PairConfig`'s."""

    intra: Literal["repeat", "shuffle"] = "repeat"  # [C] IIC's best: one frame repeated; shuffle: two quarters swapped
    blocks: int = 16  # [ours] into which a sound's time is cut and shuffled
    negatives: int = 1024  # [C]
    temperature: float = 0.07  # [C]
    bank_momentum: float = 0.5  # [C]
    hidden: int = 2048  # [ours] as S1's other rivals
    dim: int = 128  # [ours] as S1's other rivals; [C] 512, the features themselves
    head_batch_norm: bool = False  # [ours]; True in the tiny preset

    def problems(self) -> list[str]:
        wrong = super().problems()
        wrong += below(self, 1, "negatives", "hidden", "dim") + below(self, 2, "blocks")
        wrong += not_above(self, 0, "temperature")
        if self.intra not in INTRA:
            wrong.append(f"intra {self.intra!r}: {did_you_mean(self.intra, INTRA)}")
        if self.intra == "shuffle" and self.frames < 2:
            wrong.append(f"intra shuffle of {self.frames} frame has nothing to exchange: intra=repeat, or more frames")
        if not 0 <= self.bank_momentum < 1:
            wrong.append(f"bank_momentum {self.bank_momentum} must lie in [0, 1)")
        return wrong


PRESETS = {"paper": Config(), "tiny": Config(**{**TINY, "hidden": 128, "head_batch_norm": True, "negatives": 64})}


# ---- intra-negatives: the same clip with its time destroyed --------------------------------------------------------


def repeat_frame(video_B3THW: Tensor, word_B: Tensor) -> Tensor:
    """One frame of each clip, chosen by its random word, in place of all."""
    frame_B = draws.below(word_B, video_B3THW.shape[2])
    clip = torch.arange(len(frame_B), device=frame_B.device)
    return video_B3THW[clip, :, frame_B][:, :, None].expand_as(video_B3THW)


def swap_quarters(video_B3THW: Tensor, word_B2: Tensor) -> Tensor:
    """Each clip cut into four parts (fewer of fewer frames), two of which change places: never the true order.

    word_B2: random words: the first part, and how far behind it, in a circle, the second lies. Parts differ by a frame
    where the length does not divide. UsageError for clips of one frame.
    """
    frames = video_B3THW.shape[2]
    parts = min(4, frames)
    if parts < 2:
        raise UsageError("clips of one frame have no order to destroy", "", "--set intra=repeat, or --set frames=16")
    first_B = draws.below(word_B2[:, 0], parts)
    second_B = (first_B + 1 + draws.below(word_B2[:, 1], parts - 1)) % parts
    place_BK = torch.arange(parts, device=first_B.device).repeat(len(first_B), 1)
    place_BK.scatter_(1, first_B[:, None], second_B[:, None]).scatter_(1, second_B[:, None], first_B[:, None])
    part_T = torch.arange(frames, device=first_B.device) * parts // frames
    order_BT = place_BK[:, part_T].argsort(dim=1, stable=True)
    return video_B3THW.gather(2, order_BT[:, None, :, None, None].expand_as(video_B3THW))


def shuffle_blocks(audio_B1FM: Tensor, word_BK: Tensor, share_B: Tensor | None = None) -> Tensor:
    """The first `share` of each spectrogram's rows (None: all) cut into K blocks, in the order of its random words.

    Rows within a block keep their order, and what lies beyond the share its place. Blocks differ by a row where the
    length does not divide.
    """
    frames, blocks = audio_B1FM.shape[2], word_BK.shape[1]
    row_F = torch.arange(frames, device=audio_B1FM.device)
    if share_B is None:
        length_B = torch.full((len(audio_B1FM),), frames, device=audio_B1FM.device)
    else:
        length_B = (share_B.double() * frames).round().long().clamp(1, frames)
    block_BF = (row_F * blocks // length_B[:, None]).clamp(max=blocks - 1)
    place_BK = word_BK.argsort(1).argsort(1)  # where each block goes
    target_BF = torch.where(row_F < length_B[:, None], place_BK.gather(1, block_BF), blocks)
    order_BF = target_BF.argsort(dim=1, stable=True)
    return audio_B1FM.gather(2, order_BF[:, None, :, None].expand_as(audio_B1FM))


# ---- loss --------------------------------------------------------------------------------------------------------


def scores(query_BD: Tensor, target_BKD: Tensor, temperature: float) -> Tensor:
    """s = q . m / t: (B, K)."""
    return torch.einsum("bd,bkd->bk", query_BD, target_BKD) / temperature


def nce(score_pos_BP: Tensor, score_neg_BK: Tensor, partition: Tensor | float) -> Tensor:
    """Noise contrastive estimation as in AVID's code: (B,).

    P(data | s) = e^s / (e^s + K Z);  - mean_p log P(data | s_p) - sum_k log(1 - P(data | s_k)).
    """
    c = torch.log(torch.as_tensor(partition, dtype=torch.float64) * score_neg_BK.shape[1]).to(score_neg_BK)
    return -F.logsigmoid(score_pos_BP - c).mean(1) - F.logsigmoid(c - score_neg_BK).sum(1)


# ---- the method --------------------------------------------------------------------------------------------------


class Iic(Pair):
    """Two trunks and projectors, a memory bank of `n_rows` videos, Z. See `trainers` for the contract."""

    config: Config

    def __init__(self, config: Config, n_rows: int) -> None:
        super().__init__(config)
        norm: Norm = "hidden" if config.head_batch_norm else "none"
        with seeded(config.seed, 1):
            self.video_head = Projector((self.video.dim, config.hidden, config.dim), norm)
            self.audio_head = Projector((self.audio.dim, config.hidden, config.dim), norm)
        self.bank = MemoryBank(n_rows, config.dim, config.seed, config.bank_momentum)
        self.partition: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def timeless(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch' pictures and sounds with their time destroyed, as the networks want them."""
        if batch.video is None or batch.audio is None:
            raise UsageError("a batch without pictures or without sound", "this method trains on both")
        items = [batch.row, batch.draw]
        word = draws.bits(draws.key(batch.seed, FRAMES, batch.epoch), items, batch.video.shape[2])
        destroyed = (
            repeat_frame(batch.video, word[:, 0])
            if self.config.intra == "repeat"
            else swap_quarters(batch.video, word[:, :2])
        )
        word = draws.bits(draws.key(batch.seed, BLOCKS, batch.epoch), items, self.config.blocks)
        sound = shuffle_blocks(batch.audio, word, batch.sound_share)
        return destroyed, self.hear(sound, batch.sound_share, batch if self.training else None)

    def step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Half of each direction; keeps the embeddings for `after_step`."""
        both_B = batch.has_picture & batch.has_sound
        (video, audio), (still, scrambled) = self.inputs(batch), self.timeless(batch)
        v_nD = unit(present((self.video, self.video_head), video, both_B))
        a_nD = unit(present((self.audio, self.audio_head), audio, both_B))
        intra_v_nD = unit(present((self.video, self.video_head), still, both_B))
        intra_a_nD = unit(present((self.audio, self.audio_head), scrambled, both_B))
        row_n = batch.row[both_B]
        if self.training:
            mask_n2 = torch.ones(len(row_n), 2, dtype=torch.bool, device=row_n.device)
            self._pending.append((batch.position[both_B], row_n, torch.stack([v_nD, a_nD], 1).detach(), mask_n2))
        with torch.autocast(v_nD.device.type, enabled=False):
            negative_nK = draw_negatives(
                len(self.bank),
                self.config.negatives,
                row_n[:, None],
                seed=batch.seed,
                epoch=batch.epoch,
                row_B=row_n,
                draw_B=batch.draw[both_B],
            )
            own_n2D, other_nK2D = self.bank.memory[row_n], self.bank.memory[negative_nK]
            t = self.config.temperature
            noise_v = scores(v_nD, torch.cat([other_nK2D[:, :, 1], intra_a_nD[:, None]], 1), t)
            noise_a = scores(a_nD, torch.cat([other_nK2D[:, :, 0], intra_v_nD[:, None]], 1), t)
            if self.partition is None:
                here = torch.ones(len(row_n), dtype=torch.bool, device=row_n.device)
                self.partition = estimate_partition(noise_v.detach(), here)
            rows_Tn = torch.stack(
                [
                    nce(scores(v_nD, own_n2D[:, None, 1], t), noise_v, self.partition),
                    nce(scores(a_nD, own_n2D[:, None, 0], t), noise_a, self.partition),
                    (v_nD * intra_v_nD).sum(1).detach(),
                ]
            )
            v_to_a, a_to_v, cosine = global_means(rows_Tn, torch.ones_like(rows_Tn, dtype=torch.bool))
            loss = (v_to_a + a_to_v) / 2
        return loss, {
            "loss": loss.detach(),
            "video_to_audio": v_to_a.detach(),
            "audio_to_video": a_to_v.detach(),
            "partition": self.partition,
            "intra_cosine": cosine.detach(),  # of a picture with its timeless self
            "feature_std_video": spread(v_nD),
            "feature_std_audio": spread(a_nD),
        }

    def after_step(self) -> dict[str, float]:
        """Moves the bank by the embeddings of every `step` since the last call; collective."""
        if not self._pending:
            return {}
        position, row, embedding, mask = (torch.cat(x) for x in zip(*self._pending, strict=True))
        self._pending.clear()
        return self.bank.update(position, row, embedding, mask)

    def method_state(self) -> dict[str, Tensor]:
        """Bank, what was ever seen, Z."""
        state = {f"bank.{name}": x for name, x in self.bank.state().items()}
        return state if self.partition is None else state | {"partition": self.partition}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Take over `method_state()`. ConflictError for a bank of another selection or width."""
        self.bank.load_state({k.removeprefix("bank."): x for k, x in state.items() if k.startswith("bank.")})
        z = state.get("partition")
        self.partition = None if z is None else z.to(self.bank.memory.device, torch.float64).clone()
        self._pending.clear()
