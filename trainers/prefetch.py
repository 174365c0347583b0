"""One batch ahead, on a stream of its own: copies and augmentation of the next batch run beside this step's compute.

    feed = ahead(Feed(...), device)
    for ...:
        fed = next(feed)
        ...                     # forward and backward are launched
        look_ahead(feed)        # the next batch: launched while the device computes, not before it may

The reader's slots are pinned, so that a copy does not block; but on the stream of the compute it would still wait for
it. Here the next batch is launched on a second stream, and the compute stream waits for an event, not the CPU. Only a
batch that the reader has ready is launched early: a slow reader never keeps the compute from being launched. On a CPU
the feed comes back as it is. Batches, their order and their bits are those of the feed.

The host never sees that wait: `device_wait` tells it, from events with clocks on the compute stream around it. They are
read once they have passed, so nothing waits for them.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from avstore.errors import AvstoreError


def ahead(feed: Any, device: torch.device, ready: Callable[[], bool] | None = None) -> Any:
    """`feed` (an iterator of batches with a `close`), one batch ahead where `device` is a CUDA device.

    ready: whether the next batch would come without waiting; default the feed's loader's answer, or always."""
    if device.type != "cuda":
        return feed
    if ready is None:
        loader = getattr(feed, "loader", None)
        ready = loader.ready if loader is not None else lambda: True
    return Ahead(feed, torch.cuda.Stream(device), ready)


def look_ahead(feed: Any) -> float:
    """Launches the next batch of an `Ahead` if the reader has it; the seconds that took. Any other feed: nothing."""
    if not isinstance(feed, Ahead):
        return 0.0
    began = time.perf_counter()
    feed.look_ahead()
    return time.perf_counter() - began


def device_wait(feed: Any, parts: int = 1) -> dict[str, float]:
    """{'device_wait_s': seconds a step that the device could not compute since its batch was not copied and augmented
    yet}: the mean over the waits that have ended since the last call. {} for a feed that is no `Ahead` (a CPU's), and
    while none has ended. parts: batches of a step. Waits for nothing.

    It is not in `data_wait_s` (the host's wait for the reader, which is over when this one begins), but within
    `compute_s`, at whose end the host waits for the step's loss."""
    if not isinstance(feed, Ahead):
        return {}
    seconds, batches = feed.waited()
    return {"device_wait_s": parts * seconds / batches} if batches else {}


class Ahead(Iterator[Any]):
    """See the top of this file. `stream`: a CUDA stream, or anything with its methods (tests)."""

    def __init__(self, feed: Any, stream: Any, ready: Callable[[], bool], cuda: Any = torch.cuda) -> None:
        self.feed, self.stream, self.ready, self.cuda = feed, stream, ready, cuda
        # what the feed's kernels read (means, labels) was written on the compute stream; once, for it stays as it is:
        # waiting at each batch would put the copy behind the backward pass that it is to run beside
        self.stream.wait_stream(self.cuda.current_stream(self.stream.device))
        self._next: tuple[Any, Any] | None = None
        self._failed: AvstoreError | None = None
        self._ended = False
        self.early = 0  # batches that were launched before they were asked for
        self._around: deque[tuple[Any, Any]] = deque()  # events before and after each wait, oldest first
        self._spare: list[tuple[Any, Any]] = []
        self._seconds, self._batches = 0.0, 0  # of waits that have ended and were not told yet

    def __next__(self) -> Any:
        if self._next is None and self._failed is None and not self._ended:
            self._launch()
        if self._failed is not None:
            raise self._failed
        if self._next is None:
            raise StopIteration
        (batch, done), self._next = self._next, None
        current = self.cuda.current_stream(self.stream.device)
        self._read()
        before, after = self._spare.pop() if self._spare else (self._clock(), self._clock())
        current.record_event(before)
        current.wait_event(done)
        current.record_event(after)
        self._around.append((before, after))
        for tensor in tensors_of(batch):
            tensor.record_stream(current)  # or its memory would be given out again while this step still reads it
        return batch

    def look_ahead(self) -> None:
        """Launches the batch after the one that was given out, if that needs no waiting. Its errors come when it is
        asked for: the step under way is none of its business."""
        if self._next is None and self._failed is None and not self._ended and self.ready():
            self._launch()
            self.early += self._next is not None

    def waited(self) -> tuple[float, int]:
        """(seconds, batches): how long the compute stream waited for batches, in sum over the waits that have ended
        since the last call. Those under way are told by a later one."""
        self._read()
        told, self._seconds, self._batches = (self._seconds, self._batches), 0.0, 0
        return told

    def _read(self) -> None:
        """Takes down the waits that have ended, without waiting: a stream's events pass in order."""
        while self._around and self._around[0][1].query():
            before, after = self._around.popleft()
            self._seconds += before.elapsed_time(after) / 1000  # milliseconds
            self._batches += 1
            self._spare.append((before, after))  # passed: they may be recorded again

    def _clock(self) -> Any:
        return self.cuda.Event(enable_timing=True)

    def _launch(self) -> None:
        with self.cuda.stream(self.stream):
            try:
                batch = next(self.feed)
            except StopIteration:
                self._ended = True
                return
            except AvstoreError as e:
                self._failed = e
                return
            self._next = batch, self.stream.record_event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def close(self) -> None:
        """Waits for what was launched, and closes the feed."""
        self.stream.synchronize()
        self._next = None
        self.feed.close()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a batch: a tensor, a dataclass, or a dict, list or tuple of them, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)
