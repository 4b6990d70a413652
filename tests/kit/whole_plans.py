"""Plans that between them take every path from stored weights to bytes."""

from __future__ import annotations

from kit.files import FIXTURES

import moe_ckpt
from moe_ckpt.errors import InputError
from moe_ckpt.formats import FORMATS

DENSE = ("qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe", "qwen3_moe_wide")
TRANSPOSED = ("llama4", "gpt_oss")


def planned(model, row, **options):
    """The plan for a fixture; None where the format does not fit it."""
    stats = [FIXTURES / model / "stats.json"] if row.input_scale else []
    try:
        source = FIXTURES / model / "source"
        return moe_ckpt.make_plan(source, format=row.name, stats=stats, **options)
    except InputError:
        return None


CASES = [
    *((model, row, "linear", "split") for model in DENSE for row in FORMATS),
    *(
        (model, row, "experts", experts)
        for model in TRANSPOSED
        for row in FORMATS
        for experts in ("split", "fused")
    ),
]
CASES = [case for case in CASES if planned(case[0], case[1], quantize=case[2], experts=case[3])]
SOURCES = ("mxfp4", "nvfp4", "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "int4-g32")
SOURCES += ("int8-channel", "bf16")
TARGETS = ("bf16", "nvfp4", "fp8-channel")
