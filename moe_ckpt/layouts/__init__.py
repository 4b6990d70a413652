"""How families of models store their experts: a table, and detection against it."""

from .container import Experts, Range
from .detect import Detection, detect
from .family import LAYOUTS, ORDERS, SPLIT, Family, Form, Layout
from .given import Given
from .table import CHECKS, FAMILIES, UNSUPPORTED, split_loaders

__all__ = ["CHECKS", "FAMILIES", "LAYOUTS", "ORDERS", "SPLIT", "UNSUPPORTED", "Detection"]
__all__ += ["Experts", "Family", "Form", "Given", "Layout", "Range", "detect", "split_loaders"]
