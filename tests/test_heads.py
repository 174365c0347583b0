"""Projection heads: the paper's size, and what batch normalisation changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avstore.errors import UsageError
from trainers.encoders import count_parameters
from trainers.heads import ProjectionHead


def test_parameters_of_the_paper():
    sizes = [(512, 512), (512, 512), (512, 128)]
    assert count_parameters(ProjectionHead()) == sum(i * o + o for i, o in sizes)
    assert round(count_parameters(ProjectionHead()) / 1e6, 3) == 0.591


def test_default_is_three_linear_layers_with_two_relus():
    head = ProjectionHead(6, 5, 4)
    a, b, c = (m for m in head if isinstance(m, nn.Linear))
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x), c(torch.relu(b(torch.relu(a(x))))))
    assert head(x).shape == (3, head.dim)


def test_batch_norm_replaces_the_bias():
    head = ProjectionHead(6, 5, 4, batch_norm=True)
    linear = [m for m in head if isinstance(m, nn.Linear)]
    assert [m.bias is None for m in linear] == [True, True, True]
    assert count_parameters(head) == 6 * 5 + 5 * 5 + 5 * 4 + 2 * (5 + 5 + 4)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head) == 3


def test_wrong_shapes_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        ProjectionHead(0, 5, 4)
    with pytest.raises(UsageError, match="clips, features"):
        ProjectionHead(6, 5, 4)(torch.zeros(2, 3, 6))
