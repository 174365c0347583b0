"""Optimisers: LARC by hand and off, constant rates of a method's own beside the schedule, what cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from avstore.errors import UsageError
from trainers import checkpoint
from trainers.config import LATER, RunConfig, TrainConfig, resolve
from trainers.crisscross import PRESETS, CrissCross
from trainers.optimiser import larc_, learning_rate_at, make_optimiser

SGD = TrainConfig(optimiser="sgd", learning_rate=0.5, momentum=0.0, weight_decay=0.1)


class Two(nn.Module):
    """A trunk, and a head with a rate of its own."""

    def __init__(self, rate: float | None = None) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.rate = rate

    def own_rates(self) -> dict[str, float]:
        return {} if self.rate is None else {"head.": self.rate}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)).square().sum()


def test_larc_by_hand() -> None:
    """|w| = 5, |g| = 10, decay 0.1: r = 0.02 * 5 / (10 + 0.5) = 0.0095; of a rate of 0.5 that is 0.019."""
    w, g = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([6.0, 8.0], dtype=torch.float64)
    scaled = g.clone()
    larc_(w, scaled, 0.5, 0.02, 0.1)
    r = 0.02 * 5 / (10 + 0.1 * 5 + 1e-8)
    torch.testing.assert_close(scaled, r / 0.5 * torch.tensor([6.3, 8.4], dtype=torch.float64), rtol=0, atol=1e-15)
    clipped = g.clone()
    larc_(w, clipped, 1e-3, 0.02, 0.1)
    assert clipped.tolist() == pytest.approx([6.3, 8.4]), "never faster than the rate itself: g + decay w"


@pytest.mark.parametrize(("w", "g"), [([0.0, 0.0], [6.0, 8.0]), ([3.0, 4.0], [0.0, 0.0])])
def test_larc_leaves_alone_what_has_no_norm(w: list[float], g: list[float]) -> None:
    gradient = torch.tensor(g)
    larc_(torch.tensor(w), gradient, 0.5, 0.02, 0.1)
    assert gradient.tolist() == g


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(1e-6, 1.0), st.floats(1e-4, 1.0), st.floats(0, 0.5), st.floats(1e-3, 1e3))
def test_a_tensor_moves_at_most_by_trust_and_at_most_at_the_rate(
    seed: int, rate: float, trust: float, decay: float, size: float
) -> None:
    """What LARC is for: with plain SGD no tensor moves further than trust |w| (the decayed gradient's norm is at most
    |g| + decay |w|), nor further than without it."""
    w, g = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g *= size
    whole, scaled = g + decay * w, g.clone()
    larc_(w, scaled, rate, trust, decay)
    moved = float(rate * scaled.norm())
    assert moved <= trust * float(w.norm()) * (1 + 1e-9) and moved <= rate * float(whole.norm()) * (1 + 1e-9)
    assert float(torch.cosine_similarity(scaled, whole, dim=0)) == pytest.approx(1)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_larc_before_an_optimiser_is_the_formula_before_it(optimiser: str) -> None:
    """Three steps of make_optimiser against larc_ on the gradients and the bare optimiser without weight decay."""
    config = replace(SGD, optimiser=optimiser, larc=0.01)
    ours, theirs = Two(), Two()
    theirs.load_state_dict(ours.state_dict())
    made = make_optimiser(ours, config)
    bare = (torch.optim.SGD if optimiser == "sgd" else torch.optim.Adam)(theirs.parameters(), 0.5)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for rate in (0.5, 0.25, 0.125):
        for net, opt in ((ours, made), (theirs, bare)):
            for group in opt.param_groups:
                group["lr"] = rate
            opt.zero_grad()
            net(x).backward()
        for p in theirs.parameters():
            assert p.grad is not None
            larc_(p.detach(), p.grad, rate, 0.01, 0.1)
        made.step()
        bare.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_off_it_is_the_bare_optimiser_to_the_bit() -> None:
    ours, theirs = Two(), Two()
    theirs.load_state_dict(ours.state_dict())
    made = make_optimiser(ours, replace(SGD, optimiser="adam"))
    bare = torch.optim.Adam(theirs.parameters(), 0.5, weight_decay=0.1, fused=True)
    assert len(made.param_groups) == 1 and not made._optimizer_step_pre_hooks
    for net, opt in ((ours, made), (theirs, bare)):
        for seed in range(3):
            opt.zero_grad()
            net(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).backward()
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_rate_of_its_own_stays_when_the_schedule_moves() -> None:
    net = Two(rate=0.25)
    made = make_optimiser(net, replace(SGD, weight_decay=0.0))
    for rate in (0.5, 0.0):
        for group in made.param_groups:  # as the loop does
            group["lr"] = rate
        before = [p.detach().clone() for p in net.parameters()]
        made.zero_grad()
        net(torch.ones(1, 3)).backward()
        made.step()
        for p, old, own in zip(net.parameters(), before, (rate, 0.25), strict=True):
            torch.testing.assert_close(p.detach(), old - own * p.grad)


def test_a_rate_for_nothing_is_refused() -> None:
    class Misspelt(Two):
        def own_rates(self) -> dict[str, float]:
            return {"heads.": 0.1}

    with pytest.raises(UsageError, match="heads"):
        make_optimiser(Misspelt(), SGD)


def test_the_cosine_ends_where_it_is_told() -> None:
    config = TrainConfig(learning_rate=2e-4, final_rate=1e-4, schedule="cosine", warmup_steps=3)
    got = [learning_rate_at(s, 11, 5, config) for s in (0, 3, 7, 11)]
    assert got == pytest.approx([0.5e-4, 2e-4, 1.5e-4, 1e-4])
    plain = TrainConfig(learning_rate=0.3, schedule="cosine")
    assert learning_rate_at(4, 11, 5, plain) == 0.3 * 0.5 * (1 + math.cos(math.pi * 4 / 11))


@pytest.mark.parametrize(
    ("values", "word"),
    [({"larc": -1.0}, "larc"), ({"larc": 1e-3, "optimiser": "adamw"}, "adamw"),
     ({"final_rate": 1.0, "schedule": "cosine"}, "final_rate"), ({"sound_crop": (0.6,)}, "sound_crop"),
     ({"sound_crop": (1.5, 0.6)}, "sound_crop")],
)  # fmt: skip
def test_settings_that_do_not_hold(values: dict, word: str) -> None:
    with pytest.raises(UsageError) as e:
        TrainConfig(**values)
    assert word in str(e.value.why)


def test_the_ablations_of_avid_step_down_as_their_code_did() -> None:
    file = Path(__file__).resolve().parents[1] / "docs" / "papers" / "s4-tab1.toml"
    loop = resolve("avid", toml_file=file).loop
    rates = [learning_rate_at(int(epoch * 1562.5), 159375, 1562.5, loop) for epoch in (0, 74.9, 75.1, 101)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


# ---- CrissCross' ---------------------------------------------------------------------------------------------------


def small(**changes: object) -> CrissCross:
    return CrissCross(replace(PRESETS["tiny"], width=4, hidden=8, dim=8, bottleneck=4, size=16, **changes), 4)


def test_crisscross_paper_is_its_code_s_optimiser() -> None:
    loop = resolve("crisscross").loop
    assert (loop.optimiser, loop.larc, loop.learning_rate, loop.final_rate) == ("adam", 1e-3, 2e-4, 1e-4)
    assert (loop.weight_decay, loop.schedule, loop.sound_crop) == (1e-4, "cosine", (0.6, 1.5))
    made = make_optimiser(small(predictor_rate=2e-3), loop)
    assert [len(g["params"]) for g in made.param_groups][1] == 2 * 5 and made.param_groups[1]["own_rate"] == 2e-3
    total = sum(len(g["params"]) for g in made.param_groups)
    assert total == len(list(small().parameters())) and len(make_optimiser(small(), loop).param_groups) == 1
    assert resolve("crisscross", sets=["sound_crop=", "larc=0", "predictor_rate=0"]).loop.sound_crop == ()


def test_state_goes_through_a_checkpoint_whatever_the_groups(tmp_path: Path) -> None:
    """Groups reorder parameters; the checkpoint goes by name."""
    loop = resolve("crisscross").loop

    def trained(steps: range, module: CrissCross, made: torch.optim.Optimizer) -> None:
        for step in steps:
            g = torch.Generator().manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            made.step()

    whole = small(predictor_rate=2e-3)
    adam = make_optimiser(whole, loop)
    trained(range(4), whole, adam)
    first = small(predictor_rate=2e-3)
    before = make_optimiser(first, loop)
    trained(range(2), first, before)
    saved = checkpoint.save(tmp_path, 2, first, before, {}, {"total_steps": 4})
    second = small(predictor_rate=2e-3, seed=5)
    after = make_optimiser(second, loop)
    checkpoint.load(saved, second, after)
    trained(range(2, 4), second, after)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_run_of_before_has_no_larc_whatever_the_paper_s_preset_says_now() -> None:
    now = resolve("crisscross", sets=["epochs=3"])
    values = {k: v for k, v in now.to_json()["values"].items() if k not in LATER}
    before = RunConfig.from_json(now.to_json() | {"values": values})
    loop = before.loop
    assert (loop.larc, loop.final_rate, loop.sound_crop, before.method.predictor_rate) == (0.0, 0.0, (), 0.0)
    assert before.loop.epochs == 3 and before.digest != now.digest
    assert RunConfig.from_json(now.to_json()).digest == now.digest


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_gradient_that_comes_after_the_others(nesterov: bool) -> None:
    """A student that waits while its teacher learns: torch's fused SGD refuses it, ours goes on as the unfused does."""
    ours, theirs = Two(), Two()
    theirs.load_state_dict(ours.state_dict())
    config = replace(SGD, learning_rate=0.01, momentum=0.9, nesterov=nesterov)
    made = make_optimiser(ours, config)
    plain = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, weight_decay=0.1, nesterov=nesterov, fused=False)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for n in range(4):
        for net, optimiser in ((ours, made), (theirs, plain)):
            optimiser.zero_grad()
            (net.trunk(x).square().sum() if n < 2 else net(x)).backward()
            optimiser.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
