"""A spectrogram as the clip of a 3-D network: AVCL's and its rivals' way of hearing (S1, section 2.1).

The whole sound's rows are resized to as many columns as there are bands, the square is cropped like a picture, and the
crop is repeated over colour and time. What lies beyond the end of a video's sound is not heard: its own rows are
stretched instead. Resizing takes the mean over the rows that a column covers (the paper names no filter).
"""

# legend: B clips, F spectrogram frames, M bins, T frames, S side of the square

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from avstore.errors import UsageError
from trainers import draws

SOUND_CROP = 0x73637270  # stream of `trainers.draws`: "scrp"


def resize_rows(rows_BFM: Tensor, columns: int, share_B: Tensor | None = None) -> Tensor:
    """(B, columns, M): the first `share` of each clip's rows (None: all), averaged or repeated into `columns` rows."""
    frames = rows_BFM.shape[1]
    if share_B is None:
        share_B = rows_BFM.new_ones(len(rows_BFM))
    length_B = (share_B.to(rows_BFM.dtype) * frames).clamp(min=1, max=frames)
    edge_BC = length_B[:, None] / columns * torch.arange(columns + 1, device=rows_BFM.device, dtype=rows_BFM.dtype)
    row_F = torch.arange(frames, device=rows_BFM.device, dtype=rows_BFM.dtype)
    # how much of row f = [f, f + 1) lies in column c
    low, high = edge_BC[:, :-1, None], edge_BC[:, 1:, None]
    cover_BCF = (torch.minimum(high, row_F + 1) - torch.maximum(low, row_F)).clamp(min=0)
    with torch.autocast(rows_BFM.device.type, enabled=False):
        return torch.bmm(cover_BCF / cover_BCF.sum(2, keepdim=True), rows_BFM)


def sound_image(
    audio_B1FM: Tensor,
    frames: int,
    size: int,
    share_B: Tensor | None = None,
    crop: tuple[int, int, Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, 1, F, M) -> (B, 3, frames, size, size), time along the width.

    share_B: as `Batch.sound_share`. crop: (seed, epoch, row_B, draw_B) for a random crop, a function of them; None:
    the centre. Where the spectrogram has fewer bands than `size`, it is enlarged (bilinear). Raises UsageError for
    another shape.
    """
    if audio_B1FM.dim() != 4 or audio_B1FM.shape[1] != 1:
        raise UsageError(f"a sound image of a tensor of shape {tuple(audio_B1FM.shape)}", "it wants (B, 1, F, M)")
    side = audio_B1FM.shape[3]
    image = resize_rows(audio_B1FM[:, 0], side, share_B).mT  # bands down, time across
    if side < size:
        image = F.interpolate(image[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        side = size
    room = side - size
    if crop is None:
        corner_B2 = torch.full((len(image), 2), room // 2, device=image.device)
    else:
        seed, epoch, row_B, draw_B = crop
        corner_B2 = draws.below(draws.bits(draws.key(seed, SOUND_CROP, epoch), [row_B, draw_B], 2), room + 1)
    along = torch.arange(size, device=image.device)
    down, across = corner_B2[:, :1] + along, corner_B2[:, 1:] + along
    image = image[torch.arange(len(image), device=image.device)[:, None, None], down[:, :, None], across[:, None]]
    return image[:, None, None].expand(-1, 3, frames, -1, -1)
