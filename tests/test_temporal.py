"""The temporal model: eq. 4 by hand, what is masked and who may know it, the alternation, and AVID-CMA inside it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_runs import exact, goes_on_to_the_bit, trace, two_equal_one, views_batch
from test_avid import make_batch
from tiny_run import SETS, store_in
from tiny_run import config as tiny_config
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from trainers import avid, avid_cma, temporal
from trainers.config import resolve
from trainers.loop import train
from trainers.metrics import read_metrics
from trainers.positives import mine_positives
from trainers.temporal import (
    PRESETS,
    Config,
    Context,
    Temporal,
    contrast,
    masked_steps,
    positions,
    reconstruction,
    snippet_views,
)  # fmt: skip

SMALL = Config(
    snippets=3, model_width=8, heads=2, layers=2, feed_forward=16, dropout=0.0, positives=3, refresh_epochs=2,
    video_depth=10, width=4, hidden=16, dim=8, head_batch_norm=True, frames=2, size=16, negatives=6,
    within_negatives=4, batch=4,
)  # fmt: skip


def started(config: Config = SMALL, rows: int = 12) -> Temporal:
    """A method as after AVID-CMA: every row seen, Z known, positives mined."""
    method = Temporal(config, rows)
    method.bank.seen[:] = True
    method.partition = torch.tensor(1.8, dtype=torch.float64)
    method.refresh(0)
    return method


def batch_of(rows, epoch: int, **options):
    return views_batch(rows, 3, epoch=epoch, **options)


# ---- eq. 4 -------------------------------------------------------------------------------------------------------


def test_eq_4_by_hand() -> None:
    """Two videos of three steps: norms 5 and 13 at the masked ones, anything at the others."""
    target = torch.zeros(2, 3, 2, dtype=torch.float64)
    guess = torch.tensor([[[3, 4], [9, 9], [5, 12]], [[1, 1], [0, 2], [7, 7]]], dtype=torch.float64)
    masked = torch.tensor([[True, False, True], [False, True, False]])
    assert reconstruction(guess, target, masked).tolist() == pytest.approx([(5 + 13) / 2, 2.0])
    assert reconstruction(guess, target, masked, squared=True).tolist() == pytest.approx([(25 + 169) / 2, 4.0])
    assert reconstruction(guess, target, torch.zeros_like(masked)).tolist() == [0.0, 0.0]


def test_only_masked_outputs_have_a_gradient_and_none_is_nan_at_zero() -> None:
    g = torch.Generator().manual_seed(0)
    guess = torch.randn(2, 4, 3, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    masked = torch.tensor([[True, False, False, True], [False, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: reconstruction(x, target, masked), (guess,))
    reconstruction(guess, target, masked).sum().backward()
    assert torch.equal(guess.grad.abs().sum(-1) > 0, masked)
    exact = target.clone().requires_grad_()
    reconstruction(exact, target, masked).sum().backward()
    assert torch.equal(exact.grad, torch.zeros_like(exact))


@given(st.integers(1, 30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_as_many_steps_are_masked_as_said(steps: int, share: float, absent: int) -> None:
    """max(1, floor(share n + 1/2)) of the n that are there, one at least stays visible, and none that is absent."""
    g = torch.Generator().manual_seed(steps)
    bits = torch.randint(-(2**62), 2**62, (7, steps), generator=g)
    here = torch.ones(7, steps, dtype=torch.bool)
    here[3:, : min(absent, steps)] = False
    masked = masked_steps(here, share, bits)
    for n, count in zip(here.sum(1).tolist(), masked.sum(1).tolist(), strict=True):
        assert count == (min(max(1, math.floor(share * n + 0.5)), n - 1) if n > 1 else 0)
    assert not (masked & ~here).any()
    assert torch.equal(masked, masked_steps(here, share, bits))


def test_thirty_percent_of_five_and_of_ten_and_every_step_in_its_turn() -> None:
    g = torch.Generator().manual_seed(0)
    for steps, count in ((3, 1), (5, 2), (10, 3), (15, 5)):
        bits = torch.randint(-(2**62), 2**62, (3000, steps), generator=g)
        masked = masked_steps(torch.ones(3000, steps, dtype=torch.bool), 0.3, bits)
        assert (masked.sum(1) == count).all()
        share = masked.double().mean(0)
        assert (share - count / steps).abs().max() < 5 * math.sqrt(0.25 / 3000)


# ---- the Transformer -----------------------------------------------------------------------------------------------


def context(width: int = 8) -> tuple[Context, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = Context(6, 5, width, 2, 2, 16, 0.0).double().eval()
    g = torch.Generator().manual_seed(1)
    v, a = (torch.randn(2, 5, n, generator=g, dtype=torch.float64) for n in (6, 5))
    return net, v, a


def test_nothing_of_a_masked_step_reaches_its_reconstruction_but_all_others_do() -> None:
    net, v, a = context()
    here, masked = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    masked[:, 2] = True
    with torch.no_grad():
        sight, sound = net(v, a, here, masked)
        other_v, other_a = v.clone(), a.clone()
        other_v[:, 2], other_a[:, 2] = 9.0, -9.0
        again = net(other_v, other_a, here, masked)
        torch.testing.assert_close(again, (sight, sound), rtol=0, atol=0)
        for step in (0, 1, 3, 4):  # the past and the future, in sight and in sound
            for modality in (0, 1):
                changed = [v.clone(), a.clone()]
                changed[modality][:, step] += 1.0
                assert (net(*changed, here, masked)[0][:, 2] - sight[:, 2]).abs().max() > 1e-4
        swapped = net(v[:, [1, 0, 2, 3, 4]], a[:, [1, 0, 2, 3, 4]], here, masked)[0]
        assert (swapped[:, 2] - sight[:, 2]).abs().max() > 1e-4, "their order counts"


def test_an_absent_step_is_not_attended_to_and_an_empty_video_gives_no_nan() -> None:
    net, v, a = context()
    here = torch.ones(2, 5, dtype=torch.bool)
    here[0, 3:] = False
    with torch.no_grad():
        joint = net.joint(v, a, here)
        other = v.clone()
        other[0, 3:] = 100.0
        torch.testing.assert_close(net.joint(other, a, here)[0, :3], joint[0, :3], rtol=0, atol=0)
        short = net.joint(v[:1, :3], a[:1, :3], here[:1, :3])
        torch.testing.assert_close(short[0], joint[0, :3])
        here[0] = False
        assert torch.isfinite(net.joint(v, a, here)).all()


def test_positions_are_sinusoids_of_the_clip_index() -> None:
    found = positions(4, 6)
    assert found.shape == (4, 6) and found[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert found[3, 0] == pytest.approx(math.sin(3)) and found[3, 3] == pytest.approx(math.cos(3))
    assert found[2, 1] == pytest.approx(math.sin(2 / 10000 ** (2 / 6)))


# ---- the loss of AVID-CMA ------------------------------------------------------------------------------------------


def test_contrast_is_avid_cma_s() -> None:
    g = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(3, 9, 2, 4, generator=g, dtype=torch.float64), dim=-1)
    v, a = (torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    pos, neg = bank[:, :2], bank[:, 2:]
    pair = avid_cma.cross_instance(v, a, pos[:, :1], neg, 1.3, 0.3)
    torch.testing.assert_close(contrast(v, pos[:, :1, 1], neg[:, :, 1], 1.3, 0.3), pair[0], rtol=0, atol=0)
    torch.testing.assert_close(contrast(a, pos[:, :1, 0], neg[:, :, 0], 1.3, 0.3), pair[1], rtol=0, atol=0)
    pair = avid_cma.within_positive(v, a, pos, neg, 1.3, 0.3)
    torch.testing.assert_close(contrast(v, pos[:, :, 0], neg[:, :, 0], 1.3, 0.3), pair[0], rtol=0, atol=0)
    torch.testing.assert_close(contrast(a, pos[:, :, 1], neg[:, :, 1], 1.3, 0.3), pair[1], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda q: contrast(q, pos[:, :, 0], neg[:, :, 0], 1.3, 0.3), (v,))


@pytest.mark.parametrize("bank_rows", ["snippet", "video"])
def test_a_contrastive_step_is_eq_3_over_every_snippet(bank_rows: str) -> None:
    method = started(replace(SMALL, bank_rows=bank_rows))
    assert len(method.bank) == (36 if bank_rows == "snippet" else 12)
    batch = batch_of([3, 1, 4, 11], 1)
    loss, metrics = method.step(batch)
    v, a = method._pending[0][2].unbind(1)
    rows = torch.tensor([[9, 10, 11], [3, 4, 5], [12, 13, 14], [33, 34, 35]]) if bank_rows == "snippet" else (
        torch.tensor([3, 1, 4, 11])[:, None].expand(-1, 3)
    )  # fmt: skip
    assert torch.equal(method._pending[0][1], rows.flatten())
    memory, z, t = method.bank.memory, 1.8, SMALL.temperature
    positive = method.positives[rows.flatten()]
    negative = memory[method.draw(batch, rows, positive.view(4, 3, -1))]
    one = avid_cma.cross_instance(v, a, memory[rows.flatten()][:, None], negative, z, t)
    two = avid_cma.within_positive(v, a, memory[positive], negative[:, :4], z, t)
    torch.testing.assert_close(metrics["cross_instance"], sum(x.mean() for x in one) / 2)
    torch.testing.assert_close(metrics["within_positive"], sum(x.mean() for x in two) / 2)
    torch.testing.assert_close(loss.detach(), (metrics["cross_instance"] + metrics["within_positive"]) / 2)
    paper, _ = started(replace(SMALL, bank_rows=bank_rows, loss_scale="paper")).step(batch)
    torch.testing.assert_close(paper, 4 * loss, msg="eq. 3: sums, lambda = 1 / |P|")
    loss.backward()
    assert all(p.grad is None for p in method.context.parameters()), "eq. 3 does not reach the Transformer"
    before = memory.clone()
    stats = method.after_step()
    assert stats == {"samples": 12, "rows": len(set(rows.flatten().tolist())), "duplicates": 12 - stats["rows"]}
    changed = (method.bank.memory != before).flatten(1).any(1).nonzero()[:, 0]
    assert changed.tolist() == sorted(set(rows.flatten().tolist()))


@pytest.mark.parametrize("bank_rows", ["snippet", "video"])
def test_negatives_are_neither_positives_nor_of_the_own_video(bank_rows: str) -> None:
    method = started(replace(SMALL, bank_rows=bank_rows, negatives=300))
    if bank_rows == "snippet":  # two positives of the own video: excluded twice, and yet once
        method.positives[9, :2] = torch.tensor([10, 11])
    batch = batch_of([3, 1], 1)
    rows = method._rows(batch.row)
    positive = method.positives[rows.flatten()]
    negative = method.draw(batch, rows, positive.view(2, 3, -1))
    assert not (negative[:, :, None] == positive[:, None]).any()
    video = negative // 3 if bank_rows == "snippet" else negative
    assert not (video == batch.row.repeat_interleave(3)[:, None]).any()
    assert len(negative[0].unique()) == len(method.bank) - (len(set(positive[0].tolist()) | set(rows[0].tolist())))
    free = started(replace(SMALL, bank_rows=bank_rows, negatives=300, exclude_self=False))
    negative = free.draw(batch, rows, free.positives[rows.flatten()].view(2, 3, -1))
    assert (negative == rows.flatten()[:, None]).any(1).all()


def test_epochs_alternate_and_steps_on_request() -> None:
    method = started()
    assert [method.reconstructs(e) for e in range(4)] == [True, False, True, False]
    memory = method.bank.memory.clone()
    _, metrics = method.step(batch_of([3, 1, 4], 0))
    assert "reconstruction" in metrics and "contrastive" not in metrics
    assert method.after_step() == {} and torch.equal(method.bank.memory, memory), "not scored, not moved"
    _, metrics = method.step(batch_of([3, 1, 4], 1))
    assert "contrastive" in metrics and "reconstruction" not in metrics
    method.after_step()
    assert not torch.equal(method.bank.memory, memory)
    method = started(replace(SMALL, alternate="step"))
    kinds = []
    for _ in range(4):
        _, metrics = method.step(batch_of([3, 1, 4], 0))
        kinds.append("reconstruction" in metrics)
        method.after_step()
    assert kinds == [True, False, True, False]


def after_avid_cma(rows: int, snippets: int, positives: int, **changes) -> Temporal:
    """A bank of snippets as AVID-CMA leaves it: each video's memory, T times."""
    method = Temporal(replace(SMALL, snippets=snippets, positives=positives, **changes), rows)
    bank = avid.MemoryBank(rows, 8, 7)
    method.bank.memory = bank.memory.repeat_interleave(snippets, 0)
    method.bank.seen[:] = True
    return method


def test_the_first_positives_are_of_as_many_videos_as_there_are_positives() -> None:
    """Equal rows: those of AVID-CMA's own mining, at the same t, not all the snippets of a few videos."""
    method = after_avid_cma(60, 5, 32)
    assert method.refresh(0)["positives/certified"] == 1.0
    of_videos = mine_positives(method.bank.memory[::5].contiguous(), 32).rows
    for t in range(5):
        assert torch.equal(method.positives[t::5], of_videos * 5 + t)
    video = method.positives // 5
    assert all(len(set(row.tolist())) == 32 for row in video)
    assert not (video == torch.arange(300)[:, None] // 5).any()
    among_rows = mine_positives(method.bank.memory, 32).rows // 5  # what is passed over: few videos, and the own one
    assert max(len(set(row.tolist())) for row in among_rows) <= 8


def test_moved_memories_are_mined_by_snippet_of_other_videos() -> None:
    """By brute force in float64; `own_positives` keeps the own video's."""
    for own in (False, True):
        method = after_avid_cma(30, 3, 10, own_positives=own)
        noise = avid.MemoryBank(90, 8, 9).memory
        method.bank.memory = F.normalize(method.bank.memory + 0.3 * noise, dim=-1)
        stats = method.refresh(0)
        m = method.bank.memory.double()
        score = torch.minimum(m[:, 0] @ m[:, 0].T, m[:, 1] @ m[:, 1].T)
        video = torch.arange(90) // 3
        score[torch.eye(90, dtype=torch.bool) if own else video[:, None] == video] = -torch.inf
        best, rows = score.topk(10, 1)
        assert torch.equal(method.positives, rows.sort(1).values)
        assert stats["positives/agreement"] == pytest.approx(float(best.mean())) and stats["positives/certified"] == 1.0
        assert bool((method.positives // 3 == video[:, None]).any()) == own


def test_snippets_without_sound_have_no_positives_and_are_nobodys() -> None:
    method = after_avid_cma(12, 3, 4)
    method.bank.seen[[4, 5, 30], 1] = False
    stats = method.refresh(0)  # the rows of videos 1 and 10 differ now
    assert stats["positives/left_out"] == 3 and (method.positives[[4, 5, 30]] == -1).all()
    kept = method.positives[[i for i in range(36) if i not in (4, 5, 30)]]
    assert (kept >= 0).all() and not torch.isin(kept, torch.tensor([4, 5, 30])).any()
    assert math.isfinite(stats["positives/agreement"])
    method = after_avid_cma(12, 3, 4)
    method.bank.seen[3:6, 1] = False  # all of video 1: mined over videos, without it
    stats = method.refresh(0)
    assert stats["positives/left_out"] == 1 and (method.positives[3:6] == -1).all()
    assert not (method.positives // 3 == 1).any()


def test_few_videos_give_snippets_as_positives() -> None:
    """Four videos have three others: 4 positives are then snippets of these; 10 are more than there are."""
    method = after_avid_cma(4, 3, 4)
    method.refresh(0)
    assert not (method.positives // 3 == torch.arange(12)[:, None] // 3).any()
    with pytest.raises(UsageError, match="bank of 12 rows"):
        after_avid_cma(4, 3, 10)
    assert after_avid_cma(4, 3, 10, own_positives=True).refresh(0)["positives/left_out"] == 0
    method = after_avid_cma(4, 3, 9)
    method.bank.seen[0, 0] = False
    with pytest.raises(UsageError, match="9 positives among 8 snippets of other videos"):
        method.refresh(0)


def test_positives_are_mined_when_an_epoch_needs_them() -> None:
    method = Temporal(SMALL, 12)
    method.bank.seen[:] = True
    method.partition = torch.tensor(1.8, dtype=torch.float64)
    assert method.start_epoch(0) == {"sound_overlap": 0.0} and method.positives is None
    with pytest.raises(UsageError, match="no positives"):
        method.step(batch_of([1, 2], 1))
    assert method.start_epoch(1)["positives/certified"] == 1.0
    first = method.positives.clone()
    method.bank.memory.copy_(avid.MemoryBank(36, 8, 5).memory)
    assert method.start_epoch(1) == method.start_epoch(2) == {} and torch.equal(method.positives, first)
    assert method.start_epoch(3) and not torch.equal(method.positives, first)
    assert Temporal(replace(SMALL, hop=0.5, seconds=2.0), 12).start_epoch(0) == {"sound_overlap": 0.75}


# ---- the method --------------------------------------------------------------------------------------------------


def test_targets_are_constants_unless_asked_otherwise() -> None:
    """L_rec of the last step only, with the first two masked away: gradient reaches sight by what is visible."""
    batch = batch_of([3, 1, 4, 11], 0)
    grads = {}
    for detach in (True, False):
        method = Temporal(replace(SMALL, detach_targets=detach, seed=2), 12)
        loss, metrics = method.step(batch)
        torch.testing.assert_close(loss.detach(), metrics["reconstruction_video"] + metrics["reconstruction_audio"])
        loss.backward()
        assert all(p.grad is None for p in method.towers.video_head.parameters()), "eq. 4 does not reach the heads"
        grads[detach] = method.towers.video.conv1[0].weight.grad.clone()
    assert not torch.allclose(grads[True], grads[False])
    head = Temporal(replace(SMALL, target="head"), 12)
    loss, _ = head.step(batch)
    loss.backward()
    assert all(p.grad is not None for p in head.towers.video_head.parameters())


def test_missing_sound_is_left_out_not_filled_in() -> None:
    sound = [True, False, True, True]
    method = Temporal(SMALL, 12).eval()
    loss, metrics = method.step(batch_of([3, 1, 4, 11], 0, sound=sound))
    _, whole = method.step(batch_of([3, 1, 4, 11], 0))
    _, kept = method.step(_only(batch_of([3, 1, 4, 11], 0), [0, 2, 3]))
    torch.testing.assert_close(metrics["reconstruction_audio"], kept["reconstruction_audio"])
    assert torch.isfinite(loss) and metrics["reconstruction_video"] != whole["reconstruction_video"]
    part = replace(batch_of([3, 1, 4, 11], 0), sound_share=torch.tensor([[1.0, 1.0, 0.0]] * 4))
    changed = replace(part, audio=part.audio.clone())
    changed.audio[:, 2] = 7.0
    assert torch.equal(method.step(part)[0], method.step(changed)[0]), "sound outside the video is nothing"
    method = started().train()
    start = method.bank.memory.clone()
    loss, metrics = method.step(batch_of([3, 1, 4, 11], 1, sound=sound))
    loss.backward()
    method.after_step()
    assert torch.equal(method.bank.memory[3:6, 1], start[3:6, 1]), "video 1 was not heard"
    assert not torch.equal(method.bank.memory[3:6, 0], start[3:6, 0])
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in method.parameters())
    for epoch in (0, 1):
        loss, _ = method.step(batch_of([3, 1], epoch, sound=[False, False]))
        assert torch.isfinite(loss)


def _only(batch, rows):
    rows = torch.tensor(rows)
    return replace(batch, **{k: x[rows] for k, x in vars(batch).items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("bank_rows", ["snippet", "video"])
def test_it_starts_from_avid_cma(bank_rows: str) -> None:
    same = {k: getattr(SMALL, k) for k in ("positives", "video_depth", "width", "hidden", "dim", "head_batch_norm",
                                           "frames", "size", "negatives", "within_negatives", "batch")}  # fmt: skip
    before = avid_cma.AvidCma(avid_cma.Config(**same, seed=4), 12)
    method = Temporal(replace(SMALL, bank_rows=bank_rows), 12)
    with pytest.raises(ConflictError, match="no partition"):
        method.load_avid_cma(before.state_dict(), before.method_state())
    before.bank.seen[:] = True
    before.partition = torch.tensor(1.7, dtype=torch.float64)
    before.start_epoch(0)
    before.step(make_batch([1, 2, 3]))
    before.after_step()
    method.load_avid_cma(before.state_dict(), before.method_state())
    mine, theirs = method.towers.state_dict(), before.towers.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs) and method.partition == before.partition
    expected = before.bank.memory if bank_rows == "video" else before.bank.memory.repeat_interleave(3, 0)
    assert torch.equal(method.bank.memory, expected)
    method.start_epoch(1)
    method.step(batch_of([1, 2, 3], 1))[0].backward()
    with pytest.raises(ConflictError, match="other networks"):
        Temporal(replace(SMALL, width=8), 12).load_avid_cma(before.state_dict(), before.method_state())
    with pytest.raises(ConflictError, match="selection"):
        Temporal(SMALL, 13).load_avid_cma(before.state_dict(), before.method_state())


TRACE = [
    9.363938, 8.032594, 8.974146, 8.867578, 9.880919, 8.806548, 7.895722, 8.75587, 8.740406, 10.681439,
]  # fmt: skip


def test_ten_losses_of_a_fixed_seed() -> None:
    batches = [batch_of(torch.arange(4) + n % 8, n // 3, seed=n) for n in range(10)]
    one, two = (trace(started().double(), [exact(b) for b in batches], 1e-3) for _ in range(2))
    assert one == two, "the same to the bit"
    assert one == pytest.approx(TRACE, abs=1e-4)


def test_both_losses_fall_on_a_fixed_batch() -> None:
    method = started(replace(SMALL, temperature=0.3))
    losses = trace(method, [batch_of(torch.arange(6), 0)] * 12, 0.01, torch.optim.Adam)
    assert losses[-1] < 0.9 * losses[0], losses
    method.after_step = lambda: {}  # the memory is held
    losses = trace(method, [batch_of(torch.arange(6), 1)] * 8, 0.01, torch.optim.Adam)
    assert losses[-1] < losses[0] - 0.3, losses


def test_state_is_plain_tensors_and_resumes_to_the_bit() -> None:
    method = started(replace(SMALL, alternate="step"))
    method.after_step()
    state = method.method_state()
    assert set(state) == {"bank.memory", "bank.seen", "partition", "positives", "refreshed", "steps"}
    other = Temporal(replace(SMALL, alternate="step", seed=5), 12)
    other.load_state_dict(method.state_dict())
    other.load_method_state({k: v.clone() for k, v in state.items()})
    batch = batch_of([3, 1, 4], 0)
    assert other.steps == 1 and torch.equal(method.step(batch)[0], other.step(batch)[0])
    with pytest.raises(ConflictError, match="positives"):
        Temporal(replace(SMALL, positives=4), 12).load_method_state(state)


def test_joint_features_know_their_neighbours() -> None:
    method = Temporal(SMALL, 12).eval()
    batch = batch_of([3, 1], 0)
    with torch.no_grad():
        out = method.embed(batch.video.flatten(0, 1), batch.audio.flatten(0, 1))
        assert set(out) == {"video", "audio", "video-trunk", "audio-trunk"}
        v, a = (out[f"{k}-trunk"].unflatten(0, (2, 3)) for k in ("video", "audio"))
        joint = method.joint(v, a)
        changed = v.clone()
        changed[:, 0] += 1
        assert joint.shape == (2, 3, 8) and not torch.allclose(method.joint(changed, a)[:, 2], joint[:, 2])
    with pytest.raises(UsageError, match="joins"):
        method.joint(v[..., 1:], a)


def test_configuration_tells_all_its_problems() -> None:
    with pytest.raises(UsageError) as e:
        Config(bank_rows="snippets", snippets=1, heads=3, mask=1.0, hop=0.0, within_negatives=2000)
    words = ("did you mean snippet", "snippets 1", "3 heads", "mask", "hop", "within_negatives")
    assert all(word in str(e.value) for word in words)
    assert PRESETS["paper"] == Config() and (Config().heads, Config().layers, Config().mask) == (8, 2, 0.3)
    with pytest.raises(UsageError, match="3 snippets"):
        Temporal(SMALL, 12).step(views_batch([1, 2], 2))
    with pytest.raises(UsageError, match="trains on both"):
        Temporal(SMALL, 12).step(replace(batch_of([1, 2], 0), audio=None))
    with pytest.raises(UsageError, match="bank of 3 rows"):
        Temporal(SMALL, 1)
    policy = snippet_views(Config(hop=0.1, snippets=4, start="centre"), 24000)
    assert (policy.views, policy.hop, policy.centred) == (4, 2400, True)
    tiny, before = temporal.TINY, avid_cma.TINY
    for key in ("video_depth", "width", "pool", "hidden", "dim", "head_batch_norm", "front_end", "small"):
        assert getattr(tiny, key) == getattr(before, key), f"the stage's nets differ in {key}"


def test_three_stages_on_a_store_and_on_to_the_bit(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    one = train("avid", store, tiny_config("steps=2"), tmp_path / "avid").run
    c = tiny_config("steps=2", name="avid-cma")
    two = train("avid-cma", store, c, tmp_path / "avid-cma", init=one.path).run
    own = ("snippets=3", "hop=0.25", "model_width=8", "heads=2", "feed_forward=16", "positives=2",
           "within_negatives=0", "alternate=step", "batch=5", "epochs=2")  # fmt: skip
    sets = [*(s for s in SETS if s.split("=")[0] not in ("batch", "epochs")), *own]
    run = goes_on_to_the_bit("temporal", store, resolve("temporal", sets=sets), tmp_path, init=two.path)
    lines = read_metrics(run.path / "metrics.jsonl")
    assert ["reconstruction" in line for line in lines] == [True, False, True, False]
    assert lines[0]["epoch/sound_overlap"] == 0.5 and all(line["shrunk"] >= 0 for line in lines)


def cases():
    calm = replace(SMALL, head_batch_norm=False, pool="avg", temperature=0.3)
    made = {
        "snippet": (started(calm, 40), 3, 4),
        "video": (started(replace(calm, bank_rows="video", alternate="step", detach_targets=False), 40), 3, 2),
    }
    for method, _, _ in made.values():
        method.positives, method.refreshed = None, -1  # mined again, by all processes together
    return made


@pytest.mark.slow
def test_two_processes_equal_one_in_float64(tmp_path: Path) -> None:
    two_equal_one("test_temporal", tmp_path)


@pytest.mark.slow
def test_the_demo_set_from_its_files(tmp_path: Path, tiny_media: Path) -> None:
    import avstore
    from avstore.ingest import ingest

    ingest(tiny_media, tmp_path / "demo.zarr", size=(64, 80), fps=8)
    store, sets = avstore.open(tmp_path / "demo.zarr"), ["batch=8", "in_process=true", "negatives=8", "log_every=1"]
    few = ["positives=4", "steps=20"]
    one = train("avid", store, resolve("avid", preset="tiny", sets=[*sets, "steps=20"]), tmp_path / "avid").run
    cma = resolve("avid-cma", preset="tiny", sets=[*sets, *few])
    two = train("avid-cma", store, cma, tmp_path / "avid-cma", init=one.path).run
    c = resolve("temporal", preset="tiny", sets=[*sets, *few, "hop=0.5"])
    run = train("temporal", store, c, tmp_path / "temporal", init=two.path).run
    lines = read_metrics(run.path / "metrics.jsonl")
    losses = [line["reconstruction"] for line in lines if "reconstruction" in line]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
