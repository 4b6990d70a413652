"""What compared pairs say, as findings and figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from ...errors import show
from ...formats import UNQUANTIZED, find_format
from ...formats.scales import scale_of
from ...plan import Job
from ..findings import WARNING, Difference, Findings
from ..subject import Subject
from .comparer import Compared, Measured
from .lookup import Lookup
from .pairs import CopyPair, MatrixPair

__all__ = ["report"]

_GLOBAL = "global_scale"
_OTHER_WEIGHTS = "the module computes with other weights than the source"

# A matrix of which no more is left is lost.
_FEW, _SHARE = 16, 1000
_NOTHING = "it puts out nothing, there as here"
_LOST = (
    "what the matrix computed is lost; look at its largest weight, and choose a format with a "
    "scale for fewer weights if it is right"
)


def report(
    subject: Subject,
    lookup: Lookup,
    pairs: Sequence[CopyPair | MatrixPair],
    results: Sequence[Compared | None],
    findings: Findings,
    *,
    is_all: bool,
) -> None:
    """Add what was found, in the order of the pairs."""
    reporter = _Reporter(subject, lookup, findings)
    for pair, result in zip(pairs, results, strict=True):
        if result is None:
            continue
        if isinstance(pair, CopyPair):
            reporter.copied(result)
        else:
            reporter.converted(pair, result)
    if is_all and subject.is_ours:
        reporter.shared_scales()


class _Reporter:
    """One run of `report`."""

    def __init__(self, subject: Subject, lookup: Lookup, findings: Findings) -> None:
        self._is_ours = subject.is_ours
        self._lookup = lookup
        self._findings = findings
        self._stacks: dict[int, tuple[Job, str, float, float]] = {}

    def copied(self, result: Compared) -> None:
        """Bytes that should be those of the source."""
        self._findings.counts["copied tensors compared"] += 1
        for unequal in (result.unequal or {}).values():
            self._add(unequal.tensor.name, f"is not what the source has: {unequal.describe()}")

    def converted(self, pair: MatrixPair, result: Compared) -> None:
        """Matrices that should be those of the source, rounded."""
        names = [name for name in pair.names if name is not None]
        self._findings.counts["matrices compared"] += len(names)
        if result.failure:
            name, why = result.failure
            self._add(self._where(name), f"cannot be compared with the source: {why}")
        found = {measured.name: measured for measured in result.measured}
        for name in names:
            self._matrix(pair, result, name, found.get(name))

    def _matrix(
        self, pair: MatrixPair, result: Compared, name: str, measured: Measured | None
    ) -> None:
        unequal = result.unequal
        tensors = [info.name for _, info, _ in self._lookup.parts(name)]
        wrong = [unequal[tensor] for tensor in tensors if tensor in unequal] if unequal else []
        is_exact = None if unequal is None else not wrong
        is_plain = measured is None or measured.format == UNQUANTIZED
        is_copied = is_plain and pair.place.encoded.is_plain
        if is_exact is not None and (self._is_ours or is_copied):
            for one in wrong:
                again = "" if is_copied else " when the source is quantized again"
                self._add(one.tensor.name, f"{one.describe()}{again}")
        elif measured is not None and not is_exact and not result.failure:
            self._check_bound(measured)
        if measured is not None and not is_plain:
            snr_db = measured.distance.snr_db
            self._check_zeros(measured)
            self._findings.differences.append(
                Difference(measured.module, measured.format, is_exact, snr_db)
            )
            if result.shared is not None and pair.job and not pair.job.is_recoded:
                self._remember(pair.job, measured, result.shared)

    def _check_zeros(self, measured: Measured) -> None:
        """Report a matrix that is, or became, all zeros but for its largest weights."""
        found, where = measured.distance, self._where(measured.name)
        if found.present == 0:
            problem = "all weights are 0 in the source"
            self._findings.add("source", where, problem, _NOTHING, WARNING)
        elif found.present - found.lost <= max(_FEW, found.present // _SHARE) < found.lost:
            problem = (
                f"{found.lost:,} of {found.present:,} weights that are not 0 in the source became "
                f"0, beside the largest, which is {found.largest:.6g}"
            )
            self._findings.add("source", where, problem, _LOST, WARNING)

    def _check_bound(self, measured: Measured) -> None:
        found, name = measured.distance, measured.format
        problems = []
        if found.worst is not None:
            worst = found.worst
            problems.append(
                f"{found.beyond:,} of {found.count:,} weights are further from the source than "
                f"{name} rounds; the worst, at row {worst.row}, column {worst.column}, is "
                f"{worst.found:.6g} and should be {worst.expected:.6g}"
            )
        codes = find_format(name).codes
        least = codes.least_snr_db if codes else -inf
        if problems or found.snr_db < least:
            expected = f", and {name} leaves {least:g} or more" if found.snr_db < least else ""
            problems.append(f"the SNR is {found.snr_db:g} dB{expected}")
            self._add(self._where(measured.name), "; ".join(problems))

    def shared_scales(self) -> None:
        """The scale of stacked experts must be that of the largest weight of all of them."""
        for job, name, largest, shared in self._stacks.values():
            target = find_format(job.format)
            wanted, found = scale_of(np.array([largest, shared], np.float32), target.largest)
            if wanted != found:
                stack = name.partition("[expert ")[0]
                where = [i.name for p, i, _ in self._lookup.parts(name) if p.role == _GLOBAL]
                self._add(
                    where[0],
                    f"is {found:.9g}; the largest weight of {show(stack)} gives {wanted:.9g}",
                )

    def _remember(self, job: Job, measured: Measured, shared: float) -> None:
        """The largest weight so far of experts that share a scale."""
        before = self._stacks.get(id(job))
        largest = max(measured.distance.largest, before[2] if before else 0.0)
        self._stacks[id(job)] = job, measured.name, largest, shared

    def _where(self, name: str) -> str:
        """The tensor of a weight; of stacked experts, which of them it is."""
        return name if "[expert " in name else self._lookup.tensor(name)

    def _add(self, where: str, problem: str) -> None:
        self._findings.add("source", where, problem, _OTHER_WEIGHTS)
