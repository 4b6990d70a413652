"""How families of models store their experts: a table, and detection against it."""

from .detect import Detection, Experts, Rows, detect
from .table import FAMILIES, Family

__all__ = ["FAMILIES", "Detection", "Experts", "Family", "Rows", "detect"]
