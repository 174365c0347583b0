"""`avstore report`: one page about a store or a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.choose import store_path

if TYPE_CHECKING:
    from avstore.store import Store
    from trainers.run import Run


def report(
    what: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|STORE]", help="Default: $AVSTORE_STORE, else the only store here."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    run: Annotated[list[str] | None, typer.Option(help="More runs whose curves are shown; repeatable.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="The store of a run. Default: where it was trained, if it is still there.")
    ] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Results: a bench's --json, repeatable. Those of benches of the store come by themselves.",
        ),
    ] = None,
    picture: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A picture, repeatable. RUN/pictures/* come by themselves."),
    ] = None,
    retrieval: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Embeddings in the store whose answers are shown.")
    ] = None,
    count: Annotated[int, typer.Option(help="Videos in the contact sheet.")] = 18,
    queries: Annotated[int, typer.Option(help="Queries shown for each of v-v and a-a; 0: none.")] = 4,
    saliency: Annotated[bool, typer.Option(help="Maps of what the run's networks look at and listen to.")] = True,
    clips: Annotated[int, typer.Option(help="Clips with such maps.")] = 2,
    summaries: Annotated[bool, typer.Option(help="Timelines: which moments of the longest videos matter.")] = True,
    videos: Annotated[int, typer.Option(help="Videos with such timelines.")] = 2,
    within: Annotated[
        float, typer.Option(help="Seconds for saliency and timelines together; what does not fit is named.")
    ] = 120.0,
    device: Annotated[str, typer.Option(help="Of the networks: auto, cpu, cuda, ...")] = "auto",
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """One page that works offline: counts, failures, contact sheet with sound, curves, results of benches, saliency,
    summaries, retrieval. Saliency and summaries run networks: --no-saliency and --no-summaries leave them out."""
    from avstore.durable import write_atomic
    from avstore.errors import UsageError
    from benchmarks.report import report as make
    from trainers.run import find_run

    if min(count, queries, clips, videos) < 0:
        raise UsageError(f"--count {count} --queries {queries} --clips {clips} --videos {videos}", "0 or more")
    if what is not None and not (what / "zarr.json").is_file():
        runs: list[Run] = [find_run(what)]
        opened: Store | None = _store_of(runs[0], store)
    else:
        if store is not None and what is not None:
            raise UsageError(f"{what} is a store, and --store names another", "--store is for the report of a run")
        import avstore

        runs, opened = [], avstore.open(store_path(what if what is not None else store))
    runs += [r for r in map(find_run, run or ()) if r.path.resolve() not in {x.path.resolve() for x in runs}]
    text = make(
        store=opened, runs=runs, embedded=retrieval, tables=bench or (), pictures=picture or (), count=count,
        queries=queries, saliency=clips if saliency else 0, summaries=videos if summaries else 0, within=within,
        seed=seed, label=label, device=device,
    )  # fmt: skip
    write_atomic(output, text.encode())
    console.say(f"wrote {output} ({console.size(output.stat().st_size)}): open it in a browser")


def _store_of(run: Run, given: Path | None) -> Store | None:
    """The store that a run was trained on; None, said aloud, where it is no longer there."""
    import avstore

    if given is not None:
        return avstore.open(given)
    named = Path(run.snapshot.store)
    for path in (named, run.path.resolve().parent.parent / named.name):  # as it was typed then; beside the runs
        if (path / "zarr.json").is_file():
            opened = avstore.open(path)
            if opened.fingerprint == run.snapshot.fingerprint:
                return opened
    console.warn(f"{named}, on which {run.name} was trained, is not there: the report is of the run alone (or --store)")
    return None
