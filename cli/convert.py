"""`avstore convert`: a published checkpoint as a weights file, or as a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avstore.errors import UsageError
from cli import console
from cli.choose import open_store, selection
from cli.store import Json

if TYPE_CHECKING:
    from trainers.convert import Found


def convert(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A checkpoint, or one for each modality.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The weights file to write, *.safetensors.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder to make, for embed, query and bench.")] = None,
    store: Annotated[Path | None, typer.Option(help="Of the run: the store that it is for.")] = None,
    bank: Annotated[
        bool, typer.Option("--bank", help="Of AVID's run: fill its memory from the store, for train avid-cma --init.")
    ] = False,
    where: Annotated[list[str] | None, typer.Option(help="Of the run: column=value[,value]; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Of the run: keys, one a line.")] = None,
    device: Annotated[str, typer.Option(help="Of --bank: auto, cpu, cuda, ...")] = "auto",
    names: Annotated[bool, typer.Option("--names", help="Print every tensor: its name there, its name here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the file holds; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Take the encoders of a published checkpoint: AVID, AVID-CMA, CrissCross, torchvision, the VCOP family.

    Nothing in the file is executed. Weights keep their licence.
    """
    if out is None and run is None and not dry_run:
        raise UsageError(
            "nothing to write", "neither a weights file nor a run was named", "-o weights.safetensors, or --run FOLDER"
        )
    if run is None and (store is not None or bank or where or list_ is not None):
        raise UsageError("--store, --bank, --where and --list are of a run", "no run was named", "add --run FOLDER")
    from trainers.convert import read_published, write_weights

    found = read_published(files)
    notes: list[str] = []
    if not dry_run:
        opened = open_store(store) if run is not None else None
        if out is not None:
            write_weights(found, out)
        if run is not None and opened is not None:
            from trainers.converted_run import make_run

            _, notes = make_run(found, run, opened, bank=bank, device=device, **selection(where, list_, None, 0))
    _report(found, out, run, notes, names, dry_run, json)


def _report(
    found: Found, out: Path | None, run: Path | None, notes: list[str], names: bool, dry_run: bool, json: bool
) -> None:
    import dataclasses

    from trainers.encoders import count_parameters

    parameters = count_parameters(found.module())
    value: dict[str, Any] = {
        "recognised": list(found.families),
        "config": dataclasses.asdict(found.config),
        "parameters": parameters,
        "mapped": len(found.mapped),
        "left": dict(found.left),
        "partition": found.partition,
        "out": None if out is None or dry_run else str(out),
        "run": None if run is None or dry_run else str(run),
        "notes": notes,
    }
    if json:
        console.as_json(value | ({"names": dict(found.mapped)} if names else {}))
        return
    if names:
        console.columns(["there", "here"], [[console.visible(a), b] for a, b in found.mapped])
    c = found.config
    reasons: dict[str, list[str]] = {}
    for name, why in found.left:
        reasons.setdefault(why, []).append(name)
    console.pairs(
        [
            ("recognised", ", ".join(found.families)),
            *((kind, _net(c, kind)) for kind in ("video", "audio") if getattr(c, f"{kind}_net") is not None),
            ("taken", f"{len(found.mapped)} tensors, {parameters:,} parameters"),
            *(("left", f"{len(of)} {why}: {console.visible(of[0])}{', ...' if len(of) > 1 else ''}")
              for why, of in reasons.items()),
        ]
    )  # fmt: skip
    for note in notes:
        console.warn(f"note: {console.visible(note)}")
    if out is not None and not dry_run:
        console.say(f"{out}: written")
    if run is not None and not dry_run:
        console.say(f"next: avstore embed {run}")


def _net(config: Any, kind: str) -> str:
    head = getattr(config, f"{kind}_head")
    words = f"{getattr(config, f'{kind}_net')}, width {getattr(config, f'{kind}_width')}, "
    words += f"{getattr(config, f'{kind}_pool')} pool, "
    return words + (f"head {'-'.join(map(str, head))}" if head else "no head: trunk only")
