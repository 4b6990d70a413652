"""Run slime's tools/convert_hf_to_fp8.py, which asks for CUDA by name, on a CPU.

    python bench/slime.py SCRIPT --model-dir SOURCE --save-dir OUT --strategy tensor

The script is read, "cuda" in it becomes "cpu", and it runs as a program; nothing else changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    script = Path(sys.argv[1])
    text = script.read_text().replace('device="cuda"', 'device="cpu"')
    sys.argv = sys.argv[1:]
    exec(compile(text, str(script), "exec"), {"__name__": "__main__"})
