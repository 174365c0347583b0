"""SSCL: its four terms by hand, who learns when, and that the second stage goes on where the first ended."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_runs import goes_on_to_the_bit, trace, two_equal_one, views_batch
from tiny_run import store_in, tensors
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from trainers import avid
from trainers.bank import MemoryBank
from trainers.config import resolve, resolve_stage
from trainers.metrics import read_metrics
from trainers.run import Run
from trainers.sscl import (
    PRESETS,
    Config,
    StageOne,
    StageTwo,
    audio_cross,
    audio_uni,
    softmax_contrast,
    video_cross,
    visual_uni,
)  # fmt: skip

SMALL = Config(
    teacher_epochs=1, epochs=3, video_net="avid-r2plus1d-10", audio_net="resnet-10", width=4, hidden=16, dim=8,
    head_batch_norm=True, frames=2, size=16, negatives=6, batch=4,
)  # fmt: skip


def batch_of(rows, epoch: int, **options):
    return views_batch(rows, 1, epoch=epoch, **options)


def test_four_terms_by_hand() -> None:
    """Sample 0 in two dimensions among three memories: eqs. 4.4, 4.5, 5.1 and 5.2 in plain Python."""
    t = 0.5
    memory = [[(1.0, 0.0), (0.0, 1.0)], [(0.6, 0.8), (-1.0, 0.0)], [(0.0, -1.0), (0.8, -0.6)]]
    v, a = (0.8, 0.6), (-0.6, 0.8)

    def loss(query, modality):
        e = [math.exp(sum(q * m for q, m in zip(query, row[modality], strict=True)) / t) for row in memory]
        return -math.log(e[0] / sum(e))

    bank = torch.tensor(memory, dtype=torch.float64)
    own, neg = bank[:1], bank[None, 1:]
    vt, at = (torch.tensor([x], dtype=torch.float64) for x in (v, a))
    for term, query, given, modality in (
        (visual_uni, vt, v, 0), (audio_uni, at, a, 1), (audio_cross, at, a, 0), (video_cross, vt, v, 1),
    ):  # fmt: skip
        assert float(term(query, own, neg, t)) == pytest.approx(loss(given, modality), abs=1e-13), term.__name__


def test_the_softmax_is_avid_s_and_survives_extreme_scores() -> None:
    g = torch.Generator().manual_seed(0)
    q, pos, neg = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g), torch.randn(4, 7, 3, generator=g)
    scores = (q * pos).sum(1, keepdim=True) / 0.1, torch.einsum("bd,bkd->bk", q, neg) / 0.1
    torch.testing.assert_close(softmax_contrast(q, pos, neg, 0.1), avid.softmax_contrast(*scores))
    far = (1000 * q).requires_grad_()
    loss = softmax_contrast(far, pos, neg, 0.1)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.autograd.grad(loss.sum(), far)[0]).all()


def test_at_random_directions_it_is_about_log_of_all_candidates() -> None:
    """K + 1 terms of equal law, t = .07 in 128 dimensions: log(1 + K Z) - s with Z about 2.2."""
    memory, query = MemoryBank(3000, 128, 0).memory, MemoryBank(400, 128, 1).memory[:, 0]
    loss = softmax_contrast(query, memory[:400, 1], memory[1000:2024, 1].expand(400, -1, -1), 0.07).mean()
    assert float(loss) == pytest.approx(math.log(1024 * 2.22), abs=0.2)


@pytest.mark.parametrize("term", [visual_uni, audio_uni, audio_cross, video_cross])
def test_gradients(term) -> None:
    g = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(3, 6, 2, 4, generator=g, dtype=torch.float64), dim=-1)
    query = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: term(q, bank[:, 0], bank[:, 1:], 0.3), (query,))


@pytest.mark.parametrize("stage", [StageOne, StageTwo])
def test_the_teacher_learns_alone_and_then_both(stage) -> None:
    """In the first epoch the student stands still, weights, batch statistics and memory alike; later all move."""
    method = stage(SMALL, 20)
    teacher, student = ("video", "audio") if stage is StageOne else ("audio", "video")
    before = {k: x.clone() for k, x in method.state_dict().items()}
    memory = method.bank.memory.clone()
    trace(method, [batch_of([3, 1, 4, 15], 0)])

    def moved(side: str) -> set[bool]:
        now = method.state_dict()
        return {torch.equal(now[k], before[k]) for k in before if k.split(".")[1] in (side, f"{side}_head")}

    assert moved(student) == {True} and False in moved(teacher)
    own = 0 if teacher == "video" else 1
    assert not torch.equal(method.bank.memory[3, own], memory[3, own])
    assert torch.equal(method.bank.memory[:, 1 - own], memory[:, 1 - own])
    assert method.start_epoch(0) == {"joint": 0.0} and method.start_epoch(1) == {"joint": 1.0}
    trace(method, [batch_of([3, 1, 4, 15], 1)])
    assert False in moved(student)
    assert not torch.equal(method.bank.memory[3, 1 - own], memory[3, 1 - own])


def test_the_ways_of_learning_together() -> None:
    batch = batch_of([3, 1, 4, 15], 1)
    for stage, uni, cross in ((StageOne, "visual_uni", "audio_cross"), (StageTwo, "audio_uni", "video_cross")):
        both, metrics = stage(SMALL, 20).step(batch)
        torch.testing.assert_close(both.detach(), metrics[uni] + metrics[cross])
        alone = stage(replace(SMALL, joint="cross"), 20)
        loss, only = alone.step(batch)
        assert uni not in only
        torch.testing.assert_close(only[cross], metrics[cross])
        loss.backward()
        teacher = alone.towers.video if stage is StageOne else alone.towers.audio
        assert all(p.grad is None for p in teacher.parameters()), "eq. 5.1 as printed teaches the student only"
        live = stage(replace(SMALL, joint="live"), 20)
        loss, _ = live.step(batch)
        loss.backward()
        assert all(p.grad is not None for p in live.parameters())
        v, a = live._pending[0][2].unbind(1)
        _, neg = live._targets(batch)
        query, target, index = (a, v, 0) if stage is StageOne else (v, a, 1)
        expected = softmax_contrast(query, target, neg[:, :, index], SMALL.temperature).mean()
        torch.testing.assert_close(loss.detach(), expected)


def test_missing_sound_is_left_out_not_filled_in() -> None:
    sound = [True, False, True, True]
    method = StageOne(SMALL, 20).eval()
    _, metrics = method.step(batch_of([3, 1, 4, 15], 1, sound=sound))
    _, whole = method.step(batch_of([3, 1, 4, 15], 1))
    torch.testing.assert_close(metrics["visual_uni"], whole["visual_uni"])
    own, neg = method._targets(batch_of([3, 1, 4, 15], 1))
    a = method._embed(1, batch_of([3, 1, 4, 15], 1)).detach()
    keep = torch.tensor(sound)
    torch.testing.assert_close(metrics["audio_cross"], audio_cross(a, own, neg, SMALL.temperature)[keep].mean())
    method = StageTwo(SMALL, 20)
    loss, _ = method.step(batch_of([3, 1], 0, sound=[False, False]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in method.parameters())


TRACES = {
    StageOne: [3.280159, 1.325749, 1.694628, 1.442039, 2.917801, 4.166371, 4.107139, 4.070248, 3.896323, 4.096055],
    StageTwo: [3.191647, 1.450056, 1.625116, 1.240252, 3.036722, 3.130708, 4.297295, 3.715007, 3.708128, 3.815187],
}  # fmt: skip


def ten(stage, rate: float = 0.01) -> list[float]:
    same = {"dtype": torch.float64, "rich": True}
    batches = [batch_of(torch.arange(6) + n, n // 4, seed=n, **same) for n in range(10)]
    calm = replace(SMALL, head_batch_norm=False, pool="avg", temperature=0.3)
    return trace(stage(calm, 20).double(), batches, rate)


@pytest.mark.parametrize("stage", [StageOne, StageTwo])
def test_ten_losses_of_a_fixed_seed(stage) -> None:
    one = ten(stage)
    assert one == ten(stage), "the same to the bit"
    assert one == pytest.approx(TRACES[stage], abs=1e-4)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("stage", [StageOne, StageTwo])
def test_loss_falls_towards_a_planted_memory(stage, epoch: int) -> None:
    method = stage(replace(SMALL, temperature=0.3), 8)
    batch = batch_of(torch.arange(8), epoch)
    method.after_step = lambda: {}  # the memory is held
    method.bank.memory[:] = torch.eye(8)[:, None]
    losses = trace(method, [batch] * 10, 0.01, torch.optim.Adam)
    assert losses[-1] < 0.8 * losses[0], losses


def test_stage_two_goes_on_where_stage_one_ended() -> None:
    one, two = StageOne(SMALL, 20), StageTwo(replace(SMALL, seed=3), 20)
    trace(one, [batch_of([3, 1, 4, 15], 1)])
    two.load_stage_one(one.state_dict(), one.method_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(one.bank.memory, two.bank.memory) and torch.equal(one.bank.seen, two.bank.seen)
    with pytest.raises(ConflictError, match="other networks"):
        StageTwo(replace(SMALL, width=8), 20).load_stage_one(one.state_dict(), one.method_state())
    with pytest.raises(ConflictError, match="selection"):
        StageTwo(SMALL, 21).load_stage_one(one.state_dict(), one.method_state())
    assert set(one.method_state()) == {"bank.memory", "bank.seen"}


def test_configuration_tells_all_its_problems() -> None:
    with pytest.raises(UsageError) as e:
        Config(teacher_epochs=30, joint="uni", negatives=0, temperature=0.0)
    assert all(word in str(e.value) for word in ("teacher_epochs 30", "did you mean uni+cross", "negatives", "temper"))
    assert PRESETS["paper"] == Config() and Config().audio_net == "resnet-10"
    with pytest.raises(UsageError, match="trains on both"):
        StageOne(SMALL, 8).step(replace(batch_of([1, 2], 0), audio=None))


SETS = ("video_net=avid-r2plus1d-10", "audio_net=avid-conv2d-10", "width=4", "hidden=8", "dim=8", "frames=4", "fps=8",
        "head_batch_norm=true", "size=32", "seconds=0.5", "front_end=avid-linear129", "negatives=6", "batch=5",
        "draws=1", "epochs=2", "teacher_epochs=1", "statistics_clips=16", "in_process=true", "threads=1",
        "precision=fp32", "learning_rate=0.002")  # fmt: skip


def test_both_stages_on_a_store_apart_and_to_the_bit(tmp_path: Path) -> None:
    """Two runs, each with its checkpoints; the teacher's epoch, then the joint one, and a stop between them."""
    store = store_in(tmp_path)
    stage = resolve_stage("sscl", sets=SETS).replace(epochs=2, teacher_epochs=1, draws=1, learning_rate=0.002)
    first = goes_on_to_the_bit("sscl-stage-1", store, stage, tmp_path)
    second = goes_on_to_the_bit("sscl", store, resolve("sscl", sets=SETS), tmp_path, init=first.path)
    for run, uni, cross in ((first, "visual_uni", "audio_cross"), (second, "audio_uni", "video_cross")):
        lines = read_metrics(run.path / "metrics.jsonl")
        assert [uni in line for line in lines] == [True] * 4
        assert [cross in line for line in lines] == [False, False, True, True]
    assert second.snapshot.init is not None and second.snapshot.init["run"] == "sscl-stage-1-whole"
    one, two = tensors(first), tensors(second, 2)
    student = "model.safetensors:towers.video.conv1.0.weight"
    assert torch.equal(one[student], two[student]), "stage II's student begins as stage I's teacher and waits"


def cases():
    # maximum pooling, normalised heads and t = .07 magnify rounding tenfold a step within one process
    config = replace(SMALL, audio_net="avid-conv2d-10", head_batch_norm=False, temperature=0.3)
    return {
        "one": (StageOne(config, 40), 1, 3),
        "two": (StageTwo(config, 40), 1, 2),
        "cross": (StageOne(replace(config, joint="cross"), 40), 1, 2),
        "live": (StageOne(replace(config, joint="live"), 40), 1, 2),
    }


@pytest.mark.slow
def test_two_processes_equal_one_in_float64(tmp_path: Path) -> None:
    two_equal_one("test_sscl", tmp_path)


@pytest.mark.slow
def test_the_demo_set_from_its_files(tmp_path: Path, tiny_media: Path) -> None:
    import avstore
    from avstore.ingest import ingest
    from trainers.loop import train_with_stages

    ingest(tiny_media, tmp_path / "demo.zarr", size=(64, 80), fps=8)
    sets = ["batch=8", "in_process=true", "seconds=1.0", "negatives=8", "log_every=1"]
    c, stage = resolve("sscl", preset="tiny", sets=sets), resolve_stage("sscl", preset="tiny", sets=sets)
    run = train_with_stages("sscl", avstore.open(tmp_path / "demo.zarr"), c, tmp_path / "sscl", stage_config=stage).run
    for path, uni in ((tmp_path / "sscl-stage-1", "visual_uni"), (run.path, "audio_uni")):
        losses = [line[uni] for line in read_metrics(path / "metrics.jsonl")]
        assert losses[-1] < losses[0] - 0.2 and Run(path).finished
