"""CrissCross: its six relations by hand, the poster's scale and the code's, collapse, and what is missing stays out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import goes_on_to_the_bit, trace, two_equal_one, views_batch
from tiny_run import store_in
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from avstore.windows import RELAXATIONS, Extents
from trainers import crisscross, simsiam
from trainers.config import resolve
from trainers.crisscross import (
    PRESETS,
    RELATIONS,
    Config,
    CrissCross,
    combine,
    distance,
    relation,
    relations,
    two_views,
)  # fmt: skip
from trainers.metrics import read_metrics
from trainers.run import Run
from trainers.spread import feature_std

SMALL = Config(
    video_net="avid-r2plus1d-10", audio_net="resnet-10", width=4, hidden=16, dim=8, bottleneck=4, frames=2, size=16,
    batch=4,
)  # fmt: skip
ALL = dict.fromkeys(RELATIONS, 1.0)


def ends(seed: int = 0, batch: int = 5, dim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and projections of v1, a1, v2, a2: (4, B, D) each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, batch, dim, generator=g, dtype=torch.float64).unbind(0)


def test_distance_by_hand_and_no_gradient_through_the_target() -> None:
    p = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[8.0, 6.0]], dtype=torch.float64, requires_grad=True)
    d = distance(p, z)
    assert float(d.detach()) == pytest.approx(-48 / 50, abs=1e-15)
    d.sum().backward()
    assert z.grad is None and p.grad is not None and p.grad.abs().sum() > 0


def test_the_poster_s_objective_by_hand() -> None:
    """Every term of the poster written out in plain Python, with the minus that it leaves away."""
    p, z = ends(batch=1)

    def d(i: int, j: int) -> float:
        x, y = p[i, 0].tolist(), z[j, 0].tolist()
        dot = sum(a * b for a, b in zip(x, y, strict=True))
        return -dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))

    v1, a1, v2, a2 = range(4)
    intra = d(v1, v2) / 2 + d(v2, v1) / 2 + d(a1, a2) / 2 + d(a2, a1) / 2
    sync = d(v1, a1) / 2 + d(a1, v1) / 2 + d(v2, a2) / 2 + d(a2, v2) / 2
    asyn = d(v1, a2) / 2 + d(a2, v1) / 2 + d(v2, a1) / 2 + d(a1, v2) / 2
    found = relations(p, z)[:, 0]
    assert found.shape == (6,) and list(RELATIONS)[:2] == ["intra_video", "intra_audio"]
    for k, expected in enumerate((intra, sync, asyn)):
        assert float(found[2 * k : 2 * k + 2].sum()) == pytest.approx(expected, abs=1e-14)
    poster = (intra + sync + asyn) / 3
    assert float(combine(found, ALL, "paper")) == pytest.approx(poster, abs=1e-14)
    assert float(combine(found, ALL)) == pytest.approx(poster / 2, abs=1e-14), "the code's is half of it"
    without = ALL | {"async_12": 0.0, "async_21": 0.0}
    assert float(combine(found, without)) == pytest.approx((intra + sync) / 4, abs=1e-14)
    assert float(combine(found, without, "paper")) == pytest.approx((intra + sync) / 2, abs=1e-14)
    heavy = ALL | {"sync_1": 3.0}
    assert float(combine(found, heavy)) == pytest.approx(float(found.sum() + 2 * found[2]) / 6, abs=1e-14)


def test_collapse_has_the_best_loss_and_no_spread() -> None:
    """One vector for everything: -1 in the code's scale, -2 in the poster's. Only the deviation tells."""
    same = torch.ones(4, 5, 8, dtype=torch.float64)
    pair = relations(same, same).mean(1)
    assert float(combine(pair, ALL)) == pytest.approx(-1, abs=1e-12)
    assert float(combine(pair, ALL, "paper")) == pytest.approx(-2, abs=1e-12)
    everyone = torch.ones(400, dtype=torch.bool)
    assert float(feature_std(F.normalize(torch.ones(400, 64), dim=1), everyone)) < 1e-6
    spread = F.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert float(feature_std(spread, everyone)) == pytest.approx(1, abs=0.02)
    some = everyone.clone()
    some[::2] = False
    expected = spread[1::2].double().std(0, correction=0).mean() * 8
    assert float(feature_std(spread, some)) == pytest.approx(float(expected), abs=1e-6), "masked rows do not count"


def test_gradients() -> None:
    p, z = ends()
    p1, p2 = (x.clone().requires_grad_() for x in p[:2])
    assert torch.autograd.gradcheck(lambda a, b: relation(a, z[0], b, z[1]), (p1, p2))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(relations(p[:, order], z[:, order]), relations(p, z)[:, order])


def test_simsiam_is_one_synchronous_relation() -> None:
    """With one view, L_sync is SimSiam between sight and sound: the same function."""
    p, z = ends()
    theirs = (simsiam.negative_cosine(p[0], z[1]) + simsiam.negative_cosine(p[1], z[0])) / 2
    torch.testing.assert_close(relations(p, z)[list(RELATIONS).index("sync_1")], theirs, rtol=0, atol=1e-15)


def test_step_combines_its_relations() -> None:
    method, batch = CrissCross(SMALL, 20), views_batch([3, 1, 4, 15], 2)
    loss, metrics = method.step(batch)
    torch.testing.assert_close(loss.detach(), sum(metrics[name] for name in RELATIONS) / 6)
    paper, _ = CrissCross(replace(SMALL, loss_scale="paper"), 20).step(batch)
    torch.testing.assert_close(paper, 2 * loss)
    off, _ = CrissCross(replace(SMALL, async_12=0.0, async_21=0.0), 20).step(batch)
    torch.testing.assert_close(off.detach(), sum(metrics[name] for name in list(RELATIONS)[:4]) / 4)
    assert not any(torch.as_tensor(m).requires_grad for m in metrics.values())
    assert 0.5 < metrics["feature_std_video"] < 1.5 and 0.5 < metrics["feature_std_audio"] < 1.5
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_missing_sound_is_left_out_not_filled_in() -> None:
    method = CrissCross(SMALL, 20).eval()
    sound = [True, False, True, True]
    loss, metrics = method.step(views_batch([3, 1, 4, 15], 2, sound=sound))
    _, whole = method.step(views_batch([3, 1, 4, 15], 2))
    _, kept = method.step(_only(views_batch([3, 1, 4, 15], 2), [0, 2, 3]))
    torch.testing.assert_close(metrics["intra_video"], whole["intra_video"])
    for name in RELATIONS:
        if name != "intra_video":
            torch.testing.assert_close(metrics[name], kept[name])
    assert torch.isfinite(loss)
    method.train()
    loss, metrics = method.step(views_batch([3, 1], 2, sound=[False, False]))
    loss.backward()
    assert float(metrics["intra_audio"]) == float(metrics["sync_1"]) == 0.0
    sound_side = [*method.towers.audio.parameters(), *method.audio_predictor.parameters()]
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in sound_side)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


def _only(batch, rows):
    rows = torch.tensor(rows)
    return replace(batch, **{k: x[rows] for k, x in vars(batch).items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("relaxation", list(RELAXATIONS))
@pytest.mark.parametrize("loose", [False, True])
def test_every_relaxation_is_cut_as_fig_2_says(relaxation: str, loose: bool) -> None:
    """methods.md 7: none 0, mild half a clip, medium a clip, extreme in disjoint halves; 10-s videos, 2-s sound."""
    policy = two_views(Config(relaxation=relaxation, loose=loose), 24000)
    assert policy.views == 2
    long = np.full(50, 240000)
    extents = Extents(long, np.zeros(50, np.int64), long)
    u = np.random.default_rng(0).random((50, policy.numbers))
    found = policy.starts(extents, u, np.zeros(50, np.int64), 12000, 48000)
    gap_v, gap_a = (x[:, 1] - x[:, 0] for x in (found.picture, found.sound))
    part = {"none": 0, "mild": 1 / 2, "medium": 1}
    if relaxation in part:
        assert (gap_a == 48000 * part[relaxation]).all()
        assert (gap_v == (12000 if loose else 48000) * part[relaxation]).all()
    elif relaxation == "extreme" and not loose:
        assert (found.sound[:, 0] + 48000 <= 120000).all() and (found.sound[:, 1] >= 120000).all()
        assert (found.picture[:, 0] + 12000 <= 120000).all() and (found.picture[:, 1] >= 120000).all()
    elif relaxation == "extreme":
        assert (gap_a == 120000 - 48000).all(), "as coded: T / 2 - the sound's length"
    elif relaxation == "extreme-video":
        assert (gap_a == 0).all() and (gap_v > 0).all()
    elif relaxation == "extreme-audio":
        assert (gap_v == 0).all() and (gap_a > 0).all()
    else:
        assert len(set(gap_a.tolist())) > 40


TRACE = [-0.006657, -0.016662, 0.015098, -0.011702, 0.050591, -0.072981, -0.047647, -0.010448, 0.017322, 0.005476]


def ten(rate: float = 0.001) -> list[float]:
    batches = [views_batch(torch.arange(6) + n, 2, seed=n, dtype=torch.float64, rich=True) for n in range(10)]
    return trace(CrissCross(SMALL, 20).double(), batches, rate)


def test_ten_losses_of_a_fixed_seed() -> None:
    one = ten()
    assert one == ten(), "the same to the bit"
    assert one == pytest.approx(TRACE, abs=1e-4)


def test_loss_falls_on_a_fixed_batch_without_collapse() -> None:
    method, batch = CrissCross(SMALL, 20), views_batch(torch.arange(8), 2)
    losses = trace(method, [batch] * 12, 0.01, torch.optim.Adam)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2, losses
    _, metrics = method.step(batch)
    assert metrics["feature_std_video"] > 0.5 and metrics["feature_std_audio"] > 0.5


def test_needs_two_views_and_keeps_no_state() -> None:
    method = CrissCross(SMALL, 20)
    assert method.method_state() == {} and method.after_step() == {} and method.start_epoch(0) == {}
    method.load_method_state({})
    with pytest.raises(ConflictError, match="keeps no state"):
        method.load_method_state({"bank.memory": torch.zeros(1)})
    with pytest.raises(UsageError, match="two views"):
        method.step(views_batch([1, 2], 1))
    with pytest.raises(UsageError, match="trains on both"):
        method.step(replace(views_batch([1, 2], 2), audio=None))
    other = CrissCross(replace(SMALL, seed=5), 20)
    other.load_state_dict(method.state_dict())
    batch = views_batch([3, 1, 4], 2)
    assert torch.equal(method.step(batch)[0], other.step(batch)[0])
    out = method.eval().embed(batch.video[:, 0], batch.audio[:, 0])
    assert set(out) == {"video", "audio", "video-trunk", "audio-trunk"}
    torch.testing.assert_close(out["audio"].norm(dim=1), torch.ones(3))


def test_configuration_tells_all_its_problems() -> None:
    with pytest.raises(UsageError) as e:
        Config(relaxation="mildd", audio_net="resnet-8", sync_1=-1.0, dim=0)
    assert all(word in str(e.value) for word in ("did you mean mild", "did you mean resnet", "coefficients", "dim"))
    assert PRESETS["paper"] == Config() and crisscross.Config().relaxation == "mild"
    parameters = sum(p.numel() for p in CrissCross(Config(), 2).towers.audio.parameters())
    assert parameters == pytest.approx(11.17e6, rel=1e-3), "methods.md 7"


SETS = ("video_net=avid-r2plus1d-10", "audio_net=avid-conv2d-10", "width=4", "hidden=16", "dim=8", "bottleneck=4",
        "frames=4", "fps=8", "size=32", "seconds=0.5", "batch=6", "draws=1", "cutout=4", "statistics_clips=16",
        "in_process=true", "threads=1", "precision=fp32", "warmup_steps=1", "learning_rate=0.01")  # fmt: skip


def test_a_run_on_a_store_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = goes_on_to_the_bit("crisscross", store_in(tmp_path), resolve("crisscross", sets=SETS), tmp_path)
    lines = read_metrics(run.path / "metrics.jsonl")
    assert len(lines) == 4 and all(-1 <= line["loss"] <= 1 and line["feature_std_video"] > 0 for line in lines)


def cases():
    config = replace(SMALL, audio_net="avid-conv2d-10", seed=1)
    return {"crisscross": (CrissCross(config, 40), 2, 3)}


@pytest.mark.slow
def test_two_processes_equal_one_in_float64(tmp_path: Path) -> None:
    two_equal_one("test_crisscross", tmp_path)


@pytest.mark.slow
def test_the_demo_set_from_its_files(tmp_path: Path, tiny_media: Path) -> None:
    import avstore
    from avstore.ingest import ingest
    from trainers.loop import train

    ingest(tiny_media, tmp_path / "demo.zarr", size=(64, 80), fps=8)
    c = resolve("crisscross", preset="tiny", sets=["steps=30", "batch=8", "in_process=true"])
    run = train("crisscross", avstore.open(tmp_path / "demo.zarr"), c, tmp_path / "run").run
    losses = [line["loss"] for line in read_metrics(run.path / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1 and Run(run.path).finished
