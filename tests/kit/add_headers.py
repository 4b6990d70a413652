"""Add to fixtures/layout-headers.json what transformers writes for a model type.

    PYTHONPATH=tests python -m kit.add_headers MODEL_TYPE [CONFIG.json]

The model is as tiny as those of kit/expert_models.py; only its config and headers are kept. A
model with parts needs a config of its own, with 24 for the width of an expert, 8 experts and a
hidden size of 64.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from kit.expert_models import build
from kit.files import FIXTURES, read_tensors


def headers_of(model_type: str, config: dict[str, object] | None) -> dict[str, object]:
    model = build(model_type, 24, config)
    saved = {}
    for mode in "AB":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_original_format=mode == "A")
            config = json.loads((Path(folder) / "config.json").read_text())
            tensors = read_tensors(Path(folder))
            header = {name: [t.dtype, list(t.shape)] for name, t in sorted(tensors.items())}
        saved[mode] = {"config": config, "header": header}
    return saved


if __name__ == "__main__":
    path = FIXTURES / "layout-headers.json"
    model_type, *files = sys.argv[1:]
    config = json.loads(Path(files[0]).read_text()) if files else None
    headers = json.loads(path.read_text())
    headers[model_type] = headers_of(model_type, config)
    path.write_text(json.dumps(headers))
