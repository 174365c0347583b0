"""`avstore train`: a method on a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avstore.errors import UsageError
from cli import console
from cli.choose import fold_of, open_store, selection
from cli.store import Json, StoreArgument

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.config import RunConfig
    from trainers.events import Event


def train(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="avid, avid-cma, ...; none: list them.")
    ] = None,
    store: StoreArgument = None,
    preset: Annotated[
        str | None, typer.Option(help="paper (default values), tiny (CPU minutes), small (AVID's family).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="k=v", help="One setting; repeatable.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder. Default runs/<method>.")] = None,
    init: Annotated[Path | None, typer.Option(help="A finished run to start from, e.g. of AVID for avid-cma.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="column=value[,value]; repeatable.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="Keys, one a line.")] = None,
    subset: Annotated[int | None, typer.Option(help="A seeded draw of so many videos.")] = None,
    fold: Annotated[
        str | None, typer.Option(metavar="i/n", help="Leave fold i of n out (see bench retrieval).")
    ] = None,
    fold_seed: Annotated[int, typer.Option(help="Of the folds.")] = 0,
    label: Annotated[str, typer.Option(help="Column by which folds are stratified.")] = "label",
    seed: Annotated[int | None, typer.Option(help="Of the run, and of --subset unless --subset-seed is given.")] = None,
    subset_seed: Annotated[int | None, typer.Option(help="Of --subset alone.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps in all.")] = None,
    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="The methods there are; --list alone does too.")
    ] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Every setting and where it comes from.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained; write nothing.")] = False,
    json: Json = False,
    help_: Annotated[
        bool, typer.Option("--help", help="Show this; after METHOD also what it is, and its settings.")
    ] = False,
) -> None:
    """Train a method. Repeating the command resumes; a finished run is left as it is."""
    if help_:
        _help(context, method)
        return
    if list_methods or method is None:
        _methods(json)
        return
    from trainers.config import resolve, resolve_stage
    from trainers.methods import method as find_method
    from trainers.settings import show_config as rows_of

    line = find_method(method)
    sets = list(set_ or [])
    sets += [f"seed={seed}"] if seed is not None else []
    sets += [f"steps={steps}"] if steps is not None else []
    resolved = resolve(method, preset=preset, toml_file=config, sets=sets)
    stage = resolve_stage(method, preset=preset, toml_file=config, sets=sets) if line.stage else None
    if show_config:
        _settings(rows_of(resolved), json)
        return
    opened = open_store(store)
    subset_seed = subset_seed if subset_seed is not None else seed if seed is not None else 0
    chosen = selection(where, list_, subset, subset_seed)
    if "seed" in chosen:
        chosen["subset_seed"] = chosen.pop("seed")
    if fold is not None:
        chosen = _without_fold(opened, resolved, chosen, fold, fold_seed, label)
    if dry_run:
        _preview(opened, resolved, chosen, run, json)
        return
    from trainers.loop import train_with_stages

    with console.Progress(method, "steps") as progress:
        show = _Show(progress, json)
        result = train_with_stages(
            method, opened, resolved, run, init=init, stage_config=stage, on_event=show, **chosen
        )
    if json:
        console.as_json({"event": "result", "run": str(result.run.path), "step": result.step, "total": result.total,
                         "repeated": result.repeated, "seconds": result.seconds})  # fmt: skip
    if not result.repeated:
        console.say(f"{result.run.path}: {result.step} steps in {console.duration(result.seconds)}")
    console.say(f"next: avstore embed {result.run.path} {opened.path}")


class _Show:
    """Events of a training as progress, or as JSON lines."""

    def __init__(self, progress: console.Progress, json: bool) -> None:
        self.progress, self.json = progress, json

    def __call__(self, event: Event) -> None:
        if self.json:
            console.as_json({"event": event.kind, "method": event.method, "step": event.step, "total": event.total,
                             "text": event.text, "values": dict(event.values)})  # fmt: skip
        if event.kind == "step":
            values = event.values
            words = [f"loss {values['loss']:.4f}"] if isinstance(values.get("loss"), float) else []
            if isinstance(values.get("data_wait_s"), float):
                words.append(f"data wait {1000 * values['data_wait_s']:.0f} ms")
            if isinstance(values.get("device_wait_s"), float):
                words.append(f"device wait {1000 * values['device_wait_s']:.1f} ms")
            self.progress.stage_is(event.method)
            self.progress.update(event.step, event.total, extra=", ".join(words))
        elif event.kind == "note":
            console.warn(f"note: {console.visible(event.text)}")
        elif event.kind != "checkpoint":
            self.progress.stage_is(event.method)
            if event.kind == "start":
                self.progress.goes_on_from(event.step)
            console.say(f"{event.method}: {console.visible(event.text)}")


def _methods(json: bool) -> None:
    """A line each: what it asks for and where it is printed. Loads no method."""
    from trainers.methods import METHODS

    if json:
        for name, m in METHODS.items():
            console.as_json({"method": name, "summary": m.summary, "paper": m.paper, "labels": m.labels,
                             "picture": m.picture, "sound": m.sound, "views": m.views, "stage": m.stage})  # fmt: skip
        return
    rows = [
        [n, m.paper, _yes(m.labels), _yes(m.sound), m.views or BY,
         m.summary + (f" (after {m.stage})" if m.stage else "")]
        for n, m in METHODS.items()
    ]  # fmt: skip
    console.columns(["method", "paper", "labels", "sound", "views", "what"], rows)


BY = "by setting"


def _yes(value: bool | None) -> str:
    return BY if value is None else "yes" if value else "no"


def _help(context: typer.Context, name: str | None) -> None:
    """Usage; after METHOD its docstring (paper, idea, command, what differs) and its own settings."""
    if name is None:
        console.data(context.get_help())
        return
    import sys

    from trainers.config import preset_names, resolve
    from trainers.methods import method as find_method
    from trainers.settings import show_config as rows_of

    line = find_method(name)
    file = line.load()
    console.data((sys.modules[file.config.__module__].__doc__ or line.summary).strip())
    console.data("")
    console.data(f"presets: {', '.join(preset_names(name))}")
    needs = [
        word if on else f"{word} ({BY})"
        for word, on in (("pictures", line.picture), ("sound", line.sound), ("labels", line.labels))
        if on is not False
    ]
    console.data(
        f"needs: {', '.join(needs)}; views: {line.views or BY}" + (f"; starts from {line.stage}" if line.stage else "")
    )
    console.data("settings of its own (--set key=value; avstore train NAME --show-config has the loop's too):")
    _settings([r for r in rows_of(resolve(name)) if r.of == "method"], False)
    console.data("")
    console.data(context.get_help())


def _settings(rows: Any, json: bool) -> None:
    if json:
        for row in rows:
            console.as_json(dict(row.__dict__))
        return
    from trainers.typed import as_text

    console.columns(
        ["setting", "value", "paper", "where from"],
        [[r.key, as_text(r.value), "" if r.paper is None else as_text(r.paper), r.source] for r in rows],
    )


def _without_fold(
    store: Store, config: RunConfig, chosen: dict[str, Any], fold: str, fold_seed: int, label: str
) -> dict[str, Any]:
    """The selection less the videos of fold i: what `bench retrieval --folds n` then asks as queries."""
    from benchmarks.rank import folds
    from trainers.fit import select

    if "subset" in chosen:
        raise UsageError("--fold and --subset", "folds are of the whole selection", "leave one of them away")
    i, n = fold_of(fold)
    numbers = select(store, config, **chosen).numbers
    keys = [store.key(int(v)) for v in numbers]
    which = folds(keys, store.column(label, numbers), n, fold_seed)
    kept = [k for k, f in zip(keys, which.tolist(), strict=True) if f != i]
    return {"list": kept, **({"where": chosen["where"]} if "where" in chosen else {})}


def _preview(store: Store, config: RunConfig, chosen: dict[str, Any], run: Path | None, json: bool) -> None:
    """What a training would see: the selection, the steps, what is approximate."""
    import math
    import shutil

    from trainers import fit
    from trainers.run import RUNS

    fitted, notes = fit.fit(config, store)
    found = fit.select(store, fitted, **chosen)
    loop = fitted.loop
    per_epoch = math.ceil(len(found) * loop.draws / loop.batch)
    path = run if run is not None else RUNS / config.name
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    value: dict[str, Any] = {
        "run": str(path),
        "store": str(store.path),
        "videos": len(found),
        "selection": found.description,
        "digest": found.digest,
        "batch": loop.batch,
        "steps": loop.steps or per_epoch * loop.epochs,
        "approximate": list(notes),
        "free": shutil.disk_usage(folder).free,
    }
    if json:
        console.as_json(value)
        return
    console.pairs([*((k, v) for k, v in value.items() if k not in ("approximate", "free")),
                   *(("note", n) for n in notes), ("free disk", console.size(value["free"]))])  # fmt: skip
