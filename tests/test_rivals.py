"""The rivals, what all of them must do alike: start from a seed, learn, leave out what is missing, go on to the bit."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import goes_on_to_the_bit, trace, two_equal_one
from rival_cases import CLASSES, NAMES, OWN, ROWS, batch_for, make, ready, small
from tiny_run import store_in
from tiny_store import Tiny, default_spec, make_store

import avstore
from avstore.errors import ConflictError, UsageError
from trainers.batch import Batch
from trainers.config import resolve
from trainers.fit import needs_of
from trainers.methods import METHODS
from trainers.metrics import read_metrics
from trainers.run import Run
from trainers.settings import comments
from trainers.supervised import Supervised

# Losses of ten SGD steps in float64: two batches by turns, a new epoch after four (for the curricula and clusters).
# Equal to the bit twice on one machine; 1e-4 across machines.
TRACES: dict[str, list[float]] = {
    "simclr": [8.135804, 4.16462, 5.283732, 5.897009, 2.885839, 3.202842, 5.015078, 2.2555, 1.699361, 1.309931],
    "moco": [4.334843, 3.328429, 3.346647, 2.946543, 2.976156, 2.731027, 2.877424, 2.880554, 2.941969, 2.26532],
    "byol": [3.801773, 3.753847, 3.562114, 3.625218, 3.302103, 3.400079, 3.228934, 3.115088, 3.60201, 3.34265],
    "simsiam": [
        -0.013067,
        -0.042721,
        -0.008922,
        0.059096,
        -0.044524,
        -0.122411,
        0.019972,
        0.062713,
        -0.016583,
        0.087933,
    ],
    "barlow-twins": [
        9.715318,
        5.752828,
        12.855365,
        10.835622,
        4.733624,
        14.285628,
        6.54245,
        5.499037,
        12.045216,
        3.05849,
    ],
    "iic": [7.519555, 9.270099, 7.966374, 8.208298, 7.974722, 5.709079, 5.627673, 4.566715, 5.01704, 5.576746],
    "l3": [0.689447, 0.696308, 0.696437, 0.700026, 0.698825, 0.694953, 0.693795, 0.702592, 0.69741, 0.702489],
    "avts": [1.110543, 1.225641, 0.850239, 0.916295, 1.050829, 1.069314, 1.059331, 0.775581, 1.125102, 0.91767],
    "xdc": [1.185847, 1.041705, 1.043956, 1.100934, 1.310172, 1.186214, 1.080778, 1.166697, 1.234381, 1.05569],
    "cm-acc": [19.811435, 7.067802, 7.323286, 9.790819, 6.544491, 5.380039, 4.462518, 3.097776, 6.276639, 5.387148],
    "supervised": [1.140861, 1.196468, 1.046531, 1.170003, 1.066269, 1.108246, 1.030561, 1.108902, 1.021298, 1.07491],
}


class Labelled(Supervised):
    """With labels that follow from the row: `two_equal_one` makes batches without."""

    def step(self, batch: Batch) -> Any:
        return super().step(replace(batch, labels=batch.row % len(CLASSES)))


# Epochs of two steps: rounding of 1e-15 in the weights grows tenfold a step in the methods that normalise over a batch,
# whatever the number of processes (measured here: BYOL's first gradient agrees to 7e-13, its fifth to 8e-9).
EPOCHS = {name: 1 for name in ("simclr", "byol", "simsiam", "barlow-twins")} | {"l3": 3, "xdc": 3, "supervised": 3}


def cases() -> dict[str, tuple[Any, int, int]]:
    """{name: (method, views, epochs)} for `two_equal_one`, as well conditioned as they can be."""
    smooth = {"temperature": 0.5, "head_batch_norm": False}
    calm: dict[str, dict[str, Any]] = {name: smooth for name in ("simclr", "moco", "iic", "cm-acc")}
    calm |= {"avts": {"head_batch_norm": False, "epochs": 2}, "barlow-twins": {"loss_scale": 0.01}}
    made = {name: make(name, **calm.get(name, {})) for name in NAMES if name != "supervised"}
    made["supervised"] = Labelled(small("supervised"), ROWS, CLASSES)
    return {name: (still_frozen(m), METHODS[name].views, EPOCHS.get(name, 2)) for name, m in made.items()}


def still_frozen(method: Any) -> Any:
    """Its copies are frozen again once `two_equal_one` has put other batch normalisations into them."""
    names, honest = frozen(method), method.double

    def double() -> Any:
        for name, parameter in honest().named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        return method

    method.double = double
    return method


def frozen(method: Any) -> set[str]:
    return {name for name, p in method.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_a_function_of_the_seed_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = make(name), make(name), make(name, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (m.state_dict() | m.method_state() for m in (one, two, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys() == c.keys()
    assert not torch.equal(a["video.conv1.0.weight"], c["video.conv1.0.weight"])
    copies = {k.split(".")[0] for k in frozen(one)}
    momentum = {"moco": "key", "cm-acc": "key", "byol": "target"}.get(name)
    parts = ("video", "video_head", "audio", "audio_head")
    assert copies == ({f"{momentum}_{part}" for part in parts} if momentum else set())
    for part in copies:  # equal weights at the start
        mine, theirs = one.get_submodule(part), one.get_submodule(part.split("_", 1)[1])
        assert all(torch.equal(x, y) for x, y in zip(mine.parameters(), theirs.parameters(), strict=True))


def ten(name: str) -> list[float]:
    method = ready(name, make(name, epochs=2)).double()
    method.start_epoch(1)
    batches = []
    for n in range(10):
        made = batch_for(name, (3, 1, 4, 15, 9, 2) if n % 2 else (7, 3, 21, 8, 30, 11), seed=n, dtype=torch.float64)
        batches.append(replace(made, epoch=2 if n >= 4 else 1))
    return trace(method, batches, rate=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps(name: str) -> None:
    first = ten(name)
    assert first == ten(name)
    assert first == pytest.approx(TRACES[name], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_fixed_batch(name: str) -> None:
    method = ready(name, make(name))
    batch = replace(batch_for(name), epoch=1 if name == "xdc" else 0)
    parameters = [p for p in method.parameters() if p.requires_grad]
    still = {k: p.clone() for k, p in method.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(12):
        loss, metrics = method(batch)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters), "DDP waits for every gradient"
        optimiser.step()
        method.after_step()
        losses.append(float(loss.detach()))
    floor = -1.0 if name == "simsiam" else 0.0
    assert losses[-1] - floor < 0.9 * (losses[0] - floor), losses
    assert not any(torch.as_tensor(x).requires_grad for x in metrics.values())
    if name != "supervised":
        assert float(metrics["feature_std_video"]) > 0.2 and float(metrics["feature_std_audio"]) > 0.2
    for key, x in still.items():
        assert not torch.equal(method.get_parameter(key), x), f"{key} did not follow"


def masked(name: str, batch: Any, here: list[bool]) -> Any:
    """Without the sound of some clips, with nonsense in its place."""
    has = torch.tensor(here)
    shape = (-1,) + (1,) * (batch.audio.dim() - 1)
    return replace(batch, has_sound=has, audio=torch.where(has.view(shape), batch.audio, torch.nan))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_without_sound_contributes_nothing(name: str) -> None:
    """Loss and gradients are those of the batch without it, whatever stands in its place."""
    here = [True, True, False, True, True, False]
    whole = replace(batch_for(name), epoch=1 if name == "xdc" else 0)
    kept = {k: x[torch.tensor(here)] for k, x in vars(whole).items() if isinstance(x, torch.Tensor)}
    found = []
    for batch in (masked(name, whole, here), replace(whole, **kept)):
        method = ready(name, make(name))
        loss, metrics = method(batch)
        loss.backward()
        grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
        method.after_step()
        found.append((loss.detach(), grads, {**method.method_state(), **metrics}))
    (loss, grads, state), (loss_2, grads_2, state_2) = found
    torch.testing.assert_close(loss, loss_2)
    assert torch.isfinite(loss) and grads.keys() == grads_2.keys()
    for k, grad in grads.items():
        torch.testing.assert_close(grad, grads_2[k], msg=k)
    for k, x in state.items():
        torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(state_2[k]), msg=k)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_sound_is_zero(name: str) -> None:
    method = ready(name, make(name))
    batch = replace(batch_for(name), epoch=1 if name == "xdc" else 0)
    if name == "iic":
        method(batch)  # Z is known; without it there is nothing to freeze, and the bank's `estimate_partition` says so
        method.after_step()
    before = {k: x.clone() for k, x in method.method_state().items()}
    loss, _ = method(masked(name, batch, [False] * 6))
    loss.backward()
    assert float(loss.detach()) == 0
    for k, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and not p.grad.any(), k
    method.after_step()
    kept = {k for k, x in method.method_state().items() if k in before and torch.equal(x, before[k])}
    assert before.keys() - kept <= {"updates"}


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_to_the_bit(name: str) -> None:
    """Weights, momentum and state taken over after three steps: the next three are the same."""

    def steps(method: Any, optimiser: Any, first: int, last: int) -> list[float]:
        losses = []
        for n in range(first, last):
            epoch = n // 2
            if n % 2 == 0 or n == first:
                method.start_epoch(epoch)
            batch = replace(batch_for(name, [(7 * n + k) % ROWS for k in range(6)], seed=n), epoch=epoch)
            loss, _ = method(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            method.after_step()
            losses.append(float(loss.detach()))
        return losses

    def fresh() -> tuple[Any, Any]:
        method = make(name, **({"clusters": 2} if name == "xdc" else {}))
        return method, torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9)

    one, optimiser = fresh()
    steps(one, optimiser, 0, 3)
    saved = [{k: x.clone() for k, x in s.items()} for s in (one.state_dict(), one.method_state())]
    momentum = copy.deepcopy(optimiser.state_dict())
    two, other = fresh()
    two.load_state_dict(saved[0])
    two.load_method_state(saved[1])
    other.load_state_dict(momentum)
    assert steps(one, optimiser, 3, 8) == steps(two, other, 3, 8)
    a, b = one.state_dict() | one.method_state(), two.state_dict() | two.method_state()
    assert a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_selection_is_refused(name: str) -> None:
    state = make(name, rows=80).method_state()
    if not state:
        with pytest.raises(ConflictError, match="keeps no state"):
            make(name).load_method_state({"bank.memory": torch.zeros(2)})
    elif name != "byol":  # its state is a counter
        with pytest.raises(ConflictError):
            make(name).load_method_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_embeddings(name: str) -> None:
    method = make(name).eval()
    batch = batch_for(name)
    video, audio = (x[:, 0] if METHODS[name].views == 2 else x for x in (batch.video, batch.audio))
    with torch.no_grad():
        both, sight, sound = method.embed(video, audio), method.embed(video), method.embed(audio=audio)
        assert set(both) == {"video", "audio", "video-trunk", "audio-trunk"}
        assert set(sight) == {"video", "video-trunk"} and set(sound) == {"audio", "audio-trunk"}
        for key, x in both.items():
            assert len(x) == 6 and torch.isfinite(x).all() and torch.equal(x, (sight | sound)[key])
            if not key.endswith("trunk"):
                torch.testing.assert_close(x.norm(dim=1), torch.ones(6))
        assert torch.equal(method.embed(video[:2])["video-trunk"], method.embed(video[:2])["video-trunk"])
    with pytest.raises(UsageError, match="nothing to embed"):
        make("simclr").embed()


@pytest.mark.parametrize("name", NAMES)
def test_settings_say_where_they_come_from_and_needs_agree(name: str) -> None:
    config = METHODS[name].load().config
    told = comments(config)
    assert all(told[f.name].startswith("[") for f in fields(config)), "a comment begins with where the value is from"
    for preset in ("paper", "tiny"):
        resolved = resolve(name, preset=preset)
        needs = needs_of(resolved)
        assert needs.picture and needs.sound and needs.labels == (name == "supervised")
        assert resolved.loop.batch == resolved.method.batch and resolved.loop.optimiser == resolved.method.optimiser
    tiny = resolve(name, preset="tiny", sets=["width=4"])
    more = (CLASSES,) if METHODS[name].labels else ()
    assert METHODS[name].load().make(tiny.method, ROWS, *more).needs == needs_of(tiny)
    with pytest.raises(UsageError, match="epoch") as e:
        resolve(name, sets=["epoch=3"])
    assert "epochs" in str(e.value.why) + str(e.value.what)


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_do_not_hold_are_named_together(name: str) -> None:
    with pytest.raises(UsageError) as e:
        small(name, width=0, video_net="vcop-r3f", learning_rate=-1.0)
    assert all(word in str(e.value.why) for word in ("width 0", "vcop-r3d", "learning_rate -1.0"))


WRONG = {
    "simclr": ("temperature", 0.0), "moco": ("key_momentum", 1.0), "byol": ("target_momentum", 1.5),
    "simsiam": ("predictor_hidden", 0), "barlow-twins": ("loss_scale", 0.0), "iic": ("intra", "reverse"),
    "l3": ("hidden", 0), "avts": ("hard_share", 1.5), "xdc": ("clusters", 1), "cm-acc": ("sampling", "greedy"),
    "supervised": ("modality", "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_setting_of_its_own(name: str) -> None:
    key, value = WRONG[name]
    with pytest.raises(UsageError, match="does not hold") as e:
        small(name, **{key: value})
    assert key in str(e.value.why)


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = (
    "width=4", "frames=4", "fps=8", "size=32", "seconds=0.5", "batch=5", "epochs=3", "draws=1", "statistics_clips=16",
    "in_process=true", "threads=1", "precision=fp32", "log_every=1",
)  # fmt: skip


def run_config(name: str, *sets: str) -> Any:
    own = [f"{k}={v}" for k, v in OWN[name].items()]
    return resolve(name, preset="tiny", sets=[*RUN, *own, *sets])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_stops_and_goes_on(name: str, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    run = goes_on_to_the_bit(name, store, run_config(name), tmp_path)
    lines = read_metrics(run.path / "metrics.jsonl")
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and run.finished
    loaded = Run(run.path).load()
    assert type(loaded) is type(make(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "iic", "supervised"])
def test_the_papers_networks_hear_the_whole_sound(name: str, tmp_path: Path) -> None:
    """S1's set-up at a width of four: R3D for both, the sound as an image; videos of two lengths in one batch."""
    made = [Tiny(2.0 if i % 2 else 1.25, key=f"{i:03d}.mp4", label="ab"[i % 2]) for i in range(8)]
    store = avstore.open(make_store(tmp_path / "tiny.zarr", made, default_spec(sample_rate=24000)))
    sets = ("video_net=vcop-r3d", "audio_net=vcop-r3d", "front_end=avcl-mel256", "seconds=2", "batch=4")
    run = goes_on_to_the_bit(name, store, run_config(name, *sets), tmp_path)
    assert read_metrics(run.path / "metrics.jsonl")[-1]["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["v", "a"])
def test_supervision_of_one_modality_asks_for_no_other(modality: str, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    run = goes_on_to_the_bit("supervised", store, run_config("supervised", f"modality={modality}"), tmp_path)
    needs = needs_of(run.config)
    assert (needs.picture, needs.sound) == (modality == "v", modality == "a")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    found = two_equal_one("test_rivals", tmp_path)
    for name in NAMES:
        steps = 2 * EPOCHS.get(name, 2)
        assert any(k.startswith(f"{name}.grad.") for k in found) and f"{name}.loss.{steps - 1}" in found
    assert int(found["cm-acc.updates"]) == 4 and float(found["avts.hard.3"]) > 0 and int(found["xdc.round"]) == 2
