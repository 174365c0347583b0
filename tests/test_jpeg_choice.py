"""Who decodes a run's pictures: measured, told, kept by the checkpoint; and the same batches either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import config, store_in

from avstore import device_jpeg
from avstore.errors import ExtraMissingError, UsageError
from trainers import data, jpeg_choice
from trainers.snapshot import take_snapshot

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DECODE = device_jpeg.make("cpu", CPU)


def rates(cpu: float, other: float) -> Any:
    return lambda decode: cpu if decode is None else other


def never(decode: Any) -> float:
    raise AssertionError("nothing is to be measured")


def test_the_faster_is_taken_and_told() -> None:
    found: dict[str, Any] = {"one": DECODE, "two": "it is not installed"}
    fast = jpeg_choice.choose("auto", CUDA, rates(100, 121), candidates=found)
    assert fast.decoder == "one" and fast.decode is DECODE
    told = "pictures are decoded by one: measured cpu 100 clips/s, one 121 clips/s; two: it is not installed"
    assert fast.why == told
    # the device trains as well: what gains little stays the CPU's
    slow = jpeg_choice.choose("auto", CUDA, rates(100, 119), candidates=found)
    assert slow.decoder == "cpu" and slow.decode is None and "one 119" in slow.why


def test_nothing_is_measured_where_nothing_is_to_choose() -> None:
    assert jpeg_choice.choose("cpu", CUDA, never) == jpeg_choice.Choice("cpu", None, "")
    assert jpeg_choice.choose("auto", CPU, never) == jpeg_choice.Choice("cpu", None, "")
    chosen = jpeg_choice.choose("device", CUDA, never, candidates={"one": DECODE})
    assert (chosen.decoder, chosen.decode) == ("one", DECODE)
    assert "stored raw" in jpeg_choice.choose("auto", CUDA, never, unfit="its frames are stored raw").why


def test_a_device_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(ExtraMissingError, match="no decoder of JPEG") as e:
        jpeg_choice.choose("device", CUDA, never, candidates={"one": "no libnvjpeg"})
    assert "one: no libnvjpeg" in e.value.why
    with pytest.raises(ExtraMissingError, match="on cpu"):
        jpeg_choice.choose("device", CPU, never)
    with pytest.raises(UsageError, match="does not fit"):
        jpeg_choice.choose("device", CUDA, never, unfit="frames of 256 lines")


def test_a_run_goes_on_with_what_it_began() -> None:
    both: dict[str, Any] = {"one": DECODE, "two": DECODE}
    kept = jpeg_choice.choose("auto", CUDA, never, kept="two", candidates=both)
    assert kept.decoder == "two" and "as before" in kept.why
    assert jpeg_choice.choose("auto", CUDA, never, kept="cpu", candidates=both).decoder == "cpu"
    gone = jpeg_choice.choose("auto", CPU, never, kept="two")
    assert gone.decoder == "cpu" and "not equal to the bit" in gone.why
    other = jpeg_choice.choose("auto", CUDA, rates(1, 9), kept="two", candidates={"one": DECODE})
    assert other.decoder == "one" and "where two decoded before" in other.why


def test_a_feed_gives_the_same_batches_by_either(tmp_path: Path) -> None:
    """libjpeg-turbo in the device's place: whole batches, augmented, equal to the bit; `auto` really measures."""
    store = store_in(tmp_path, codec="jpeg")
    cfg = config("in_process=true", "sound_gain=0")
    snapshot = take_snapshot(store, cfg)
    plan = data.Plan(len(snapshot.numbers), cfg)
    calls: list[int] = []

    def decode(jpegs: Any, height: int, width: int) -> torch.Tensor:
        calls.append(len(jpegs))
        return DECODE(jpegs, height, width)

    def batches(asked: str) -> tuple[jpeg_choice.Choice, list[data.Fed]]:
        feed = data.Feed(store, snapshot, cfg.replace(jpeg=asked), CPU, plan, decoders={"stand-in": decode})
        try:
            return feed.jpeg, [next(feed) for _ in range(3)]
        finally:
            feed.close()

    (_, plain), calls[:] = batches("cpu"), []
    choice, coded = batches("device")
    assert choice.decoder == "stand-in" and len(calls) >= 3
    for a, b in zip(plain, coded, strict=True):
        assert a.batch.video is not None and b.batch.video is not None
        assert torch.equal(a.batch.video, b.batch.video) and torch.equal(a.batch.row, b.batch.row)
    calls.clear()
    measured, again = batches("auto")
    assert "measured cpu" in measured.why and "stand-in" in measured.why and len(calls) >= data.MEASURED
    one, two = again[0].batch.video, plain[0].batch.video
    assert one is not None and two is not None and torch.equal(one, two)


def test_what_cannot_go_to_a_device_as_jpeg(tmp_path: Path) -> None:
    needs = data.needs_of(config())
    assert "stored raw" in str(data.why_not_coded(store_in(tmp_path), needs))
    large = store_in(tmp_path / "large", codec="jpeg", height=128, width=176)
    assert "only the CPU's decoder" in str(data.why_not_coded(large, needs))
    assert data.why_not_coded(store_in(tmp_path / "fits", codec="jpeg"), needs) is None
