"""A decoding child: probes and decodes one video after another, under limits, and hands each back as one message.

Started as `python -m avstore.worker` by `avstore.children`; never imported by it. Jobs come as JSON on stdin; answers
go out on what was stdout (stdout itself is turned away, since libraries print). The child has no say in what is
committed: whatever it does, crash included, costs the parent one video at most.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import queue
import resource
import signal
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avstore.durable import MACHINE_ERRNOS
from avstore.errors import MachineError
from avstore.spec import Spec
from avstore.spool import HEADER, Spool, SpoolFull

HEADROOM = 4 * 2**30  # bytes of address space above what the imported libraries take


class Collector:
    """The sink of a decoder: encodes frames, cuts the sound into seconds, keeps an index of the payloads.

    frames: [offset, length, repeat] per picture; waveform, spectrograms: [offset, length] per second.
    """

    def __init__(self, spec: Spec, spool: Spool, slot: int, sound_on: str = "cpu") -> None:
        """sound_on: the device of torch on which spectrograms are computed."""
        from avstore.codecs import encode_jpeg, with_crc

        self.spec, self.spool, self.slot, self.sound_on = spec, spool, slot, sound_on
        self.encode_jpeg, self.with_crc = encode_jpeg, with_crc
        self.frames: list[list[int]] = []
        self.source: list[list[int]] = []
        self.rows = 0
        # Pages are touched as sound arrives; the slot bounds it. Whole, because spectrograms need the whole video.
        self.waveform = np.zeros(slot * spec.sample_rate if slot else 0, np.int16)
        self.samples = 0

    def frame(self, picture: np.ndarray, source: int, repeat: int) -> None:
        """A picture, uint8 (H, W, 3), for the next `repeat` rows."""
        spec = self.spec
        if not spec.picture:
            return
        if picture.shape != (spec.height, spec.width, 3) or picture.dtype != np.uint8 or repeat < 1:
            raise ValueError(f"the decoder gave {picture.dtype} {picture.shape}, {repeat} times")
        if self.rows + repeat > self.slot * spec.fps:
            raise ValueError(f"the decoder gave more than the {self.slot * spec.fps} rows of the slot")
        picture = np.ascontiguousarray(picture)
        self._keep(self.encode_jpeg(picture, spec.quality) if spec.codec == "jpeg" else picture, source, repeat)

    def encoded(self, jpeg: bytes, source: int, repeat: int) -> None:
        """As `frame`, for a picture that the decoder's device has encoded already."""
        if self.spec.codec != "jpeg" or repeat < 1 or self.rows + repeat > self.slot * self.spec.fps:
            raise ValueError(f"the decoder gave a JPEG, {repeat} times, after {self.rows} rows")
        self._keep(jpeg, source, repeat)

    def _keep(self, body: bytes | np.ndarray, source: int, repeat: int) -> None:
        payload = self.with_crc(body)
        self.frames.append([self.spool.append(payload), len(payload), repeat])
        self.source.append([int(source), repeat])
        self.rows += repeat

    def sound(self, samples: np.ndarray) -> None:
        """The next samples, int16 (n,)."""
        end = self.samples + len(samples)
        if end > len(self.waveform):
            raise ValueError(f"the decoder gave more than the {len(self.waveform)} samples of the slot")
        self.waveform[self.samples : end] = samples
        self.samples = end

    def seconds(self, rows: np.ndarray, rate: int, empty: Any) -> list[list[int]]:
        """Spools `rows` as chunks of `rate` rows, the last one filled up with `empty`."""
        index = []
        for start in range(0, len(rows), rate):
            chunk = rows[start : start + rate]
            if len(chunk) < rate:
                rest = np.full((rate - len(chunk), *rows.shape[1:]), empty, rows.dtype)
                chunk = np.concatenate([chunk, rest])
            payload = self.with_crc(np.ascontiguousarray(chunk, rows.dtype.newbyteorder("<")).tobytes())
            index.append([self.spool.append(payload), len(payload)])
        return index

    def finish(self, has_sound: bool, samples: int) -> dict[str, Any]:
        """The index of all payloads. `samples`: the video's length in samples; sound that ends before is silence."""
        index: dict[str, Any] = {"frames": self.frames, "source": self.source, "waveform": [], "spectrograms": {}}
        if has_sound:
            if not 0 < samples <= len(self.waveform):
                raise ValueError(f"{samples} samples of sound in a slot of {len(self.waveform)}")
            waveform = self.waveform[:samples]
            index["waveform"] = self.seconds(waveform, self.spec.sample_rate, 0)
            for name in self.spec.front_ends:
                from avstore.frontends import FRONT_ENDS  # torch, only where there is sound

                rate = FRONT_ENDS[name].rows_per_second
                index["spectrograms"][name] = self.seconds(self.spectrogram(waveform, name), rate, np.nan)
        return index

    def spectrogram(self, waveform: np.ndarray, name: str) -> np.ndarray:
        from avstore.frontends import spectrogram_rows

        try:
            return spectrogram_rows(waveform, name, self.spec.sample_rate, self.sound_on)
        except RuntimeError as e:  # of CUDA: the video begins again, whole, on the CPU
            if self.sound_on == "cpu":
                raise
            from avstore.timeline import Unfit

            raise Unfit(f"{name} on the device: {' '.join(str(e).split())[:120]}") from e


def decode_video(job: dict[str, Any], spec: Spec, device: Any = None) -> tuple[dict[str, Any], bytearray | None]:
    """Header and body of a decoded video; failures of the file are told in the header. `device`: of
    `avstore.decode_dali`, tried first; what it cannot do is PyAV's, and the record says why."""
    from avstore.decode_pyav import decode

    if device is None:
        return _collect(job, spec, decode)
    from avstore.decode_dali import Unfit
    from avstore.decode_dali import decode as decode_on

    fallback = "the device's decoder ended with this file"
    if job["device"]:
        try:
            return _collect(job, spec, decode_on, device=device)
        except Unfit as e:
            fallback = str(e)
    return _collect(job, spec, decode, fallback)


def _collect(
    job: dict[str, Any], spec: Spec, decode: Any, fallback: str | None = None, **how: Any
) -> tuple[dict[str, Any], bytearray | None]:
    spool = Spool(Path(job["spool"]))
    try:
        collector = Collector(spec, spool, job["slot"], how["device"].sound_on if "device" in how else "cpu")
        start, end = _time(job["start"]), _time(job["end"])
        facts = decode(job["path"], spec, collector, start=start, end=end, slot_seconds=job["slot"], **how)
        record = {**facts.to_record(), "fallback": fallback}
        index = collector.finish(record["sound_end"] > record["sound_start"], record["samples"])
        body = spool.close()
        return {"facts": {**record, "status": "ok"}, "index": index, "size": spool.size}, body
    except BaseException:
        spool.abort()
        raise


def probe_video(job: dict[str, Any], spec: Spec) -> tuple[dict[str, Any], None]:
    """What the container says of a video: its length in seconds (a fraction as text) and kind."""
    from avstore.probe import probe

    found = probe(job["path"], _time(job["start"]), _time(job["end"]), spec)
    names = ("has_picture", "has_sound", "single_picture", "width", "height", "sample_rate")
    header: dict[str, Any] = {name: getattr(found, name, None) for name in names}
    fps = getattr(found, "source_fps", None)
    return {**header, "source_fps": None if fps is None else str(fps), "seconds": str(Fraction(found.seconds))}, None


def answer(job: dict[str, Any], spec: Spec, device: Any = None) -> tuple[dict[str, Any], bytearray | None]:
    """Does a job; every failure becomes a header: `failed` (of the file) or `machine` (an errno)."""
    from avstore.probe import DecodeFailed

    try:
        first = _readable(job["path"], whole=False)
        if first is not None:
            return first, None
        return decode_video(job, spec, device) if job["kind"] == "decode" else probe_video(job, spec)
    except DecodeFailed as e:
        seconds = getattr(e, "seconds", None)
        failed = {
            "failed": e.reason,
            "message": getattr(e, "message", None) or str(e),
            "seconds": None if seconds is None else str(Fraction(seconds)),
        }
    except MemoryError:
        failed = {"failed": "too_large", "message": "needs more memory than a decoding child may have"}
    except MachineError as e:
        return {"machine": getattr(e.__cause__, "errno", None), "message": e.why, "where": job["path"]}, None
    except SpoolFull as e:
        return {"machine": e.errno, "message": e.strerror, "where": job["spool"]}, None
    except Exception as e:
        failed = {"failed": "crashed", "message": f"{type(e).__name__}: {e}"}
    # A disk that fails, or a file that has just gone, looks like a broken file to a demuxer: read it once through.
    return _readable(job["path"], whole=True) or failed, None


def _readable(path: str, whole: bool) -> dict[str, Any] | None:
    """None where the file's bytes can be read; else the header of the failure."""
    try:
        with open(path, "rb", buffering=0) as f:
            while f.read(1 << 20) and whole:
                pass
        return None
    except OSError as e:
        if e.errno in MACHINE_ERRNOS:
            return {"machine": e.errno, "message": e.strerror, "where": path}
        gone = e.errno in (errno.ENOENT, errno.ENOTDIR)
        return {"failed": "unreadable", "message": e.strerror or str(e), "gone": gone}


def _time(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text)


def limit_memory() -> None:
    """Address space: what is mapped now, and HEADROOM above."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = mapped + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def limit_cpu(seconds: float) -> None:
    """CPU seconds from now on; SIGXCPU ends the process beyond them, in C code too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def die_with_parent(parent: int) -> None:
    """Linux: SIGKILL when the parent ends, however it ends. Elsewhere the end of stdin does it, see `jobs_from`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)


def jobs_from(stream: BinaryIO) -> queue.SimpleQueue[dict[str, Any]]:
    """Jobs as they come; the end of the stream ends the process at once, even in the midst of a video."""
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        while line := stream.readline():
            jobs.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="jobs").start()
    return jobs


def load(spec: Spec, decode: str = "pyav") -> dict[str, str]:
    """Imports what decoding needs and returns the versions of everything that shapes the bytes."""
    from importlib.metadata import version

    import avstore
    from avstore.codecs import encode_jpeg  # noqa: F401  (imported now, so that the limits count without it)
    from avstore.decode_pyav import decoder_versions

    versions = {"avstore": avstore.__version__, "numpy": np.__version__, **decoder_versions()}
    if spec.picture and spec.codec == "jpeg":
        import simplejpeg  # noqa: F401

        versions["simplejpeg"] = version("simplejpeg")
    if spec.front_ends:
        import torch

        torch.set_num_threads(1)
        versions["torch"] = torch.__version__
    if decode != "pyav":
        import torch

        from avstore import dali
        from avstore.decode_dali import decode as _decode  # noqa: F401  (imported now, as above)

        torch.set_num_threads(1)
        versions |= {"torch": torch.__version__, **dali.versions(decode)}
        if spec.front_ends and dali.backend(decode) == "gpu":
            versions["spectrograms"] = f"cuda {torch.version.cuda} where the decoder is dali, else cpu"
    return versions


def main() -> None:
    """Hello, then one answer per job, until stdin ends."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs = jobs_from(sys.stdin.buffer)
    first = jobs.get()
    spec, decode = Spec.from_json(first["spec"]), first["decode"]
    send(out, {"versions": load(spec, decode)}, None)
    device: Any = None
    if decode != "pyav":
        from avstore.decode_dali import Device

        device = Device(decode)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while True:
        job = jobs.get()
        if device is None or device.where == "cpu":  # CUDA maps addresses by the hundred GiB
            limit_memory()
        limit_cpu(job["cpu_seconds"])
        header, body = answer(job, spec, device)
        send(out, header, body)


def send(out: Any, header: dict[str, Any], body: bytearray | None) -> None:
    text = json.dumps(header).encode()
    for data in (HEADER.pack(len(text), len(body or b"")) + text, body or b""):
        view = memoryview(data)
        while len(view):
            view = view[out.write(view) :]


if __name__ == "__main__":
    main()
