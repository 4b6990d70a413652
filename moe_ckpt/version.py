"""The version of moe-ckpt."""

__version__ = "0.1.0"
