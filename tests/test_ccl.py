"""CCL: compositions and eqs. 6.1-6.5 by hand, teachers of every kind, and what every method promises."""

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
from trainers.batch import Batch
from trainers.ccl import (
    PRESETS,
    Ccl,
    Composition,
    Config,
    class_aware_nce,
    distillation,
    probabilities,
    symmetric_kl,
)  # fmt: skip
from trainers.config import resolve
from trainers.embed import embed
from trainers.loop import train
from trainers.methods import METHODS
from trainers.metrics import read_metrics

SMALL = replace(PRESETS["tiny"], width=4, frames=2, size=16, batch=6, epochs=4, draws=1, audio_dim=32, image_dim=32)
# Ten SGD steps in float64: equal to the bit twice on one machine, 1e-4 across machines.
TRACE = [8.458258, 7.980946, 6.758818, 7.42169, 7.027932, 6.779801, 6.768753, 6.461923, 6.146954, 5.964656]


class Given(Ccl):
    """With teachers that answer from a table; `two_equal_one` makes batches without labels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, ROWS, CLASSES)
        for n, teacher in enumerate(self.teachers.values()):
            said = table(teacher.dim, seed=n)
            teacher.give(lambda b, said=said: said[b.row])

    def step(self, batch: Batch) -> Any:
        return super().step(replace(batch, labels=batch.row % len(CLASSES)) if batch.labels is None else batch)


def make(**changes: Any) -> Given:
    return Given(replace(SMALL, **changes)).train()


def test_composition_by_hand() -> None:
    """Section 6.2: the residual is the teacher's vector as it is, the linear layer sees unit vectors."""
    made = Composition(2)
    with torch.no_grad():
        made.f_theta.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 10, 0]]))
        made.f_theta.bias.copy_(torch.tensor([0.0, 1]))
        out = made(torch.tensor([[3.0, 4]]), torch.full((1, 2), 2.0))
    # x_t / |x_t| = (.6, .8), x_v = (2, 2), of length one (.7071, .7071)
    assert out.tolist() == [pytest.approx([3.6, 4 + 10 * math.sqrt(0.5) + 1])]


def test_nce_by_hand() -> None:
    """Eqs. 6.2, 6.3 at t = 1/2: three videos of classes 0, 0, 1; cosines of the first with the teacher 1, 0, -1."""
    x = torch.tensor([[2.0, 0], [0, 1], [1, 0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0], [0, 5], [-1, 0]], dtype=torch.float64)
    e = math.exp
    z = e(2) + e(0) + e(-2)
    p = [e(2) / z, e(0) / z, e(-2) / z]
    got = probabilities(x, y, 0.5)
    assert got[0].tolist() == pytest.approx(p)
    label = torch.tensor([0, 0, 1])
    q = [1 / (e(0) + e(2) + e(0)), e(2) / (e(0) + e(2) + e(0)), 1 / (e(0) + e(2) + e(0))]
    expected = [
        -(math.log(p[0]) + math.log(p[1])) / 2 - math.log(1 - p[2]),
        -(math.log(q[0]) + math.log(q[1])) / 2 - math.log(1 - q[2]),
        -math.log(p[2]) - (math.log(1 - p[0]) + math.log(1 - p[1])) / 2,
    ]
    assert class_aware_nce(x, y, label, 0.5).tolist() == pytest.approx(expected, abs=1e-8)


def test_one_class_and_classes_of_one_are_finite() -> None:
    """methods.md, section 7."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 4, generator=g).requires_grad_() for _ in range(2))
    for label in (torch.zeros(5, dtype=torch.long), torch.arange(5)):
        loss = class_aware_nce(x, y, label, 0.1)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
    one_class = class_aware_nce(x, y, torch.zeros(5, dtype=torch.long), 0.1)
    torch.testing.assert_close(one_class, -torch.log(probabilities(x, y, 0.1)).mean(1), rtol=1e-3, atol=1e-3)  # 1e-10
    alone = class_aware_nce(x[:1], y[:1], torch.zeros(1, dtype=torch.long), 0.1)
    assert float(alone.detach()) == pytest.approx(0, abs=1e-6)


def test_a_certain_mistake_still_has_a_gradient() -> None:
    """p of a negative rounds to 1 in float32: log(1 - p) is that of the other probabilities, not of a clamp."""
    x = torch.tensor([[1.0, 0], [1, 0.01]], requires_grad=True)
    y = torch.tensor([[-1.0, 0], [1, 0]])
    loss = class_aware_nce(x, y, torch.tensor([0, 1]), 0.1)[0]
    (grad,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == pytest.approx(2 * 20, rel=0.05) and torch.isfinite(grad).all()
    assert 1 - float(probabilities(x, y, 0.1)[0, 1].detach()) < 1e-7
    (z,) = torch.autograd.grad(
        class_aware_nce(x + torch.tensor([[0.0, 0.3], [0, 0]]), y, torch.tensor([0, 1]), 0.1)[0], x
    )
    assert z.abs().max() > 1


def test_distillation_by_hand() -> None:
    """Eqs. 6.4, 6.5, and the code's sum, halved with two teachers."""
    d, c = torch.tensor(2.0), torch.tensor(6.0)
    assert float(distillation(d, c, 0.25, "report", 2)) == pytest.approx(5)
    assert float(distillation(d, c, 0.25, "code", 2)) == 4 and float(distillation(d, c, 0.25, "code", 1)) == 8


def test_symmetric_kl_by_hand() -> None:
    p = torch.tensor([[math.log(3.0), 0.0], [1, 1]], dtype=torch.float64)  # (3/4, 1/4), (1/2, 1/2)
    q = torch.tensor([[0.0, 0.0], [7, 7]], dtype=torch.float64)
    both = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.5 * math.log(1 / 1.5) + 0.5 * math.log(2)
    assert symmetric_kl(p, q).tolist() == pytest.approx([both, 0])


@pytest.mark.parametrize(
    "loss",
    [lambda x, y: class_aware_nce(x, y, torch.tensor([0, 1, 0, 2]), 0.5), lambda x, y: symmetric_kl(x, y)],
)
def test_gradients(loss: Any) -> None:
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(loss, (x, y))


@pytest.mark.parametrize("preset", ["report", "code"])
def test_the_whole(preset: str) -> None:
    """Eqs. 6.1 + 6.4 + 6.5, and what the code does instead."""
    code = preset == "code"
    c: dict[str, Any] = {"loss_scale": preset, "symmetric": code, "divergence": 0.5 if code else 0.0, "mix": 0.3}
    batch, label = labelled(), labelled().labels
    loss, metrics = make(**c)(batch)
    other = make(**c)
    x = other.video(batch.video)
    logit = other.classifier(x)
    expected = F.cross_entropy(logit, label)
    if code:
        student, compositions = losses_of_the_code(other, batch)
        torch.testing.assert_close(loss, student + compositions, rtol=1e-5, atol=1e-5)
        return
    for n, (name, t) in enumerate((("audio", 0.5), ("image", 0.1))):
        said = table(32, seed=n)[batch.row]
        tv = other.compositions[name](said, x)
        expected = expected + F.cross_entropy(other.composed_classifiers[name](tv), label)
        direct, composed = class_aware_nce(x, said, label, t).mean(), class_aware_nce(x, tv, label, t).mean()
        expected = expected + 0.3 * direct + 0.7 * composed
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(float((logit.argmax(1) == label).float().mean()))


def losses_of_the_code(method: Given, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the compositions', as sums of their terms, with every parameter free in both."""
    label = batch.row % len(CLASSES)
    x = method.video(batch.video)
    logit = method.classifier(x)
    student, compositions = F.cross_entropy(logit, label), torch.zeros(())
    share = 1 / len(method.teachers)

    def both(y: torch.Tensor, z: torch.Tensor, t: float) -> torch.Tensor:
        return class_aware_nce(y, z, label, t).mean() + class_aware_nce(z, y, label, t).mean()

    for n, name in enumerate(method.teachers):
        t = {"audio": 0.5, "image": 0.1}[name]
        said = table(32, seed=n)[batch.row]
        tv = method.compositions[name](said, x)
        told = method.composed_classifiers[name](tv)
        apart = 0.5 * symmetric_kl(logit, told).mean()
        student = student + share * (both(x, said, t) + both(x, tv, t) + apart)
        compositions = compositions + F.cross_entropy(told, label) + both(x, tv, t) + both(tv, said, t) + apart
    return student, compositions


@pytest.mark.parametrize("teachers", ["both", "audio"])
def test_the_code_s_two_losses_reach_each_its_own_parameters(teachers: str) -> None:
    """Student: its loss with the compositions' parameters as constants. Compositions: theirs with x_v constant."""
    c: dict[str, Any] = {"loss_scale": "code", "symmetric": True, "divergence": 0.5, "teachers": teachers}
    method, other, batch = make(**c), make(**c), labelled()
    method(batch)[0].backward()
    student, compositions = losses_of_the_code(other, batch)
    own = [k for k, _ in other.named_parameters() if not k.startswith("compos")]
    assert any(k.startswith("video") for k in own) and "classifier.weight" in own
    parameters = dict(other.named_parameters())
    composed = [k for k in parameters if k not in own]
    assert len(composed) == 4 * len(method.teachers)
    expected = dict(
        zip(own, torch.autograd.grad(student, [parameters[k] for k in own], retain_graph=True), strict=True)
    )
    expected |= dict(zip(composed, torch.autograd.grad(compositions, [parameters[k] for k in composed]), strict=True))
    for k, p in method.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected[k], rtol=1e-3, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")


def test_no_classification_of_a_composition_reaches_the_student_and_an_adapter_learns_with_it() -> None:
    c: dict[str, Any] = {"loss_scale": "code", "symmetric": True, "teachers": "audio", "audio_dim": 20}
    grads = []
    for scale in (1.0, 7.0):  # of the composition's classes
        method = make(**c)
        with torch.no_grad():
            for p in method.composed_classifiers.parameters():
                p.mul_(scale)
        method(labelled())[0].backward()
        grads.append({k: p.grad for k, p in method.named_parameters()})
    one, two = grads
    assert torch.equal(one["video.conv1.0.weight"], two["video.conv1.0.weight"]), "without a divergence"
    assert not torch.equal(one["compositions.audio.f_theta.weight"], two["compositions.audio.f_theta.weight"])
    assert not torch.equal(one["adapters.audio.weight"], two["adapters.audio.weight"])


# Ten SGD steps of the code's losses in float64.
CODE_TRACE = [
    32.168837, 22.925548, 30.601848, 24.077071, 26.023872, 23.169253, 28.753183, 24.590077, 25.259382, 22.991294,
]  # fmt: skip


def test_ten_steps_of_the_code() -> None:
    c: dict[str, Any] = {"loss_scale": "code", "symmetric": True, "divergence": 0.5}
    first = ten_steps(lambda: make(**c))
    assert first == ten_steps(lambda: make(**c))
    assert first == pytest.approx(CODE_TRACE, abs=1e-4)


def test_presets_and_what_is_asked_of_a_store() -> None:
    code = PRESETS["code"]
    assert code.symmetric and code.divergence == 0.5 and code.loss_scale == "code"
    both, image = Config(), replace(Config(), teachers="image")
    given = replace(Config(), audio_teacher="x.zarr/embeddings/panns/audio-trunk")
    assert both.needs().sound and not image.needs().sound and not given.needs().sound, "given vectors need no sound"
    assert both.needs().labels and METHODS["ccl"].load().teachers(image) == ("runs/avid",)
    assert set(make(teachers="image").teachers) == {"image"} and set(make(teachers="audio").teachers) == {"audio"}
    assert isinstance(make(audio_dim=20).adapters["audio"], torch.nn.Linear)
    loss, _ = make(audio_dim=20)(labelled())
    assert torch.isfinite(loss)


def test_embeddings_are_the_student_s() -> None:
    method, batch = make().eval(), labelled()
    with torch.no_grad():
        found = method.embed(batch.video, batch.audio)
        assert set(found) == {"video", "video-trunk"} and method.embed(audio=batch.audio) == {}
    torch.testing.assert_close(found["video"].norm(dim=1), torch.ones(6))


@pytest.mark.parametrize(
    ("key", "value"),
    [("teachers", "text"), ("audio_dim", 0), ("image_temperature", 0.0), ("mix", 1.5), ("divergence", -1.0),
     ("loss_scale", "paper"), ("video_net", "vcop-r3f")],
)  # fmt: skip
def test_settings_that_do_not_hold(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match="does not hold") as e:
        replace(SMALL, **{key: value})
    assert key in str(e.value.why)


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="classes"):
        Ccl(SMALL, ROWS, ("a",))
    with pytest.raises(UsageError, match="not bound"):
        Ccl(SMALL, ROWS, CLASSES)(labelled())
    with pytest.raises(UsageError, match="without pictures or without labels"):
        Ccl(SMALL, ROWS, CLASSES)(replace(labelled(), labels=None))
    with pytest.raises(ConflictError, match="keeps no state"):
        make().load_method_state({"bank.memory": torch.zeros(2)})


# ---- what every method promises ------------------------------------------------------------------------------------


def test_ten_steps() -> None:
    first = ten_steps(make)
    assert first == ten_steps(make)
    assert first == pytest.approx(TRACE, abs=1e-4)


def test_it_learns_a_fixed_batch() -> None:
    metrics = learns_a_fixed_batch(make, labelled())
    assert float(metrics["feature_std_video"]) > 0.2 and float(metrics["accuracy"]) > 0.6


def test_what_nobody_knows_contributes_nothing() -> None:
    """A clip without picture, one without label; and a teacher that does not know a clip is out of its terms only."""
    here = [True, True, False, True, True, False]
    whole, has = labelled(), torch.tensor(here)
    leaves_out(make, whole, here, has_picture=torch.tensor([True, True, False, True, True, True]),
               video=torch.where(has[:, None, None, None, None], whole.video, torch.nan),
               labels=torch.where(torch.tensor([True, True, True, True, True, False]), whole.labels, -1))  # fmt: skip
    silent = replace(whole, has_sound=has)
    (_, full), (_, less) = make()(whole), make()(silent)
    same = {"cls", "accuracy", "cls_image", "nce_image", "nce_composed_image"}
    assert all(torch.equal(full[k], less[k]) for k in same) and not torch.equal(full["nce_audio"], less["nce_audio"])


def test_a_batch_without_labels_is_zero() -> None:
    nothing_is_zero(make, replace(labelled(), labels=torch.full((6,), -1)))


def test_it_goes_on_to_the_bit() -> None:
    goes_on(make)
    assert not [k for k in make().state_dict() if k.startswith("teachers.")], "teachers are no part of a checkpoint"


def cases() -> dict[str, tuple[Any, int, int]]:
    """For `two_equal_one`: as printed and as coded; the second at mild temperatures."""
    mild = {"audio_temperature": 0.5, "image_temperature": 0.5}
    code = {"symmetric": True, "divergence": 0.5, "loss_scale": "code", "audio_dim": 20}
    return {"report": (make(**mild), 1, 1), "code": (make(**mild, **code), 1, 1)}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    two_equal_one("test_ccl", tmp_path)


@pytest.mark.slow
def test_runs_of_teachers_of_each_kind(tmp_path: Path) -> None:
    """A run listens, a column of given vectors sees; then a weights file of an image network."""
    from safetensors.torch import save_file

    from trainers.backbones import image_net

    store = store_in(tmp_path)
    avid = train("avid", store, avid_config("steps=2"), tmp_path / "avid").run
    embed(avid, store)
    net = image_net("image-resnet-18", 4)
    save_file({k: x.contiguous() for k, x in net.state_dict().items()}, tmp_path / "image.safetensors")
    small = ("width=4", "frames=4", "size=32", "seconds=0.5", "batch=5", "epochs=3", "draws=1", "statistics_clips=16",
             "in_process=true", "threads=1", "precision=fp32", "log_every=1", "front_end=avid-linear129",
             f"audio_teacher={avid.path}", "audio_dim=32", "image_dim=32")  # fmt: skip
    for n, source in enumerate(
        (f"{store.path}/embeddings/avid/video-trunk", f"{tmp_path}/image.safetensors#image-resnet-18:4")
    ):
        config = resolve("ccl", preset="tiny", sets=[*small, f"image_teacher={source}"])
        run = goes_on_to_the_bit("ccl", store, config, tmp_path / str(n))
        assert [x["step"] for x in read_metrics(run.path / "metrics.jsonl")] == [1, 2, 3, 4]
        assert set(run.snapshot.teachers) == {str(avid.path), source}
