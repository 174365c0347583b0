"""Small fully connected networks of the rivals: projectors behind an encoder, predictors behind a projector.

One class, whose sizes and normalisation each method states as its paper does. AVID's three-layer head is in
`heads.py`; here is no loss.
"""

# legend: B clips

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from avstore.errors import UsageError, did_you_mean

Norm = Literal["none", "hidden", "all"]
NORMS: tuple[Norm, ...] = ("none", "hidden", "all")


class Projector(nn.Sequential):
    """Linear layers sizes[0] -> sizes[1] -> ... with ReLU between them. (B, sizes[0]) -> (B, sizes[-1]).

    norm: 'hidden' puts a batch normalisation behind each layer but the last (before the ReLU), 'all' one behind the
    last too (SimSiam's projector), 'none' nowhere. A normalised layer has no bias. Raises UsageError for sizes below 1
    and for an input of another shape.
    """

    def __init__(self, sizes: Sequence[int], norm: Norm = "none") -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise UsageError(f"a projector of sizes {tuple(sizes)}", "it wants two or more, each at least 1")
        if norm not in NORMS:
            raise UsageError(f"no normalisation {norm!r} of a projector", did_you_mean(norm, NORMS))
        layers: list[nn.Module] = []
        for n, (inputs, outputs) in enumerate(pairwise(sizes)):
            last = n == len(sizes) - 2
            normed = norm == "all" or (norm == "hidden" and not last)
            layers.append(nn.Linear(inputs, outputs, bias=not normed))
            if normed:
                layers.append(nn.BatchNorm1d(outputs))
            if not last:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        self.inputs, self.dim = sizes[0], sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise UsageError(
                f"a projector got a tensor of shape {tuple(x.shape)}", f"it wants (clips, {self.inputs} features)"
            )
        return super().forward(x)
