"""The protocols of SeLaVi and VCOP: cells and means by hand, distances against scikit-learn, clips on a tiny run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors
from tiny_run import config, store_in

from avstore.errors import UsageError
from benchmarks import blocks, protocols
from benchmarks.protocols import PROTOCOLS, cells, over_clips
from benchmarks.rank import rank
from benchmarks.vectors import means_of, spaced
from trainers.loop import train


def test_cells_by_hand():
    x = torch.arange(32.0).reshape(1, 1, 2, 4, 4)
    assert cells(x, (1, 2, 2)).tolist() == [[5, 7, 13, 15, 21, 23, 29, 31]]  # each step of time kept
    assert cells(x, (2, 2, 2)).tolist() == [[21, 23, 29, 31]]
    assert cells(x[:, :, :1], (2, 2, 2)).tolist() == [[5, 7, 13, 15]]  # one step: one cell
    assert cells(torch.zeros(1, 512, 2, 7, 7), PROTOCOLS["VCOP"].cell).shape == (1, 9216)  # as printed in their code
    assert cells(torch.zeros(1, 512, 4, 7, 7), PROTOCOLS["SeLaVi"].cell).shape == (1, 9216)


def test_means_over_clips_by_hand():
    x = np.array([[[3.0, 4.0], [0.0, 2.0]]], np.float32)
    assert over_clips(x, unit=True) == pytest.approx(np.array([[0.3, 0.9]]))  # not brought to unit length again
    assert over_clips(x, unit=False) == pytest.approx(np.array([[1.5, 3.0]]))


@pytest.mark.parametrize("by", ["cosine", "euclidean"])
def test_distances_are_scikit_learn_s(by):
    rng = np.random.default_rng(0)
    q, g = (
        rng.normal(size=(30, 6)) * rng.uniform(0.2, 3, (30, 1)),
        rng.normal(size=(80, 6)) * rng.uniform(0.2, 3, (80, 1)),
    )
    ql, gl = rng.integers(4, size=30), rng.integers(4, size=80)
    found = rank(q, g, ql, gl, ks=(1, 5, 20), by=by)
    if by == "euclidean":
        order = NearestNeighbors(n_neighbors=80).fit(g).kneighbors(q, return_distance=False)
    else:
        order = np.argsort(cosine_distances(q, g), axis=1)
    hits = gl[order] == ql[:, None]
    for k in (1, 5, 20):
        assert found.recall[k] == pytest.approx(hits[:, :k].any(1).mean())
    assert found.first.tolist() == (hits.argmax(1) + 1).tolist()
    assert found.mrr == pytest.approx((1 / (hits.argmax(1) + 1)).mean())


def test_lengths_matter_to_euclid_alone():
    q, g = np.array([[1.0, 0.0]]), np.array([[10.0, 0.0], [0.9, 0.5]])
    assert rank(q, g, ["a"], ["a", "b"], ks=(1,)).recall[1] == 1.0
    assert rank(q, g, ["a"], ["a", "b"], ks=(1,), by="euclidean").recall[1] == 0.0
    with pytest.raises(UsageError, match="no distance"):
        rank(q, g, ["a"], ["a", "b"], by="manhattan")


def test_seconds_evenly_spaced():
    seconds = np.array([3, 0, 1, 2, 4])
    assert seconds[spaced(seconds, 3)].tolist() == [0, 2, 4]
    assert seconds[spaced(seconds, 1)].tolist() == [2] and spaced(seconds, 9).all()
    x = np.array([[1.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 1.0]])
    means, who = means_of(x, np.array([7, 7, 7, 2]), np.array([0, 1, 2, 0]), 2)
    assert who.tolist() == [2, 7] and means == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]))


def test_published_figures_are_labelled():
    rows = protocols.published_rows("UCF101")
    vcop = next(r for r in rows if r["features"] == "published: VCOP")
    assert vcop["R@1"] == 0.141 and vcop["R@50"] == 0.665 and (vcop["level"], vcop["pair"]) == ("class", "v-v")
    assert all(r["features"].startswith("published") for r in rows)
    assert any(r["features"] == "published, unchecked: CrissCross" and "R@10" not in r for r in rows)
    with pytest.raises(UsageError, match="no published"):
        protocols.published_rows("Kinetics")
    with pytest.raises(UsageError, match="no protocol"):
        protocols.protocol("selavi")


def test_a_protocol_s_clips_are_its_own(tmp_path):
    """The vectors are the maxima over cells of the network's last map of 16 consecutive frames, at its size."""
    store = store_in(tmp_path, codec="jpeg")
    run = train("avid", store, config("steps=1"), tmp_path / "runs" / "mine").run
    method, of = blocks.with_weights(run), PROTOCOLS["VCOP"]
    clip = protocols.clip_of(of, run, store)
    assert (clip.frames, clip.fps, clip.size) == (16, "native", 48) and "48 pixels" in protocols.what_differs(of, store)
    shown = []

    def keep(module, inputs):
        shown.append(inputs[0])

    net = blocks.trunk(method, "v")
    hook = net.forward_blocks
    net.forward_blocks = lambda x: (keep(None, (x,)), hook(x))[1]
    found = protocols.video_vectors(of, method, run, store, store.numbers[:2])
    assert all(x.shape[1:] == (3, 16, 48, 48) for x in shown) and sum(len(x) for x in shown) == 20
    with torch.no_grad():
        by_hand = cells(hook(torch.cat(shown)[:10].float())["conv5x"], of.cell).mean(0)
    assert found.shape[0] == 2 and found[0] == pytest.approx(by_hand.numpy(), rel=1e-4, abs=1e-5)
    assert "theirs 30 fps: the tape has 16" in protocols.what_differs(PROTOCOLS["SeLaVi"], store)
