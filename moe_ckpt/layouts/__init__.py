"""How families of models store their experts: a table, and detection against it."""

from .detect import Detection, detect
from .experts import Experts, Range, Side
from .family import LAYOUTS, ORDERS, SPLIT, Family, Form, Layout
from .given import Given
from .table import CHECKS, FAMILIES, UNSUPPORTED

__all__ = ["CHECKS", "FAMILIES", "LAYOUTS", "ORDERS", "SPLIT", "UNSUPPORTED", "Detection"]
__all__ += ["Experts", "Family", "Form", "Given", "Layout", "Range", "Side", "detect"]
