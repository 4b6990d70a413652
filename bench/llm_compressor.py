"""Run llm-compressor's model_free_ptq on a folder; a script for the Python that has it.

    PYTHON bench/llm_compressor.py SOURCE OUT SCHEME WORKERS

It leaves what moe-ckpt leaves by default: only routed experts are quantized.
"""

from __future__ import annotations

import sys

from llmcompressor import model_free_ptq

KEPT = ["re:.*self_attn.*", r"re:.*mlp\.gate$", "re:.*embed_tokens$", "lm_head"]

if __name__ == "__main__":
    source, out, scheme, workers = sys.argv[1:]
    model_free_ptq(source, out, scheme=scheme, ignore=KEPT, max_workers=int(workers), device="cpu")
