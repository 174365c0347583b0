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
INSTALL = {  # what to type for a check that is not ok; shown beneath it, and `install` in the JSON
    "decoding": "pip install av",
    "jpeg": "pip install simplejpeg",
    "faiss": "pip install faiss-cpu; to search on the GPU: pip uninstall faiss-cpu && pip install faiss-gpu",
    "torch": "pip install torch (pytorch.org tells the line for your CUDA)",
    "driver": "install NVIDIA's driver (on Debian and Ubuntu: apt install nvidia-driver); in a container: --gpus all",
    "cuda": "a torch built for CUDA: pytorch.org tells the line that fits your driver",
    "nvdec": "in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; else NVIDIA's whole driver",
    "dali": "pip install 'avstore[gpu]'  (nvidia-dali-cuda130, or -cuda120 beside a torch for CUDA 12)",
    "compile": "on a CPU g++ (on Debian and Ubuntu: apt install g++), on CUDA triton, which comes with torch",
    "nvimagecodec": "pip install 'nvidia-nvimgcodec-cu13[all]'  (-cu12 for CUDA 12); without it JPEG is the CPU's",
}


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
        ("driver", _driver),
        ("cuda", _cuda),
        ("nvdec", _nvdec),
        ("dali", _dali),
        ("nvimagecodec", _nvimagecodec),
        ("compile", _compile),
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
        install = INSTALL.get(name) if state != "ok" else None
        found.append({"check": name, "state": state, "text": text, **({"install": install} if install else {})})
    if json:
        console.as_json({"ok": all(f["state"] != "broken" for f in found), "checks": found})
    else:
        width = max(len(f["check"]) for f in found)
        for f in found:
            console.data(f"{f['state']:<7} {f['check']:<{width}}  {console.visible(f['text'])}")
            if "install" in f:
                console.data(f"{'':<7} {'':<{width}}  -> {f['install']}")
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
    from trainers.search import faiss_flavour

    on_gpu = faiss_flavour() == "gpu"
    devices = f" on {faiss.get_num_gpus()} devices" if on_gpu else " (on a CUDA device torch searches, with equal rows)"
    flavour = "faiss-gpu" if on_gpu else "faiss-cpu"
    return "ok", f"{flavour} {faiss.__version__}{devices}, {faiss.omp_get_max_threads()} threads"


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
    from avstore import dali

    missing = dali.why_not("dali")
    if missing is None:
        return "ok", f"{dali.installed()}: ingest --decode dali works"
    there = dali.installed()
    if there is None:
        return "none", "not installed: pictures are decoded by PyAV on the CPU"
    if (broken := dali.why_not("dali-cpu")) is not None:
        return "broken", f"{there}: {broken}"
    return "ok", f"{there}, on the CPU alone (VP8, VP9, MJPEG: --decode dali-cpu); {missing}"


def _driver() -> tuple[str, str]:
    import ctypes

    from avstore.dali import cuda_devices

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none", "no NVIDIA driver (libcuda.so.1): everything runs on the CPU"
    number = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"up to CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    version = ""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        version = next((f"{w}, " for w in words if w[:1].isdigit() and w.count(".") >= 1), "")
    count = cuda_devices()
    return ("ok" if count else "none"), f"{version}{cuda}, {count} devices"


def _nvdec() -> tuple[str, str]:
    from avstore.dali import cuda_devices, has_nvdec

    if has_nvdec():
        return "ok", "libnvcuvid.so.1 is there"
    if cuda_devices():
        return "none", "a device, but no libnvcuvid.so.1: its video decoder cannot be reached; pictures by PyAV"
    return "none", "no libnvcuvid.so.1: pictures are decoded on the CPU"


def _nvimagecodec() -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    for name, needed in (("nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"), ("nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12")):
        with contextlib.suppress(PackageNotFoundError):
            found = f"{name} {version(name)}"
            try:
                return "ok", f"{found}, {needed} {version(needed)}: --decode dali-nvjpeg, train --set jpeg=auto"
            except PackageNotFoundError:
                return "none", f"{found} without {needed}: JPEG stays on the CPU"
    return "none", "not installed: JPEG is encoded and decoded on the CPU"


def _compile() -> tuple[str, str]:
    import torch

    from trainers.compiled import why_not

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = why_not(device)
    return ("ok", f"train --set compile=compile works on {device}") if missing is None else ("none", missing)


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
