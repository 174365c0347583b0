"""bf16 on a CPU: weight gradients of the sound networks' convolutions, where oneDNN's own are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainers.encoders import AudioNet, PaddedConv2d


def gradients(conv: nn.Module, x: Tensor, bf16: bool) -> tuple[Tensor, ...]:
    conv.zero_grad()
    inputs = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = conv(inputs)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape)
    (y.float() * weights).sum().backward()
    assert inputs.grad is not None
    return (*(p.grad.clone() for p in conv.parameters() if p.grad is not None), inputs.grad)


@pytest.mark.parametrize("side", [(1, 1), (1, 2), (2, 1), (3, 1), (2, 2), (1, 17), (13, 17)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (7, 1), (7, 2), (1, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_weight_gradients_equal_those_of_fp32(side: tuple[int, int], kernel: int, stride: int, last: bool) -> None:
    for inputs, outputs, clips in ((16, 16, 4), (16, 128, 24), (4, 16, 4)):
        torch.manual_seed(0)
        conv, x = PaddedConv2d(inputs, outputs, kernel, stride), torch.randn(clips, inputs, *side)
        if last:
            conv, x = conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        for exact, rounded in zip(gradients(conv, x, False), gradients(conv, x, True), strict=True):
            error = float((rounded - exact).norm() / exact.norm())
            assert error < 2e-2, f"relative error {error} of {inputs} -> {outputs} channels, {clips} clips"


@pytest.mark.parametrize("side", [(1, 1), (2, 1), (3, 5), (14, 14)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (7, 2)])
def test_it_is_the_function_of_a_plain_convolution(side: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    mine = PaddedConv2d(5, 7, kernel, stride).double()
    plain = nn.Conv2d(5, 7, kernel, stride, kernel // 2, bias=False).double()
    plain.load_state_dict(mine.state_dict())
    x = torch.randn(2, 5, *side, dtype=torch.float64)
    torch.testing.assert_close(mine(x), plain(x), rtol=0, atol=1e-13)


def test_no_convolution_of_the_sound_network_pads_a_small_map_itself() -> None:
    """Sounds so short that the last maps are 1 x 1: every gradient is finite and near that of fp32."""
    assert all(isinstance(m, PaddedConv2d) for m in AudioNet(10, 4).modules() if isinstance(m, nn.Conv2d))
    torch.manual_seed(0)
    net = AudioNet(10, 16, pool="avg").eval()  # eval: batch statistics over 1 x 1 maps would magnify the rounding
    exact, rounded = (gradients(net, torch.randn(8, 1, 10, 12, generator=torch.Generator().manual_seed(1)), b)
                      for b in (False, True))  # fmt: skip
    for a, b in zip(exact, rounded, strict=True):  # flipped ReLU masks leave a tenth or two, wrong ones nothing alike
        assert torch.isfinite(b).all()
        assert float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)) > 0.9 or float(a.norm()) < 1e-6
