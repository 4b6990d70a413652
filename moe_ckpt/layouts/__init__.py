"""How families of models store their experts: a table, and detection against it."""

from .container import Experts, Rows
from .detect import Detection, detect
from .table import FAMILIES, Family

__all__ = ["FAMILIES", "Detection", "Experts", "Family", "Rows", "detect"]
