"""Projection heads: the small networks between an encoder's vector and the sphere on which the losses live."""

# legend: B clips, D embedding

from __future__ import annotations

from torch import Tensor, nn

from avstore.errors import UsageError


class ProjectionHead(nn.Sequential):
    """Three linear layers, inputs -> hidden -> hidden -> dim, ReLU after the first two. (B, inputs) -> (B, dim).

    AVID (`proj_dim: [512, 512, 128]`, output sizes): no batch normalisation, 0.591 M parameters at 512. With
    `batch_norm` (declared choice of the tiny presets: nets trained for a minute need it) all three layers are batch
    normalised and lose their bias: without it on the last one, the embeddings of a modality share a large mean, and
    most of a short training goes into turning it. The output is *not* of unit length here.
    """

    def __init__(self, inputs: int = 512, hidden: int = 512, dim: int = 128, batch_norm: bool = False) -> None:
        if min(inputs, hidden, dim) < 1:
            raise UsageError(f"a head of sizes {inputs}, {hidden}, {dim}", "each must be at least 1")
        layers: list[nn.Module] = []
        for size in (inputs, hidden):
            layers.append(nn.Linear(size, hidden, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(hidden, dim, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(dim))
        super().__init__(*layers)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise UsageError(f"a head got a tensor of shape {tuple(x.shape)}", "it wants (clips, features)")
        return super().forward(x)
