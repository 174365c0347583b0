"""Teachers: what a student learns from. A frozen network of another run or of a weights file, or given vectors.

    self.audio_teacher = Teacher("runs/avid", "audio", dim=128)       # in a method's __init__
    target_BD = self.audio_teacher(batch)                             # (B, dim), without gradient

A source is one of
    runs/NAME, runs/NAME@STEP, either with #TOWER     a run of avstore: its `embed` (default tower: <modality>-trunk)
    FILE.safetensors#NET, FILE.pt#NET:WIDTH           weights of a network of `backbones.py` (image-resnet-18)
    STORE.zarr/embeddings/NAME/TOWER                  vectors in a store: of each video the mean of its normalised rows

A teacher is bound once, when training begins; its `digest` is kept in the run's snapshot, so that a run never goes on
with another. It is no part of its student's checkpoints: embedding and evaluation of a student need no teacher. Its
width is a setting of the student's (`dim`), for heads are built from it.
"""

# legend: B clips, V views of each, D vector

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from avstore.durable import read_json
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from trainers.batch import Batch

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.snapshot import Snapshot

Modality = Literal["video", "audio"]
WEIGHTS = (".safetensors", ".pt", ".pth")


class Teacher(nn.Module):
    """See the top of this file. modality: which of the clip it is shown; dim: length of its vectors.

    UsageError for a source of no known form, and for a call before `bind`.
    """

    def __init__(self, source: str, modality: Modality, dim: int) -> None:
        super().__init__()
        if modality not in ("video", "audio"):
            raise UsageError(f"no modality {modality!r} of a teacher", "there is: video, audio")
        if dim < 1:
            raise UsageError(f"a teacher of {dim} numbers", "its vectors have at least 1")
        kind_of(source)
        self.source, self.modality, self.dim = source, modality, dim
        self.digest: str | None = None
        self.missing = 0  # videos without a given vector
        self._answer: Callable[[Batch], Tensor] | None = None

    def forward(self, batch: Batch) -> Tensor:
        """(B, dim), at least float32, without gradient; a zero row for a clip without the modality (see `known`)."""
        if self._answer is None:
            raise UsageError(f"the teacher {self.source} is not bound", "training does so when it begins")
        with torch.no_grad(), torch.autocast(batch.row.device.type, enabled=False):
            out = self._answer(batch)
        if out.shape != (len(batch.row), self.dim):
            raise UsageError(
                f"the teacher {self.source} gives vectors of {out.shape[-1]}, {self.dim} were expected",
                "heads of the student are built from that number",
                f"set the width of the {self.modality} teacher to {out.shape[-1]}",
            )
        return torch.where(self.known(batch)[:, None], out, 0)

    def known(self, batch: Batch) -> Tensor:
        """(B,) bool: clips that the teacher can say something about."""
        here = batch.has_picture if self.modality == "video" else batch.has_sound
        rows = self._rows
        return here if rows is None else rows[batch.row]

    _rows: Tensor | None = None

    def bind(self, store: Store, snapshot: Snapshot, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Opens the source. NotFoundError; ConflictError where it is another than the snapshot says, or hears another
        front-end than its student."""
        digest = digest_of(self.source)
        if snapshot.teachers and snapshot.teachers.get(self.source, digest) != digest:
            raise ConflictError(
                f"the teacher {self.source} is another than when this run began",
                f"{snapshot.teachers[self.source]} then, {digest} now",
                "put it back, or start a new run with --run",
            )
        kind = kind_of(self.source)
        if kind == "vectors":
            vectors, known = _vectors(self.source, store, snapshot)
            self.missing = int((~known).sum())
            table = torch.from_numpy(vectors).to(device, dtype)
            self._rows = torch.from_numpy(known).to(device)
            self.give(lambda batch: table[batch.row], digest)
        else:
            if kind == "run":
                network, call = _of_run(self.source, self.modality, snapshot)
            else:
                network, call = _of_weights(self.source, self.modality)
            network.to(device, dtype).eval().requires_grad_(False)
            self.give(lambda batch: call(_shown(batch, self.modality)), digest)

    def give(self, answer: Callable[[Batch], Tensor], digest: str = "given") -> None:
        """Binds any function of a batch instead, (B, dim): for tests and for teachers of your own."""
        self._answer, self.digest = answer, digest


def bind_teachers(
    method: nn.Module, store: Store, snapshot: Snapshot, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Binds every `Teacher` among a method's modules; one line to read for each that does not know all videos."""
    notes = []
    for module in method.modules():
        if isinstance(module, Teacher):
            module.bind(store, snapshot, device, dtype)
            if module.missing:
                notes.append(f"{module.missing} videos have no vector of the teacher {module.source}")
    return notes


def digests(sources: Iterable[str]) -> dict[str, str]:
    """Source -> digest, of all that are there. NotFoundError for one that is not."""
    return {source: digest_of(source) for source in sources if source}


def kind_of(source: str) -> Literal["run", "weights", "vectors"]:
    """What a source is, by its form alone. UsageError where it has none."""
    path = source.partition("#")[0]
    if path.endswith(WEIGHTS):
        if "#" not in source:
            raise UsageError(
                f"the teacher {source} names no network", "weights alone do not say what they are of",
                f"e.g. {source}#image-resnet-18",
            )  # fmt: skip
        return "weights"
    if "/embeddings/" in path:
        return "vectors"
    if path:
        return "run"
    raise UsageError("a teacher without a source", "a run, a weights file, or STORE.zarr/embeddings/NAME/TOWER")


def digest_of(source: str) -> str:
    """16 hex digits that name what a source holds now. NotFoundError where it is not there."""
    path, _, part = source.partition("#")
    kind = kind_of(source)
    if kind == "run":
        return f"{checkpoint_of(path)[1].digest}" + (f"#{part}" if part else "")
    if kind == "weights":
        with open(_file(path), "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16] + f"#{part}"
    folder = Path(path)
    if not (folder / "zarr.json").is_file():
        raise NotFoundError(f"there are no vectors in {source}", "a teacher's vectors are an array of embeddings")
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as f:
            whole.update(f"{file.name}:{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


# ---- the three kinds ----------------------------------------------------------------------------------------------

Network = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _shown(batch: Batch, modality: Modality) -> Tensor:
    x = batch.video if modality == "video" else batch.audio
    if x is None:
        raise UsageError(f"a batch without {modality} for a teacher of {modality}", "the student does not need it")
    return x[:, 0] if batch.views > 1 else x


def checkpoint_of(path: str) -> tuple[Any, Any]:
    """(run, checkpoint) of `RUN` or `RUN@STEP`; the latest where no step is named."""
    from trainers.run import find_run

    folder, at, step = path.rpartition("@")
    run = find_run(folder if at else path)
    return run, run.checkpoint(step if at else "latest")


def _of_run(source: str, modality: Modality, snapshot: Snapshot) -> Network:
    path, _, tower = source.partition("#")
    run, checkpoint = checkpoint_of(path)
    method: Any = run.load(checkpoint.step)
    tower = tower or f"{modality}-trunk"
    shift = scale = None
    if modality == "audio":
        mine, own = run.snapshot.statistics, snapshot.statistics
        if mine is None or own is None or mine["hash"] != own["hash"]:
            raise ConflictError(
                f"the teacher {run.path} hears another front-end than its student",
                f"{mine and mine['front_end']} there, {own and own['front_end']} here",
                "train both with one --set front_end=...",
            )
        # from the student's normalisation to the teacher's: (x std + mean - mean') / std'
        std = torch.tensor(mine["std"])
        scale = torch.tensor(own["std"]) / std
        shift = (torch.tensor(own["mean"]) - torch.tensor(mine["mean"])) / std

    def call(x: Tensor) -> Tensor:
        if scale is not None and shift is not None:
            x = x * scale.to(x) + shift.to(x)
        found: dict[str, Tensor] = method.embed(**{modality: x})
        if tower not in found:
            raise UsageError(f"the run {run.path} has no tower {tower!r} of {modality}", did_you_mean(tower, found))
        return found[tower]

    return method, call


def _of_weights(source: str, modality: Modality) -> Network:
    from trainers import backbones

    path, _, name = source.partition("#")
    name, _, width = name.partition(":")
    if width and not width.isdigit():
        raise UsageError(f"a network {name} of width {width!r}", "a whole number", f"e.g. {path}#{name}:64")
    makers = {"video": backbones.video_net, "audio": backbones.audio_net}
    image = name in backbones.IMAGE and modality == "video"
    net = (backbones.image_net if image else makers[modality])(name, int(width) if width else None)
    backbones.load_trunk(net, _state(_file(path)))

    def call(x: Tensor) -> Tensor:
        return net(x[:, :, x.shape[2] // 2] if image else x)  # an image network sees the middle picture

    return net, call


def _state(path: Path) -> dict[str, Tensor]:
    """Tensors by name. A .pt file is read as weights alone: nothing in it is run."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise CorruptError(f"{path} cannot be read", str(e), "use another file") from e
    from trainers import foreign

    return foreign.state_dict_in(foreign.load_tensors_only(path), path)[0]


def _vectors(source: str, store: Store, snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """(float32 (n, D), bool (n,): whether there is one) for the videos of a snapshot, matched by their keys."""
    import avstore
    from avstore import index

    path, _, rest = source.partition("/embeddings/")
    name, slash, tower = rest.rpartition("/")
    if not slash or "avstore" not in read_json(Path(source) / "zarr.json")["attributes"]:
        raise UsageError(f"{source} are no embeddings", "expected STORE.zarr/embeddings/NAME/TOWER")
    with avstore.open(path) as given:
        place = {given.key(int(n)): int(n) for n in given.numbers}
        asked = [place.get(store.key(int(n))) for n in snapshot.numbers]
        there = np.array(sorted({n for n in asked if n is not None}), np.int64)
        means, who = index.video_means(given, index.read_rows(given, name, tower), there)
    row = {int(n): i for i, n in enumerate(who)}
    rows = np.array([-1 if n is None else row.get(n, -1) for n in asked], np.int64)
    known = rows >= 0
    if not known.any():
        raise ConflictError(
            f"{source} has no vector of any video of this run", "videos are matched by their keys", "name another"
        )
    vectors = np.zeros((len(rows), means.shape[1]), np.float32)
    vectors[known] = means[rows[known]]
    return vectors, known


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise NotFoundError(f"there is no weights file {path}", "a teacher's weights are a .safetensors or .pt file")
    return Path(path)
