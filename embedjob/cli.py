"""The command line: what is asked, who answers, and the exit code.

Heavy rooms are imported inside the commands, so that `--help` and a typo cost no seconds.
"""

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.job_file import JobSource, read_job, validate_partial
from embedjob.config.types import seconds_of
from embedjob.config.url_secrets import redacted
from embedjob.errors import ConfigError, EmbedjobError, InterruptedRunError, amount

app = typer.Typer(
    help="Parquet shards in, embedding shards out, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file.")]
OutPath = Annotated[str, typer.Argument(metavar="OUT", help="An output, as in output.path.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; run prints it as last line.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster, or auto; else a local Ray.")]
Takeover = Annotated[bool, typer.Option(help="Do not wait for the lease of a run that died.")]
NewFingerprint = Annotated[
    bool, typer.Option("--new-fingerprint", help="Write another recipe's vectors beside the old.")
]
PublishPartial = Annotated[
    bool, typer.Option("--publish-partial", help="Publish in spite of faults; they are listed.")
]
Repair = Annotated[bool, typer.Option("--repair", help="Make damaged chunks again.")]
RetryQuarantined = Annotated[
    bool, typer.Option("--retry-quarantined", help="Do chunks with quarantined rows again.")
]
NewInput = Annotated[
    bool, typer.Option("--new-input", help="Replace the served corpus by that of another input.")
]
Refit = Annotated[bool, typer.Option("--refit", help="Make the artefacts of fits once more.")]
AllowShrink = Annotated[
    bool, typer.Option("--allow-shrink", help="Publish fewer rows than run.max_shrink allows.")
]


@app.command()
def run(  # noqa: PLR0913 - each parameter is an option of the command line
    *,
    job: JobFile,
    sets: Sets = None,
    address: Address = None,
    as_json: AsJson = False,
    takeover: Takeover = False,
    new_fingerprint: NewFingerprint = False,
    publish_partial: PublishPartial = False,
    repair: Repair = False,
    retry_quarantined: RetryQuarantined = False,
    new_input: NewInput = False,
    allow_shrink: AllowShrink = False,
    refit: Refit = False,
) -> None:
    """Embed what is left of a job, and publish it."""
    source = _source(job, sets)
    from embedjob.job.options import Console as RunConsole
    from embedjob.job.options import Options
    from embedjob.pipeline import embed
    from embedjob.reports.progress import shown
    from embedjob.reports.summary import show_summary

    options = Options(
        address=address,
        takeover=takeover,
        new_fingerprint=new_fingerprint,
        publish_partial=publish_partial,
        repair=repair,
        retry_quarantined=retry_quarantined,
        new_input=new_input,
        allow_shrink=allow_shrink,
        refit=refit,
    )
    result = embed(source, options, RunConsole(_say, shown))
    show_summary(result, Console(stderr=as_json))
    if as_json:
        _print_json(result.summary.as_dict())
    if result.exit_code:
        _say(result.verdict)
        raise typer.Exit(result.exit_code)


@app.command()
def score(  # noqa: PLR0913 - each parameter is an option of the command line
    pairs: Annotated[str, typer.Argument(metavar="PAIRS.parquet", help="Pairs of texts.")],
    *,
    model: Annotated[str, typer.Option(help="A language model, as in encoder.model.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="Where the distances are put.")],
    left: Annotated[str, typer.Option(help="The column of the one text.")] = "left",
    right: Annotated[str, typer.Option(help="The column of the other text.")] = "right",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How continuations are sampled: count=20."),
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="The GPUs of each actor.")] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Score pairs of texts by the exact trajectory distance (arXiv:2310.18348); resumes."""
    from embedjob.config.job_file import trajectory_settings
    from embedjob.stages.language.score import Pairs
    from embedjob.stages.language.score import score as scored

    settings = trajectory_settings(sets or ())
    of = Pairs(pairs, left, right)
    ended = scored(of, out, model, settings=settings, gpus=gpus, address=address)
    if as_json:
        _print_json(ended.as_dict())
    else:
        done = f"{amount(ended.chunks, 'chunk')}, {ended.chunks_done_before:,} of them done before"
        _say(f"{amount(ended.pairs, 'pair')} in {done}: {ended.directory}")
    for fault in ended.faults:
        _say(f"fault: {fault}")
    if ended.faults:
        raise typer.Exit(1)


@app.command()
def fit(  # noqa: PLR0913 - each parameter is an option of the command line
    *,
    job: JobFile,
    sets: Sets = None,
    address: Address = None,
    as_json: AsJson = False,
    takeover: Takeover = False,
    publish_partial: PublishPartial = False,
    refit: Refit = False,
) -> None:
    """Make the artefacts of a job's fits, and embed nothing but what they need."""
    source = _source(job, sets)
    from functools import partial

    from embedjob.job.options import Console as RunConsole
    from embedjob.job.options import Options
    from embedjob.job.planning import plan_job
    from embedjob.pipeline import embed_plan
    from embedjob.reports.progress import shown
    from embedjob.stages.fits.fit import make_artefacts

    console = RunConsole(_say, shown)
    options = Options(
        address=address, takeover=takeover, publish_partial=publish_partial, refit=refit
    )
    plan = plan_job(source, refit=refit)
    made = make_artefacts(
        plan, partial(embed_plan, console=console), options=options, console=console
    )
    for one in made.fits:
        if as_json:
            _print_json(one.as_dict())
        elif one.made is not None:
            read = "text" if FITS[one.section.kind].of_texts else "vector"
            typer.echo(f"{one.name}: {one.made.name}, from {amount(one.made.rows, read)}")


@app.command()
def preview(
    job: JobFile,
    sets: Sets = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show the views, spans and micro-batches of a few rows; loads no weights."""
    source = _source(job, sets)
    from embedjob.reports.preview import preview as described
    from embedjob.reports.preview import show

    views = described(source, rows, _say)
    if not as_json:
        show(views, Console())
        return
    for view in views:
        _print_json(view)


@app.command()
def verify(out: OutPath, as_json: AsJson = False) -> None:
    """Read an output again and check every promise; exit 1 and a list if one is broken."""
    from embedjob.reports.verify import verify as checked

    report = checked(out)
    if as_json:
        _print_json(report.as_dict())
    else:
        Console().print(
            f"{amount(report.files, 'file')}, {amount(report.rows, 'row')},"
            f" {amount(len(report.problems), 'problem')}"
        )
        for problem in report.problems:
            _say(problem)
        for note in report.notes:
            _say(f"note: {note}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    resolved: Annotated[
        str | None, typer.Option(metavar="JOB.yaml", help="Print every key and who set it.")
    ] = None,
    sets: Sets = None,
) -> None:
    """List the methods, show one, or show what a job makes of it."""
    from embedjob.reports.method_listing import resolved_lines, show_method, show_methods

    if resolved is not None:
        named = [f"encoder.method={name}"] if name else []
        for line in resolved_lines(_source(resolved, [*named, *(sets or [])])):
            typer.echo(line)
    elif name is None:
        show_methods(Console())
    else:
        show_method(name, Console())


@app.command()
def prune(
    out: OutPath,
    keep: Annotated[int, typer.Option(min=1, help="How many snapshots stay readable.")] = 2,
    grace: Annotated[
        str, typer.Option(metavar="DURATION", help="For how long a replaced snapshot stays, too.")
    ] = "24h",
) -> None:
    """Delete embedding files that no kept snapshot names, and what no kept recipe generated."""
    from embedjob.output.cleanup import prune as pruned

    try:
        seconds = seconds_of(grace)
    except ValueError as error:
        raise ConfigError(f"--grace: got {grace}; {error}") from error
    deleted = pruned(out, keep=keep, grace_seconds=seconds, say=_say)
    kinds = [amount(deleted.files, "file"), amount(deleted.snapshots, "snapshot")]
    if deleted.generations:
        kinds.append(f"{amount(deleted.generations, 'file')} of generations")
    Console().print(f"{', '.join(kinds[:-1])} and {kinds[-1]} deleted")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 faults, 2 refused, 3 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        app(args=None if argv is None else list(argv))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except EmbedjobError as error:
        _say(f"embedjob: {error}")
        return error.exit_code
    except OSError as error:  # a full disk, a network that is gone: no traceback helps with these
        _say(f"embedjob: {error}; finished chunks are committed; run again to resume")
        return 1
    return 0


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """End this process with the exit code of one command."""
    try:
        code = main(argv)
    except ModuleNotFoundError:
        raise  # jobs/embed.py says which Python lacks it
    except Exception:  # a fault of ours, which ends in a traceback and in the code of one
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    execution = sys.modules.get("embedjob.stages.execution")
    if execution is None or not execution.is_unfinished():
        # Else an orderly end would have Ray shut down under a thread that uses it.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    # A thread that Arrow reads with frees what it read after it has handed it on. That takes the
    # interpreter's lock, and where the interpreter ends meanwhile, Python ends the thread inside of
    # a destructor, and C++ the process (signal 6): what was said would have another exit code.
    os._exit(code)


def _source(job: str, sets: Sequence[str] | None) -> JobSource:
    source = read_job(job, sets or ())
    # Before the imports that cost seconds: most mistakes are found here.
    validate_partial(source)
    return source


def _interrupted(number: int, _frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise InterruptedRunError(
        f"stopped by {name}; finished chunks are committed; run again to resume"
    )


def _say(message: str) -> None:
    sys.stderr.write(f"{redacted(message)}\n")
    sys.stderr.flush()


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
