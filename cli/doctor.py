"""`avstore doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console
from cli.choose import VARIABLE
from cli.store import Json

PACKAGES = ("numpy", "zarr", "numcodecs", "google-crc32c", "av", "simplejpeg", "torch", "safetensors", "faiss-cpu",
            "h5py", "scipy", "scikit-learn", "typer", "rich", "imagecodecs", "xarray", "tensorstore",
            "tensorboard")  # fmt: skip


def doctor(
    folder: Annotated[Path, typer.Option(help="Where stores and runs will lie: its disk is tried.")] = Path(),
    json: Json = False,
) -> None:
    """Say what works here. Exit 1 when something that avstore needs does not."""
    checks = [
        ("python", _python),
        ("packages", _packages),
        ("decoding", _decoding),
        ("jpeg", _jpeg),
        ("zarr codec", _codec),
        ("faiss", _faiss),
        ("torch", _torch),
        ("cuda", _cuda),
        ("nvdec (DALI)", _dali),
        ("shared memory", _memory),
        ("cpu", _cpu),
        ("disk", lambda: _disk(folder)),
        ("environment", _environment),
    ]
    found = []
    for name, check in checks:
        try:
            state, text = check()
        except Exception as e:  # whatever is broken here is what the command is asked to report
            state, text = "broken", f"{type(e).__name__}: {e}"
        found.append({"check": name, "state": state, "text": text})
    if json:
        console.as_json({"ok": all(f["state"] != "broken" for f in found), "checks": found})
    else:
        width = max(len(f["check"]) for f in found)
        for f in found:
            console.data(f"{f['state']:<7} {f['check']:<{width}}  {console.visible(f['text'])}")
    if any(f["state"] == "broken" for f in found):
        raise typer.Exit(1)


def _python() -> tuple[str, str]:
    import platform

    import avstore

    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    where = f"{platform.system()} {platform.release()} {platform.machine()}"
    text = f"{platform.python_version()}, avstore {avstore.__version__}, {where}"
    return ("ok" if fits else "broken"), text if fits else f"{text}: avstore needs 3.11 to 3.13"


def _packages() -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    there = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            there.append(f"{name} {version(name)}")
    return "ok", ", ".join(there)


def _decoding() -> tuple[str, str]:
    import av

    libraries = ", ".join(f"{k} {'.'.join(map(str, v))}" for k, v in sorted(av.library_versions.items()))
    missing = [c for c in ("h264", "hevc", "vp9", "av1", "mpeg4", "aac", "mp3", "vorbis", "opus", "flac")
               if c not in av.codecs_available]  # fmt: skip
    return "ok", f"PyAV {av.__version__} ({libraries})" + (f"; no decoder for {', '.join(missing)}" if missing else "")


def _jpeg() -> tuple[str, str]:
    import time

    import numpy as np

    from avstore.codecs import decode_jpeg_into, encode_jpeg

    y, x = np.mgrid[:128, :176]
    frame = np.stack([(x + y) % 256, (2 * x) % 256, (3 * y) % 256], axis=-1).astype(np.uint8)
    data, out = encode_jpeg(frame, 90), np.empty_like(frame)
    start = time.perf_counter()
    for _ in range(100):
        decode_jpeg_into(data, out)
    wall = time.perf_counter() - start
    off = float(np.abs(out.astype(int) - frame).mean())
    if off > 12:
        return "broken", f"a decoded frame is off by {off:.1f} on average"
    return "ok", f"{100 / wall:.0f} frames of 128x176 per second and thread"


def _codec() -> tuple[str, str]:
    from importlib.metadata import entry_points

    found = [e.value for e in entry_points(group="zarr.codecs") if e.name == "imagecodecs_jpeg"]
    if not found:
        return "broken", "imagecodecs_jpeg is not registered: zarr cannot read frames; install avstore with pip"
    return "ok", f"imagecodecs_jpeg -> {', '.join(found)}"


def _faiss() -> tuple[str, str]:
    import faiss
    import numpy as np

    x = np.eye(4, dtype=np.float32)
    if faiss.knn(x, x, 1, metric=faiss.METRIC_INNER_PRODUCT)[1].ravel().tolist() != [0, 1, 2, 3]:
        return "broken", "faiss gives wrong neighbours"
    return "ok", f"faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads"


def _torch() -> tuple[str, str]:
    import torch

    a = torch.ones(8, 8)
    if float((a @ a)[0, 0]) != 8.0:
        return "broken", "torch multiplies wrongly"
    return (
        "ok",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )


def _cuda() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but finds no device" if built else "this torch is built without CUDA"
        return "none", f"{why}: training runs on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}, bf16 {torch.cuda.is_bf16_supported()}"


def _dali() -> tuple[str, str]:
    from importlib.util import find_spec

    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return (
            "none",
            "DALI is not installed: decoding runs on the CPU with PyAV (pip install 'avstore[gpu]' on Linux + CUDA)",
        )
    import nvidia.dali as dali

    return "ok", f"DALI {dali.__version__}"


def _memory() -> tuple[str, str]:
    if not hasattr(os, "memfd_create"):
        return "none", "no memfd here: the loader decodes in threads of the training process (in_process)"
    fd = os.memfd_create("avstore-doctor")
    try:
        os.posix_fallocate(fd, 0, 1 << 20)
    finally:
        os.close(fd)
    return "ok", "memfd works: the reader process shares its batches"


def _cpu() -> tuple[str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "ok", f"{usable} usable of {os.cpu_count()}"


def _disk(folder: Path) -> tuple[str, str]:
    import shutil
    import tempfile
    import time

    from avstore.lock import filesystem_of, require_locks

    if not folder.is_dir():
        return "broken", f"{folder} is no folder"
    with tempfile.TemporaryDirectory(prefix=".avstore-doctor", dir=folder) as scratch:
        require_locks(Path(scratch))
        block = os.urandom(1 << 20)
        start = time.perf_counter()
        with open(Path(scratch) / "speed", "wb") as f:
            for _ in range(64):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
        wall = time.perf_counter() - start
    free = console.size(shutil.disk_usage(folder).free)
    return "ok", f"{filesystem_of(folder)}: {free} free, flock and link work, writes {64 / wall:.0f} MiB/s (synced)"


def _environment() -> tuple[str, str]:
    names = (VARIABLE, "NO_COLOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    there: list[Any] = [f"{n}={os.environ[n]}" for n in names if n in os.environ]
    return "ok", ", ".join(there) or f"none of {', '.join(names)} is set"
