"""avstore: the command line. `run` is the entry point; it turns every error into three lines and an exit code.

0 ok, 1 failed, 2 usage, 3 finished but some files failed, 4 not found, 5 conflict, 130 interrupted (repeat to go on).
Importing this loads neither torch nor PyAV; each command imports what it needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import avstore
from avstore.errors import AvstoreError, InterruptedRun, MachineError, UsageError, did_you_mean
from cli import (
    bench,
    bench_finetune,
    bench_gpu,
    bench_growth,
    bench_ingest,
    bench_methods,
    bench_pieces,
    bench_probe,
    bench_step,
    bench_summarize,
    bench_untrimmed,
    console,
    convert,
    demo,
    derive,
    doctor,
    embed,
    explain,
    export,
    ingest,
    query,
    report,
    store,
    summarize,
    train,
)

HELP = """Videos with sound, decoded once into a store; encoders trained on it; search by sight and sound.

\b
  avstore ingest kinetics/        -> kinetics.zarr     (resumes by repeating it)
  avstore train avid-cma          -> runs/avid-cma/    (resumes by repeating it)
  avstore embed avid-cma          writes embeddings into the store
  avstore query --video clip.mp4  the nearest videos by sight
  avstore query --audio dog.wav   the nearest by sound
  avstore bench retrieval         R@k, with its controls

STORE omitted: $AVSTORE_STORE, else the only *.zarr store in the current folder.

Exit codes: 0 ok, 1 failed, 2 usage, 3 finished but some files failed, 4 not found, 5 conflict, 130 interrupted
(repeat the command to go on)."""


class Commands(TyperGroup):
    """A group that suggests close matches for an unknown command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(
                f"there is no command {args[0]!r}",
                did_you_mean(args[0], self.list_commands(ctx)),
                f"{ctx.command_path} --help",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as e:  # typer would take it for a reader of stdout that went away, and say nothing
            raise AvstoreError(
                "a process that avstore had started ended early", str(e), "repeat the command; --debug shows where"
            ) from e

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order in which one uses them


plain: dict[str, Any] = {"cls": Commands, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(help=HELP, no_args_is_help=True, **plain)
app.command("ingest")(ingest.ingest)
app.command("derive")(derive.derive)
app.command("info")(store.info)
app.command("ls")(store.ls)
app.command("verify")(store.verify)
app.command("train")(train.train)
app.command("embed")(embed.embed)
app.command("export")(export.export)
app.command("convert")(convert.convert)
app.command("query")(query.query)
app.command("summarize")(summarize.summarize)
app.command("explain")(explain.explain)
app.command("report")(report.report)
benches = typer.Typer(help="Measure: quality and speed.", no_args_is_help=True, **plain)
benches.command("retrieval")(bench.retrieval)
benches.command("svm")(bench_probe.svm)
benches.command("linear")(bench_probe.linear)
benches.command("knn")(bench_probe.knn)
benches.command("finetune")(bench_finetune.finetune)
benches.command("summarize")(bench_summarize.summarize)
benches.command("untrimmed")(bench_untrimmed.untrimmed)
benches.command("loader")(bench.loader)
benches.command("growth")(bench_growth.growth)
benches.command("methods")(bench_methods.methods)
benches.command("pieces")(bench_pieces.pieces)
benches.command("ingest")(bench_ingest.ingest)
benches.command("step")(bench_step.step)
benches.command("gpu")(bench_gpu.gpu)
app.add_typer(benches, name="bench")
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"avstore {avstore.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """The options before the command."""


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code."""
    # OpenMP threads that wait by spinning starve each other as soon as the cores are shared (docs/decisions.md); it is
    # read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = invoke(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
    sys.exit(code)


def invoke(arguments: list[str]) -> int:
    """The exit code of a command; prints its errors."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > end]
    if arguments[:1] == ["train"] and arguments[-1] == "--list":
        arguments[-1] = "--list-methods"
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="avstore", standalone_mode=False)
        if code == 130:
            console.error(InterruptedRun("interrupted"))
        return code if isinstance(code, int) else 0
    except AvstoreError as e:
        return _told(e, debug)
    except KeyboardInterrupt:
        return _told(InterruptedRun("interrupted"), debug)
    except console.ReaderGone:  # | head
        _close_stdout()
        return 0
    except Exception as e:
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):
            return _told(_usage(e), debug)
        if type(e).__name__ == "Abort":
            return _told(InterruptedRun("interrupted"), debug)
        if isinstance(e, OSError) and e.strerror:
            name = f"{e.filename}: " if e.filename else ""
            return _told(MachineError(f"{name}{e.strerror}", "the system refused it", "--debug shows where"), debug)
        if isinstance(e, MemoryError):
            return _told(MachineError("out of memory", str(e), "a smaller --set batch=, or fewer videos"), debug)
        unexpected = AvstoreError(
            f"{type(e).__name__}: {e}", "this is a fault of avstore itself", "run it again with --debug and report it"
        )
        return _told(unexpected, debug)


def _told(e: AvstoreError, debug: bool) -> int:
    if debug:
        console.traceback()
    console.error(e)
    return e.exit_code


def _usage(e: Any) -> AvstoreError:
    """The parser's complaint in three lines."""
    lines = str(e.format_message()).splitlines() or ["wrong usage"]
    context = getattr(e, "ctx", None)
    path = context.command_path if context is not None else "avstore"
    why = ""
    if getattr(e, "option_name", None) and context is not None:
        options = [o for p in context.command.params for o in getattr(p, "opts", ()) if o.startswith("--")]
        lines, why = [f"there is no option {e.option_name}"], did_you_mean(e.option_name, options)
    return UsageError(lines[0].rstrip("."), why, f"{path} --help")


def _close_stdout() -> None:
    """Nobody reads any more: what Python still holds must not fail at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    run()
