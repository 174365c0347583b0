"""The rivals' losses: small numbers worked out by hand, gradients in float64, and what must equal what."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rival_cases import ROWS, batch_for, make
from torch.nn import functional as F

from avstore.errors import UsageError
from trainers import avid, cm_acc, draws, iic, moco, supervised
from trainers.avts import apart, together
from trainers.barlow_twins import cross_correlation, redundancy
from trainers.batch import Batch
from trainers.byol import regression
from trainers.cm_acc import gradient_factor, kmeans_plus_plus
from trainers.iic import repeat_frame, shuffle_blocks, swap_quarters
from trainers.l3 import correspondence
from trainers.moco import info_nce
from trainers.momentum import cosine_momentum
from trainers.pair import CYCLE, cycle
from trainers.simclr import nt_xent
from trainers.simsiam import negative_cosine
from trainers.supervised import cross_entropy
from trainers.xdc import balance, kmeans, pseudo_label_loss, same_pairs, whitened


def f64(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(noise(*shape, seed=seed), dim=-1)


# ---- simclr --------------------------------------------------------------------------------------------------------


def test_nt_xent_by_hand() -> None:
    """Two videos in the plane, every sum over the other three items in plain Python."""
    v, a, t = [(1.0, 0.0), (0.6, 0.8)], [(0.8, 0.6), (0.0, -1.0)], 0.5
    items = v + a
    expected = []
    for i, z in enumerate(items):
        s = {k: (z[0] * y[0] + z[1] * y[1]) / t for k, y in enumerate(items) if k != i}
        expected.append(-math.log(math.exp(s[(i + 2) % 4]) / sum(map(math.exp, s.values()))))
    assert nt_xent(f64(*v), f64(*a), t).tolist() == pytest.approx(expected, abs=1e-14)


def test_nt_xent_at_its_ends() -> None:
    same = torch.ones(5, 3, dtype=torch.float64) / 3**0.5
    assert nt_xent(same, same, 0.1).tolist() == pytest.approx([math.log(9)] * 10), "2N - 1 candidates, all alike"
    apart_ = torch.eye(5, dtype=torch.float64)
    assert float(nt_xent(apart_, apart_, 0.01).max()) < 1e-12
    v, a, order = units(6, 4), units(6, 4, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(nt_xent(v[order], a[order], 0.2).sum(), nt_xent(v, a, 0.2).sum())
    torch.testing.assert_close(nt_xent(v, a, 0.2).roll(6), nt_xent(a, v, 0.2))


# ---- moco and cm-acc -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [info_nce, cm_acc.info_nce])
def test_info_nce_by_hand(loss) -> None:
    q, k, queue, t = (0.6, 0.8), (1.0, 0.0), [(0.0, 1.0), (-1.0, 0.0), (0.8, 0.6)], 0.5
    own = torch.tensor([[False, False, True]])
    s = [(q[0] * y[0] + q[1] * y[1]) / t for y in [k, *queue]]
    expected = -math.log(math.exp(s[0]) / (math.exp(s[0]) + math.exp(s[1]) + math.exp(s[2])))
    assert float(loss(f64(q), f64(k), f64(*queue), own, t)) == pytest.approx(expected, abs=1e-14)


def test_moco_and_cm_acc_print_the_same_formula() -> None:
    q, k, queue = units(4, 3), units(4, 3, seed=1), units(7, 3, seed=2)
    own = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    args = (q, k, queue, own, 0.2)
    assert torch.equal(moco.info_nce(*args), cm_acc.info_nce(*args))
    order = torch.tensor([6, 2, 0, 1, 5, 3, 4])
    torch.testing.assert_close(info_nce(q, k, queue[order], own[:, order], 0.2), info_nce(*args))
    assert info_nce(q, k, queue, torch.ones(4, 7, dtype=torch.bool), 0.2).tolist() == [0.0] * 4, "no noise, no loss"


def test_the_gradient_embedding_is_the_gradient() -> None:
    """(p - onehot) x key / t is the gradient of the pseudo-label's cross-entropy with respect to the last layer."""
    key, other, t = units(3, 4), units(5, 4, seed=1), 0.3
    none = torch.zeros(3, 5, dtype=torch.bool)
    for i in range(3):
        layer = other.clone().requires_grad_()
        score = key[i] @ layer.T / t
        (grad,) = torch.autograd.grad(F.cross_entropy(score[None], score.argmax()[None]), layer)
        factor = gradient_factor(key[i : i + 1], other, none[:1], t)[0]
        torch.testing.assert_close(grad, factor[:, None] * key[i] / t)
    own = none.clone()
    own[:, 2] = True
    assert not gradient_factor(key, other, own, t)[:, 2].any(), "the own key is no label"


def test_kmeans_plus_plus_as_with_the_products_formed() -> None:
    f, x, u = noise(9, 4), units(9, 3, seed=1), torch.rand(6, generator=torch.Generator().manual_seed(2))
    g = torch.einsum("pq,pd->pqd", f, x).flatten(1)
    expected = [int(g.square().sum(1).argmax())]
    for n in range(1, 6):
        d = torch.stack([(g - g[c]).square().sum(1) for c in expected]).amin(0)
        expected.append(int(torch.searchsorted(d.cumsum(0), u[n].double() * d.sum(), right=True)))
    got = kmeans_plus_plus(f, x, 6, u)
    assert got.tolist() == expected and len(set(expected)) == 6


def test_kmeans_plus_plus_takes_one_of_each_kind() -> None:
    """Thirty copies of one gradient and one each of three others: four choices find all four."""
    f = torch.eye(4, dtype=torch.float64)[[0] * 30 + [1, 2, 3]]
    x = torch.ones(33, 1, dtype=torch.float64)
    picks = kmeans_plus_plus(f, x, 4, torch.tensor([0.0, 0.99, 0.5, 0.01]))
    assert {int(p) if int(p) >= 30 else 0 for p in picks} == {0, 30, 31, 32}
    more = kmeans_plus_plus(f, x, 33, torch.full((33,), 0.999))
    assert sorted(more.tolist()) == list(range(33)), "equal ones too, once each"
    with pytest.raises(UsageError, match="34 of a pool of 33"):
        kmeans_plus_plus(f, x, 34, torch.zeros(34))


# ---- byol, simsiam -------------------------------------------------------------------------------------------------


def test_regression_by_hand() -> None:
    q, z = f64((1, 0), (3, 0), (1, 0), (3, 4)), f64((0, 5), (-2, 0), (7, 0), (4, 3))
    assert regression(q, z).tolist() == pytest.approx([2.0, 4.0, 0.0, 2 - 2 * 24 / 25], abs=1e-14)
    torch.testing.assert_close(regression(q, z), (F.normalize(q) - F.normalize(z)).square().sum(1))


def test_the_target_momentum_ends_at_one() -> None:
    assert [cosine_momentum(0.99, k, 100) for k in (0, 50, 100, 200)] == pytest.approx([0.99, 0.995, 1.0, 1.0])


def test_simsiam_is_the_synchronous_loss_of_one_view() -> None:
    """CrissCross: L_sync of a view is D(v, a)/2 + D(a, v)/2 with D(p, z) = -cos(p, stop(z)) (S3)."""
    method = make("simsiam")
    batch = batch_for("simsiam")
    loss, _ = method(batch)
    z_v, z_a = method.video_head(method.video(batch.video)), method.audio_head(method.audio(batch.audio))
    p_v, p_a = method.video_predictor(z_v), method.audio_predictor(z_a)

    def cosine(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))

    torch.testing.assert_close(loss, -(cosine(p_v, z_a.detach()) + cosine(p_a, z_v.detach())).mean() / 2)


def test_negative_cosine_by_hand_and_at_collapse() -> None:
    assert negative_cosine(f64((3, 4), (1, 0)), f64((4, 3), (0, 2))).tolist() == pytest.approx([-0.96, 0.0])
    same = torch.ones(4, 5, dtype=torch.float64)
    assert negative_cosine(same, same).tolist() == pytest.approx([-1.0] * 4)


# ---- barlow twins --------------------------------------------------------------------------------------------------


def test_cross_correlation_by_hand() -> None:
    """Three clips, two dimensions: centred sight (-1, 0, 1), (1, -2, 1), sound (1, -1, 0), (0, 2, -2)."""
    v, a = f64((1, 3), (2, 0), (3, 3)), f64((4, 1), (2, 3), (3, -1))
    got = cross_correlation(v, a)
    expected = f64((-1 / 2, -2 / 4), (3 / 12**0.5, -6 / 48**0.5))
    torch.testing.assert_close(got, expected)
    on, off = redundancy(got)
    assert float(on) == pytest.approx(2.25 + (1 + 6 / 48**0.5) ** 2) and float(off) == pytest.approx(0.25 + 9 / 12)


def test_barlow_twins_is_cgra_of_centred_features() -> None:
    """S1 eq. 6 without centring, on centred features, and eq. 5 with lambda .005."""
    method = make("barlow-twins")
    batch = batch_for("barlow-twins")
    loss, _ = method(batch)
    v, a = method.video_head(method.video(batch.video)), method.audio_head(method.audio(batch.audio))
    v, a = v - v.mean(0), a - a.mean(0)
    c = torch.einsum("bi,bj->ij", v, a) / (v.square().sum(0).sqrt()[:, None] * a.square().sum(0).sqrt())
    eye = torch.eye(len(c), dtype=torch.bool)
    torch.testing.assert_close(loss, ((1 - c[eye]) ** 2).sum() + 0.005 * (c[~eye] ** 2).sum())


def test_independent_dimensions_of_equal_features() -> None:
    """methods.md 7: on the diagonal 0, off it about 1 / B each."""
    x = noise(400, 30)
    on, off = redundancy(cross_correlation(x, 3 * x + 7))
    assert float(on) < 1e-20 and float(off) / (30 * 29) == pytest.approx(1 / 400, rel=0.1)
    dead = torch.cat([x[:, :2], torch.full((400, 1), 3.0, dtype=torch.float64)], 1).requires_grad_()
    on, _ = redundancy(cross_correlation(dead, dead))
    assert float(on.detach()) == pytest.approx(1.0), "a dead dimension correlates with nothing"
    (grad,) = torch.autograd.grad(on, dead)
    assert torch.isfinite(grad).all()


# ---- iic -----------------------------------------------------------------------------------------------------------


def test_iic_prints_avids_noise_contrast() -> None:
    pos, neg = noise(3, 1), noise(3, 7, seed=1)
    assert torch.equal(iic.nce(pos, neg, 1.7), avid.nce(pos, neg, 1.7))
    q, m = units(3, 4), units(3, 7, 4, seed=1)
    assert torch.equal(iic.scores(q, m, 0.07), avid.scores(q, m, 0.07))


def test_the_intra_negative_is_one_more_of_the_noise() -> None:
    """One positive, one other video, one timeless self, worked out from P(data | s) = e^s / (e^s + 2 Z)."""
    s, z = [0.5, 0.2, 1.5], 1.7
    p = [math.exp(x) / (math.exp(x) + 2 * z) for x in s]
    expected = -math.log(p[0]) - math.log(1 - p[1]) - math.log(1 - p[2])
    assert float(iic.nce(f64((s[0],)), f64((s[1], s[2])), z)) == pytest.approx(expected, abs=1e-14)


def test_timeless_pictures() -> None:
    video = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4, 1, 1)
    still = repeat_frame(video, torch.tensor([(1 << 63) - 1, 0]))
    assert torch.equal(still[1], video[1, :, :1].expand(3, 4, 1, 1))
    assert (still == still[:, :, :1]).all() and bool((still[0, 0, 0] == video[0, 0]).any())


def test_two_quarters_change_places() -> None:
    """IIC's adjacent_shuffle: two of four chunks, all six pairs, never the true order; three pairs of three frames."""
    for frames, cuts in ((16, (0, 4, 8, 12, 16)), (8, (0, 2, 4, 6, 8)), (6, (0, 2, 3, 5, 6)), (3, (0, 1, 2, 3))):
        video = torch.arange(float(frames)).view(1, 1, frames, 1, 1).expand(400, 3, frames, 2, 2)
        word = torch.randint(-(2**62), 2**62, (400, 2), generator=torch.Generator().manual_seed(frames)) * 2
        out = swap_quarters(video, word)
        assert out.shape == video.shape and (out == out[:, :1, :, :1, :1]).all()
        pieces = [list(range(a, b)) for a, b in itertools.pairwise(cuts)]
        allowed = set()
        for i, j in itertools.combinations(range(len(pieces)), 2):
            order = list(pieces)
            order[i], order[j] = order[j], order[i]
            allowed.add(tuple(itertools.chain(*order)))
        found = [tuple(map(int, clip)) for clip in out[:, 0, :, 0, 0].tolist()]
        assert set(found) == allowed and tuple(range(frames)) not in allowed
        assert min(found.count(order) for order in allowed) > 400 / len(allowed) / 2
    with pytest.raises(UsageError, match="one frame"):
        swap_quarters(video[:, :, :1], word)
    with pytest.raises(UsageError, match="nothing to exchange"):
        iic.Config(intra="shuffle", frames=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(2, 6), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_timeless_sounds(frames: int, blocks: int, share: float, seed: int) -> None:
    """The heard rows are permuted in runs, what follows them stays."""
    audio = torch.arange(frames, dtype=torch.float32)[None, None, :, None].expand(1, 1, frames, 2)
    word = torch.randint(0, 2**62, (1, blocks), generator=torch.Generator().manual_seed(seed))
    out = shuffle_blocks(audio, word, torch.tensor([share]))[0, 0, :, 0]
    heard = min(max(round(share * frames), 1), frames)
    assert sorted(out[:heard].tolist()) == list(range(heard)) and out[heard:].tolist() == list(range(heard, frames))
    breaks = sum(b - a != 1 for a, b in itertools.pairwise(out[:heard].tolist()))
    assert breaks < blocks
    assert torch.equal(shuffle_blocks(audio, word, torch.ones(1)), shuffle_blocks(audio, word))


# ---- l3, avts ------------------------------------------------------------------------------------------------------


def test_correspondence_by_hand() -> None:
    x = f64((0.0, 2.0, -3.0))[0]
    p = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    assert correspondence(x, True).tolist() == pytest.approx([-math.log(v) for v in p], abs=1e-14)
    assert correspondence(x, False).tolist() == pytest.approx([-math.log(1 - v) for v in p], abs=1e-14)
    assert torch.isfinite(correspondence(f64((900.0, -900.0)), True)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=20))
def test_a_cycle_leaves_nobody_his_own(words: list[int]) -> None:
    partner = cycle(torch.tensor(words)).tolist()
    assert sorted(partner) == list(range(len(words))) and all(p != i for i, p in enumerate(partner))
    here, seen = 0, set()
    while here not in seen:
        seen.add(here)
        here = partner[here]
    assert len(seen) == len(words), "one cycle"
    assert cycle(torch.tensor([5])).tolist() == [0]


def test_margin_by_hand() -> None:
    v, a = f64((1, 0), (0, 0), (1, 2)), f64((0.5, 0), (3, 4), (1, 2))
    assert together(v, a).tolist() == pytest.approx([0.25, 25.0, 0.0])
    assert apart(v, a, 0.99).tolist() == pytest.approx([0.49**2, 0.0, 0.99**2])
    at = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(apart(at, a, 0.99).sum(), at)
    assert torch.isfinite(grad).all() and not grad[1].any() and grad[0].tolist() == pytest.approx([-0.98, 0.0])


def test_avts_turns_hard_half_way() -> None:
    method = make("avts", epochs=5)
    assert [method.hard_share(e) for e in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    # 40 videos in batches of 6 with 27 steps: 5 epochs, begun
    assert make("avts", steps=27, epochs=90).epochs == 5 and make("avts", epochs=90).epochs == 90


def test_avts_takes_the_shifted_sound_where_it_is_hard() -> None:
    """With every false sound of the own video, the loss is that of the second view; without, it never enters."""
    batch = batch_for("avts")
    for share in (1.0, 0.0):
        method = make("avts", hard_share=share, easy_share=0.0).eval()
        loss, metrics = method(batch)
        v = F.normalize(method.video_head(method.video(batch.video[:, 0])))
        a, shifted = (F.normalize(method.audio_head(method.audio(batch.audio[:, k]))) for k in (0, 1))
        partner = cycle(draws.bits(draws.key(0, CYCLE, 0), [batch.position], 1)[:, 0])
        wrong = shifted if share else a[partner]
        expected = (together(v, a).mean() + apart(v, wrong, 0.99).mean()) / 2
        torch.testing.assert_close(loss, expected)
        assert float(metrics["hard"]) == share


# ---- xdc -----------------------------------------------------------------------------------------------------------


def test_kmeans_finds_planted_clusters_and_leaves_none_empty() -> None:
    centre = np.eye(5)[np.arange(60) % 2]
    x = centre + 0.05 * np.random.default_rng(0).standard_normal(centre.shape)
    for seed in range(5):
        label = kmeans(x, 2, seed)
        assert set(label[0::2]) | set(label[1::2]) == {0, 1} and len(set(label[0::2])) == len(set(label[1::2])) == 1
    many = kmeans(x, 7, seed=3)
    assert np.array_equal(many, kmeans(x, 7, seed=3)) and len(set(many)) == 7
    mean = np.stack([x[many == k].mean(0) for k in range(7)])
    assert np.square(x - mean[many]).sum() < 0.8 * np.square(x - centre).sum(), "closer than the two centres"
    few = kmeans(np.repeat(np.eye(3), 4, axis=0), 6, seed=0)  # three points, six clusters
    assert np.bincount(few, minlength=6).min() >= 1
    with pytest.raises(UsageError, match="6 clusters of 5 videos"):
        kmeans(x[:5], 6, seed=0)


def test_whitened_by_hand_and_no_direction_outweighs_another() -> None:
    # variances 9 and 1 along the axes: both components become +-1, so rows lie on the diagonals
    x = np.array([[3.0, 1], [3, -1], [-3, 1], [-3, -1]]) + 100
    np.testing.assert_allclose(np.abs(whitened(x, 2)), np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_allclose(np.abs(whitened(x, 1)), 1.0, rtol=1e-6)
    assert whitened(x, 8).shape == (4, 2), "no more components than there are"
    assert not whitened(np.ones((5, 3)), 2).any() and whitened(np.ones((5, 3)), 2).shape == (5, 1)
    # two classes apart by 1 in a direction that a nuisance of deviation 10 drowns
    rng, many = np.random.default_rng(0), np.arange(200) % 2
    y = np.stack([10 * rng.standard_normal(200), many + 0.05 * rng.standard_normal(200)], 1).astype(np.float32)
    share = [np.abs(np.corrcoef(kmeans(f, 2, seed=0), many)[0, 1]) for f in (y, whitened(y, 2))]
    assert share[0] < 0.3 and share[1] > 0.9


def test_every_cluster_weighs_alike() -> None:
    label = torch.tensor([0, 0, 0, 1, -1, 2, 2])
    got = balance(label, 3)
    assert got.tolist() == pytest.approx([6 / 9] * 3 + [2.0, 0.0, 1.0, 1.0])
    logit = noise(7, 3)
    loss = pseudo_label_loss(logit, label, got.double())
    by_cluster = [F.cross_entropy(logit[label == k], label[label == k]) for k in range(3)]
    torch.testing.assert_close(loss.sum() / 6, torch.stack(by_cluster).mean())


def test_how_much_of_a_clustering_stayed() -> None:
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert same_pairs(a, torch.tensor([2, 2, 0, 0, 1, 1])) == pytest.approx(1.0)
    assert same_pairs(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])) == pytest.approx(0.0, abs=1e-12)


def test_xdc_s_first_epoch_only_collects_and_its_rounds_swap_the_senses() -> None:
    method = make("xdc", round_epochs=2)
    assert [method.due(e) for e in range(6)] == [0, 1, 1, 2, 2, 3]
    before = {k: p.clone() for k, p in method.named_parameters()}
    optimiser = torch.optim.SGD(method.parameters(), lr=1.0)
    for first in range(0, 40, 8):
        loss, _ = method(batch_for("xdc", range(first, first + 8)))
        loss.backward()
        optimiser.step()
        method.after_step()
    assert float(loss.detach()) == 0 and all(torch.equal(p, before[k]) for k, p in method.named_parameters())
    assert bool(method.bank.complete().all()) and bool((method.labels == -1).all())
    told = method.start_epoch(1)
    assert told["round"] == 1 and told["labelled"] == 1 and bool((method.labels >= 0).all())
    assert method.start_epoch(1) == {} and method.start_epoch(2) == {}, "one clustering for two epochs"
    sight, sound = method.labels.unbind(1)
    assert not torch.equal(sight, sound)
    assert not torch.equal(method.video_classifier.weight, before["video_classifier.weight"]), "last layers anew"
    method.eval()
    loss, metrics = method(batch_for("xdc", range(6)))
    logit = method.video_classifier(method.video(batch_for("xdc", range(6)).video))
    expected = (F.cross_entropy(logit, sound[:6], reduction="none") * method.weights[:6, 1]).mean()
    torch.testing.assert_close(metrics["video_loss"], expected.detach())
    assert "kept_video" in method.start_epoch(3)


def test_xdc_keeps_a_mean_over_clips_without_noise_in_it() -> None:
    method = make("xdc", feature_momentum=0.5)
    seen = []
    for seed in (1, 2):
        batch = batch_for("xdc", (3, 1, 4), seed=seed)
        method(batch)
        method.after_step()
        seen.append(F.normalize(method.video(batch.video).detach(), dim=1))
        if seed == 1:
            torch.testing.assert_close(method.bank.memory[batch.row, 0], seen[0])
    mean = F.normalize((seen[0] + seen[1]) / 2, dim=1)
    torch.testing.assert_close(method.bank.memory[batch.row, 0], mean)


def test_xdc_learns_what_both_senses_know() -> None:
    """Three classes, planted in picture and sound under noise and a light that only the picture has: the loss falls in
    each round, and each sense comes to name the other's clusters (measured: .85 and .60; a third by chance)."""
    method = make("xdc", clusters=3, round_epochs=2, whiten=6, feature_momentum=0.5, width=8)
    g, rows = torch.Generator().manual_seed(0), torch.arange(ROWS)
    kind = rows % 3
    sight, sound = torch.randn(3, 3, 1, 16, 16, generator=g), torch.randn(3, 1, 16, 12, generator=g)
    dark = torch.randn(ROWS, 1, 1, 1, 1, generator=g)  # each video's own light: no class, and nothing that sounds

    def batch(seed: int) -> Batch:
        noise = torch.Generator().manual_seed(seed)
        video = sight[kind] + dark + 0.3 * torch.randn(ROWS, 3, 2, 16, 16, generator=noise)
        audio = sound[kind] + 0.3 * torch.randn(ROWS, 1, 16, 12, generator=noise)
        return replace(batch_for("xdc", rows), video=video, audio=audio, epoch=seed // 15)

    optimiser = torch.optim.Adam(method.parameters(), lr=2e-3)
    losses: dict[int, list[float]] = {}
    for n in range(15 * 5):
        if n % 15 == 0:
            method.start_epoch(n // 15)
        loss, metrics = method(batch(n))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step()
        losses.setdefault(method.round, []).append(float(loss.detach()))
    assert list(losses) == [0, 1, 2] and set(losses[0]) == {0.0}
    for told in (losses[1], losses[2]):
        assert np.mean(told[-5:]) < 0.7 * np.mean(told[:5]), told
    assert float(metrics["video_accuracy"]) > 0.5 and float(metrics["audio_accuracy"]) > 0.5


# ---- supervised ----------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    logit = f64((1, 2, 0), (5, 5, 5))
    expected = -math.log(math.exp(2) / (math.e + math.exp(2) + 1))
    assert cross_entropy(logit, torch.tensor([1, -1])).tolist() == pytest.approx([expected, 0.0])


def test_supervision_needs_two_classes_and_knows_its_modality() -> None:
    with pytest.raises(UsageError, match="1 classes"):
        supervised.Supervised(supervised.Config(width=4), 4, ("a",))
    sight = make("supervised", modality="v").eval()
    assert not hasattr(sight, "audio") and sight.needs.sound is False and sight.needs.labels
    batch = batch_for("supervised")
    assert (
        set(sight.embed(batch.video, batch.audio)) == {"video", "video-trunk"} and sight.embed(audio=batch.audio) == {}
    )
    with pytest.raises(UsageError, match="without labels"):
        sight(batch_for("simclr"))


# ---- gradients -----------------------------------------------------------------------------------------------------

SMOOTH = {
    "simclr": lambda v, a: nt_xent(F.normalize(v, dim=1), F.normalize(a, dim=1), 0.3),
    "moco": lambda v, a: info_nce(v, a, units(5, 4, seed=9), torch.eye(3, 5, dtype=torch.bool), 0.3),
    "byol": lambda v, a: regression(v, a.detach() * 1.0),
    "simsiam": lambda v, a: negative_cosine(v, a.detach() * 1.0),
    "barlow-twins": lambda v, a: torch.stack(redundancy(cross_correlation(v, a))),
    "iic": lambda v, a: iic.nce((v * a).sum(1, keepdim=True), v @ a.T, 1.3),
    "l3": lambda v, a: torch.stack([correspondence((v * a).sum(1), b) for b in (True, False)]),
    "avts": lambda v, a: together(v, a) + apart(v, a, 9.0),
    "xdc": lambda v, a: pseudo_label_loss(v * a, torch.tensor([0, -1, 2]), torch.tensor([0.5, 1.0, 2.0])),
    "supervised": lambda v, a: cross_entropy(v * a, torch.tensor([0, -1, 2])),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name: str) -> None:
    v, a = noise(3, 4).requires_grad_(), noise(3, 4, seed=1)
    if name in ("byol", "simsiam"):  # their targets take no gradient, whatever they are
        assert torch.autograd.gradcheck(lambda v: SMOOTH[name](v, a), (v,))
    else:
        assert torch.autograd.gradcheck(SMOOTH[name], (v, a.requires_grad_()))


@pytest.mark.parametrize("loss", [regression, negative_cosine])
def test_the_target_takes_no_gradient(loss) -> None:
    v, a = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    loss(v, a).sum().backward()
    assert a.grad is None and v.grad is not None and bool(v.grad.any())
