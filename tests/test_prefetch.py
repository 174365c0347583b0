"""One batch ahead: order, what waits for what, and the end; on a stand-in for CUDA's streams that writes down calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config, store_in

from avstore.errors import CorruptError
from trainers import trainer
from trainers.loop import train
from trainers.metrics import read_metrics
from trainers.prefetch import Ahead, ahead, device_wait, look_ahead, tensors_of


@dataclass
class Fed:
    number: int
    x: torch.Tensor


class Feed:
    """Batches 0 .. n-1; writes down when each is launched and on which stream."""

    def __init__(self, n: int, log: list[str], now: list[str]) -> None:
        self.left, self.log, self.now, self.closed = list(range(n)), log, now, False
        self.order = "of the feed"

    def __iter__(self) -> Iterator[Fed]:
        return self

    def __next__(self) -> Fed:
        if not self.left:
            raise StopIteration
        k = self.left.pop(0)
        self.log.append(f"launch {k} on {self.now[-1]}")
        return Fed(k, torch.tensor([k]))

    def close(self) -> None:
        self.closed = True


class Cuda:
    """The part of torch.cuda that is used, for two streams by name."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = ["compute"]
        outer = self

        class Stream:
            device = torch.device("cpu")

            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                outer.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: str) -> None:
                outer.log.append(f"{self.name} waits for {event}")
                outer.pending.append(outer.wait)  # the device gets there when it gets there

            def record_event(self, event: Any = None) -> Any:
                if event is None:
                    return f"event {sum('launch' in line for line in outer.log)}"
                event.record()
                return event

            def synchronize(self) -> None:
                outer.log.append(f"cpu waits for {self.name}")

        class Event:
            """With a clock, of the compute stream; passed only once the device got there (`outer.run`)."""

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at: float | None = None
                outer.events.append(self)

            def record(self) -> None:
                self.at = None
                outer.pending.append(self)

            def query(self) -> bool:
                return self.at is not None

            def elapsed_time(self, other: Any) -> float:
                assert self.at is not None and other.at is not None  # CUDA would raise
                return float(other.at - self.at)

            def synchronize(self) -> None:
                outer.log.append("cpu waits for an event")

        self.side, self.compute, self.Event = Stream("side"), Stream("compute"), Event
        self.events: list[Event] = []
        self.pending: list[Any] = []  # of the compute stream: events, and milliseconds of waits
        self.clock, self.wait = 100.0, 0.0

    def run(self, until: int | None = None) -> None:
        """The device works off what was launched, but for the last `until` of it."""
        work = self.pending[: len(self.pending) - (until or 0)]
        del self.pending[: len(work)]
        for one in work:
            if isinstance(one, float):
                self.clock += one
            else:
                one.at = self.clock

    def current_stream(self, device: Any) -> Any:
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.now.append(stream.name)
        yield
        self.now.pop()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def test_one_batch_is_launched_ahead_and_waited_for_by_the_stream() -> None:
    cuda = Cuda()
    feed = Feed(3, cuda.log, cuda.now)
    fed = Ahead(feed, cuda.side, lambda: True, cuda)
    assert next(fed).number == 0
    cuda.log.append("compute 0")
    assert look_ahead(fed) > 0
    look_ahead(fed)  # one ahead, not two
    assert next(fed).number == 1
    assert cuda.log == [
        "side waits for compute",  # once: a copy that waits for the backward pass would not run beside it
        "launch 0 on side",
        "compute waits for event 1",
        "compute 0",
        "launch 1 on side",
        "compute waits for event 2",
    ]
    look_ahead(fed)
    assert [b.number for b in fed] == [2] and fed.early == 2
    look_ahead(fed)
    with pytest.raises(StopIteration):
        next(fed)
    assert fed.order == "of the feed"
    fed.close()
    assert feed.closed and cuda.log[-1] == "cpu waits for side"


def test_the_devices_wait_is_told_when_it_has_ended() -> None:
    cuda = Cuda()
    fed = Ahead(Feed(9, cuda.log, cuda.now), cuda.side, lambda: True, cuda)
    assert device_wait(fed) == {}
    cuda.wait = 3.0
    next(fed)
    assert device_wait(fed) == {}  # under way
    cuda.run(until=1)
    assert device_wait(fed) == {}  # waited, but the event behind it has not passed
    cuda.wait = 5.0
    next(fed)
    cuda.run(until=2)  # the first wait has ended; the second has not
    assert device_wait(fed) == {"device_wait_s": pytest.approx(0.003)}
    assert device_wait(fed) == {}  # told once
    cuda.wait = 0.0
    next(fed)
    cuda.run()
    assert device_wait(fed, parts=4) == {"device_wait_s": pytest.approx(4 * (0.005 + 0.0) / 2)}
    assert not any("cpu waits" in line for line in cuda.log)


def test_events_are_used_again_and_their_number_stays_small() -> None:
    cuda = Cuda()
    fed = Ahead(Feed(60, cuda.log, cuda.now), cuda.side, lambda: True, cuda)
    cuda.wait = 2.0
    for _ in range(50):
        next(fed)
        cuda.run(until=3)  # always one step behind
    assert len(cuda.events) <= 6
    cuda.run()
    assert fed.waited() == (pytest.approx(0.1), 50) and fed.waited() == (0.0, 0)
    assert not any("cpu waits" in line for line in cuda.log)


def test_the_devices_wait_is_on_the_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.wait = 2.0  # milliseconds, for each batch

    class Working(Ahead):
        def __next__(self) -> Any:
            fed = super().__next__()
            cuda.run()
            return fed

    store, cfg = store_in(tmp_path), config("epochs=2", "batch=4", "accumulate=2")
    plain = read_metrics(train("avid", store, cfg, tmp_path / "cpu").run.path / "metrics.jsonl")
    assert plain and not any("device_wait_s" in line for line in plain)
    monkeypatch.setattr(trainer, "ahead", lambda feed, device: Working(feed, cuda.side, lambda: True, cuda))
    lines = read_metrics(train("avid", store, cfg, tmp_path / "run").run.path / "metrics.jsonl")
    assert [x["device_wait_s"] for x in lines] == [pytest.approx(0.004)] * len(plain)  # two batches a step
    assert [x["loss"] for x in lines] == [x["loss"] for x in plain]  # a batch ahead, and the same


def test_a_plain_feed_has_no_wait_of_a_device() -> None:
    assert device_wait(Feed(2, [], ["compute"])) == {}


def test_a_batch_that_is_not_ready_is_not_waited_for() -> None:
    cuda = Cuda()
    fed = Ahead(Feed(3, cuda.log, cuda.now), cuda.side, lambda: False, cuda)
    next(fed)
    look_ahead(fed)
    assert [line for line in cuda.log if "launch" in line] == ["launch 0 on side"]
    assert [b.number for b in fed] == [1, 2] and fed.early == 0


def test_the_error_of_a_coming_batch_waits_until_it_is_asked_for() -> None:
    cuda = Cuda()

    class Breaks(Feed):
        def __next__(self) -> Fed:
            if self.left == [1]:
                raise CorruptError("video 7 is damaged", "the checksum differs")
            return super().__next__()

    fed = Ahead(Breaks(2, cuda.log, cuda.now), cuda.side, lambda: True, cuda)
    assert next(fed).number == 0
    look_ahead(fed)  # this step is not to blame
    for _ in range(2):
        with pytest.raises(CorruptError, match="video 7"):
            next(fed)


def test_looking_ahead_of_a_plain_feed_does_nothing() -> None:
    feed = Feed(2, [], ["compute"])
    assert look_ahead(feed) == 0 and feed.left == [0, 1]


def test_an_empty_feed_ends() -> None:
    cuda = Cuda()
    assert list(Ahead(Feed(0, cuda.log, cuda.now), cuda.side, lambda: True, cuda)) == []


def test_on_a_cpu_the_feed_comes_back() -> None:
    feed = Feed(1, [], ["compute"])
    assert ahead(feed, torch.device("cpu")) is feed


def test_tensors_of_anything() -> None:
    one = torch.ones(1)
    assert len(list(tensors_of({"a": [one, (one, None)], "b": Fed(1, one), "c": "x"}))) == 3
