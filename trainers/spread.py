"""How far embeddings spread: the collapse monitor of every method whose loss alone cannot show one.

A network that answers every clip with one vector has the best loss of SimSiam, BYOL or CrissCross (cosine 1), and its
retrieval is chance. SimSiam (Chen and He, 2021, section 4.1) watches the deviation of the normalised output instead.
"""

# legend: B clips of this rank, D embedding

from __future__ import annotations

import torch
from torch import Tensor

from trainers import distributed


@torch.no_grad()
def feature_std(x_BD: Tensor, mask_B: Tensor) -> Tensor:
    """sqrt(D) times the mean over dimensions of the deviation of unit vectors over the global batch; 0-dim float64.

    1: directions as random as on the sphere (each coordinate deviates by 1 / sqrt(D)); 0: one vector for every clip,
    that is collapse. Masked rows do not count; collective. The same on every rank, as metrics are.
    """
    x_BD = torch.where(mask_B[:, None], x_BD.detach().double(), 0)
    sums = distributed.all_reduce_sum(torch.cat([x_BD.sum(0), x_BD.square().sum(0), mask_B.sum()[None].double()]))
    count = sums[-1].clamp(min=1)
    mean_D, square_D = sums[:-1].view(2, -1) / count
    return (square_D - mean_D.square()).clamp(min=0).sqrt().mean() * x_BD.shape[1] ** 0.5
