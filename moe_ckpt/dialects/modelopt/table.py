"""ModelOpt's algorithms: what each is called, which tensors it makes, and who reads them.

    format       role           tensor
    nvfp4*       qweight        weight          uint8, two codes in a byte
                 block_scale    weight_scale    e4m3
                 global_scale   weight_scale_2  float32, 0-d
                 input_scale    input_scale     float32, 0-d
    fp8-tensor   qweight        weight          e4m3
                 global_scale   weight_scale    float32, 0-d
                 input_scale    input_scale     float32, 0-d
    mxfp8        qweight        weight          e4m3
                 block_scale    weight_scale    uint8, powers of two
    fp8-block    qweight        weight          e4m3
                 block_scale    weight_scale    float32
    fp8-channel  qweight        weight          e4m3
                 channel_scale  weight_scale    float32
    mxfp4        qweight        weight          uint8, two codes in a byte
                 block_scale    weight_scale    uint8, powers of two

Experts of a layer in one tensor, as ModelOpt exports Llama 4 and gpt-oss, spell it
``experts.gate_up_proj`` and ``experts.gate_up_proj_weight_scale``: without ``weight``, and with an
underscore. Their tensors are [E, K, N], as the model stores them.

Algorithms that are not here change weights or activations beforehand (AWQ, SVDQuant), which shows
in no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...formats import FORMATS, find_format
from ...runtimes import SGLANG, TRTLLM, VLLM
from ..dialect import MODELOPT, Spelling, plain_spelling

__all__ = ["ALGORITHMS", "FOREIGN", "METHOD_NAMES", "MIX", "PLAIN", "READ_IN_SOURCES", "SPELLINGS"]
__all__ += ["UNKNOWN_FORMATS", "Algorithm", "algorithm_named", "algorithm_of"]

# The quant_methods that runtimes know as ModelOpt's; sources may have others that begin so.
METHOD_NAMES = (MODELOPT, *(f"{MODELOPT}_{of}" for of in ("fp4", "fp8", "mixed", "mxfp8")))

MIX = "MIXED_PRECISION"  # the quant_algo of several algorithms

# Algorithms that ModelOpt and TensorRT-LLM know, and nothing here reads (TensorRT-LLM's
# quantization/mode.py, ModelOpt's export/quant_utils.py).
FOREIGN = frozenset(
    "INT8 INT4_AWQ NVFP4_AWQ NVFP4_SVD NVFP4_SVDQUANT W4A16 W4A16_AWQ W4A16_GPTQ W4A16_MXFP4 "
    "W4A8_AWQ W4A8_CUSTOM W4A8_MXFP4_FP8 W4A8_MXFP4_MXFP8 W4A8_NVFP4_FP8 W4A8_QSERVE_PER_CHANNEL "
    "W4A8_QSERVE_PER_GROUP W8A16 W8A16_GPTQ W8A8_SQ_PER_CHANNEL W8A8_SQ_PER_TENSOR_PLUGIN "
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN "
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN".split()
)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What ModelOpt calls a way to quantize, and what that is.

    ``names``: of quant_algo, in capitals as vLLM compares them; the first is written.
    ``has_inputs``: whether activations are quantized.
    ``is_grouped``: whether ModelOpt writes config_groups where all modules have this algorithm.
    ``is_stacked``: whether there are experts of a layer in one tensor.
    ``keys_beside``: what vLLM wants of hf_quant_config.json, where it goes by it.
    """

    names: tuple[str, ...]
    spelling: Spelling
    has_inputs: bool = True
    is_grouped: bool = True
    is_stacked: bool = False
    keys_beside: tuple[str, ...] = ()

    @property
    def group_size(self) -> int | None:
        """The columns that share a scale; None if all do."""
        scale = find_format(self.spelling.format).scale
        return scale.columns if scale and scale.role == "block_scale" else None

    @property
    def number(self) -> dict[str, Any]:
        """What config_groups say of weights, and of activations if they are quantized."""
        bits = find_format(self.spelling.format).weight_bits
        number = {"dynamic": False, "num_bits": bits, "type": "float"}
        return number if self.group_size is None else number | {"group_size": self.group_size}


_ALL = (VLLM, SGLANG, TRTLLM)
_NO_MOE = "vLLM and SGLang read no experts of ModelOpt's with {}"
_NO_EXPERTS = "it reads no experts with a scale for {} of ModelOpt's"
_UNKNOWN = "vLLM and SGLang know no such algorithm of ModelOpt's"

_NVFP4 = {
    "qweight": "weight",
    "block_scale": "weight_scale",
    "global_scale": "weight_scale_2",
}
_BLOCKS = {"qweight": "weight", "block_scale": "weight_scale"}
_KEYS_BESIDE = ("kv_cache_quant_algo", "exclude_modules")

ALGORITHMS = (
    Algorithm(
        ("NVFP4",),
        Spelling(
            "nvfp4",
            "NVFP4 of ModelOpt",
            _NVFP4 | {"input_scale": "input_scale"},
            _ALL,
            scale_dtypes={"global_scale": ("F32",)},
        ),
        is_stacked=True,
        keys_beside=("group_size", *_KEYS_BESIDE),
    ),
    Algorithm(
        ("W4A16_NVFP4",),
        Spelling(
            "nvfp4-w4a16",
            "NVFP4 of ModelOpt",
            _NVFP4,
            (VLLM,),
            why_not={SGLANG: "it takes activations of experts to be of 4 bits"},
            scale_dtypes={"global_scale": ("F32",)},
        ),
        has_inputs=False,
        keys_beside=("group_size", *_KEYS_BESIDE),
    ),
    Algorithm(
        ("FP8",),
        Spelling(
            "fp8-tensor",
            "FP8 per tensor",
            {"qweight": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"},
            _ALL,
        ),
        is_stacked=True,
    ),
    Algorithm(
        ("MXFP8",),
        Spelling(
            "mxfp8",
            "MXFP8",
            _BLOCKS,
            _ALL,
        ),
        is_grouped=False,
        keys_beside=_KEYS_BESIDE,
    ),
    Algorithm(
        ("FP8_PB_WO", "FP8_BLOCK_SCALES"),
        Spelling(
            "fp8-block",
            "FP8 in blocks",
            _BLOCKS,
            (TRTLLM,),
            why_not=dict.fromkeys((VLLM, SGLANG), _NO_EXPERTS.format("each block")),
            not_written=_NO_MOE.format("a scale for each block"),
        ),
    ),
    Algorithm(
        ("FP8_PER_CHANNEL_PER_TOKEN",),
        Spelling(
            "fp8-channel",
            "FP8 per channel",
            {"qweight": "weight", "channel_scale": "weight_scale"},
            (),
            why_not=dict.fromkeys((VLLM, SGLANG), _NO_EXPERTS.format("each row")),
            not_written=_NO_MOE.format("a scale for each row"),
        ),
    ),
    Algorithm(
        ("MXFP4",),
        Spelling(
            "mxfp4",
            "MXFP4 of ModelOpt",
            _BLOCKS,
            (),
            why_not=dict.fromkeys(_ALL, "it knows no algorithm MXFP4"),
            not_written=_UNKNOWN,
            is_source=False,
        ),
    ),
)
SPELLINGS = tuple(algorithm.spelling for algorithm in ALGORITHMS)
PLAIN = plain_spelling(_ALL)

# Formats for which there is no algorithm at all, and why they are not written.
UNKNOWN_FORMATS: Mapping[str, str] = {
    row.name: _UNKNOWN
    for row in FORMATS
    if row.is_quantized and row.name not in {spelling.format for spelling in SPELLINGS}
}

READ_IN_SOURCES = frozenset({MIX}).union(
    name for algorithm in ALGORITHMS if algorithm.spelling.is_source for name in algorithm.names
)


def algorithm_named(name: object) -> Algorithm | None:
    """The algorithm that ModelOpt calls so, in any case of letters."""
    wanted = str(name).upper()
    return next((algorithm for algorithm in ALGORITHMS if wanted in algorithm.names), None)


def algorithm_of(format_name: str) -> Algorithm:
    """The algorithm that makes a format."""
    return next(a for a in ALGORITHMS if a.spelling.format == format_name)
