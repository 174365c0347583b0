"""Networks by name: sizes of the papers, torchvision's names and shapes, right bf16 gradients, shapes of the maps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from avstore.errors import ConflictError, UsageError
from trainers.backbones import AUDIO, IMAGE, VIDEO, audio_net, image_net, load_trunk, video_net
from trainers.encoders import Encoder
from trainers.resnet2d import FoldedResNet2d, PaddedConv2d
from trainers.resnet3d import middle_channels
from trainers.towers import Towers

Shapes = dict[str, tuple[int, ...]]


def total(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Networks without memory: for counts and shapes of full width, at once."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(nn.init, name, lambda x, *args, **options: x)
        yield


def shapes(net: nn.Module) -> Shapes:
    return {k: tuple(x.shape) for k, x in net.state_dict().items()}


# ---- torchvision's state dicts, written down from its description, not from our networks ------------------------


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()
    }


def video_resnet(kind: str, classes: int) -> Shapes:
    """stem, layer1 ... layer4 of two blocks each (conv1.0, conv1.1, conv2.0, conv2.1, downsample.0, .1), fc."""
    out: Shapes = {}
    if kind == "r2plus1d":
        out |= {"stem.0.weight": (45, 3, 1, 7, 7), "stem.3.weight": (64, 45, 3, 1, 1)}
        out |= norm("stem.1", 45) | norm("stem.4", 64)
    else:
        out |= {"stem.0.weight": (64, 3, 3, 7, 7)} | norm("stem.1", 64)
    for layer, (before, channels) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        for block in range(2):
            inputs = before if block == 0 else channels
            middle = inputs * channels * 27 // (inputs * 9 + 3 * channels)
            for conv, n in (("conv1", inputs), ("conv2", channels)):
                name = f"layer{layer}.{block}.{conv}"
                if kind == "r2plus1d":
                    out |= {
                        f"{name}.0.0.weight": (middle, n, 1, 3, 3),
                        f"{name}.0.3.weight": (channels, middle, 3, 1, 1),
                    }
                    out |= norm(f"{name}.0.1", middle)
                else:
                    flat = kind == "mc3" and layer > 1
                    out[f"{name}.0.weight"] = (channels, n, 1 if flat else 3, 3, 3)
                out |= norm(f"{name}.1", channels)
            if inputs != channels:
                out[f"layer{layer}.{block}.downsample.0.weight"] = (channels, inputs, 1, 1, 1)
                out |= norm(f"layer{layer}.{block}.downsample.1", channels)
    return out | {"fc.weight": (classes, 512), "fc.bias": (classes,)}


def image_resnet(blocks: tuple[int, ...], classes: int) -> Shapes:
    out: Shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    for layer, (before, channels, n) in enumerate(zip((64, 64, 128, 256), (64, 128, 256, 512), blocks, strict=True), 1):
        for block in range(n):
            inputs, name = before if block == 0 else channels, f"layer{layer}.{block}"
            out |= {
                f"{name}.conv1.weight": (channels, inputs, 3, 3),
                f"{name}.conv2.weight": (channels, channels, 3, 3),
            }
            out |= norm(f"{name}.bn1", channels) | norm(f"{name}.bn2", channels)
            if inputs != channels:
                out[f"{name}.downsample.0.weight"] = (channels, inputs, 1, 1)
                out |= norm(f"{name}.downsample.1", channels)
    return out | {"fc.weight": (classes, 512), "fc.bias": (classes,)}


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("r2plus1d-18", "r2plus1d", 31_505_325), ("r3d-18", "r3d", 33_371_472), ("mc3-18", "mc3", 11_695_440)],
)
def test_video_resnets_are_torchvision_s(name: str, kind: str, count: int) -> None:
    theirs = video_resnet(kind, 400)
    with hollow():
        assert shapes(video_net(name, classes=400)) == theirs
        trunk = shapes(video_net(name))
    assert trunk == {k: s for k, s in theirs.items() if not k.startswith("fc.")}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(math.prod(s) for k, s in theirs.items() if not k.endswith(buffers)) == count


@pytest.mark.parametrize(
    ("name", "blocks", "count"),
    [("image-resnet-18", (2, 2, 2, 2), 11_689_512), ("image-resnet-34", (3, 4, 6, 3), 21_797_672)],
)
def test_image_resnets_are_torchvision_s(name: str, blocks: tuple[int, ...], count: int) -> None:
    with hollow():
        net = image_net(name, classes=1000)
    assert shapes(net) == image_resnet(blocks, 1000)
    assert total(net) == count


def test_torchvision_weights_load_both_ways() -> None:
    """In: a state dict with its classifier into a trunk, or whole; out: every name and shape, values untouched."""
    state = {k: torch.rand(s) if s else torch.tensor(7) for k, s in video_resnet("mc3", 400).items()}
    with hollow():
        whole, trunk = video_net("mc3-18", classes=400), video_net("mc3-18")
    whole, trunk = whole.to_empty(device="cpu"), trunk.to_empty(device="cpu")
    whole.load_state_dict(state)
    assert all(torch.equal(x, state[k]) for k, x in whole.state_dict().items())
    assert load_trunk(trunk, state) == ["fc.weight", "fc.bias"]
    assert all(torch.equal(x, state[k]) for k, x in trunk.state_dict().items())
    before = {k: x.clone() for k, x in trunk.state_dict().items()}
    with pytest.raises(ConflictError, match="another network"):
        load_trunk(trunk, {**state, "layer1.0.conv1.0.weight": torch.zeros(1)})
    with pytest.raises(ConflictError, match="another network"):
        load_trunk(trunk, {k: x for k, x in state.items() if k != "stem.0.weight"})
    assert all(torch.equal(x, before[k]) for k, x in trunk.state_dict().items())


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (video_net, "avid-r2plus1d-10", 7_015_616),
        (video_net, "avid-r2plus1d-18", 15_379_136),
        (video_net, "avid-r2plus1d-34", 28_861_632),
        (audio_net, "avid-conv2d-10", 4_725_696),
        (audio_net, "resnet-18", 11_170_240),  # CrissCross: 11.17 M
    ],
)
def test_parameters_of_the_papers(make, name: str, count: int) -> None:
    with hollow():
        assert total(make(name)) == count


def test_parameters_counted_by_hand() -> None:
    """vgg-9 and the C3D of the family from their lists of convolutions; R3D and R(2+1)D from their blocks."""
    with hollow():
        vgg = [(1, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
        assert len(vgg) == 9 and total(audio_net("vgg-9")) == sum(9 * i * o + 2 * o for i, o in vgg)
        c3d = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
        assert total(video_net("vcop-c3d")) == sum(27 * i * o + 3 * o for i, o in c3d)

        def r3d(i: int, o: int) -> int:
            shortcut = i * o + 2 * o if i != o else 0
            return 27 * i * o + 27 * o * o + 4 * o + shortcut

        stages = [(64, 64), (64, 128), (128, 256), (256, 512)]
        assert total(video_net("vcop-r3d")) == 3 * 64 * 147 + 128 + sum(r3d(i, o) for i, o in stages)

        def factored(i: int, o: int, t: int, s: int) -> int:
            m = t * s * i * o // (s * i + t * o)
            return m * (s * i + t * o + 2)

        count = factored(3, 64, 3, 49) + 128
        for i, o in stages:
            count += factored(i, o, 3, 9) + factored(o, o, 3, 9) + 4 * o
            count += factored(i, o, 1, 1) + 2 * o if i != o else 0
        assert total(video_net("vcop-r2plus1d")) == count


def test_middle_channels() -> None:
    assert [middle_channels(i, o) for i, o in ((64, 64), (64, 128), (128, 128))] == [144, 230, 288]
    assert middle_channels(1, 1) == 2


def test_names_of_the_vcop_family() -> None:
    """Those of its public checkpoints: every layer's own words."""
    with hollow():
        r21d, r3d, c3d = (shapes(video_net(f"vcop-{n}")) for n in ("r2plus1d", "r3d", "c3d"))
    assert r21d["conv1.spatial_conv.weight"] == (83, 3, 1, 7, 7) and r21d["conv1.bn.weight"] == (83,)
    assert r21d["conv3.block1.downsampleconv.temporal_conv.weight"] == (128, 42, 1, 1, 1)
    assert r21d["conv5.block1.conv2.temporal_conv.weight"] == (512, 1152, 3, 1, 1)
    assert r3d["conv1.temporal_spatial_conv.weight"] == (64, 3, 3, 7, 7)
    assert r3d["conv2.block1.bn2.running_var"] == (64,) and "conv2.block1.downsampleconv" not in " ".join(r3d)
    assert c3d["conv3b.bias"] == (256,) and c3d["bn5b.weight"] == (512,)


def test_frozen_biases_of_c3d_change_nothing_but_take_published_values() -> None:
    net = video_net("vcop-c3d", 2)
    frozen = [k for k, p in net.named_parameters() if not p.requires_grad]
    assert frozen == [f"conv{n}.bias" for n in ("1", "2", "3a", "3b", "4a", "4b", "5a", "5b")]
    x = torch.randn(2, 3, 8, 16, 16)
    before = net(x)
    with torch.no_grad():
        for k, p in net.named_parameters():
            if k in frozen:
                p += 1.0
    torch.testing.assert_close(net(x), before, atol=1e-4, rtol=1e-4)  # batch statistics take any constant away
    net.eval()
    assert not torch.allclose(net(x), before)  # running statistics do not: the value counts


# ---- the contract ------------------------------------------------------------------------------------------------

NETS = [(video_net, n) for n in VIDEO] + [(audio_net, n) for n in AUDIO] + [(image_net, n) for n in IMAGE]


def example(name: str) -> torch.Tensor:
    if name in VIDEO:
        return torch.randn(2, 3, 8, 32, 32)
    return torch.randn(2, 1, 40, 33) if name in AUDIO else torch.randn(2, 3, 40, 32)


@pytest.mark.parametrize(("make", "name"), NETS, ids=[n for _, n in NETS])
def test_every_network_keeps_the_contract(make, name: str) -> None:
    torch.manual_seed(0)
    net, x = make(name, 4), example(name)
    assert isinstance(net, Encoder)
    maps = net.forward_blocks(x)
    assert list(maps) == ["conv2x", "conv3x", "conv4x", "conv5x"]
    channels = [8, 16, 32, 32] if name == "vcop-c3d" else [4, 8, 16, 32]
    assert [m.shape[1] for m in maps.values()] == channels and net.dim == net.out_channels == 32
    net.eval()
    for pool in ("max", "avg"):
        net.pool = pool
        last = net.forward_blocks(x)["conv5x"].flatten(2)
        if isinstance(net, FoldedResNet2d):  # bins are folded, time is pooled
            last = last.unflatten(2, (-1, 3)) @ net.fold.weight[0] + net.fold.bias
        torch.testing.assert_close(net(x), last.amax(2) if pool == "max" else last.mean(2))
    net.train()
    net(x).square().sum().backward()
    missing = [k for k, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not missing, "a parameter that no gradient reaches"
    assert not torch.isnan(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])).any()
    allowed = isinstance(getattr(net, "fc", None), nn.Linear) or name == "vcop-c3d"
    biases = {k for k, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.bias is not None}
    assert not biases or allowed, "a bias in front of a batch normalisation"


def test_shapes_of_the_maps() -> None:
    """8 frames of 112: torchvision's stem has no max-pool; mc3 keeps every frame; C3D halves with pools."""
    with torch.no_grad():
        x = torch.zeros(1, 3, 8, 112, 112)
        got = {n: [tuple(m.shape[2:]) for m in video_net(n, 1).forward_blocks(x).values()] for n in VIDEO}
        heard = audio_net("l2l-resnet-18", 1).forward_blocks(torch.zeros(1, 1, 101, 40))["conv5x"]
        assert audio_net("resnet-18", 1).forward_blocks(torch.zeros(1, 1, 200, 80))["conv5x"].shape[2:] == (7, 3)
    plain = [(8, 56, 56), (4, 28, 28), (2, 14, 14), (1, 7, 7)]
    assert got["r2plus1d-18"] == got["r3d-18"] == got["vcop-r3d"] == got["vcop-r2plus1d"] == plain
    assert got["mc3-18"] == [(8, s, s) for s in (56, 28, 14, 7)]
    assert got["vcop-c3d"] == plain
    assert got["avid-r2plus1d-18"] == [(8, 28, 28), (4, 14, 14), (2, 7, 7), (1, 4, 4)]
    assert heard.shape[2:] == (7, 3), "Listen-to-Look: 101 x 40 ends in 7 x 3"


def test_listen_to_look_folds_its_bins_by_hand() -> None:
    """Last map of two channels, two times, three bins: .5 b1 - 1 b2 + 2 b3 + .25 for each time, then the larger."""
    net = audio_net("l2l-resnet-18", 1)
    last = torch.tensor([[[[1.0, 2, 3], [4, 0, 1]], [[0, 0, 0], [2, 8, 0]]]])
    net.forward_blocks = lambda x: {"conv5x": last}  # type: ignore[method-assign]
    with torch.no_grad():
        net.fold.weight.copy_(torch.tensor([[0.5, -1, 2]]))  # type: ignore[union-attr]
        net.fold.bias.fill_(0.25)  # type: ignore[union-attr]
        assert net(torch.zeros(1, 1, 101, 40)).tolist() == [[4.75, 0.25]]  # of (4.75, 4.25) and (.25, -6.75)
        net.pool = "avg"
        assert net(torch.zeros(1, 1, 101, 40)).tolist() == [[4.5, -3.25]]


def test_listen_to_look_hears_time_but_not_when() -> None:
    """A tone at another second is the same tone, at another pitch another; 40 bands, and none that do not fold."""
    torch.manual_seed(0)
    net = audio_net("l2l-resnet-18", 4).eval()
    x = torch.zeros(3, 1, 128, 40)
    x[0, 0, 32:48, 8:12] = x[1, 0, 64:80, 8:12] = x[2, 0, 32:48, 28:32] = 3.0
    with torch.no_grad():
        y = net(x)
    assert (y[0] - y[1]).abs().max() < 0.2 * (y[0] - y[2]).abs().max(), "16 rows are one step of the last map"
    with pytest.raises(UsageError, match="folds 33 to 48"):
        net(torch.zeros(1, 1, 100, 129))
    with pytest.raises(UsageError, match="at least one"):
        audio_net("l2l-resnet-18", 4, bins=0)
    assert audio_net("l2l-resnet-18", 4, bins=9).eval()(torch.zeros(1, 1, 100, 129)).shape == (1, 32)


def test_same_generator_state_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(video_net("mc3-18", 4).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_unknown_names_and_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean r2plus1d-18"):
        video_net("r2plus1d18")
    with pytest.raises(UsageError, match="no sound network"):
        audio_net("r3d-18")
    with pytest.raises(UsageError, match="takes no 'small'"):
        video_net("r3d-18", small=True)
    with pytest.raises(UsageError, match="width 0"):
        audio_net("vgg-9", 0)
    with pytest.raises(UsageError, match="no pooling"):
        image_net("image-resnet-18", 4, pool="mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="classes"):
        video_net("mc3-18", 4, classes=0)
    with pytest.raises(UsageError, match="no classes"):
        video_net("mc3-18", 4).logits(torch.zeros(1, 3, 4, 16, 16))  # type: ignore[operator]
    for name, x in (
        ("vcop-c3d", torch.zeros(1, 3, 4, 32, 32)),
        ("vcop-c3d", torch.zeros(1, 3, 8, 8, 32)),
        ("vcop-r3d", torch.zeros(1, 1, 8, 32, 32)),
        ("r3d-18", torch.zeros(3, 8, 32, 32)),
    ):
        with pytest.raises(UsageError):
            video_net(name, 2)(x)
    for name, x in (("vgg-9", torch.zeros(1, 1, 15, 40)), ("resnet-9", torch.zeros(1, 3, 40, 40))):
        with pytest.raises(UsageError):
            audio_net(name, 2)(x)


# ---- bf16 on a CPU -------------------------------------------------------------------------------------------------


def gradients(net: nn.Module, x: torch.Tensor, bf16: bool) -> dict[str, torch.Tensor]:
    net.zero_grad()
    inputs = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = net(inputs)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape)
    (y.float() * weights).sum().backward()
    return {"input": inputs.grad} | {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def convolutions_of(net: nn.Module, x: torch.Tensor) -> list[tuple[str, nn.Module, torch.Tensor]]:
    """Each convolution with the input that it gets, one of a kind (sizes, strides, shape of the input)."""
    seen: dict[tuple[object, ...], tuple[str, nn.Module, torch.Tensor]] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):

            def keep(m: nn.Module, got: tuple[torch.Tensor, ...], name: str = name) -> None:
                kind = (type(m), tuple(m.weight.shape), m.stride, tuple(got[0].shape))
                seen.setdefault(kind, (name, m, got[0].detach()))

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [n for n in VIDEO if n not in ("avid-r2plus1d-10", "avid-r2plus1d-34")])
def test_bf16_gradients_of_every_3d_convolution(name: str, frames: int) -> None:
    """Where it stands in its network, on clips of 1 to 4 frames of 16 x 16 (C3D: 8 to 11, which pools down to 1)."""
    torch.manual_seed(0)
    net = video_net(name, 8).to(memory_format=torch.channels_last_3d)
    assert all(m.padding[0] == 0 for m in net.modules() if isinstance(m, nn.Conv3d)), "time is padded by hand"
    frames += 7 if name == "vcop-c3d" else 0
    x = torch.randn(2, 3, frames, 16, 16).to(memory_format=torch.channels_last_3d)
    for where, convolution, seen in convolutions_of(net, x):
        exact, rounded = gradients(convolution, seen, False), gradients(convolution, seen, True)
        for k, g in exact.items():
            if k != "bias":
                assert (rounded[k] - g).norm() / g.norm() < 2e-2, f"{where} on {tuple(seen.shape)}: {k}"


@pytest.mark.parametrize("name", AUDIO)
def test_bf16_gradients_of_every_2d_convolution(name: str) -> None:
    torch.manual_seed(0)
    net = audio_net(name, 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 20, 33 if name == "l2l-resnet-18" else 17).to(memory_format=torch.channels_last)
    for where, convolution, seen in convolutions_of(net, x):
        exact, rounded = gradients(convolution, seen, False), gradients(convolution, seen, True)
        for k, g in exact.items():
            assert (rounded[k] - g).norm() / g.norm() < 2e-2, f"{where} on {tuple(seen.shape)}: {k}"


@pytest.mark.parametrize("side", [1, 2, 3, 14])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (7, 2), (7, 1), (1, 2)])
def test_bf16_gradients_of_2d_convolutions(side: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = PaddedConv2d(16, 32, kernel, stride).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, side, side).to(memory_format=torch.channels_last)
    exact, rounded = gradients(conv, x, False), gradients(conv, x, True)
    for k, g in exact.items():
        assert (rounded[k] - g).norm() / g.norm() < 2e-2, k
    plain = nn.Conv2d(16, 32, kernel, stride, kernel // 2, bias=False).double()
    plain.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv.double()(x.double()), plain(x.double()))


# ---- towers of named networks --------------------------------------------------------------------------------------


def test_towers_take_names() -> None:
    named = Towers(seed=3, width=4, hidden=8, dim=8, video_net="avid-r2plus1d-10", audio_net="avid-conv2d-10")
    depth = Towers(seed=3, width=4, hidden=8, dim=8, video_depth=10)
    assert list(named.state_dict()) == list(depth.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(named.state_dict().values(), depth.state_dict().values(), strict=True))
    other = Towers(seed=3, width=4, hidden=8, dim=8, pool=None, video_net="mc3-18", audio_net="resnet-9").eval()
    assert other.video.pool == other.audio.pool == "avg"
    with torch.no_grad():
        out = other.embed(torch.randn(2, 3, 4, 16, 16), torch.randn(2, 1, 40, 33))
    assert {k: tuple(x.shape) for k, x in out.items()} == {
        "video": (2, 8), "audio": (2, 8), "video-trunk": (2, 32), "audio-trunk": (2, 32)
    }  # fmt: skip
    with pytest.raises(UsageError, match="takes no 'small'"):
        Towers(seed=0, width=4, small=True, video_net="mc3-18")
