"""The preview: that it finds the moments that tell, one step by hand, padding, budgets, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from avstore.errors import CorruptError, NotFoundError, UsageError
from trainers.preview import Preview, PreviewConfig, fit, load, padded
from trainers.projectors import Projector

CLASSES, WIDTHS = 3, (6, 4)
QUICK = PreviewConfig(steps=3, hidden=24, dim=16, batch=16, epochs=30, milestones=(25,), learning_rate=0.05,
                      classifier_rate=1.0)  # fmt: skip


def long_videos(n: int, seed: int, moments: int = 20) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Videos of noise in which one moment is marked and tells the class; the marks are no class, and other moments
    carry the pattern of a random class without a mark."""
    r = np.random.default_rng(seed)
    pattern = np.eye(CLASSES)
    features, labels, where = [], r.integers(0, CLASSES, n), np.zeros(n, np.int64)
    for i, label in enumerate(labels):
        length = int(r.integers(moments // 2, moments + 1))
        x = 0.3 * r.standard_normal((length, sum(WIDTHS)))
        x[:, :CLASSES] += pattern[r.integers(0, CLASSES, length)] * 2
        where[i] = r.integers(0, length)
        x[where[i], :CLASSES] = pattern[label] * 2
        x[where[i], WIDTHS[0]] += 4  # a sound marks it
        features.append(x.astype(np.float32))
    return features, labels, where


@pytest.fixture(scope="module")
def fitted() -> Preview:
    features, labels, _ = long_videos(96, 0)
    return fit(features, labels, CLASSES, WIDTHS, config=QUICK)


def test_it_finds_the_moment_that_tells(fitted: Preview) -> None:
    """One look of a learned preview against a random one, of about fifteen moments: sound says where, sight what."""
    features, labels, where = long_videos(60, 1)
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]
    hit = np.mean([fitted.choose(x, 1)[0] == w for x, w in zip(features, where, strict=True)])
    right = np.mean(
        [fitted.scores(x, fitted.choose(x, 1)).argmax() == y for x, y in zip(features, labels, strict=True)]
    )
    r = np.random.default_rng(2)
    blind = np.mean(
        [fitted.scores(x, [r.integers(len(x))]).argmax() == y for x, y in zip(features, labels, strict=True)]
    )
    assert hit > 0.8 and right > 0.8 and blind < 0.6, (hit, right, blind)


def test_choices_are_distinct_and_within_the_budget(fitted: Preview) -> None:
    x = long_videos(1, 3)[0][0]
    for budget in (1, 4, len(x), len(x) + 5):
        where = fitted.choose(x, budget)
        assert where.dtype == np.int64 and len(where) == min(budget, len(x)) == len(set(where.tolist()))
        assert where.min() >= 0 and where.max() < len(x)
    assert fitted.choose(x, 4).tolist() == fitted.choose(x, 7)[:4].tolist(), "more budget adds moments"
    assert fitted.choose(x, 1)[0] == fitted.attention(x)[0].argmax(), "the first look is the trained one"
    seen = fitted.attention(x)
    assert seen.shape == (3, len(x))
    np.testing.assert_allclose(seen.sum(1), 1, rtol=1e-5)
    assert fitted.choose(x[:1], 3).tolist() == [0]


def by_hand(p: Preview, x: torch.Tensor, psi: Projector) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
    """(logits, each step's weights, each step's moments) of one video (n, 10), written out: the first input is Psi of
    the mean; softmax of q . k / sqrt(dim) per modality over what that modality has not looked at; their mixture weighs
    the moments, and Psi of what comes out is the next input; the class from the mean of the inputs."""
    state = (torch.zeros(1, 8), torch.zeros(1, 8))
    seen, weights, at, hidden = [psi(x.mean(0, keepdim=True))], [], [], ([], [])
    for _ in range(p.config.steps):
        state = p.cell(seen[-1], state)
        each = []
        for part, key, query, gone in zip((x[:, :6], x[:, 6:]), p.keys, p.queries, hidden, strict=True):
            score = key(part) @ query(state[0])[0] / 2
            score[gone] = -torch.inf
            each.append(torch.softmax(score, 0))
            gone.append(int(score.argmax()))
        share = torch.softmax(p.modality(state[0])[0], 0)
        weights.append(share[0] * each[0] + share[1] * each[1])
        at.append([gone[-1] for gone in hidden])
        seen.append(psi((weights[-1] @ x)[None]))
    return p.classifier(torch.stack(seen[:-1]).mean(0))[0], weights, at


def test_steps_by_hand() -> None:
    psi = Projector((10, 12, 7)).eval()
    torch.manual_seed(0)
    p = Preview(WIDTHS, CLASSES, PreviewConfig(steps=4, hidden=8, dim=4), fusion=psi).eval()
    x = 3 * torch.randn(6, 10)
    with torch.no_grad():
        got = p(x[None], torch.ones(1, 6, dtype=torch.bool))
        logits, weights, at = by_hand(p, x, psi)
    assert any(a != b for a, b in at), "the two modalities look at different moments"
    torch.testing.assert_close(got.attention[0], torch.stack(weights))
    torch.testing.assert_close(got.logits[0], logits)
    order: list[int] = []
    for weight, pair in zip(weights, at, strict=True):
        order += [n for n in sorted(set(pair), key=lambda n: -float(weight[n])) if n not in order]
    assert p.choose(x.numpy(), len(order)).tolist() == order


def test_masks_are_of_each_modality_and_begin_anew() -> None:
    """In training too. Three moments, five steps: in the fourth all are there again. Without masks none is hidden."""
    torch.manual_seed(1)
    x, mask = padded([torch.randn(3, 6), torch.randn(5, 6)])
    for training in (False, True):
        p = Preview((6,), CLASSES, PreviewConfig(steps=5, hidden=8, dim=4)).train(training)
        seen = p(x, mask).attention.detach()
        assert (seen[0] == 0).sum(1).tolist() == [2, 3, 4, 2, 3] and (seen[1] == 0).sum(1).tolist() == [0, 1, 2, 3, 4]
        assert not seen[0, :, 3:].any()
        torch.testing.assert_close(seen.sum(2), torch.ones(2, 5))
        free = Preview((6,), CLASSES, PreviewConfig(steps=5, hidden=8, dim=4, masks=False)).train(training)
        assert (free(x, mask).attention[1] > 0).all()


def test_padding_changes_nothing() -> None:
    """Neither in eval mode nor in batch statistics."""
    g = torch.Generator().manual_seed(0)
    videos = [torch.randn(n, 10, generator=g) for n in (3, 7, 5)]
    for training in (False, True):
        one, two = (Preview(WIDTHS, CLASSES, PreviewConfig(steps=2, hidden=8, dim=4)).train(training) for _ in range(2))
        x, mask = padded(videos)
        wide = torch.cat([x, torch.full((3, 4, 10), 1e3)], 1)
        a, b = one(x, mask), two(wide, torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1))
        torch.testing.assert_close(a.logits, b.logits)
        assert not a.attention[0, :, 3:].any() and not b.attention[:, :, 7:].any()
        for k, v in one.state_dict().items():
            torch.testing.assert_close(v, two.state_dict()[k])


def test_fusion_is_frozen_and_used() -> None:
    features, labels, _ = long_videos(12, 4)
    fusion = Projector((10, 12, 8))
    before = {k: v.clone() for k, v in fusion.state_dict().items()}
    p = fit(features, labels, CLASSES, WIDTHS, fusion=fusion, classifier=torch.nn.Linear(8, CLASSES),
            config=PreviewConfig(steps=2, hidden=8, dim=8, batch=11, epochs=2))  # fmt: skip
    assert p.fusion is not None and all(torch.equal(v, before[k]) for k, v in p.fusion.state_dict().items())
    x = torch.from_numpy(features[0])
    expected = torch.softmax(p.classifier(p.fusion(x[[1, 2]]).mean(0)), 0).detach().numpy()
    np.testing.assert_allclose(p.scores(features[0], [1, 2]), expected, rtol=1e-5)


def test_the_same_seed_is_the_same_preview(tmp_path: Path) -> None:
    features, labels, _ = long_videos(20, 5)
    c = PreviewConfig(steps=2, hidden=8, dim=8, batch=7, epochs=2)
    fusion = Projector((10, 6))
    one, two = (fit(features, labels, CLASSES, WIDTHS, fusion=fusion, config=c) for _ in range(2))
    assert one.losses == two.losses and all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    one.save(tmp_path / "p.safetensors")
    again = load(tmp_path / "p.safetensors")
    assert again.config == c and again.choose(features[0], 5).tolist() == one.choose(features[0], 5).tolist()
    np.testing.assert_array_equal(again.scores(features[1]), one.scores(features[1]))
    one.config = dataclasses.replace(c, masks=False)
    one.save(tmp_path / "free.safetensors")
    assert not load(tmp_path / "free.safetensors").config.masks
    with safe_open(str(tmp_path / "p.safetensors"), "pt") as file:
        made = json.loads(file.metadata()["preview"])
    del made["config"]["masks"]
    save_file({k: v.contiguous() for k, v in again.state_dict().items()}, str(tmp_path / "old.safetensors"),
              {"preview": json.dumps(made)})  # fmt: skip
    with pytest.raises(CorruptError, match="older"):
        load(tmp_path / "old.safetensors")
    with pytest.raises(NotFoundError):
        load(tmp_path / "none")
    (tmp_path / "q.safetensors").write_bytes(b"no preview")
    with pytest.raises(CorruptError):
        load(tmp_path / "q.safetensors")


def test_one_modality() -> None:
    features, labels, _ = long_videos(8, 6)
    p = fit([x[:, :6] for x in features], labels, CLASSES, (6,), config=PreviewConfig(
        steps=2, hidden=8, dim=8, batch=8, epochs=1))  # fmt: skip
    assert len(p.choose(features[0][:, :6], 3)) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.choose(np.zeros((3, 9), np.float32), 1), lambda p: p.choose(np.zeros((0, 10), np.float32), 1),
        lambda p: p.choose(np.zeros((3, 10), np.float32), 0), lambda p: p.choose(np.full((3, 10), np.nan), 1),
        lambda p: p.scores(np.zeros((3, 10), np.float32), [3]), lambda p: p.scores(np.zeros((3, 10), np.float32), []),
        lambda p: PreviewConfig(steps=1), lambda p: PreviewConfig(learning_rate=0.0), lambda p: Preview((3, 2, 1), 2),
        lambda p: Preview((3,), 1), lambda p: Preview((3,), 2, fusion=Projector((4, 2))),
        lambda p: Preview((3,), 2, classifier=torch.nn.Linear(4, 2)),
        lambda p: fit([np.zeros((2, 3))], [0], 2, (3,)), lambda p: fit([np.zeros((2, 3))] * 2, [0, 2], 2, (3,)),
    ],
)  # fmt: skip
def test_refusals(fitted: Preview, call: Any) -> None:
    with pytest.raises(UsageError):
        call(fitted)
