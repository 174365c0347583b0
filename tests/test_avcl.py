"""AVCL: its eleven equations by hand, its tables' options, and what every method promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import ROWS, goes_on, labelled, learns_a_fixed_batch, leaves_out, nothing_is_zero, ten_steps
from method_runs import goes_on_to_the_bit, two_equal_one
from tiny_run import store_in

from avstore.errors import ConflictError, UsageError
from avstore.frontends import FRONT_ENDS, spectrogram
from trainers import barlow_twins
from trainers.avcl import PRESETS, SHORT, Amfm, Avcl, Config, alignment, clips, cross_correlation, self_contrast
from trainers.config import resolve
from trainers.metrics import read_metrics

SMALL = replace(PRESETS["tiny"], width=4, frames=2, size=16, batch=6, epochs=4, draws=1)
# Ten SGD steps in float64: equal to the bit twice on one machine, 1e-4 across machines.
TRACE = [22.523917, 17.823287, 14.595153, 19.897836, 15.329675, 23.763038, 14.445365, 14.744288, 17.082252, 14.95313]


def make(**changes: Any) -> Avcl:
    return Avcl(replace(SMALL, **changes), ROWS).train()


def test_fusion_by_hand() -> None:
    """Eqs. 1-4 with D = 2: Z = (v1 + a2, v2 - a1 + 1), E = (Z1 - Z2, Z1 + 2)."""
    fusion = Amfm(2)
    assert fusion.squeeze.out_features == 2 and Amfm(512).squeeze.weight.shape == (512, 1024), "c_u: half of the sum"
    with torch.no_grad():
        fusion.squeeze.weight.copy_(torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0]]))
        fusion.squeeze.bias.copy_(torch.tensor([0.0, 1]))
        fusion.excite.weight.copy_(torch.tensor([[1.0, -1], [1, 0]]))
        fusion.excite.bias.copy_(torch.tensor([0.0, 2]))
        v, a = torch.tensor([[2.0, 3], [1, 0]]), torch.tensor([[5.0, 4], [0, -1]])
        f_v, f_a = fusion(v, a)  # Z = (6, -1), (0, 1); E = (7, 8), (-1, 2): a ReLU shuts one channel for both
    assert f_v.tolist() == [[14, 24], [0, 0]] and f_a.tolist() == [[35, 32], [0, -2]]


def test_cgra_by_hand() -> None:
    """Eqs. 5 and 6 of two clips: norms of sight sqrt 10 and 2, of sound sqrt 2 and 2."""
    v = torch.tensor([[1.0, 2], [3, 0]], dtype=torch.float64)
    a = torch.tensor([[1.0, 0], [1, 2]], dtype=torch.float64)
    c = cross_correlation(v, a)
    expected = [[4 / math.sqrt(20), 6 / math.sqrt(40)], [2 / math.sqrt(8), 0.0]]
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float64))
    on, off = alignment(c)
    assert float(on) == pytest.approx((1 - 4 / math.sqrt(20)) ** 2 + 1) and float(off) == pytest.approx(0.9 + 0.5)
    dead = cross_correlation(torch.zeros(2, 2), a.float())
    assert not dead.any(), "a feature that is always zero correlates with none"


def test_identical_independent_features() -> None:
    """methods.md, section 7: on the diagonal 0, off it about 1 / B."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(256, 64, generator=g, dtype=torch.float64)
    f = (f - f.mean(0)) / f.std(0)
    on, off = alignment(cross_correlation(f, f))
    assert float(on) < 1e-12 and float(off) / (64 * 63) * 256 == pytest.approx(1, abs=0.1)


def test_centred_it_is_barlow_twins() -> None:
    g = torch.Generator().manual_seed(1)
    v, a = torch.randn(9, 5, generator=g), torch.rand(9, 5, generator=g) + 3
    torch.testing.assert_close(cross_correlation(v, a, center=True), barlow_twins.cross_correlation(v, a))
    torch.testing.assert_close(alignment(cross_correlation(v, a)), barlow_twins.redundancy(cross_correlation(v, a)))
    assert (cross_correlation(v, a) - cross_correlation(v, a, center=True)).abs().max() > 0.1
    # eq. 6 as printed does not change with the scale of a feature, centred or not
    torch.testing.assert_close(cross_correlation(v * 7, a), cross_correlation(v, a))


def test_selfcl_by_hand() -> None:
    """Eqs. 7-9 of two clips at t = 1/2: x = e1, e2; y = 3 e1, (.6, .8)."""
    x = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    y = torch.tensor([[3.0, 0], [0.6, 0.8]], dtype=torch.float64)
    e = math.exp
    visual = [math.log(e(2) + e(1.2) + 1) - 2, math.log(e(1.6) + 1 + 1) - 1.6]
    sound = [math.log(e(2) + 1 + e(1.2)) - 2, math.log(e(1.6) + e(1.2) + e(1.2)) - 1.6]
    assert self_contrast(x, y, 0.5).tolist() == pytest.approx(visual)
    assert self_contrast(y, x, 0.5).tolist() == pytest.approx(sound)
    assert self_contrast(x[:1], y[:1], 0.5).tolist() == [0.0], "alone there is nothing to tell apart"
    g = torch.Generator().manual_seed(2)
    p, q = torch.randn(7, 4, generator=g), torch.randn(7, 4, generator=g)
    order = torch.randperm(7, generator=g)
    torch.testing.assert_close(self_contrast(p, q, 0.1)[order], self_contrast(p[order] * 3, q[order], 0.1))


@pytest.mark.parametrize(
    "loss",
    [
        lambda v, a: torch.stack(alignment(cross_correlation(v, a))),
        lambda v, a: self_contrast(v, a, 0.3),
        lambda v, a: self_contrast(a, v, 0.3).sum(),
    ],
)
def test_gradients(loss: Any) -> None:
    g = torch.Generator().manual_seed(3)
    v, a = (torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(loss, (v, a))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_whole_is_eq_11(reduction: str) -> None:
    """0.9 (sum (1 - C_ii)^2 + .005 sum C_ij^2) + 0.1 (eq. 7 + eq. 9), of conv5 and of the fused pool."""
    c = {"cgra_layers": "conv5+pool", "weight_cor": 0.9, "weight_self": 0.1, "reduction": reduction}
    method, batch = make(**c), labelled()
    loss, metrics = method(batch)
    other = make(**c)
    v5, a5 = other.video.forward_blocks(batch.video)["conv5x"], other.audio.forward_blocks(batch.audio)["conv5x"]
    v, a = v5.mean((2, 3, 4)), a5.mean((2, 3))
    f_v, f_a = other.fuse(v, a)
    expected = torch.zeros(())
    for x, y in ((v, a), (f_v, f_a)):
        on, off = alignment(cross_correlation(x, y))
        expected = expected + 0.9 * (on + 0.005 * off)
    terms = self_contrast(f_v, f_a, 0.1) + self_contrast(f_a, f_v, 0.1)
    expected = expected + 0.1 * (terms.sum() if reduction == "sum" else terms.mean())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["gate_open"], (f_v != 0).double().mean())


def test_paper_s_weights() -> None:
    c = Config()
    assert (c.weight_cor, c.weight_self, c.off_diagonal) == (0.9, 0.1, 0.005) and c.amfm and not c.center
    assert (c.learning_rate, c.momentum, c.weight_decay, c.batch, c.epochs) == (1e-3, 0.9, 5e-4, 16, 300)
    assert (c.video_net, c.frames, c.size, c.cgra_layers, c.reduction) == ("vcop-r3d", 16, 112, "pool", "sum")


@pytest.mark.parametrize("net", ["vcop-c3d", "vcop-r3d", "vcop-r2plus1d"])
@pytest.mark.parametrize("layers", ["none", "conv3", "conv4+pool"])
def test_backbones_and_layers_of_the_tables(net: str, layers: str) -> None:
    """Table 4's networks hear the whole sound as an image; Table 2's layers."""
    method = make(video_net=net, audio_net=net, cgra_layers=layers, frames=8, width=2, amfm=layers != "none")
    batch = labelled((1, 2, 3))
    g = torch.Generator().manual_seed(0)
    loss, metrics = method(replace(batch, video=torch.randn(3, 3, 8, 16, 16, generator=g)))
    loss.backward()
    assert torch.isfinite(loss) and ("gate_open" in metrics) == (layers != "none")
    assert (float(metrics["on_diagonal"]) > 0) == (layers != "none")


def test_one_model_and_one_frame() -> None:
    """Table 1: 'model number 1', and RGB length 1."""
    nets = {"video_net": "vcop-r3d", "audio_net": "vcop-r3d", "width": 2, "frames": 1}
    one, two = make(shared=True, **nets), make(**nets)
    assert not [k for k in one.state_dict() if k.startswith("audio.")] and one.audio is one.video
    rest = sum(p.numel() for p in one.amfm.parameters())
    assert 2 * (sum(p.numel() for p in one.parameters()) - rest) == sum(p.numel() for p in two.parameters()) - rest
    batch = labelled((1, 2, 3))
    loss, _ = one(replace(batch, video=batch.video[:, :, :1]))
    loss.backward()
    assert all(p.grad is not None for p in one.parameters())
    assert one.double().audio is one.video
    with pytest.raises(UsageError, match="does not hold"):
        make(shared=True)


def test_what_is_heard() -> None:
    """Table 1: the whole sound, or 1.28 s that begin with the clip."""
    whole, short, raw = (replace(Config(), audio=x) for x in ("whole", "1.2s", "raw"))
    assert clips(whole, 24000).whole_sound and not clips(short, 24000).whole_sound and not clips(raw, 24000).whole_sound
    assert (whole.needs().seconds, short.needs().seconds, raw.needs().seconds) == (10.0, SHORT, SHORT)
    heard = [c.needs().front_end for c in (whole, short, raw)]
    assert heard == ["avcl-mel256", "avcl-mel256-5ms", "avcl-raw"]
    assert [FRONT_ENDS[name].rows(int(24000 * SHORT), 24000) for name in heard[1:]] == [256, 128]
    other = replace(short, front_end="avid-linear129")
    assert other.needs().front_end == "avid-linear129", "what is asked for is heard"


@pytest.mark.parametrize("audio", ["whole", "1.2s", "raw"])
@pytest.mark.parametrize("frames", [1, 16])
def test_every_row_of_table_1_takes_a_step(audio: str, frames: int) -> None:
    """From a waveform through the row's own front-end and the image into R3D, and back."""
    method = make(video_net="vcop-r3d", audio_net="vcop-r3d", front_end="avcl-mel256", width=2, size=32,
                  audio=audio, frames=frames)  # fmt: skip
    needs, g = method.needs, torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(3, int(24000 * needs.seconds), generator=g)
    rows = spectrogram(sound, needs.front_end, 24000)
    rows = (rows - rows.mean()) / rows.std()
    video = torch.randn(3, 3, frames, 32, 32, generator=g)
    loss, metrics = method(replace(labelled((1, 2, 3)), video=video, audio=rows[:, None]))
    loss.backward()
    assert torch.isfinite(loss) and float(metrics["feature_std_audio"]) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in method.audio.named_parameters() if "conv" in n)


def test_embeddings() -> None:
    method, batch = make().eval(), labelled()
    with torch.no_grad():
        both, sight, sound = (
            method.embed(batch.video, batch.audio),
            method.embed(batch.video),
            method.embed(audio=batch.audio),
        )
    assert set(sight) == {"video", "video-trunk"} and set(sound) == {"audio", "audio-trunk"}
    f_v, f_a = method.fuse(both["video-trunk"], both["audio-trunk"])
    torch.testing.assert_close(both["joint-trunk"], torch.cat([f_v, f_a], 1).detach())
    torch.testing.assert_close(both["joint"].norm(dim=1), torch.ones(6))
    for key, x in (sight | sound).items():
        torch.testing.assert_close(x, both[key])


@pytest.mark.parametrize(
    ("key", "value"),
    [("audio", "loud"), ("reduction", "max"), ("cgra_layers", "conv6"), ("cgra_layers", "pool+pool"),
     ("temperature", 0.0), ("weight_cor", -1.0), ("amfm_dropout", 1.0)],
)  # fmt: skip
def test_settings_that_do_not_hold(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match="does not hold") as e:
        replace(SMALL, **{key: value})
    assert key in str(e.value.why)


def test_no_loss_at_all_and_networks_that_do_not_pair() -> None:
    with pytest.raises(UsageError, match="does not hold"):
        replace(SMALL, weight_self=0.0, cgra_layers="none")
    with pytest.raises(UsageError, match="features"):
        make(video_net="vcop-c3d", audio_net="vcop-r3d", cgra_layers="conv3")
    with pytest.raises(ConflictError, match="keeps no state"):
        make().load_method_state({"bank.memory": torch.zeros(2)})
    with pytest.raises(UsageError, match="without pictures or without sound"):
        make()(replace(labelled(), audio=None))


# ---- what every method promises ------------------------------------------------------------------------------------


def test_ten_steps() -> None:
    first = ten_steps(make)
    assert first == ten_steps(make)
    assert first == pytest.approx(TRACE, abs=1e-4)


def test_it_learns_a_fixed_batch() -> None:
    metrics = learns_a_fixed_batch(make, labelled())
    assert float(metrics["feature_std_video"]) > 0.2 and float(metrics["feature_std_audio"]) > 0.2


def test_a_clip_without_sound_contributes_nothing() -> None:
    here = [True, True, False, True, True, False]
    whole, has = labelled(), torch.tensor(here)
    audio = torch.where(has[:, None, None, None], whole.audio, torch.nan)
    leaves_out(make, whole, here, has_sound=has, audio=audio)


@pytest.mark.parametrize("layers", ["pool", "conv4+conv5"])
def test_a_batch_without_any_sound_is_zero(layers: str) -> None:
    none = torch.zeros(6, dtype=torch.bool)
    nothing_is_zero(lambda: make(cgra_layers=layers), replace(labelled(), has_sound=none))


def test_it_goes_on_to_the_bit() -> None:
    goes_on(make)


def cases() -> dict[str, tuple[Any, int, int]]:
    """For `two_equal_one`: separate and shared networks."""
    image = {"video_net": "vcop-r3d", "audio_net": "vcop-r3d", "width": 2}
    return {"avcl": (make(temperature=0.5, cgra_layers="conv5+pool"), 1, 1),
            "shared": (make(temperature=0.5, shared=True, reduction="sum", **image), 1, 1)}  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    two_equal_one("test_avcl", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [("audio=1.2s",), ("audio=raw", "frames=1"), ("audio=raw", "width=2", "video_net=vcop-r3d", "audio_net=vcop-r3d"),
     ("video_net=vcop-r3d", "audio_net=vcop-r3d", "front_end=avcl-mel256", "shared=true",
      "seconds=2")],
)  # fmt: skip
def test_a_run_that_stops_and_goes_on(tmp_path: Path, own: tuple[str, ...]) -> None:
    config = resolve("avcl", preset="tiny", sets=[
        "width=4", "frames=4", "size=32", "batch=5", "epochs=3", "draws=1", "statistics_clips=16",
        "in_process=true", "threads=1", "precision=fp32", "log_every=1", *own,
    ])  # fmt: skip
    run = goes_on_to_the_bit("avcl", store_in(tmp_path), config, tmp_path)
    assert [x["step"] for x in read_metrics(run.path / "metrics.jsonl")] == [1, 2, 3, 4]
