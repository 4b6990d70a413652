"""Number formats: one row in `table`, one module with the arithmetic beside it.

A row says, without torch, which tensors a quantized matrix becomes; its module holds the
`quantize`/`dequantize` pair. Formats know nothing of names, files or runtimes.
"""

from __future__ import annotations

from .format import UNQUANTIZED, WHOLE_ROW, Codec, Codes, Part, QuantFormat
from .table import DEFAULT_FORMAT, FORMATS, find_format, without_input_scale

__all__ = ["DEFAULT_FORMAT", "FORMATS", "UNQUANTIZED", "WHOLE_ROW", "Codec", "Codes", "Part"]
__all__ += ["QuantFormat", "find_format", "without_input_scale"]
