"""Checkpoints in folders of a checkpoint, such as a draft model: copied whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..dialects.config import CONFIG

__all__ = ["nested_checkpoints"]


def nested_checkpoints(names: Iterable[str], other_weights: Iterable[str]) -> Mapping[str, bool]:
    """Folders with a config.json and weights of their own, and whether they can be copied whole.

    They can if all of their weights are safetensors. A folder in such a folder belongs to it.

    Args:
        names: files below the checkpoint, ``/`` separated.
        other_weights: endings of other files that hold weights.

    >>> nested_checkpoints(["draft/config.json", "draft/model.safetensors"], [".bin"])
    {'draft': True}
    >>> nested_checkpoints(["draft/config.json", "draft/pytorch_model.bin"], [".bin"])
    {'draft': False}
    >>> nested_checkpoints(["1_Pooling/config.json", "config.json", "a.safetensors"], [".bin"])
    {}
    """
    files = sorted(names)
    folders = [name.rpartition("/")[0] for name in files if name.endswith(f"/{CONFIG}")]
    endings = (*other_weights,)
    found: dict[str, bool] = {}
    for folder in sorted(folders, key=lambda f: f.count("/")):
        if any(folder.startswith(f"{outer}/") for outer in found):
            continue
        inside = [name for name in files if name.startswith(f"{folder}/")]
        others = any(name.endswith(endings) for name in inside)
        if others or any(name.endswith(".safetensors") for name in inside):
            found[folder] = not others
    return found
