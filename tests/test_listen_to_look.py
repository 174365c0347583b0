"""Listen to Look: eqs. 3.1-3.3 by hand, who learns from whom, and what every method promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import (
    CLASSES,
    ROWS,
    goes_on,
    labelled,
    learns_a_fixed_batch,
    leaves_out,
    nothing_is_zero,
    table,
    ten_steps,
)
from method_runs import goes_on_to_the_bit, two_equal_one
from tiny_run import config as avid_config
from tiny_run import store_in
from torch.nn import functional as F

from avstore.errors import ConflictError, UsageError
from trainers import preview
from trainers.batch import Batch
from trainers.config import TrainConfig, resolve
from trainers.embed import embed
from trainers.listen_to_look import PRESETS, Config, ListenToLook, descriptor_distance, soft_cross_entropy
from trainers.loop import train
from trainers.metrics import read_metrics
from trainers.optimiser import make_optimiser

SMALL = replace(PRESETS["tiny"], width=4, hidden=16, dim=12, frames=2, size=16, batch=6, epochs=4, draws=1)
# Ten SGD steps in float64: equal to the bit twice on one machine, 1e-4 across machines.
TRACE = [4.425824, 3.98006, 3.940937, 3.761866, 3.72355, 3.613557, 3.618067, 3.47483, 3.446918, 3.362491]


class Given(ListenToLook):
    """With a teacher that answers from a table; `two_equal_one` makes batches without labels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, ROWS, CLASSES)
        said = table(config.dim)
        self.teacher.give(lambda b: said[b.row])

    def step(self, batch: Batch) -> Any:
        return super().step(replace(batch, labels=batch.row % len(CLASSES)) if batch.labels is None else batch)


def make(**changes: Any) -> Given:
    return Given(replace(SMALL, **{"kl_weight": 1.0, "l1": "mean", **changes})).train()


def test_eqs_3_1_and_3_2_by_hand() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # Omega = (3/4, 1/4)
    student = torch.tensor([[0.0, math.log(4.0)]], dtype=torch.float64)  # Phi = (1/5, 4/5)
    expected = -0.75 * math.log(0.2) - 0.25 * math.log(0.8)
    assert soft_cross_entropy(teacher, student).tolist() == pytest.approx([expected])
    z, psi = torch.tensor([[1.0, -2, 0, 4]]), torch.tensor([[0.0, 1, 0, 6]])
    assert descriptor_distance(z, psi).tolist() == [6.0] and descriptor_distance(z, psi, "mean").tolist() == [1.5]


def test_eq_3_1_is_least_where_the_student_says_the_same() -> None:
    """Cross-entropy = KL + the teacher's entropy: its gradient vanishes where both agree, and reaches no teacher."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    student = (teacher.detach() + 5).requires_grad_()
    loss = soft_cross_entropy(teacher, student)
    loss.sum().backward()
    p = torch.softmax(teacher.detach(), 1)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum(1))
    assert teacher.grad is None and student.grad.abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(teacher.detach(), s), torch.randn(
        3, 4, generator=g, dtype=torch.float64).requires_grad_())  # fmt: skip


@pytest.mark.parametrize("l1", ["sum", "mean"])
def test_the_whole_is_eq_3_3(l1: str) -> None:
    """L_1 + lambda L_KL of the first picture and the sound; and the teacher's layer's own cross-entropy."""
    batch = labelled()
    loss, metrics = make(l1=l1, kl_weight=7.0)(batch)
    other = make(l1=l1, kl_weight=7.0)
    psi = other.fusion(torch.cat([other.image(batch.video[:, :, 0]), other.audio(batch.audio)], 1))
    z = table(12)[batch.row]
    said = other.teacher_classifier(z)
    distance = (z - psi).abs().sum(1).mean() / (12 if l1 == "mean" else 1)
    kl = -(said.softmax(1) * F.log_softmax(other.classifier(psi), 1)).sum(1).mean()
    torch.testing.assert_close(loss, distance + 7 * kl + F.cross_entropy(said, batch.labels), rtol=1e-5, atol=1e-5)
    assert 0 <= float(metrics["accuracy"]) <= 1
    # the other pictures are the teacher's alone
    later = batch.video.clone()
    later[:, :, 1] = 9
    assert torch.equal(make(l1=l1, kl_weight=7.0)(replace(batch, video=later))[0], loss)


def test_labels_teach_the_teacher_s_layer_only() -> None:
    batch = labelled()
    student = ("image", "audio", "fusion", "classifier")
    found = []
    for labels in (batch.labels, batch.labels.roll(1)):
        method = make()
        method(replace(batch, labels=labels))[0].backward()
        found.append({k: p.grad.clone() for k, p in method.named_parameters()})
    for k, grad in found[0].items():
        assert torch.equal(grad, found[1][k]) == (k.split(".")[0] in student), k
    one, other = make(kl_weight=0.0), make(kl_weight=50.0)
    for method in (one, other):
        method(batch)[0].backward()
    assert torch.equal(one.teacher_classifier.weight.grad, other.teacher_classifier.weight.grad)


def test_the_teacher_s_layer_has_a_rate_of_its_own() -> None:
    """Constant, whatever the schedule gives the student; none where it is 0."""
    method = make(teacher_rate=0.5)
    optimiser = make_optimiser(method, TrainConfig(optimiser="sgd", learning_rate=0.1))
    for group in optimiser.param_groups:
        group["lr"] = 0.0  # what a schedule ends with
    before = {k: p.detach().clone() for k, p in method.named_parameters()}
    method(labelled())[0].backward()
    optimiser.step()
    for k, p in method.named_parameters():
        moved = before[k] - p.detach()
        expected = 0.5 * p.grad if k.startswith("teacher_classifier.") else torch.zeros_like(p)
        torch.testing.assert_close(moved, expected, msg=k)
    assert make(teacher_rate=0.0).own_rates() == {}


def test_a_teacher_that_is_ahead_teaches_sooner() -> None:
    """The student agrees with the labels, which it never sees, in fewer steps where the teacher's layer is fast."""
    batch, right = labelled([(7 * k) % ROWS for k in range(24)]), []
    for rate in (0.0, 0.05):
        method = make(teacher_rate=rate, kl_weight=10.0)
        optimiser = make_optimiser(method, TrainConfig(optimiser="adam", learning_rate=2e-3))
        for _ in range(25):
            loss, metrics = method(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        right.append((float(metrics["kl"]), float(metrics["accuracy"])))
    assert right[1][0] < right[0][0] - 0.2 and right[1][1] > 0.9, right


def test_embeddings() -> None:
    method, batch = make().eval(), labelled()
    with torch.no_grad():
        both, sight, sound = (
            method.embed(batch.video, batch.audio),
            method.embed(batch.video),
            method.embed(audio=batch.audio),
        )
        first = method.embed(batch.video[:, :, :1])
    assert set(sight) == {"video", "video-trunk"} and set(sound) == {"audio", "audio-trunk"}
    assert set(both) == {"video", "video-trunk", "audio", "audio-trunk", "joint", "joint-trunk"}
    assert both["joint-trunk"].shape == (6, 12) and torch.equal(first["video-trunk"], sight["video-trunk"])
    torch.testing.assert_close(both["joint"].norm(dim=1), torch.ones(6))


@pytest.mark.parametrize(
    ("key", "value"),
    [("l1", "max"), ("kl_weight", -1.0), ("teacher_rate", -1.0), ("image_net", "resnet-9"), ("audio_net", "vcop-r3d"),
     ("dim", 0), ("seconds", 0.0), ("schedule", "step")],
)  # fmt: skip
def test_settings_that_do_not_hold(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match="does not hold") as e:
        replace(SMALL, **{key: value})
    assert key in str(e.value.why)


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="classes"):
        ListenToLook(SMALL, ROWS, ("a",))
    with pytest.raises(UsageError, match="not bound"):
        ListenToLook(SMALL, ROWS, CLASSES)(labelled())
    with pytest.raises(UsageError, match="without pictures, sound or labels"):
        make()(replace(labelled(), audio=None))
    with pytest.raises(ConflictError, match="keeps no state"):
        make().load_method_state({"bank.memory": torch.zeros(2)})
    with pytest.raises(UsageError, match="nothing to embed"):
        make().embed()


# ---- what every method promises ------------------------------------------------------------------------------------


def test_ten_steps() -> None:
    first = ten_steps(make)
    assert first == ten_steps(make)
    assert first == pytest.approx(TRACE, abs=1e-4)


def test_it_learns_a_fixed_batch() -> None:
    metrics = learns_a_fixed_batch(make, labelled())
    assert float(metrics["feature_std_joint"]) > 0.2 and float(metrics["teacher_accuracy"]) > 0.6


def test_a_clip_without_sound_contributes_nothing() -> None:
    here = [True, True, False, True, True, False]
    whole, has = labelled(), torch.tensor(here)
    audio = torch.where(has[:, None, None, None], whole.audio, torch.nan)
    leaves_out(make, whole, here, has_sound=has, audio=audio)


def test_a_clip_without_label_is_still_distilled() -> None:
    batch = replace(labelled(), labels=torch.full((6,), -1))
    loss, metrics = make()(batch)
    assert float(metrics["teacher_cross_entropy"]) == 0 < float(metrics["l1"]) and float(loss.detach()) > 0


def test_a_batch_without_any_sound_is_zero() -> None:
    nothing_is_zero(make, replace(labelled(), has_sound=torch.zeros(6, dtype=torch.bool)))


def test_it_goes_on_to_the_bit() -> None:
    goes_on(make)
    assert not [k for k in make().state_dict() if k.startswith("teacher.")], "the teacher is no part of a checkpoint"


def cases() -> dict[str, tuple[Any, int, int]]:
    """For `two_equal_one`."""
    return {"l2l": (make(), 1, 1)}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    two_equal_one("test_listen_to_look", tmp_path)


@pytest.mark.slow
def test_from_a_teacher_to_the_moments_to_look_at(tmp_path: Path) -> None:
    """A run teaches the student; its embeddings of every second are the moments that the preview chooses from."""
    store = store_in(tmp_path)
    avid = train("avid", store, avid_config("steps=2"), tmp_path / "avid").run
    config = resolve("listen-to-look", preset="tiny", sets=[
        "width=4", "hidden=16", "dim=32", "frames=4", "size=32", "seconds=0.5", "batch=5", "epochs=3", "draws=1",
        "statistics_clips=16", "in_process=true", "threads=1", "precision=fp32", "log_every=1", f"teacher={avid.path}",
    ])  # fmt: skip
    run = goes_on_to_the_bit("listen-to-look", store, config, tmp_path)
    assert [x["step"] for x in read_metrics(run.path / "metrics.jsonl")] == [1, 2, 3, 4]
    embed(run, store)
    student: Any = run.load()
    found = preview.moments(store, run.name, store.numbers)
    assert set(found) == set(store.numbers.tolist())
    widths = (student.image.dim, student.audio.dim)
    assert all(x.features.shape == (len(x.seconds), sum(widths)) for x in found.values())
    assert {len(x.seconds) for x in found.values()} == {2}, "1.25 s and 2 s begin two seconds each"
    labels = [["a", "b"].index(str(x)) for x in store.column("label", store.numbers)]
    looks = preview.fit(
        [found[int(n)].features for n in store.numbers], labels, 2, widths, fusion=student.fusion,
        config=preview.PreviewConfig(steps=2, hidden=8, dim=8, batch=6, epochs=2),
    )  # fmt: skip
    assert sorted(looks.choose(found[int(store.numbers[0])].features, 5)) == [0, 1]
