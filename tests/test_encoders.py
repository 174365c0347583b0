"""The two networks: sizes and shapes of the papers, right bf16 gradients, blanks that leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avstore.errors import UsageError
from trainers.encoders import AudioNet, TimePaddedConv3d, VideoNet, count_parameters, encode
from trainers.towers import Towers


def video_parameters(depth: tuple[int, int, int, int], width: int = 64) -> int:
    """Counted from the description in AVID's paper, not from the network."""
    total, inputs = 3 * width * 3 * 7 * 7 + 2 * width, width
    for stage, blocks in enumerate(depth):
        outputs = width * 2**stage
        for block in range(blocks):
            i = inputs if block == 0 else outputs
            total += 9 * i * outputs + 3 * outputs * outputs + 9 * outputs * outputs + 3 * outputs * outputs
            total += 4 * 2 * outputs  # four normalisations
            total += i * outputs if i != outputs else 0  # the shortcut
        inputs = outputs
    return total


@pytest.mark.parametrize(
    ("depth", "blocks", "millions"), [(10, (1, 1, 1, 1), 7.016), (18, (2, 2, 2, 2), 15.379), (34, (3, 4, 6, 3), 28.862)]
)
def test_video_parameters(depth, blocks, millions):
    count = count_parameters(VideoNet(depth))
    assert count == video_parameters(blocks)
    assert round(count / 1e6, 3) == millions


def test_audio_parameters():
    convolutions = [(1, 64, 7), (64, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3),
                    (256, 512, 3), (512, 512, 3)]  # fmt: skip
    assert len(convolutions) == 9, "the paper's nine layers"
    count = count_parameters(AudioNet())
    assert count == sum(i * o * k * k + 2 * o for i, o, k in convolutions)
    assert round(count / 1e6, 3) == 4.726


def test_video_shapes():
    with torch.no_grad():
        maps = VideoNet(18, width=8).eval().forward_blocks(torch.randn(1, 3, 8, 224, 224))
    shapes = {name: tuple(x.shape[1:]) for name, x in maps.items()}
    assert shapes == {
        "conv2x": (8, 8, 56, 56), "conv3x": (16, 4, 28, 28), "conv4x": (32, 2, 14, 14), "conv5x": (64, 1, 7, 7)
    }  # fmt: skip
    small = VideoNet(10, width=4, small=True).eval().forward_blocks(torch.randn(1, 3, 8, 112, 112))
    assert small["conv2x"].shape[2:] == (8, 56, 56), "without its max-pool the stem halves once"


def test_audio_shapes():
    net = AudioNet(width=8).eval()
    assert net.forward_blocks(torch.randn(1, 1, 200, 257))["conv5x"].shape == (1, 64, 13, 17)
    small = AudioNet(width=8, small=True).eval().forward_blocks(torch.randn(1, 1, 100, 129))
    assert {name: tuple(x.shape[2:]) for name, x in small.items()} == {
        "conv2x": (50, 65), "conv3x": (25, 33), "conv4x": (13, 17), "conv5x": (13, 17)
    }  # fmt: skip
    assert net(torch.randn(2, 1, 40, 33)).shape == (2, 64)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pooled_vector_is_the_pool_of_the_last_map(pool):
    video, audio = VideoNet(10, width=4, pool=pool).eval(), AudioNet(width=4, pool=pool).eval()
    for net, x in ((video, torch.randn(2, 3, 4, 32, 32)), (audio, torch.randn(2, 1, 40, 33))):
        last = net.forward_blocks(x)["conv5x"].flatten(2)
        expected = last.amax(2) if pool == "max" else last.mean(2)
        torch.testing.assert_close(net(x), expected)
        assert net.dim == expected.shape[1]


def test_no_convolution_has_a_bias_and_all_end_in_a_normalisation():
    for net in (VideoNet(34, width=4), AudioNet(width=4)):
        names = [name for name, _ in net.named_parameters() if name.endswith("bias")]
        norms = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
        assert sorted(names) == sorted(f"{name}.bias" for name in norms)


def test_time_padding_is_the_same_function_with_the_same_state():
    for kernel, stride in (((3, 1, 1), (2, 1, 1)), ((3, 7, 7), (1, 2, 2)), ((1, 3, 3), (1, 1, 1))):
        ours = TimePaddedConv3d(3, 5, kernel, stride).double()
        plain = nn.Conv3d(3, 5, kernel, stride, tuple(k // 2 for k in kernel), bias=False).double()
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 5, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("side", [1, 2, 14])
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 1, 1), (1, 1, 1)), ((3, 1, 1), (2, 1, 1)), ((3, 7, 7), (1, 2, 2)), ((1, 3, 3), (1, 2, 2))],
)
def test_bf16_weight_gradients_equal_fp32(frames, side, kernel, stride):
    """oneDNN's are wrong, often inf, when Conv3d itself pads time and the kernel is longer than the clip."""
    torch.manual_seed(0)
    conv = TimePaddedConv3d(16, 32, kernel, stride).to(memory_format=torch.channels_last_3d)
    x = torch.randn(4, 16, frames, side, side).to(memory_format=torch.channels_last_3d)
    gradients = []
    for bf16 in (False, True):
        conv.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = conv(inputs)
        weights = torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape)
        (y.float() * weights).sum().backward()
        gradients.append((conv.weight.grad.clone(), inputs.grad.clone()))
    for exact, rounded in zip(*gradients, strict=True):
        error = (rounded - exact).norm() / exact.norm()
        assert error < 2e-2, f"relative error {error}"


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match="depth 12"):
        VideoNet(12)
    with pytest.raises(UsageError, match="depth 18"):
        AudioNet(18)
    with pytest.raises(UsageError, match="pooling"):
        VideoNet(10, width=4, pool="mean")
    with pytest.raises(UsageError, match="clips, 3, frames"):
        VideoNet(10, width=4)(torch.zeros(2, 8, 3, 16, 16))
    with pytest.raises(UsageError, match="clips, 1, frames"):
        AudioNet(width=4)(torch.zeros(2, 40, 33))


def test_blanks_do_not_enter_the_network():
    x, present = torch.randn(5, 1, 40, 33), torch.tensor([True, False, True, True, False])
    torch.manual_seed(1)
    net = AudioNet(width=4)
    alone = AudioNet(width=4)
    alone.load_state_dict(net.state_dict())
    out = encode([net], torch.where(present[:, None, None, None], x, 0), present)
    expected = alone(x[present])
    torch.testing.assert_close(out[present], expected)
    assert (out[~present] == 0).all()
    for mine, theirs in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_of_blanks_gives_zero_gradients_and_keeps_the_statistics():
    net = AudioNet(width=4)
    before = [b.clone() for b in net.buffers()]
    out = encode([net], torch.zeros(3, 1, 40, 33), torch.zeros(3, dtype=torch.bool))
    assert out.shape == (3, 32) and (out == 0).all()
    out.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def test_towers_are_a_function_of_the_seed_and_leave_the_global_state():
    state = torch.random.get_rng_state()
    one, same, other = (Towers(seed=s, video_depth=10, width=4, hidden=8, dim=8) for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, a), b in zip(one.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.video.conv1[0].weight, other.video.conv1[0].weight)


def test_towers_embed_each_modality_alone():
    towers = Towers(seed=0, video_depth=10, width=4, hidden=8, dim=8).eval()
    video, audio = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 1, 40, 33)
    with torch.no_grad():
        both = towers.embed(video, audio)
        assert set(towers.embed(audio=audio)) == {"audio", "audio-trunk"}
        assert set(both) == {"video", "video-trunk", "audio", "audio-trunk"}
        torch.testing.assert_close(both["video"].norm(dim=1), torch.ones(2))
        torch.testing.assert_close(both["audio-trunk"], towers.audio(audio))
        with torch.autocast("cpu", torch.bfloat16):
            assert towers.embed(video)["video"].dtype == torch.float32
    with pytest.raises(UsageError, match="nothing to embed"):
        towers.embed()
