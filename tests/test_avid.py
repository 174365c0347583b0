"""AVID: its losses by hand, its gradients, its bookkeeping, and that it learns a planted correspondence."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from trainers import avid
from trainers.avid import (
    PRESETS,
    Avid,
    Config,
    audio_to_audio,
    audio_to_video,
    nce,
    scores,
    softmax_contrast,
    term_weights,
    video_to_audio,
    video_to_video,
)  # fmt: skip
from trainers.bank import MemoryBank
from trainers.batch import Batch

SMALL = Config(
    video_depth=10, width=4, hidden=16, dim=8, head_batch_norm=True, frames=2, size=16, negatives=6, batch=4
)  # fmt: skip


def make_batch(rows, *, seed=0, sound=None, picture=None, dtype=torch.float32, draw=0) -> Batch:
    """Clips whose content is a fixed function of the row: a tint of the picture and a pattern of the sound."""
    rows = torch.as_tensor(rows)
    n = len(rows)
    g = torch.Generator().manual_seed(99)
    tint, tone = torch.randn(64, 3, 1, 1, 1, generator=g), torch.randn(64, 1, 1, 12, generator=g)
    noise = torch.Generator().manual_seed(seed)
    video = tint[rows % 64].expand(n, 3, 2, 16, 16) + 0.1 * torch.randn(n, 3, 2, 16, 16, generator=noise)
    audio = tone[rows % 64].expand(n, 1, 16, 12) + 0.1 * torch.randn(n, 1, 16, 12, generator=noise)
    has_picture = torch.ones(n, dtype=torch.bool) if picture is None else torch.as_tensor(picture)
    has_sound = torch.ones(n, dtype=torch.bool) if sound is None else torch.as_tensor(sound)
    video = torch.where(has_picture.view(-1, 1, 1, 1, 1), video, 0)
    audio = torch.where(has_sound.view(-1, 1, 1, 1), audio, 0)
    return Batch(
        row=rows, position=torch.arange(n), draw=torch.full((n,), draw), has_picture=has_picture,
        has_sound=has_sound, epoch=0, seed=seed, video=video.to(dtype), audio=audio.to(dtype),
    )  # fmt: skip


def test_nce_by_hand():
    """Two positives, three negatives, from the definition of P and no softplus."""
    pos, neg, z = [0.5, -1.0], [0.2, 1.5, -0.7], 1.7
    k = len(neg)
    p = {s: math.exp(s) / (math.exp(s) + k * z) for s in pos + neg}
    expected = -sum(math.log(p[s]) for s in pos) / 2 - sum(math.log(1 - p[s]) for s in neg)
    got = nce(torch.tensor([pos], dtype=torch.float64), torch.tensor([neg], dtype=torch.float64), z)
    assert float(got) == pytest.approx(expected, abs=1e-14)


def test_softmax_by_hand():
    pos, neg = 0.5, [0.2, 1.5, -0.7]
    expected = -math.log(math.exp(pos) / (math.exp(pos) + sum(map(math.exp, neg))))
    got = softmax_contrast(torch.tensor([[pos]], dtype=torch.float64), torch.tensor([neg], dtype=torch.float64))
    assert float(got) == pytest.approx(expected, abs=1e-14)


def test_losses_survive_extreme_scores():
    pos, neg = torch.tensor([[-900.0]], requires_grad=True), torch.tensor([[900.0, -900.0]], requires_grad=True)
    for loss in (nce(pos, neg, 2.2), softmax_contrast(pos, neg)):
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), (pos, neg)))


def test_each_direction_meets_its_own_memory_by_hand():
    """Three rows in two dimensions; sample 0 against negatives 1 and 2, every term worked out in plain Python."""
    t, z = 0.5, 2.0
    memory = [[(1.0, 0.0), (0.0, 1.0)], [(0.6, 0.8), (-1.0, 0.0)], [(0.0, -1.0), (0.8, -0.6)]]
    v, a = (0.8, 0.6), (-0.6, 0.8)

    def loss(query, modality):
        s = [sum(q * m for q, m in zip(query, row[modality], strict=True)) / t for row in memory]
        p = [math.exp(x) / (math.exp(x) + 2 * z) for x in s]
        return -math.log(p[0]) - math.log(1 - p[1]) - math.log(1 - p[2])

    bank = torch.tensor(memory, dtype=torch.float64)
    pos, neg = bank[None, :1], bank[None, 1:]
    contrast = partial(nce, partition=z)
    vt, at = torch.tensor([v], dtype=torch.float64), torch.tensor([a], dtype=torch.float64)
    assert float(video_to_audio(vt, pos, neg, t, contrast)) == pytest.approx(loss(v, 1), abs=1e-13)
    assert float(audio_to_video(at, pos, neg, t, contrast)) == pytest.approx(loss(a, 0), abs=1e-13)
    assert float(video_to_video(vt, pos, neg, t, contrast)) == pytest.approx(loss(v, 0), abs=1e-13)
    assert float(audio_to_audio(at, pos, neg, t, contrast)) == pytest.approx(loss(a, 1), abs=1e-13)


def test_weights_of_the_variants():
    assert term_weights("cross", "code") == {"video_to_audio": 0.5, "audio_to_video": 0.5}
    assert term_weights("self", "paper") == {"video_to_video": 1.0, "audio_to_audio": 1.0}
    joint = term_weights("joint", "code")
    assert len(joint) == 4 and set(joint.values()) == {0.25}


@pytest.mark.parametrize("contrast", [partial(nce, partition=1.3), softmax_contrast])
@pytest.mark.parametrize("direction", [video_to_audio, audio_to_video, video_to_video, audio_to_audio])
def test_gradients(contrast, direction):
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64), dim=-1)
    query = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: direction(q, bank[:, :2], bank[:, 2:], 0.3, contrast), (query,))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        direction(query, bank[:, :2], bank[:, 2:], 0.3, contrast),
        direction(query, bank[:, :2], bank[:, 2:][:, order], 0.3, contrast),
    )


def test_nce_at_random_init_is_about_8_7():
    """K = 1024, D = 128, t = .07: log(K Z) for a positive of score about 0, and about 1 for all the noise."""
    memory = MemoryBank(3000, 128, 0).memory
    query = MemoryBank(512, 128, 1).memory[:, 0]
    t, k = 0.07, 1024
    all_scores = query @ memory[:, 1].T / t
    z = float(all_scores.exp().mean())
    score_neg, score_pos = all_scores[:, :k], all_scores[:, k : k + 1]
    loss = float(nce(score_pos, score_neg, z).mean())
    noise = float(torch.log1p(score_neg.exp() / (k * z)).sum(1).mean())
    assert loss == pytest.approx(math.log(k * z) + noise, abs=0.2)
    assert noise == pytest.approx(1.0, abs=0.02) and loss == pytest.approx(8.7, abs=0.2)
    assert 2.1 < z < 2.3


@pytest.mark.parametrize("variant", ["cross", "self", "joint"])
@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_step_is_the_weighted_sum_of_its_terms(variant, form):
    method = Avid(replace(SMALL, variant=variant, form=form), 20)
    summed = Avid(replace(SMALL, variant=variant, form=form, loss_scale="paper"), 20)
    batch = make_batch([3, 1, 4, 15])
    loss, metrics = method.step(batch)
    paper, _ = summed.step(batch)
    terms = avid.VARIANTS[variant]
    spread = {"feature_std_video", "feature_std_audio"}
    assert set(metrics) == {"loss", *terms} | spread | ({"partition"} if form == "nce" else set())
    torch.testing.assert_close(loss.detach(), sum(metrics[t] for t in terms) / len(terms))
    torch.testing.assert_close(paper, loss * len(terms))
    assert not any(torch.as_tensor(m).requires_grad for m in metrics.values())


def test_partition_is_the_first_batch_then_frozen():
    for variant, query, key in (("cross", 0, 1), ("self", 0, 0), ("joint", 0, 1)):
        method = Avid(replace(SMALL, variant=variant), 20)
        batch = make_batch([3, 1, 4, 15])
        start = method.bank.memory.clone()
        method.step(batch)
        embedding = method._pending[0][2][:, query]
        pos_b12d, neg_bk2d = method._targets(batch)
        assert torch.equal(pos_b12d[:, 0], start[batch.row])
        expected = scores(embedding, neg_bk2d[:, :, key], SMALL.temperature).double().exp().mean()
        torch.testing.assert_close(method.partition, expected, rtol=1e-6, atol=0)
        frozen = method.partition.clone()
        method.after_step()
        method.step(make_batch([5, 6, 7, 8], seed=3))
        assert torch.equal(method.partition, frozen)


def test_step_writes_no_bank_and_after_step_does_once():
    method = Avid(SMALL, 20)
    start = method.bank.memory.clone()
    batch = make_batch([3, 1, 3, 15])
    loss, _ = method.step(batch)
    assert torch.equal(method.bank.memory, start)
    v, a = method._pending[0][2].unbind(1)
    stats = method.after_step()
    loss.backward()  # the bank moved under it: the scores must have kept their own copy
    assert stats == {"samples": 4, "rows": 3, "duplicates": 1}
    torch.testing.assert_close(method.bank.memory[1, 0], F.normalize(start[1, 0] + v[1], dim=0))
    torch.testing.assert_close(method.bank.memory[3, 1], F.normalize(start[3, 1] + (a[0] + a[2]) / 2, dim=0))
    assert method.after_step() == {}
    method.eval()
    method.step(batch)
    assert method.after_step() == {}, "an evaluation leaves the bank alone"


def test_missing_sound_is_left_out_not_filled_in():
    """The masked batch gives the loss of the terms that are there, and the missing row stays noise."""
    method = Avid(replace(SMALL, variant="joint"), 20).eval()
    method.partition = torch.tensor(2.0, dtype=torch.float64)
    sound = [True, False, True, True]
    loss, metrics = method.step(make_batch([3, 1, 4, 15], sound=sound))
    whole, alone = method.step(make_batch([3, 1, 4, 15]))
    keep = torch.tensor(sound)
    batch = make_batch([3, 1, 4, 15])
    v, _ = method.towers(batch.video, batch.audio, batch.has_picture, batch.has_sound)
    pos, neg = method._targets(batch)
    contrast = partial(nce, partition=2.0)
    expected = video_to_audio(v, pos, neg, SMALL.temperature, contrast)[keep].mean().detach()
    torch.testing.assert_close(metrics["video_to_audio"], expected)
    torch.testing.assert_close(metrics["video_to_video"], alone["video_to_video"])
    assert torch.isfinite(loss) and not torch.equal(loss, whole)
    method.train()
    start = method.bank.memory.clone()
    method.step(make_batch([3, 1, 4, 15], sound=sound))
    method.after_step()
    assert torch.equal(method.bank.memory[1, 1], start[1, 1])
    assert method.bank.seen[[3, 1]].tolist() == [[True, True], [True, False]]


def test_a_batch_without_any_sound_has_zero_gradient_not_nan():
    method = Avid(SMALL, 20)
    method.partition = torch.tensor(2.0, dtype=torch.float64)
    loss, _ = method.step(make_batch([3, 1], sound=[False, False]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in method.parameters())


def test_autocast_scores_stay_float32():
    method = Avid(SMALL, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method.step(make_batch([3, 1, 4, 15]))
    loss.backward()
    assert loss.dtype == torch.float32 and method._pending[0][2].dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


def train(method, steps: int, rows: int = 8, lr: float = 1e-2, move_bank: bool = True) -> list[float]:
    optimiser = torch.optim.Adam(method.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        loss, _ = method(make_batch(torch.randperm(rows, generator=g), seed=step, draw=step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if move_bank:
            method.after_step()
        losses.append(float(loss.detach()))
    return losses


# Ten SGD steps in float64: equal to the bit twice on one machine, 1e-4 across machines. Average pooling, heads without
# normalisation, a mild temperature and clips that are no flat tints keep rounding where it is (`test_avid_cma.CALM`).
TRACES: dict[str, list[float]] = {
    "nce": [3.37089, 3.25887, 3.107331, 3.081274, 3.209385, 3.250797, 3.389116, 3.39872, 3.123108, 2.980409],
    "softmax": [2.354391, 2.177449, 2.121333, 1.973568, 2.07621, 2.152157, 2.20729, 2.228273, 1.910959, 1.778747],
}


def ten(form, rate=0.001):
    from method_runs import trace, views_batch  # which imports test_avid_cma, which imports this file

    batches = [views_batch(torch.arange(6) + n, 1, seed=n, dtype=torch.float64, rich=True) for n in range(10)]
    calm = replace(SMALL, form=form, head_batch_norm=False, pool="avg", temperature=0.3)
    return trace(Avid(calm, 20).double(), batches, rate)


@pytest.mark.parametrize("form", TRACES)
def test_ten_losses_of_a_fixed_seed(form):
    one = ten(form)
    assert one == ten(form), "the same to the bit"
    assert one == pytest.approx(TRACES[form], abs=1e-4)


@pytest.mark.parametrize("variant", ["cross", "self", "joint"])
@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_loss_falls_within_ten_steps_towards_a_planted_memory(variant, form):
    """The memory is held: sight and sound of a row at one planted point, which the nets must learn to reach."""
    method = Avid(replace(SMALL, variant=variant, form=form), 8)
    method.bank.memory[:] = torch.eye(8)[:, None]
    losses = train(method, 10, move_bank=False)
    assert losses[-1] < 0.7 * losses[0], losses


def test_forty_steps_match_sight_with_sound():
    method = Avid(SMALL, 8)
    losses = train(method, 40)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    method.eval()
    batch = make_batch(torch.arange(8), seed=1000)
    with torch.no_grad():
        out = method.embed(batch.video, batch.audio)
    hits = ((out["video"] @ out["audio"].T).argmax(1) == torch.arange(8)).float().mean()
    assert hits >= 0.5, f"chance is 1/8, found {float(hits)}"


def test_same_seed_same_losses_and_state_resumes_to_the_bit():
    one, two = Avid(SMALL, 16), Avid(SMALL, 16)
    assert train(one, 3) == train(two, 3)
    weights, state = one.state_dict(), one.method_state()
    assert set(state) == {"bank.memory", "bank.seen", "partition"}
    assert not any(name.startswith("bank") for name in weights)
    other = Avid(replace(SMALL, seed=9), 16)
    other.load_state_dict(weights)
    other.load_method_state({k: v.clone() for k, v in state.items()})
    batch = make_batch([1, 2, 3], seed=77)
    assert torch.equal(one.step(batch)[0], other.step(batch)[0])
    with pytest.raises(ConflictError, match="selection"):
        Avid(SMALL, 17).load_method_state(state)


def test_configuration_tells_all_its_problems():
    with pytest.raises(UsageError) as e:
        Config(variant="crossed", negatives=0, temperature=0.0)
    assert all(word in str(e.value) for word in ("crossed", "did you mean cross", "negatives", "temperature"))
    assert PRESETS["paper"] == Config()


def test_needs_follow_the_configuration():
    needs = Avid(SMALL, 16).needs
    assert (needs.frames, needs.fps, needs.size, needs.seconds) == (2, 16, 16, 2.0)
    assert needs.picture and needs.sound and not needs.labels and needs.max_offset == 0.5
    with pytest.raises(UsageError, match="fps"):
        Avid(replace(SMALL, fps=0), 16)
    with pytest.raises(UsageError, match="trains on both"):
        Avid(SMALL, 16).step(replace(make_batch([1, 2]), audio=None))
