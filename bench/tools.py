"""The tools that are compared, as command lines. All read the same folder and write to a new one.

moe-ckpt and llm-compressor quantize the routed experts and copy the rest. slime's script quantizes
attention as well, and nothing that is fused: it goes by names that end in ``weight``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_ckpt.formats import find_format

__all__ = ["CP", "LLM_COMPRESSOR", "MOE_CKPT", "SLIME", "Competitors", "Tool", "tools"]

CP, MOE_CKPT, LLM_COMPRESSOR, SLIME = "cp", "moe-ckpt", "llm-compressor", "slime"
HERE = Path(__file__).parent
_SCHEMES = {
    "nvfp4": "NVFP4A16",
    "nvfp4-w4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "fp8-channel": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
}
_STRATEGIES = {
    "fp8-tensor": ["tensor"],
    "fp8-channel": ["channel"],
    "fp8-block": ["block", "--block-size", "128", "128"],
}
_STATS = '{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}\n'


@dataclass(frozen=True, slots=True)
class Competitors:
    """What else there is on this machine.

    ``llm_compressor``: a Python that has it. ``slime``: its tools/convert_hf_to_fp8.py.
    ``workers``: threads of theirs, over shards.
    """

    llm_compressor: Path | None = None
    slime: Path | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool with a format; the format of `cp` is "bf16".

    ``python``: what its memory above `import torch` is counted from.
    """

    name: str
    format: str
    python: str | None
    options: Mapping[str, object]

    def command(self, source: Path, out: Path) -> list[object]:
        """The process to run."""
        if self.name == CP:
            return ["cp", *sorted(source.glob("*.safetensors")), out]
        if self.name == MOE_CKPT:
            stats = self.stats_file(out)
            return [
                *(sys.executable, "-m", "moe_ckpt", "convert", source, out, "-q"),
                *("--format", self.format, "--device", self.options["device"]),
                *(("--stats", stats, "--missing-stats", "constant") if stats else ()),
            ]
        if self.name == LLM_COMPRESSOR:
            script, scheme = HERE / "llm_compressor.py", _SCHEMES[self.format]
            return [self.python, script, source, out, scheme, self.options["workers"]]
        return [
            *(self.python, HERE / "slime.py", self.options["script"]),
            *("--model-dir", source, "--save-dir", out),
            *("--max-workers", self.options["workers"]),
            *("--strategy", *_STRATEGIES[self.format]),
        ]

    def stats_file(self, out: Path) -> Path | None:
        """Statistics without a module, written beside the output, for formats that demand some."""
        row = find_format(self.format)
        if not row.input_scale or row.constant_input_scale:
            return None
        path = out.with_name("stats.json")
        path.write_text(_STATS)
        return path


def tools(formats: list[str], competitors: Competitors, device: str = "cpu") -> list[Tool]:
    """Every tool with every format that it has."""
    mine = {"device": device}
    found = [Tool(CP, "bf16", None, {})]
    found += [Tool(MOE_CKPT, find_format(name).name, sys.executable, mine) for name in formats]
    workers = {"workers": competitors.workers}
    if competitors.llm_compressor:
        executable = str(competitors.llm_compressor)
        named = [name for name in formats if name in _SCHEMES]
        found += [Tool(LLM_COMPRESSOR, name, executable, workers) for name in named]
    if competitors.slime:
        options = workers | {"script": competitors.slime}
        named = [name for name in formats if name in _STRATEGIES]
        found += [Tool(SLIME, name, sys.executable, options) for name in named]
    return found
