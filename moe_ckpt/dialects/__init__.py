"""Dialects: how a quantized checkpoint is spelled, in tensor names and config files.

A dialect turns the roles of a format's parts into tensor suffixes, and the choice of what is
quantized into configuration. It knows no weights.
"""

from .modelopt import LOADERS, config_files, tensor_name

__all__ = ["LOADERS", "config_files", "tensor_name"]
