"""Check a quantized checkpoint: what no runtime says, and what would go wrong unseen.

Four parts: structure (files, headers, names, shapes), scales (their values), config (what runtimes
will make of it), and source (whether it is what the source says). Each adds to `Findings`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from .findings import PARTS, Difference, Finding, Findings, Runtime

if TYPE_CHECKING:
    from ..engines import Backend
    from ..limits import Limits
    from .subject import Subject

__all__ = ["PARTS", "Difference", "Finding", "Findings", "Runtime", "check_parts", "verify"]


def verify(
    out_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    sample: int | None = 64,
    backend: Backend | None = None,
    limits: Limits | None = None,
) -> Findings:
    """Check a quantized checkpoint folder.

    Args:
        out_dir: the folder; it need not be a conversion of ours.
        source: the checkpoint that it was made from; None leaves the comparison out.
        sample: how many pieces of quantized weights are compared with it; None for all.
        backend: where to compute; the CPU if None. It changes no finding.
        limits: threads and memory.

    Raises:
        InputError: there is no such folder, or the source cannot be read.
        EnvironmentFaultError: disk, memory or GPU failed.
    """
    from ..faults import environment_faults
    from .config.agreement import check_keys
    from .structure.whole_model import check_whole_model
    from .subject import open_subject

    findings = Findings()
    with environment_faults():
        subject = open_subject(out_dir, findings)
        check_whole_model(subject, findings)
        check_keys(subject, findings)
        check_parts(subject, findings, read_weights=True)
    if source is None:
        findings.skipped["source"] = "no --source was given"
    else:
        from ..engines import backend_for
        from ..limits import Limits

        part = import_module(".source.comparison", __name__)
        part.against_source(
            subject, source, findings, sample, backend or backend_for("cpu"), limits or Limits()
        )
    return findings


def check_parts(subject: Subject, findings: Findings, *, read_weights: bool = False) -> None:
    """Check structure, scales and config, the first three parts.

    ``read_weights``: read whole weights too, for codes that are no numbers and for digests; else
    only scales are read.
    """
    from .config.consequences import tell_consequences
    from .config.modules import check_config
    from .inventory import inventory_of
    from .structure.digests import check_digests
    from .structure.tensors import check_structure
    from .values.scale_values import check_scales

    inventory = inventory_of(subject)
    check_structure(subject, inventory, findings)
    check_digests(subject, findings, read_all=read_weights)
    check_scales(subject, inventory, findings, read_weights=read_weights)
    check_config(subject, inventory, findings)
    tell_consequences(findings)
