"""The command line: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import UncheckedError, UsageError, VerifyError, show
from ..version import __version__
from .shared_options import in_argument, json_option, limit_options, named, plan_options
from .signals import ignore_signals
from .terminal import print_json, say, say_notes

if TYPE_CHECKING:
    from typing import Unpack

    from ..planning.options import PlanOptions

__all__ = ["cli"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moe-ckpt")
def cli() -> None:
    """Quantize Mixture-of-Experts checkpoints file by file, without loading the model."""


@cli.command()
@in_argument
@click.argument("out_dir", metavar="OUT", callback=named)
@plan_options()
@limit_options
@click.option(
    "--overwrite", is_flag=True, help="Remove an earlier conversion in OUT and start over."
)
@click.option(
    "--trust-journal",
    is_flag=True,
    help="Going on, compare only the sizes of finished shards with the journal, not SHA-256.",
)
@click.option(
    "--hash-source",
    is_flag=True,
    help="Record SHA-256 of the files of IN; going on, they count instead of modification times.",
)
@click.option(
    "--no-verify", is_flag=True, help="Do not check the result before its configuration is written."
)
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@json_option
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
    no_verify: bool,
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

    from ..conversion import execute, prepare
    from ..limits import Limits
    from ..output.resume import check_resumable
    from ..report.plan_report import plan_document, plan_lines
    from ..report.result_report import result_document, result_lines
    from .progress import Progress

    limits = Limits(workers, memory, device_memory)
    plan = prepare(in_dir, out_dir, overwrite=overwrite, **options)
    if not quiet and (verbose or dry_run):
        say(plan_lines(plan, limits))
    say_notes(plan, quiet)
    if dry_run:
        check_resumable(plan, Path(out_dir), overwrite=overwrite)
        if as_json:
            print_json(plan_document(plan, limits))
        return
    from ..engines import backend_for

    backend = backend_for(device)
    if backend.note and not quiet:
        say([f"note: {backend.note}"])
    with Progress(plan, say, quiet=quiet) as report:
        result = execute(
            plan,
            out_dir,
            backend=backend,
            limits=limits,
            overwrite=overwrite,
            trust_journal=trust_journal,
            hash_source=hash_source,
            verify=not no_verify,
            progress=report,
            say=(lambda _line: None) if quiet else (lambda line: say([line])),
        )
        ignore_signals()  # the output is complete: say so, whatever comes now
    if not quiet:
        say(result_lines(result))
    if as_json:
        print_json(result_document(result, limits))


@cli.command()
@in_argument
@plan_options("experts", "layout", "gate_up_order")
@json_option
def inspect(in_dir: str, as_json: bool, **options: Unpack[PlanOptions]) -> None:
    """Show what is in the checkpoint folder IN, and what a default conversion would do."""
    from ..planning.planner import make_plan
    from ..report.plan_report import plan_document, plan_lines

    options["allow_requantize"] = True  # to look at a file is no decision
    plan = make_plan(in_dir, **options)
    if as_json:
        print_json(plan_document(plan))
    else:
        say(plan_lines(plan))
    say_notes(plan, quiet=as_json)


@cli.command()
@in_argument
@click.option(
    "-o",
    "--output",
    "out_file",
    required=True,
    metavar="FILE",
    callback=named,
    help="The file to write.",
)
@plan_options("layout", "gate_up_order")
@limit_options
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
    from ..engines import backend_for
    from ..limits import Limits
    from ..scan import scan as scan_folder

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
        say([f"amax of {count:,} modules written to {out_file}"])


@cli.command()
@click.argument("out_dir", metavar="OUT", callback=named)
@click.option(
    "--source",
    metavar="IN",
    callback=named,
    help="The checkpoint that OUT was made from, to compare with.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Quantized weights to compare with IN, 64 if not given, evenly spread.",
)
@click.option("--all", "compare_all", is_flag=True, help="Compare all of them.")
@limit_options
@json_option
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
    """Check the quantized checkpoint OUT, whoever made it.

    The exit code is 6 if something is wrong, and 7 if nothing is, but not all can be checked.
    Checked are files, names and shapes; every scale; what runtimes make of the configuration; and
    with --source, whether the weights are those of IN.
    """
    from ..engines import backend_for
    from ..limits import Limits
    from ..report.verification import document, lines, outcome
    from ..verify import verify as verify_folder
    from ..verify.findings import ERROR

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
    say(lines(findings, quiet=quiet))
    if as_json:
        print_json(document(findings))
    said = f"{show(out_dir)}: {outcome(findings)}"
    if findings.of_grade(ERROR):
        raise VerifyError(said)
    if not findings.is_clean:
        raise UncheckedError(said)
    if not quiet:
        say([said])


@cli.command()
@in_argument
@click.argument("out_dir", metavar="OUT", callback=named)
@plan_options("stats")
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Threads, at most 256; if not given one per core, up to 16.",
)
@click.option("--overwrite", is_flag=True, help="Remove an earlier repair in OUT and start over.")
@click.option(
    "--trust-journal",
    is_flag=True,
    help="Going on, compare only the sizes of finished shards with the journal, not SHA-256.",
)
@click.option(
    "--partial", is_flag=True, help="Mend what can be mended, though something stays wrong."
)
@click.option("--dry-run", is_flag=True, help="Say what would be mended; write nothing.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
def repair(
    in_dir: str,
    out_dir: str,
    stats: tuple[str, ...],
    workers: int | None,
    overwrite: bool,
    trust_journal: bool,
    partial: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a copy of the quantized checkpoint IN, whoever made it, with its faults mended.

    Mended are scales that must be equal and are not, that are missing, or stored as their
    reciprocal; dtypes of scales; what config.json and hf_quant_config.json say; and the index.
    All else keeps its bytes. If nothing is to be mended, nothing is written.
    """
    from pathlib import Path

    from ..limits import Limits
    from ..output.out_dir import check_out_dir
    from ..repairing import carry_out, make_repair
    from ..report.repair_report import repair_document, repair_lines, repaired_lines
    from .progress import Progress

    limits = Limits(workers)
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    found = make_repair(in_dir, stats=stats)
    if not quiet:
        say(repair_lines(found))
    result = None
    if not dry_run and found.plan is None:
        found.refuse_what_is_left()
    elif not dry_run and found.plan is not None:
        with Progress(found.plan, say, quiet=quiet) as report:
            result = carry_out(
                found,
                out_dir,
                partial=partial,
                limits=limits,
                overwrite=overwrite,
                trust_journal=trust_journal,
                progress=report,
                say=(lambda _line: None) if quiet else (lambda line: say([line])),
            )
            ignore_signals()  # the output is complete: say so, whatever comes now
    if result is not None and not quiet:
        say(repaired_lines(result))
    if as_json:
        print_json(repair_document(found, result))
    if result is not None and found.left:
        raise VerifyError(*found.left, f"{show(out_dir)}: is mended in part; this stays wrong")


@cli.command()
@json_option
def formats(as_json: bool) -> None:
    """List number formats: their size, what they need, how they are spelled, who reads them."""
    from ..report.catalogue import formats_document, formats_lines

    if as_json:
        print_json(formats_document())
    else:
        for line in formats_lines():
            click.echo(line)


@cli.command()
@json_option
def layouts(as_json: bool) -> None:
    """List how families of models store experts, and which runtimes read what is written."""
    from ..report.catalogue import layouts_document, layouts_lines

    if as_json:
        print_json(layouts_document())
    else:
        for line in layouts_lines():
            click.echo(line)
