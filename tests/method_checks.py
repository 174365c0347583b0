"""What the tests of one method after another ask of it: a trace, learning, leaving out, going on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from method_runs import trace, views_batch

from trainers.batch import Batch

CLASSES = ("a", "b", "c")
ROWS = 40
Maker = Callable[[], Any]


def labelled(rows: Any = (3, 1, 4, 15, 9, 2), **options: Any) -> Batch:
    """Clips of 2 frames of 16 x 16 with 16 x 12 of sound; the class follows from the row."""
    made = views_batch(rows, 1, **options)
    return replace(made, labels=made.row % len(CLASSES))


def table(width: int, seed: int = 5) -> torch.Tensor:
    """(64, width): what a teacher says of each row, alike within a class."""
    g = torch.Generator().manual_seed(seed)
    own, shared = torch.randn(64, width, generator=g), torch.randn(len(CLASSES), width, generator=g)
    return own + 2 * shared[torch.arange(64) % len(CLASSES)]


def ten_steps(make: Maker) -> list[float]:
    """Losses of ten SGD steps in float64, two batches by turns."""
    rows = (3, 1, 4, 15, 9, 2), (7, 3, 21, 8, 30, 11)
    return trace(make().double(), [labelled(rows[n % 2], seed=n, dtype=torch.float64) for n in range(10)], rate=0.02)


def learns_a_fixed_batch(make: Maker, batch: Batch, share: float = 0.9) -> dict[str, Any]:
    """Twelve steps of Adam; every trainable parameter has a gradient, the loss ends below `share` of what it was."""
    method = make()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimiser, losses, metrics = torch.optim.Adam(parameters, lr=1e-2), [], {}
    for _ in range(12):
        loss, metrics = method(batch)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters), "DDP waits for every gradient"
        optimiser.step()
        method.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < share * losses[0], losses
    assert not any(torch.as_tensor(x).requires_grad for x in metrics.values())
    return metrics


def leaves_out(make: Maker, whole: Batch, here: Sequence[bool], **missing: Any) -> None:
    """`whole` with `missing` in some fields is, in loss and gradients, the batch of those that are `here`."""
    kept = {k: x[torch.tensor(here)] for k, x in vars(whole).items() if isinstance(x, torch.Tensor)}
    found = []
    for batch in (replace(whole, **missing), replace(whole, **kept)):
        method = make()
        loss, metrics = method(batch)
        loss.backward()
        found.append((loss.detach(), {k: p.grad for k, p in method.named_parameters()}, metrics))
    (loss, grads, metrics), (loss_2, grads_2, metrics_2) = found
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, loss_2)
    for k, grad in grads.items():
        torch.testing.assert_close(grad, grads_2[k], msg=lambda m, k=k: f"{k}: {m}", rtol=1e-4, atol=1e-5)
    for k, x in metrics.items():
        torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(metrics_2[k]), msg=k)


def nothing_is_zero(make: Maker, batch: Batch) -> None:
    """A batch in which no clip counts: loss 0, and a zero gradient for each parameter."""
    method = make()
    loss, metrics = method(batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(torch.isfinite(torch.as_tensor(x)) for x in metrics.values())
    for k, p in method.named_parameters():
        assert p.grad is not None and not p.grad.any(), k


def goes_on(make: Maker) -> None:
    """Weights, momentum and state taken over after three steps: the next five are the same to the bit."""

    def steps(method: Any, optimiser: Any, first: int, last: int) -> list[float]:
        losses = []
        for n in range(first, last):
            loss, _ = method(labelled([(7 * n + k) % ROWS for k in range(6)], seed=n))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            method.after_step()
            losses.append(float(loss.detach()))
        return losses

    def fresh() -> tuple[Any, Any]:
        method = make()
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
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())
