"""Media on the device: ingest by DALI beside a bare NVDEC loop and PyAV on all cores; JPEG; spectrograms."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import avstore
from avstore import dali, device_jpeg
from avstore.codecs import decode_jpeg_into, encode_jpeg
from avstore.encode import encode_batch
from avstore.frontends import FRONT_ENDS, SPREAD, spectrogram, spectrogram_rows
from benchmarks.gpu import Bench, Row, rate, wanted


def write_videos(folder: Path, files: int, seconds: int, height: int) -> list[Path]:
    """16:9 H.264 at 30 fps with moving texture, made once and copied: NVDEC does not mind, and encoding takes long."""
    folder.mkdir(parents=True, exist_ok=True)
    width = height * 16 // 9 // 2 * 2
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(0).integers(0, 40, (height, width + 512), np.uint8)
    first = folder / "000.mp4"
    with av.open(str(first), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for k in range(30 * seconds):
            plain = ((x + 5 * k) // 3 % 200 + (y // 4) % 16).astype(np.uint8)
            picture = plain + grain[:, 3 * k % 512 : 3 * k % 512 + width] // 2
            frame = av.VideoFrame.from_ndarray(np.stack([picture, plain, picture // 2], -1), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = first.read_bytes()
    paths = [folder / f"{k:03d}.mp4" for k in range(files)]
    for path in paths[1:]:
        path.write_bytes(data)
    return paths


def ingest_rates(bench: Bench) -> Iterator[Row]:
    """Source frames a second: a bare NVDEC loop, `ingest --decode dali` and `dali-nvjpeg`, and PyAV on all cores."""
    files, seconds, height = bench.size.media
    paths = write_videos(bench.folder / "media", files, seconds, height)
    frames = files * seconds * 30
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bare: float | None = None
    what = f"{files} files of {height} lines, {seconds} s"
    row: Row = {"what": f"bare NVDEC loop, {what}", "unit": "frames/s"}
    missing = dali.why_not("dali") if bench.cuda else "a CPU: no NVDEC"
    if missing is None:
        for streams in (1, 4, 8):
            value = _bare(paths, seconds * 30, streams)
            bare = max(bare or 0.0, value)
            yield {**row, "what": f"{row['what']}, {streams} at a time", "value": value}
    else:
        yield {**row, "note": f"not measured: {missing}"}
    options: dict[str, Any] = {"front_ends": ()} if bench.cuda else {"front_ends": (), "size": (32, 48), "fps": 8}
    for kind in ("dali", "dali-nvjpeg", "pyav"):
        who = f"ingest --decode {kind}" + (f", {cpus} cores" if kind == "pyav" else "")
        device = kind != "pyav"
        row = {"what": who, "unit": "frames/s", "limit": bare if device else None}
        share = "of the bare loop"
        why = None if kind == "pyav" else (dali.why_not(kind) if bench.cuda else "a CPU: no NVDEC")
        if why is not None:
            yield {**row, "limit": None, **wanted(None, ">=", 0.8, share), "note": f"not measured: {why}"}
            continue
        workers = cpus if kind == "pyav" or cpus < 8 else 8
        began = time.perf_counter()
        made = avstore.ingest(
            bench.folder / "media",
            bench.folder / f"{kind}.zarr",
            decode=kind,
            workers=workers if bench.cuda else 1,
            **options,
        )
        wall = time.perf_counter() - began
        with avstore.open(made.store) as store:
            by = [v.facts["decoder"] for v in store]
            back = sorted({str(v.facts["fallback"]) for v in store if v.facts["fallback"]})
        note = f"{made.ok} of {files} ok, {by.count('dali')} by DALI" + (f"; {back[0]}" if back else "")
        asked = wanted(frames / wall / bare if bare else None, ">=", 0.8, share) if device else {}
        yield {**row, "value": frames / wall, **asked, "note": f"{note}; the limit: the bare loop" if device else note}


def _bare(paths: list[Path], count: int, streams: int) -> float:
    """Frames a second of DALI's decoder and resize alone, in `streams` threads with a pipeline each."""

    def work(mine: list[Path]) -> int:
        stream, done = dali.Stream("gpu"), 0
        for path in mine:
            if stream.spent:
                stream = dali.Stream("gpu")
            for chunk in stream.pictures(np.fromfile(path, np.uint8), count, (228, 128)):
                done += len(chunk)
        torch.cuda.synchronize()
        return done

    work(paths[:1])
    with ThreadPoolExecutor(streams) as pool:
        began = time.perf_counter()
        done = sum(pool.map(work, [paths[k::streams] for k in range(streams)]))
    return done / (time.perf_counter() - began)


def jpeg(bench: Bench) -> Iterator[Row]:
    """Pictures a second, 128x176 at quality 90: decoded on CPU threads, by nvJPEG through torchvision, by nvImageCodec;
    encoded on the CPU and by nvImageCodec."""
    n = bench.size.pictures
    y, x = np.mgrid[:128, :176]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 30, (n, 128, 176, 1))
    pictures = (
        (np.stack([x + y, 2 * x, 3 * y], -1)[None] + 7 * np.arange(n)[:, None, None, None]) % 220 + noise
    ).astype(np.uint8)
    payloads = encode_batch(pictures, 90)
    out = np.empty_like(pictures)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = 0.0
    for threads in sorted({1, min(8, cpus), cpus}):
        with ThreadPoolExecutor(threads) as pool:
            value = rate(bench, lambda pool=pool: list(pool.map(decode_jpeg_into, payloads, out)), n)  # type: ignore[misc]
        best = max(best, value)
        what = f"decode on the CPU, {threads} thread{'s' if threads > 1 else ''}"
        yield {"what": what, "value": value, "unit": "pictures/s"}
    arrays = [np.frombuffer(p, np.uint8) for p in payloads]
    exact = np.empty_like(pictures[0])
    decode_jpeg_into(payloads[0], exact)
    for name, decode in device_jpeg.available(torch.device(bench.device)).items():
        row: Row = {"what": f"decode on the device, {name}", "unit": "pictures/s"}
        if isinstance(decode, str):
            yield {**row, "note": f"not measured: {decode}"}
            continue
        try:
            off = np.abs(decode(arrays[:1], 128, 176)[0].cpu().numpy().astype(int) - exact)
            value = rate(bench, lambda decode=decode: decode(arrays, 128, 176), n)  # type: ignore[misc]
        except Exception as e:
            yield {**row, "note": f"not measured: {type(e).__name__}: {' '.join(str(e).split())[:120]}"}
            continue
        levels = f"off by {off.mean():.2f} levels on average, {off.max()} at most"
        note = f"{value / best:.2f} times the CPU's best; {levels}; the limit: to copy the JPEGs to the device"
        upload = bench.limits.get("upload")
        limit = upload * 1e9 * n / sum(map(len, payloads)) if upload else None
        yield {**row, "value": value, "limit": limit, "note": note}
    yield {
        "what": "encode on the CPU, 1 thread",
        "unit": "pictures/s",
        "value": rate(bench, lambda: [encode_jpeg(p, 90) for p in pictures[: max(1, n // 8)]], max(1, n // 8)),
    }
    row = {"what": "encode on the device, nvImageCodec", "unit": "pictures/s"}
    if not bench.cuda:
        yield {**row, "note": "not measured: a CPU"}
        return
    there = torch.from_numpy(pictures).to(bench.device)
    try:
        value = rate(bench, lambda: encode_batch(there, 90, "nvimagecodec"), n)
        again = np.empty_like(pictures[0])
        decode_jpeg_into(encode_batch(there[:1], 90, "nvimagecodec")[0], again)
        off = float(np.abs(again.astype(int) - pictures[0]).mean())
    except Exception as e:
        yield {**row, "note": f"not measured: {type(e).__name__}: {' '.join(str(e).split())[:120]}"}
        return
    yield {**row, "value": value, "note": f"off by {off:.2f} levels on average"}


def spectrograms(bench: Bench) -> Iterator[Row]:
    """Windows a second of each front-end at read time, and how far the device's rows lie from the CPU's; and the rows
    of a whole video of a minute, as an ingest stores them."""
    count, seconds = bench.size.sound
    for name, recipe in FRONT_ENDS.items():
        hertz = max(24000, recipe.sample_rate)
        sound = np.random.default_rng(0).integers(-8000, 8000, (count, seconds * hertz)).astype(np.int16)
        there = torch.from_numpy(sound).to(bench.device)
        with torch.inference_mode():
            value = rate(bench, lambda there=there, name=name, hertz=hertz: spectrogram(there, name, hertz), count)  # type: ignore[misc]
            off = (spectrogram(there[:2], name, hertz).cpu() - spectrogram(sound[:2], name, hertz)).abs().max()
        bytes_each = seconds * (2 * hertz + 4 * recipe.bins * float(recipe.rate))
        limit = bench.limits["copy"] * 1e9 / bytes_each if "copy" in bench.limits else None
        note = f"largest difference to the CPU {float(off):.2g}; the limit: to read the sound and write the rows once"
        yield {"what": f"{name}, {count} windows of {seconds} s", "value": value, "unit": "windows/s", "limit": limit,
               "note": note}  # fmt: skip
    wave = np.random.default_rng(1).integers(-8000, 8000, (60 if bench.cuda else 2) * 24000).astype(np.int16)
    for name in ("crisscross-mel80", "avid-linear257"):
        mine = spectrogram_rows(wave, name, 24000, bench.device).astype(np.float32)
        theirs = spectrogram_rows(wave, name, 24000).astype(np.float32)
        value = rate(bench, lambda name=name: spectrogram_rows(wave, name, 24000, bench.device), len(wave) / 24000)  # type: ignore[misc]
        beyond = float(np.max(np.abs(mine - theirs) - np.spacing(np.abs(theirs).astype(np.float16)).astype(np.float32)))
        what = f"{name}, stored rows of a whole video"
        yield {"what": what, "value": value, "unit": "s of sound/s"}
        distance = max(beyond, 0.0) if math.isfinite(beyond) else beyond
        yield {"what": f"{what}: farthest from the CPU's", "value": distance, **wanted(distance, "<=", SPREAD),
               "note": "of the logarithm, beyond a step of float16"}  # fmt: skip
