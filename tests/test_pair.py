"""What the rivals share: projectors, momentum copies, queues of keys, sound images, and two networks side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_runs import views_batch
from torch import nn

from avstore.errors import ConflictError, UsageError
from avstore.views import RandomView
from trainers.keys import KeyQueue, in_order
from trainers.momentum import follow, momentum_copy
from trainers.pair import Pair, PairConfig, clips, predict, seeded, spread
from trainers.projectors import Projector
from trainers.sound_image import resize_rows, sound_image


def test_projectors_of_the_papers() -> None:
    siam = Projector((512, 2048, 2048, 2048), "all")
    assert [type(m).__name__ for m in siam] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(m.bias is None for m in siam if isinstance(m, nn.Linear)), "no bias before a normalisation"
    plain = Projector((512, 2048, 128))
    assert sum(p.numel() for p in plain.parameters()) == 512 * 2048 + 2048 + 2048 * 128 + 128
    predictor = Projector((4, 3, 4), "hidden")
    assert isinstance(predictor[-1], nn.Linear) and predictor[-1].bias is not None and predictor.dim == 4
    for wrong in ((4,), (4, 0, 4)):
        with pytest.raises(UsageError):
            Projector(wrong)
    with pytest.raises(UsageError, match="no normalisation"):
        Projector((4, 4), "batch")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="it wants \\(clips, 4 features\\)"):
        predictor(torch.zeros(2, 5))


def test_a_copy_follows_and_takes_no_gradient() -> None:
    net = nn.Linear(2, 2)
    target = momentum_copy(net)
    assert not any(p.requires_grad for p in target.parameters()) and net.weight.requires_grad
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    follow(target, net, 0.9)
    torch.testing.assert_close(target.weight, start + 0.1)
    follow(target, net, 1.0)
    torch.testing.assert_close(target.weight, start + 0.1)
    follow(target, net, 0.0)
    assert torch.equal(target.weight, net.weight)
    with pytest.raises(UsageError, match=r"momentum of 1\.5"):
        follow(target, net, 1.5)
    with pytest.raises(UsageError, match="another network"):
        follow(nn.Linear(2, 2, bias=False), net, 0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
def test_a_queue_is_the_last_keys_in_order(length: int, pushes: list[int]) -> None:
    queue, model, n = KeyQueue(length, 3, 0, 0), [], 0
    noise = queue.keys.clone()
    for count in pushes:
        rows = torch.arange(n, n + count)
        queue.push(rows, torch.nn.functional.one_hot(rows % 3, 3).float())
        model, n = [*model, *rows.tolist()][-length:], n + count
    assert sorted(queue.rows[queue.rows >= 0].tolist()) == model
    oldest = torch.roll(queue.rows, -int(queue.place))
    assert [r for r in oldest.tolist() if r >= 0] == model
    for key, row, before in zip(queue.keys, queue.rows.tolist(), noise, strict=True):
        assert torch.equal(key, before) if row < 0 else int(key.argmax()) == row % 3
    assert float(queue.filled()) == pytest.approx(len(model) / length)


def test_a_queue_starts_from_its_seed_and_is_saved_whole() -> None:
    queue = KeyQueue(5, 4, 0, 0)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))
    assert torch.equal(queue.keys, KeyQueue(5, 4, 0, 0).keys) and queue.keys.dtype == torch.float32
    assert not torch.equal(queue.keys, KeyQueue(5, 4, 0, 1).keys) and not torch.equal(
        queue.keys, KeyQueue(5, 4, 1, 0).keys
    )
    queue.push(torch.tensor([7, 8]), torch.eye(4)[:2])
    other = KeyQueue(5, 4, 3, 0)
    other.load_state({k: x.clone() for k, x in queue.state().items()})
    for each in (queue, other):
        each.push(torch.tensor([9]), torch.eye(4)[2:3])
    assert all(torch.equal(x, other.state()[k]) for k, x in queue.state().items()) and int(queue.place) == 3
    assert queue.double().keys.dtype == torch.float64 and queue.rows.dtype == torch.int64
    with pytest.raises(ConflictError, match="the saved queue's keys"):
        KeyQueue(6, 4, 0, 0).load_state(queue.state())
    with pytest.raises(UsageError, match="non-finite"):
        other.push(torch.tensor([1]), torch.full((1, 4), torch.nan))
    assert other.rows.tolist() == [7, 8, 9, -1, -1]
    a, b = in_order(torch.tensor([3, 1, 2]), torch.tensor([30, 10, 20]), torch.eye(3))
    assert a.tolist() == [10, 20, 30] and b.argmax(1).tolist() == [1, 2, 0]


def test_rows_are_averaged_into_columns() -> None:
    rows = torch.tensor([1.0, 3.0, 5.0, 7.0, 100.0, 100.0])[None, :, None].expand(2, 6, 2)
    got = resize_rows(rows, 2, torch.tensor([4 / 6, 1.0]))
    torch.testing.assert_close(got[0, :, 0], torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(got[1, :, 0], torch.tensor([3.0, 69.0]))
    torch.testing.assert_close(resize_rows(rows[:1], 12)[0, :, 0], rows[0, :, 0].repeat_interleave(2))
    torch.testing.assert_close(resize_rows(rows[:1], 4)[0, 0, 0], torch.tensor((1 + 3 / 2) / 1.5))
    assert torch.isfinite(resize_rows(rows, 3, torch.zeros(2))).all(), "no sound at all is its first row"


def test_a_sound_image_is_a_clip() -> None:
    sound = torch.arange(40.0)[None, None, :, None] + 100 * torch.arange(8.0)
    image = sound_image(sound, frames=3, size=4)
    assert image.shape == (1, 3, 3, 4, 4) and (image == image[:, :1, :1]).all(), "alike over colour and time"
    square = resize_rows(sound[:, 0], 8).mT
    torch.testing.assert_close(image[0, 0, 0], square[0, 2:6, 2:6])  # the centre
    item = torch.tensor([3]), torch.tensor([0])
    one, again, other = (sound_image(sound, 3, 4, crop=(0, e, *item)) for e in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    corners = set()
    for row in range(60):
        crop = sound_image(sound, 1, 4, crop=(0, 0, torch.tensor([row]), torch.tensor([0])))[0, 0, 0]
        corners.add((int(crop[0, 0]) // 100, round((float(crop[0, 0]) % 100 - 2) / 5)))
    assert {y for y, _ in corners} == {x for _, x in corners} == set(range(5)), "every corner, whose crop fits"
    assert sound_image(sound, 1, 16).shape == (1, 3, 1, 16, 16)  # fewer bands than pixels
    with pytest.raises(UsageError, match="it wants"):
        sound_image(sound[0], 1, 4)


def test_a_pair_hears_as_its_network_does() -> None:
    image = PairConfig(width=4, frames=2, size=16, video_net="vcop-r3d", audio_net="vcop-r3d")
    plain = PairConfig(width=4, frames=2, size=16, video_net="vcop-r3d", audio_net="resnet-9")
    assert clips(image, 24000) == RandomView(whole_sound=True) and clips(plain, 24000) == RandomView()
    sound = torch.randn(2, 1, 40, 24)
    assert Pair(image).hear(sound).shape == (2, 3, 2, 16, 16) and Pair(plain).hear(sound) is sound
    pair = Pair(image).eval()
    pair.video_head = pair.audio_head = nn.Identity()
    padded = torch.cat([sound, torch.zeros(2, 1, 40, 24)], 2)
    heard, half = pair.embed(audio=sound), pair.embed(audio=padded, sound_share=torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(heard["audio-trunk"], half["audio-trunk"])  # padding is not heard
    assert not torch.allclose(heard["audio-trunk"], pair.embed(audio=padded)["audio-trunk"])
    assert pair.video is not pair.audio
    weights = zip(pair.video.parameters(), pair.audio.parameters(), strict=True)
    assert any(not torch.equal(x, y) for x, y in weights), "no common weights"
    assert pair.method_state() == pair.after_step() == pair.start_epoch(3) == {}
    with pytest.raises(UsageError, match="without sound"):
        pair.inputs(replace(views_batch([1, 2], 1), audio=None))


def test_seeds_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    with seeded(3, 1):
        x = torch.randn(4)
    with seeded(3, 1):
        assert torch.equal(x, torch.randn(4))
    with seeded(3, 2):
        assert not torch.equal(x, torch.randn(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_to_predict_still_reaches_every_weight() -> None:
    predictor = Projector((4, 3, 4), "hidden")
    out = predict(predictor, torch.zeros(0, 4, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 4) and all(p.grad is not None and not p.grad.any() for p in predictor.parameters())


def test_spread_tells_collapse() -> None:
    assert float(spread(torch.ones(5, 8))) == pytest.approx(0, abs=1e-6)
    assert float(spread(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)))) == pytest.approx(1, abs=0.02)
    assert float(spread(torch.zeros(0, 8))) == 0
