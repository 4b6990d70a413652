"""The command line: parse, call, print. Documents go to stdout, messages to stderr."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import (
    EnvironmentFaultError,
    InterruptedConversionError,
    MoeCkptError,
    UsageError,
    VerifyError,
    show,
)

if TYPE_CHECKING:
    from typing import Unpack

    from .options import PlanOptions
    from .plan import Plan

_SHOWN_PROBLEMS = 20
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _named(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty path: it would mean the current folder, and is a variable that is not set."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("is empty")
    return value


_in_dir = click.argument("in_dir", metavar="IN", callback=_named)


def _experts_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a command is told of the experts, stored and written."""
    for option in (
        click.option(
            "--gate-up-order",
            metavar="ORDER",
            help="concat or interleaved: how gate and up lie in one tensor, the same.",
        ),
        click.option(
            "--layout",
            metavar="NAME",
            help="How IN stores experts, where headers and model type leave it open; see layouts.",
        ),
        click.option(
            "--experts",
            default="auto",
            show_default=True,
            help="split: a matrix for each; fused: as ModelOpt fuses Llama 4 and gpt-oss; "
            "auto: what most runtimes read.",
        ),
    ):
        command = option(command)
    return command


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where to compute and with how much; nothing of it changes a byte."""
    for option in (
        click.option(
            "--device-memory",
            default="2GiB",
            show_default=True,
            help="All buffers on the GPU together.",
        ),
        click.option(
            "--memory",
            default="256MiB",
            show_default=True,
            help="All buffers together, beside the program itself.",
        ),
        click.option("--workers", type=int, help="Threads; if not given one per core, 16 at most."),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    ):
        command = option(command)
    return command


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moe-ckpt")
def cli() -> None:
    """Quantize Mixture-of-Experts checkpoints file by file, without loading the model."""


@cli.command()
@_in_dir
@click.argument("out_dir", metavar="OUT", callback=_named)
@click.option(
    "--stats",
    multiple=True,
    metavar="FILE",
    callback=_named,
    help="Activation statistics; may be given more than once, the maximum counts.",
)
@click.option(
    "--format",
    metavar="NAME",
    help="Number format, nvfp4 if not given; `moe-ckpt formats` lists them.",
)
@click.option(
    "--quantize",
    metavar="WHAT",
    help="experts: routed experts only, if not given; linear: every linear layer.",
)
@click.option(
    "--recipe",
    metavar="FILE",
    callback=_named,
    help="TOML that says which modules become which format, instead of the two above.",
)
@click.option(
    "--dialect",
    metavar="NAME",
    help="modelopt, compressed-tensors or fp8; what most runtimes load if not given.",
)
@click.option(
    "--kv-cache",
    default="none",
    show_default=True,
    help="fp8: write scales for an FP8 KV cache, from output_amax in the statistics.",
)
@click.option(
    "--weight-amax",
    metavar="FILE",
    callback=_named,
    help="What `moe-ckpt scan` found in IN; saves a pass over it.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Round 4-bit weights a second time, to another 4-bit format.",
)
@_experts_options
@_limit_options
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Tensors in one output file."
)
@click.option(
    "--missing-stats",
    default="error",
    show_default=True,
    help="error, or constant: input scale 1.0 where statistics are missing.",
)
@click.option("--overwrite", is_flag=True, help="Remove an earlier conversion in OUT, start anew.")
@click.option(
    "--trust-journal",
    is_flag=True,
    help="Going on, compare only the sizes of finished shards with the journal, not SHA-256.",
)
@click.option(
    "--hash-source",
    is_flag=True,
    help="Record SHA-256 of the shards of IN; going on, they count instead of modification times.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@_json_option
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="Print the plan before converting.")
def convert(
    in_dir: str,
    out_dir: str,
    device: str,
    workers: int | None,
    memory: str,
    device_memory: str,
    overwrite: bool,
    trust_journal: bool,
    hash_source: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Unpack[PlanOptions],
) -> None:
    """Convert the checkpoint folder IN to a quantized one in the new folder OUT.

    If it is interrupted, the same command goes on with it.
    """
    from pathlib import Path

    from .options import Limits
    from .out_dir import check_out_dir
    from .planner import make_plan
    from .progress import Progress
    from .report import plan_document, plan_lines, result_lines
    from .resume import check_resumable

    limits = Limits(workers, memory, device_memory)
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    plan = make_plan(in_dir, **options)
    if not quiet and (verbose or dry_run):
        _say(plan_lines(plan, limits))
    _say_notes(plan, quiet)
    if dry_run:
        check_resumable(plan, Path(out_dir), overwrite=overwrite)
        if as_json:
            _print_json(plan_document(plan, limits))
        return
    from .conversion import execute
    from .engines import backend_for

    backend = backend_for(device)
    if backend.note and not quiet:
        _say([f"note: {backend.note}"])
    with Progress(plan, _say, quiet=quiet) as report:
        result = execute(
            plan,
            out_dir,
            backend=backend,
            limits=limits,
            overwrite=overwrite,
            trust_journal=trust_journal,
            hash_source=hash_source,
            progress=report,
            say=(lambda _line: None) if quiet else (lambda line: _say([line])),
        )
        _ignore_signals()  # the output is complete: say so, whatever comes now
    if not quiet:
        _say(result_lines(result))
    if as_json:
        done = {"out_dir": str(result.out_dir), "device": result.device, "seconds": result.seconds}
        done |= {"resumed_shards": result.resumed, "was_complete": result.was_complete}
        _print_json(plan_document(plan, limits) | {"result": done})


@cli.command()
@_in_dir
@_experts_options
@_json_option
def inspect(in_dir: str, as_json: bool, **options: Unpack[PlanOptions]) -> None:
    """Show what is in the checkpoint folder IN, and what a default conversion would do."""
    from .planner import make_plan
    from .report import plan_document, plan_lines

    options["allow_requantize"] = True  # to look at a file is no decision
    plan = make_plan(in_dir, **options)
    if as_json:
        _print_json(plan_document(plan))
    else:
        _say(plan_lines(plan))
    _say_notes(plan, quiet=as_json)


@cli.command()
@_in_dir
@click.option(
    "-o", "--output", "out_file", required=True, metavar="FILE", callback=_named, help="To write."
)
@click.option("--layout", metavar="NAME", help="See convert.")
@click.option("--gate-up-order", metavar="ORDER", help="See convert.")
@_limit_options
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
def scan(
    in_dir: str,
    out_file: str,
    layout: str | None,
    gate_up_order: str | None,
    device: str,
    workers: int | None,
    memory: str,
    device_memory: str,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Find the largest magnitude of every weight in IN, for convert --weight-amax."""
    from .engines import backend_for
    from .options import Limits
    from .scan import scan as scan_folder

    count = scan_folder(
        in_dir,
        out_file,
        backend=backend_for(device),
        limits=Limits(workers, memory, device_memory),
        layout=layout,
        gate_up_order=gate_up_order,
        overwrite=overwrite,
    )
    if not quiet:
        _say([f"amax of {count:,} modules written to {out_file}"])


@cli.command()
@click.argument("out_dir", metavar="OUT", callback=_named)
@click.option(
    "--source",
    metavar="IN",
    callback=_named,
    help="The checkpoint that OUT was made from, to compare with.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Quantized weights to compare with IN, 64 if not given, evenly spread.",
)
@click.option("--all", "compare_all", is_flag=True, help="Compare all of them.")
@_limit_options
@_json_option
@click.option("-q", "--quiet", is_flag=True, help="Print only what is wrong.")
def verify(
    out_dir: str,
    source: str | None,
    sample: int | None,
    compare_all: bool,
    device: str,
    workers: int | None,
    memory: str,
    device_memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the quantized checkpoint OUT, whoever made it, and exit with 6 if something is wrong.

    Checked are files, names and shapes; every scale; what runtimes make of the configuration; and
    with --source, whether the weights are those of IN.
    """
    from .engines import backend_for
    from .options import Limits
    from .verify import verify as verify_folder
    from .verify.report import document, lines, outcome

    if compare_all and sample is not None:
        raise UsageError("--all compares what --sample would choose from; give one of them")
    if source is None and (compare_all or sample is not None):
        raise UsageError("--sample and --all are about --source; give it too")
    findings = verify_folder(
        out_dir,
        source=source,
        sample=None if compare_all else sample or 64,
        backend=backend_for(device) if source is not None else None,
        limits=Limits(workers, memory, device_memory),
    )
    _say(lines(findings, quiet=quiet))
    if as_json:
        _print_json(document(findings))
    if findings.is_clean and not quiet:
        _say([f"{show(out_dir)}: {outcome(findings)}"])
    if not findings.is_clean:
        raise VerifyError(f"{show(out_dir)}: {outcome(findings)}")


@cli.command()
@_json_option
def formats(as_json: bool) -> None:
    """List number formats: their size, what they need, how they are spelled, who reads them."""
    from .catalogue import formats_document, formats_lines

    if as_json:
        _print_json(formats_document())
    else:
        for line in formats_lines():
            click.echo(line)


@cli.command()
@_json_option
def layouts(as_json: bool) -> None:
    """List how families of models store experts, and which runtimes read what is written."""
    from .catalogue import layouts_document, layouts_lines

    if as_json:
        _print_json(layouts_document())
    else:
        for line in layouts_lines():
            click.echo(line)


def main() -> NoReturn:
    """Run the command line and exit with the code that the error tree documents."""
    # numba imports it to look for a BLAS that no kernel uses, which takes longer than all of ours.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants hangups ignored
            signal.signal(number, _terminate)
    code = _run(cli)
    _ignore_signals()
    sys.exit(code)


def _run(command: Callable[..., Any]) -> int:
    try:
        command(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        return _fail(InterruptedConversionError())
    except MoeCkptError as error:
        _ignore_signals()
        return _fail(error)
    except OSError as error:
        with suppress(OSError):
            sys.stdout.close()  # else the interpreter tries again to write what is left
        return _fail(EnvironmentFaultError(f"standard output: {error.strerror}"))
    except Exception:  # noqa: BLE001  any other exception is a bug to report
        with tempfile.NamedTemporaryFile(
            "w", prefix="moe-ckpt-", suffix=".log", delete=False
        ) as log:
            log.write(traceback.format_exc())
        _error(f"this is a bug in moe-ckpt; please report it with the log {log.name}")
        return 1


def _fail(error: MoeCkptError) -> int:
    for problem in error.problems[:_SHOWN_PROBLEMS]:
        _error(problem)
    rest = len(error.problems) - _SHOWN_PROBLEMS
    if rest > 0:
        _error(f"and {rest} more problems of this kind")
    return error.exit_code


def _terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    raise InterruptedConversionError(128 + signum)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _error(message: str) -> None:
    _say([f"moe-ckpt: error: {message}"])


def _say(lines: Iterable[str]) -> None:
    """Write to stderr if it can be written to: hours of work do not depend on it."""
    with suppress(OSError, ValueError):
        for line in lines:
            click.echo(line, err=True)


def _say_notes(plan: Plan, quiet: bool) -> None:
    if not quiet:
        _say(f"moe-ckpt: note: {note}" for note in plan.notes)
    _say(f"moe-ckpt: warning: {warning}" for warning in plan.warnings)


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))
