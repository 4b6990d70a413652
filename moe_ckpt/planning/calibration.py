"""Which activation amax each quantized module gets from the statistics.

The rules are ModelOpt's: all experts of a layer share one input amax for each projection, the
largest of any expert; gate and up share it, and so do linear layers that read the same input.
An expert that no token reached therefore gets its layer's value, and is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import Problems, StatsError, show, show_some
from ..layouts import Detection, Experts
from ..layouts.roles import module_of
from ..source.headers import TensorInfo
from ..words import count_of
from .stats import Amax, Stats, largest

__all__ = ["Calibration"]


class Calibration:
    """Looks modules up in statistics, and keeps account of what was missing.

    ``missing_is_constant``: a module without statistics gets the constant scale, not an error.
    ``changes``: beginnings of names that were changed in the source; statistics may have either.
    """

    def __init__(
        self,
        stats: Stats,
        detection: Detection,
        missing_is_constant: bool,
        changes: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.stats = stats
        self.detection = detection
        self.missing_is_constant = missing_is_constant
        self._prefixes = (*detection.family.prefixes, *changes)
        self.covered = 0
        self.constant: list[str] = []
        self._unreached: list[tuple[str, int]] = []
        self._known: set[str] = set()
        self._in_layer: Counter[str] = Counter()
        for found in detection.experts:
            self._in_layer[found.layer] += found.num_experts

    def experts_amax(
        self, experts: Experts, projections: tuple[str, ...], problems: Problems
    ) -> float | None:
        """The input amax of ``projections`` (gate and up, or down) in all experts of a layer.

        None asks for the constant scale.
        """
        E = experts.num_experts
        known: list[float | None] = [None] * E
        for name in self._fused_names(experts, is_down=projections == experts.projections[-1:]):
            amax = self._find(name)
            if isinstance(amax, tuple):
                if len(amax) != self._in_layer[experts.layer]:
                    problems.add(
                        StatsError,
                        f"{self.stats.paths[name]}: has {len(amax)} entries, the layer has "
                        f"{self._in_layer[experts.layer]} experts; use statistics of this model",
                    )
                    return None
                amax = amax[experts.first : experts.first + E]
                known = [largest(pair) for pair in zip(known, amax, strict=True)]
            else:
                known = [largest((value, amax)) for value in known]
        for expert in range(E):
            for prefix in {experts.output, experts.source}:
                for projection in projections:
                    name = f"{prefix}.{experts.first + expert}.{projection}"
                    amax = self._find_number(name, problems)
                    known[expert] = largest((known[expert], amax))
        found = largest(known)
        label = f"{experts.output}.*.{'/'.join(projections)}"
        if found is None:
            self._missing([label], problems)
        else:
            self.covered += E * len(projections)
            if None in known:
                self._unreached.append((label, known.count(None)))
        return found

    def linears_amax(self, names: Iterable[tuple[str, str]], problems: Problems) -> float | None:
        """The input amax of linear layers that share it, each given as (source, output) name."""
        values = []
        outputs = []
        for source, output in names:
            outputs.append(output)
            names_of_it = {source, output, *self._transformers_names(output)}
            values += [self._find_number(name, problems) for name in names_of_it]
        found = largest(values)
        if found is None:
            self._missing(outputs, problems)
        else:
            self.covered += len(outputs)
        return found

    def output_amax(self, source: str, output: str, problems: Problems) -> float | None:
        """The output amax of a linear layer, for the KV cache; None, and a problem, without one."""
        names = {source, output, *self._transformers_names(output)}
        found = [self.stats.output_amax.get(alias) for name in names for alias in self._names(name)]
        amax = largest(found)
        if not amax:
            problems.add(
                StatsError,
                f"{show(output)}: has no output_amax in the statistics, which --kv-cache fp8 takes "
                "its scale from; calibrate again, and record outputs",
            )
        return amax

    def warnings(self, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        """What the user should know about the statistics."""
        found = []
        if self._unreached:
            count = sum(number for _, number in self._unreached)
            found.append(
                f"{count_of(count, 'expert projection')} in "
                f"{count_of(len(self._unreached), 'place')} saw no tokens in "
                f"calibration and got their layer's largest input amax (first: "
                f"{show(self._unreached[0][0])}); calibrate with more data"
            )
        if self.constant:
            found.append(f"no statistics, and so input scale 1.0: {show_some(self.constant)}")
        modules = {module_of(name) for name in tensors}
        fused = {name for name in tensors if not name.endswith(".weight")}
        known = self._known | modules | fused
        unknown = {name: path for name, path in self.stats.paths.items() if name not in known}
        if unknown:  # there are many names that experts may have
            experts = {*self._names_of_experts()}
            unknown = {name: path for name, path in unknown.items() if name not in experts}
        if unknown:
            found.append(
                f"statistics of modules that this model does not have were ignored: "
                f"{show_some(unknown.values())}"
            )
        return tuple(found)

    def _names_of_experts(self) -> Iterator[str]:
        """What experts may be called, those that are not quantized as well."""
        for experts in self.detection.experts:
            names = self._fused_names(experts, is_down=False) | self._fused_names(
                experts, is_down=True
            )
            for prefix in {experts.output, experts.source}:
                numbers = range(experts.first, experts.first + experts.num_experts)
                names.update(f"{prefix}.{n}.{p}" for n in numbers for p in experts.projections)
            for name in names:
                yield from self._names(name)

    def _fused_names(self, experts: Experts, *, is_down: bool) -> set[str]:
        """What the layer's stacked projection may be called, in this file or in transformers."""
        paths = [experts.output, f"{experts.layer}.mlp.experts"]
        names = {f"{path}.{'down_proj' if is_down else 'gate_up_proj'}" for path in paths}
        for form in self.detection.family.forms:
            leaves = form.leaves[-1:] if is_down else form.leaves[:-1]
            path = f"{experts.layer}.{form.path}"
            names |= {f"{path}.{leaf.removesuffix('.weight')}" for leaf in leaves}
        return names

    def _transformers_names(self, output: str) -> Iterator[str]:
        """What transformers may call a module that runtimes call ``output``."""
        for stack in self.detection.stacks:
            match = re.match(rf"({re.escape(stack)}\.\d+)\.", output)
            if match is None:
                continue
            rest = f"{output[match.end() :]}."
            for theirs, ours in self.detection.family.renames:
                if rest.startswith(ours):
                    yield f"{match[1]}.{theirs}{rest.removeprefix(ours)}".rstrip(".")

    def _names(self, name: str) -> list[str]:
        """A module's name as runtimes give it, and as transformers does."""
        names = [name]
        for theirs, ours in self._prefixes:
            if name.startswith(ours):
                names.append(theirs + name.removeprefix(ours))
        return names

    def _find(self, name: str) -> Amax:
        """The entry of a module under the name that runtimes give it, or transformers."""
        names = self._names(name)
        self._known.update(names)
        entries = (self.stats.input_amax.get(known) for known in names)
        return next((amax for amax in entries if amax is not None), None)

    def _find_number(self, name: str, problems: Problems) -> float | None:
        amax = self._find(name)
        if isinstance(amax, tuple):
            problems.add(
                StatsError,
                f"{self.stats.paths[name]}: is a list; one matrix has one number",
            )
            return None
        return amax

    def _missing(self, modules: Sequence[str], problems: Problems) -> None:
        if self.missing_is_constant:
            self.constant += modules
        else:
            problems.add(
                StatsError,
                f"{show(', '.join(modules))}: has no input amax in the statistics; calibrate with "
                "more data, or pass --missing-stats constant for input scale 1.0",
            )
