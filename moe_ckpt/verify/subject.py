"""What is verified: a folder with shards, opened as far as it can be.

Where `open_source` stops at the first damage, here everything that can be read is, and what
cannot is a finding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..dialects.config import CONFIG, HF_QUANT_CONFIG
from ..errors import CheckpointError, InputError, OutputRefusedError, show
from ..layouts import Detection, detect
from ..output.journal import JOURNAL, PRIVATE, Journal, read_journal
from ..source.checkpoint import INDEX, Source, is_safe_shard_name, missing_of, shards_in
from ..source.declared import Declared, everything_declared, quantization_beside
from ..source.files import read_regular
from ..source.headers import Shard, TensorInfo, read_header
from ..source.strict_json import parse_object, type_name
from ..source.weights import Found, Weights, find_weights, weights_in
from .findings import Findings

__all__ = ["Subject", "open_subject", "subject_of"]

_CAP_NBYTES = 100_000_000


@dataclass(frozen=True)
class Subject:
    """A checkpoint as far as it could be read.

    ``source`` has all headers that could be read. ``weights`` are what of it is whole, each
    quantized weight as one; ``found`` says what is not. ``texts`` are the configuration files,
    where they are not those on disk. ``said`` is what the files say of quantization, config.json
    first. ``detection`` is None if the experts are not whole, or fused and quantized;
    ``undetected`` says why. ``index`` is None if there is none. ``lost``: tensors that are named
    in the index, in a shard that cannot be read. ``journal`` is that of our conversion, if this
    is one.
    """

    source: Source
    texts: Mapping[str, str]
    index: Mapping[str, Any] | None
    lost: frozenset[str]
    found: Found
    weights: Weights
    said: Sequence[Declared]
    detection: Detection | None
    undetected: tuple[str, ...]
    journal: Journal | None

    @property
    def root(self) -> Path:
        """The folder."""
        return self.source.root

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json holds; nothing if it cannot be read."""
        return self.source.config

    @property
    def is_ours(self) -> bool:
        """Whether a conversion of ours wrote it."""
        return self.journal is not None

    @cached_property
    def unread(self) -> tuple[tuple[str, str], ...]:
        """What is said of ways to quantize that are not read here, and where.

        What such tensors are is not known, so nothing about them is right or wrong.
        """
        is_read = bool(self.weights.encodings) and not (self.found.unread or self.found.orphans)
        is_read &= not any(of.parts[0].dtype == "I32" for of in self.weights.all_encoded())
        return tuple(
            (said.where, reason) for said in self.said for reason in said.unread(is_read=is_read)
        )

    @property
    def method(self) -> str:
        """The ``quant_method``; '' if nothing is said of quantization."""
        return self.said[0].method if self.said else ""


def open_subject(
    folder: str | os.PathLike[str], findings: Findings, texts: Mapping[str, str] | None = None
) -> Subject:
    """Open a folder; what is damaged or missing is added to the findings.

    ``texts``: name -> text of config.json, hf_quant_config.json and the index, for a conversion
    that has written its shards and not yet these; they count instead of files of those names.

    Raises:
        CheckpointError: there is no such folder.
        OSError: a file cannot be read.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise CheckpointError(f"{show(root)}: is not a folder with a checkpoint")
    opening = _Opening(root, texts or {}, findings)
    config = opening.object_of(CONFIG, constants=True)
    if config is None and not (root / CONFIG).exists():
        opening.missing_config()
    elif config == {}:
        opening.empty_config()
    index, weight_map = opening.index()
    shards, tensors, lost = opening.shards(weight_map)
    source = Source(
        root=root,
        config=config or {},
        shards=shards,
        tensors=tensors,
        side_files=(),
        left_out=(),
        warnings=(),
    )
    said = opening.said(config or {})
    return subject_of(
        source, said, index, texts=texts or {}, lost=frozenset(lost), journal=opening.journal()
    )


def subject_of(
    source: Source,
    said: Sequence[Declared],
    index: Mapping[str, Any] | None,
    *,
    texts: Mapping[str, str],
    lost: frozenset[str] = frozenset(),
    journal: Journal | None = None,
) -> Subject:
    """What headers and configuration files make a checkpoint; see `Subject` for the arguments."""
    found = find_weights(source.tensors)
    weights = weights_in(source.tensors, found, said)
    detection, undetected = _detected(weights, source.config)
    return Subject(
        source=source,
        texts=texts,
        index=index,
        lost=lost,
        found=found,
        weights=weights,
        said=said,
        detection=detection,
        undetected=undetected,
        journal=journal,
    )


def _detected(
    weights: Weights, config: Mapping[str, Any]
) -> tuple[Detection | None, tuple[str, ...]]:
    try:
        return detect(weights.tensors, config), ()
    except InputError as error:
        return None, error.problems


class _Opening:
    """Reads the files of a folder; what is wrong with one is a finding of the structure."""

    def __init__(self, root: Path, texts: Mapping[str, str], findings: Findings) -> None:
        self._root, self._texts, self._findings = root, texts, findings

    def object_of(self, name: str, *, constants: bool = False) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is none, or it cannot be read."""
        text = self._bytes_of(name)
        if text is None:
            return None
        try:
            return parse_object(text, name, CheckpointError, constants=constants)
        except CheckpointError as error:
            self._add_all(name, error, "no runtime can read it")
            return None

    def journal(self) -> Journal | None:
        """The journal of the conversion that wrote the folder, if one of ours did."""
        try:
            return read_journal(self._root)
        except OutputRefusedError:
            self._add(
                JOURNAL,
                "is damaged, or of another version",
                "runtimes do not read it; whether files are still those written cannot be told",
            )
            return None

    def missing_config(self) -> None:
        """Report that there is no config.json."""
        unfinished = (self._root / PRIVATE).is_dir()
        self._add(
            CONFIG,
            "is missing" + ("; a conversion to this folder was not finished" if unfinished else ""),
            "no runtime takes the folder for a model",
        )

    def empty_config(self) -> None:
        """Report that config.json says nothing."""
        self._add(CONFIG, "is empty", "no runtime takes the folder for a model")

    def index(self) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The index and its weight_map, of which only sound entries are kept."""
        index = self.object_of(INDEX)
        if index is None:
            return None, {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self._add(
                INDEX,
                '"weight_map" must be an object that names each tensor\'s shard, found '
                f"{type_name(weight_map)}",
                "runtimes that read it find no weights",
            )
            return index, {}
        sound: dict[str, str] = {}
        names = {shard for shard in weight_map.values() if isinstance(shard, str)}
        safe = {name for name in names if is_safe_shard_name(name)}
        for tensor, shard in weight_map.items():
            if isinstance(shard, str) and shard in safe:
                sound[tensor] = shard
                continue
            self._add(
                INDEX,
                f'weight_map["{show(tensor)}"] is {show(shard)!r}; expected the plain name of a '
                ".safetensors file in the same folder",
                "runtimes open whatever file that is, or stop",
            )
        return index, sound

    def shards(
        self, weight_map: Mapping[str, str]
    ) -> tuple[dict[str, Shard], dict[str, TensorInfo], list[str]]:
        """The shards, their tensors, and those that the index names in a shard that is bad."""
        present = shards_in(self._root)
        named = sorted(set(weight_map.values()) or present)
        for name in sorted(present - set(named)):
            self._add(
                name,
                f"is a shard that {INDEX} does not name",
                "runtimes that go by the index leave it out, those that take every .safetensors "
                "file load it over the others",
            )
        if not weight_map and len(named) > 1:
            self._add(
                INDEX,
                f"is missing, or of no use, and there are {len(named)} shards",
                "transformers finds no weights; runtimes that take every .safetensors file load "
                "all, whether they belong together or not",
            )
        for name in [] if weight_map else missing_of(named):
            self._add(
                name,
                "is missing: other shards are named as of so many",
                "vLLM and SGLang load the shards that are there; vLLM checks no quantized model "
                "for weights that are missing, and computes with what memory held",
            )
        if not named:
            self._add(
                show(self._root),
                "holds no .safetensors file",
                "there is nothing to load",
            )
        shards: dict[str, Shard] = {}
        tensors: dict[str, TensorInfo] = {}
        for name in named:
            try:
                shards[name], found = read_header(self._root / name)
            except CheckpointError as error:
                self._add_all(name, error, "runtimes stop when they open it")
                continue
            for info in found:
                there = tensors.get(info.name)
                if there is not None:
                    self._add(
                        info.name,
                        f"is in two shards, {there.shard} and {name}",
                        f"{'transformers goes by the index; ' if weight_map else ''}vLLM keeps "
                        "that of the last file by name, with SGLang it is left to chance",
                    )
                if there is None or weight_map.get(info.name) != there.shard:
                    tensors[info.name] = info
        lost = [tensor for tensor, shard in weight_map.items() if shard not in shards]
        return shards, tensors, lost

    def said(self, config: Mapping[str, Any]) -> list[Declared]:
        """What config.json and hf_quant_config.json say of quantization."""
        text = self._bytes_of(HF_QUANT_CONFIG)
        try:
            if text is not None and quantization_beside(text) is None:
                problem = 'has no object "quantization"'
                self._add(HF_QUANT_CONFIG, problem, "TensorRT-LLM cannot read it")
            return everything_declared(config, text)
        except CheckpointError as error:
            self._add_all(HF_QUANT_CONFIG, error, "TensorRT-LLM cannot read it")
            return everything_declared(config, None)

    def _bytes_of(self, name: str) -> bytes | None:
        if name in self._texts:
            return self._texts[name].encode()
        if not os.path.lexists(self._root / name):
            return None
        try:
            return read_regular(self._root / name, _CAP_NBYTES, CheckpointError)
        except CheckpointError as error:
            self._add_all(name, error, "no runtime can read it")
            return None

    def _add_all(self, where: str, error: InputError, effect: str) -> None:
        for problem in error.problems:
            self._add(where, problem.removeprefix(f"{show(where)}: "), effect)

    def _add(self, where: str, problem: str, effect: str) -> None:
        self._findings.add("structure", where, problem, effect)
