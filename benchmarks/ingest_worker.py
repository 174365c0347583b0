"""A decoding child with a watch in its hand: `avstore.worker` as it is, its stages timed from outside.

Started in the place of `python -m avstore.worker` by `benchmarks.ingest_case`, with a folder as a second argument.
After each answer it writes `<pid>.json` there: CPU seconds and calls by stage. A stage inside another counts once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START, PROBE, DEMUX, PICTURES, RESIZE, ENCODE = "start", "probe", "demux", "decode pictures", "resize", "JPEG encode"
SOUND, RESAMPLE, SPECTROGRAM, HAND_OVER = "decode sound", "mix and resample", "spectrograms", "checksum, hand over"
REST = "rest of the child"
STAGES = (START, PROBE, DEMUX, PICTURES, RESIZE, ENCODE, SOUND, RESAMPLE, SPECTROGRAM, HAND_OVER, REST)


class Watch:
    """CPU time of this thread by stage; a stage that begins inside another one stops that one's watch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.calls: dict[str, int] = dict.fromkeys(STAGES, 0)
        self.inside: list[str] = []
        self.since = time.thread_time()

    def _turn(self) -> None:
        now = time.thread_time()
        if self.inside:
            self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._turn()
        self.inside.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._turn()
            self.inside.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as `name`."""

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            self._turn()
            self.inside.append(name)
            self.calls[name] += 1
            try:
                return function(*args, **named)
            finally:
                self._turn()
                self.inside.pop()

        return call

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces `owner.attribute` by itself, timed."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


class _Packet:
    """A packet whose `decode` is timed."""

    def __init__(self, packet: Any, watch: Watch) -> None:
        self._packet, self._watch = packet, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def decode(self) -> Any:
        with self._watch.stage(SOUND if self._packet.stream.type == "audio" else PICTURES):
            return self._packet.decode()


class _Container:
    """An open file whose packets are timed, on their way and in their decoders."""

    def __init__(self, container: Any, watch: Watch) -> None:
        self._container, self._watch = container, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def demux(self, *streams: Any) -> Iterator[Any]:
        packets = self._container.demux(*streams)
        while True:
            with self._watch.stage(DEMUX):
                packet = next(packets, None)
            if packet is None:
                return
            yield _Packet(packet, self._watch)


def instrument(watch: Watch) -> None:
    """Puts the watch into the functions that the worker calls."""
    from avstore import codecs, decode_pyav, frontends, pictures, sound, spool, worker

    @contextlib.contextmanager
    def open_media(path: Any, opened: Any = decode_pyav.open_media) -> Iterator[_Container]:
        with opened(path) as container:
            yield _Container(container, watch)

    decode_pyav.open_media = open_media
    watch.wrap(worker, "probe_video", PROBE)
    watch.wrap(worker, "decode_video", REST)
    watch.wrap(pictures.Pictures, "_picture", RESIZE)
    watch.wrap(codecs, "encode_jpeg", ENCODE)
    for name in ("push", "finish", "hand_out", "close"):
        watch.wrap(sound.Sound, name, RESAMPLE)
    watch.wrap(frontends, "spectrogram_rows", SPECTROGRAM)
    watch.wrap(codecs, "with_crc", HAND_OVER)
    watch.wrap(spool.Spool, "append", HAND_OVER)


def main() -> None:
    from avstore import worker

    watch, file = Watch(), Path(sys.argv[2]) / f"{os.getpid()}.json"
    sent = watch.timed(HAND_OVER, worker.send)

    def send(*answer: Any) -> None:
        if not file.exists():  # the hello: all that came before it was starting
            watch.seconds[START] = time.process_time()
            instrument(watch)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"seconds": watch.seconds, "calls": watch.calls}))
        part.rename(file)
        sent(*answer)

    worker.send = send  # type: ignore[assignment]  # whatever it takes
    worker.main()


if __name__ == "__main__":
    main()
