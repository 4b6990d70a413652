"""Jobs that make again what a checkpoint holds, from its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...dialects import dialect_for, find_dialect
from ...dialects.dialect import MODELOPT
from ...errors import InputError, Problems
from ...formats import QuantFormat, find_format
from ...layouts import Detection
from ...plan import Job
from ...planning.calibration import Calibration
from ...planning.shards import CopyUnit, QuantUnit, pack
from ...planning.stats import Stats
from ...planning.units import UnitMaker
from ...source.stored import Encoded
from ...source.weights import Weights

__all__ = ["Maker", "Recipe", "jobs_of", "only_job"]

# What a unit maker is asked for, in a format: a job, or None if it takes several.
Recipe = Callable[[UnitMaker, QuantFormat], Job | None]

_NO_STATS = Stats({}, {}, {}, ())
_EVERYTHING = 1 << 62


class Maker:
    """Makes jobs from a source; their input scales are the constant."""

    def __init__(self, weights: Weights, detection: Detection) -> None:
        self._weights = weights
        self._detection = detection

    def job(self, encoded: set[Encoded], make: Recipe) -> Job | None:
        """The job that makes what is there; None if none does, or if it takes several.

        ``encoded``: how what it makes is stored.
        """
        if len(encoded) != 1:
            return None
        (there,) = encoded
        problems = Problems()
        target = find_format(there.format)
        try:
            job = make(self._units(target, there, problems), target)
            problems.check()
        except InputError:
            return None
        if job is None or not _stores(job, there):
            return None
        return _placed(replace(job, inverse=there.inverse))

    def _units(self, target: QuantFormat, there: Encoded, problems: Problems) -> UnitMaker:
        dialect = dialect_for([target.name])
        kept = dialect.spellings[target.name].kept_dtypes
        return UnitMaker(
            self._weights,
            self._detection,
            dialect,
            Calibration(_NO_STATS, self._detection, missing_is_constant=True),
            {},
            problems,
            may_requantize=True,
            kept_dtypes={
                (target.name, part.role): part.dtype
                for part in there.parts
                if part.dtype in kept.get(part.role, ())
            },
        )


def jobs_of(units: Sequence[CopyUnit | QuantUnit]) -> list[Job]:
    """All jobs of units."""
    return [job for unit in units if isinstance(unit, QuantUnit) for job in unit.jobs]


def only_job(units: Sequence[QuantUnit]) -> Job | None:
    """The job of units, if it is one for all."""
    jobs = jobs_of(units)
    return jobs[0] if len(jobs) == 1 else None


def _stores(job: Job, encoded: Encoded) -> bool:
    """Whether a job writes parts in the dtypes in which they are there."""
    there = {part.role: part.dtype for part in encoded.parts}
    made = {part.role: part.dtype for part in job.parts}
    return all(made.get(role) == dtype for role, dtype in there.items() if role != "input_scale")


def _placed(job: Job) -> Job:
    """The job with its regions one after another."""
    dialect = find_dialect(MODELOPT) if job.is_stacked else dialect_for([job.format])
    (shard,) = pack([QuantUnit((job,))], dialect, _EVERYTHING)
    return shard.jobs[0]
