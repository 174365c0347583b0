"""Checkpoints: safetensors and JSON in a folder of their own, there whole or not at all.

    checkpoints/step-000400/  model.safetensors      weights and batch statistics
                              optimizer.safetensors  <parameter>/<name>
                              method.safetensors     the method's own: bank, partition constant, positives, ...
                              state.json             step, digests of the files, versions, threads, instruction set

Written under a dotted name, synced, renamed. The random state is not among it: every draw is a function of counters.
An encoder loads alone (`load_encoder`), from model.safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avstore.durable import canonical_json, machine_errors, read_json, sync_folder
from avstore.errors import ConflictError, CorruptError, NotFoundError

if TYPE_CHECKING:
    from trainers.run import Run

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "method.safetensors")
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Checkpoint:
    """One folder of `checkpoints/`. `digest` names the weights: 16 hex digits of model.safetensors."""

    path: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """state.json: step, total_steps, epoch, environment, files, metrics."""
        value = read_json(self.path / "state.json")
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ConflictError(
                f"{self.path} is of another format",
                f"this avstore reads format {FORMAT}",
                "use the avstore that wrote it",
            )
        return value

    @property
    def digest(self) -> str:
        return str(self.state["files"]["model.safetensors"])[:16]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def list_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [
        Checkpoint(p, int(p.name[5:]))
        for p in checkpoints.iterdir()
        if p.name.startswith("step-") and p.name[5:].isdigit()
    ]
    return sorted(found, key=lambda c: c.step)


def save(
    checkpoints: Path,
    step: int,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    method_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Writes `step-<step>` beside the others; an equal name that is there already stays as it is.

    `state`: what else state.json shall hold, as JSON. MachineError when the disk is full; nothing is left then.
    """
    from safetensors.torch import save_file

    final = folder_of(checkpoints, step)
    if final.is_dir():
        return Checkpoint(final, step)
    tmp = checkpoints / f".{final.name}.tmp.{os.getpid()}"
    tensors = {
        "model.safetensors": module.state_dict(),
        "optimizer.safetensors": flat_optimiser(module, optimiser),
        "method.safetensors": dict(method_state),
    }
    with machine_errors(final):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            digests = {}
            for name, group in tensors.items():
                with _disk_errors():
                    save_file({k: x.detach().to("cpu").contiguous() for k, x in group.items()}, tmp / name)
                digests[name] = _digest(tmp / name)
            body = {"format": FORMAT, "step": step, "files": digests, "environment": environment(), **state}
            (tmp / "state.json").write_bytes(canonical_json(body))
            for name in (*tensors, "state.json"):
                _sync(tmp / name)
            sync_folder(tmp)
            os.rename(tmp, final)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        sync_folder(checkpoints)
    return Checkpoint(final, step)


def load(checkpoint: Checkpoint, module: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Puts a checkpoint into a method (weights, its own state) and its optimiser; returns state.json.

    CorruptError where a file's digest differs; ConflictError where the nets do.
    """
    state = checkpoint.state
    weights = read_tensors(checkpoint, "model.safetensors")
    _require_same_tensors(checkpoint, module.state_dict(), weights)
    module.load_state_dict(weights)
    module.load_method_state(read_tensors(checkpoint, "method.safetensors"))  # type: ignore[operator]
    if optimiser is not None:
        load_optimiser(module, optimiser, read_tensors(checkpoint, "optimizer.safetensors"))
    return state


def read_tensors(checkpoint: Checkpoint, name: str, check: bool = True) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the CPU. NotFoundError, CorruptError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checkpoint.path / name
    if not path.is_file():
        raise NotFoundError(f"{path} is missing", "the checkpoint is not whole", "name another with --checkpoint")
    if check and _digest(path) != checkpoint.state["files"][name]:
        raise CorruptError(
            f"{path} is damaged", "its digest differs from the one in state.json", "use another checkpoint"
        )
    try:
        return load_file(path)
    except SafetensorError as e:
        raise CorruptError(f"{path} cannot be read", str(e), "use another checkpoint") from e


def flat_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as {parameter/name: tensor}."""
    out = {}
    for name, parameter in module.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{name}/{key}"] = value
    return out


def load_optimiser(module: nn.Module, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of `flat_optimiser`.

    Each tensor is copied into `empty_like(parameter)`: safetensors keeps contiguous tensors, and a fused Adam that
    finds other strides in its state than in a channels-last parameter pairs the wrong elements, without an error.
    """
    parameters = dict(module.named_parameters())
    fused = any(group.get("fused") or group.get("capturable") for group in optimiser.param_groups)
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        if name not in parameters:
            raise ConflictError(f"the checkpoint has optimiser state of {name!r}", "this method has no such parameter")
        parameter = parameters[name]
        if value.dim() and value.shape == parameter.shape:
            optimiser.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:  # the step counter: a fused optimiser wants it beside the parameter, others on the host
            optimiser.state[parameter][key] = value.to(parameter.device) if fused else value.clone()


def prune(checkpoints: Path, keep_last: int, keep_every: int) -> list[int]:
    """Removes all but the newest `keep_last` and those at multiples of `keep_every` (0: none); the steps removed."""
    found = list_checkpoints(checkpoints)
    gone = []
    for checkpoint in found[:-keep_last]:
        if keep_every and checkpoint.step % keep_every == 0:
            continue
        dotted = checkpoint.path.with_name(f".{checkpoint.path.name}.tmp.{os.getpid()}")  # never half a checkpoint
        with machine_errors(checkpoint.path):
            os.rename(checkpoint.path, dotted)
            shutil.rmtree(dotted)
        gone.append(checkpoint.step)
    return gone


def sweep(checkpoints: Path) -> None:
    """Removes what a killed run left half done. Only under the run's lock."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step-*.tmp.*"):
            shutil.rmtree(path, ignore_errors=True)


def load_encoder(run: Run, name: str, which: str | int = "latest") -> nn.Module:
    """One encoder of a run alone, in eval mode on the CPU: 'video' or 'audio' of its towers.

    `which`: 'latest' or a step. NotFoundError where the run has no such tower or checkpoint.
    """
    method = run.build(rows=None)
    towers: Any = getattr(method, "towers", method)
    children = dict(towers.named_children())
    if name not in children:
        from avstore.errors import did_you_mean

        raise NotFoundError(f"the run {run.path} has no encoder {name!r}", did_you_mean(name, children))
    prefix = f"towers.{name}." if towers is not method else f"{name}."
    weights = read_tensors(run.checkpoint(which), "model.safetensors")
    encoder = children[name]
    encoder.load_state_dict({k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)})
    return encoder.eval()


def environment() -> dict[str, Any]:
    """What a bitwise repeat depends on: torch, its threads, and the instruction set that oneDNN may use."""
    capabilities: Mapping[str, Any] = {}
    with contextlib.suppress(AttributeError, RuntimeError):
        capabilities = torch.cpu.get_capabilities()
    features = [name for name in _CPU_FEATURES if capabilities.get(name)]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability() + ("" if limit is None else f", oneDNN at most {limit.upper()}"),
        "cpu_features": features,
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a resumed run will not be equal to the bit: one text per thing that differs."""
    return [
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]


def _require_same_tensors(checkpoint: Checkpoint, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    wrong = _differing(mine, theirs)
    if wrong:
        raise ConflictError(
            f"{checkpoint.path} holds other networks",
            f"{len(wrong)} tensors differ, first {wrong[0]}",
            "use the configuration of that run",
        )


def _differing(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    names: Iterable[str] = sorted({*mine, *theirs})
    return [k for k in names if k not in mine or k not in theirs or mine[k].shape != theirs[k].shape]


@contextlib.contextmanager
def _disk_errors() -> Any:
    """safetensors tells of a full disk in an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        import errno

        full = "No space left" in str(e) or "os error 28" in str(e)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(e)) from e


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
