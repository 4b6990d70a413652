"""Names that runtimes read, names that they do not, and how changed ones are got back."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Set
from functools import lru_cache

from ..errors import LayoutError, Problems, show_some
from ..source.headers import TensorInfo
from .experts import Experts
from .family import SPLIT, Family
from .layers import stack_of
from .roles import set_aside

__all__ = [
    "WRAPPER_WORDS",
    "computed_from",
    "named_twice",
    "of_adapters",
    "refuse_unrestorable",
    "restore_names",
]
__all__ += ["root_of", "roots_in", "unread_names", "wrapped_names"]

# What lists of layers are called.
_LISTS = ("layers", "blocks", "h")
_ROOT = re.compile(rf"((?:[^.]+\.)*?)(?:{'|'.join(_LISTS)})\.[0-9]+\.")
_HEAD = re.compile(r"((?:[^.]+\.)*?)lm_head\.")

# Words of wrappers, and of adapters, that no model has in its names: whole components of a path.
WRAPPER_WORDS = (
    "_orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module _forward_module module "
    "base_layer original_module modules_to_save base_model"
).split()
_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPER_WORDS)})(?![^.])")
_ADAPTERS = "lora_ ia3_ hada_ lokr_ oft_ boft_ vera_ randlora_ trainable_tokens_".split()
_ADAPTER = re.compile(rf"(?<![^.])(?:{'|'.join(_ADAPTERS)})\w+(?![^.])")

_COMPUTED = re.compile(r"\.parametrizations\.\w+\.|\.weight_(orig|mask)$")


def computed_from(names: Iterable[str]) -> list[str]:
    """The names in layers of what PyTorch computes a weight from, by parametrization or pruning.

    >>> computed_from(["model.layers.0.q_proj.parametrizations.weight.original0", "lm_head.weight"])
    ['model.layers.0.q_proj.parametrizations.weight.original0']
    """
    return [n for n in names if _COMPUTED.search(n) and root_of(n) is not None]


def of_adapters(names: Collection[str]) -> list[str]:
    """The names that hold weights of an adapter, such as LoRA.

    >>> of_adapters(["q_proj.lora_A.default.weight", "q_a_layernorm.weight"])
    ['q_proj.lora_A.default.weight']
    """
    return _with(_ADAPTERS, _ADAPTER, names)


def wrapped_names(names: Collection[str]) -> list[str]:
    """The names that hold a word of a wrapper."""
    return _with(WRAPPER_WORDS, _WRAPPER, names)


def _with(words: Iterable[str], pattern: re.Pattern[str], names: Collection[str]) -> list[str]:
    text = "\n".join(names)  # one search for all names: there may be a million
    here = [word for word in words if word in text]
    if not here:
        return []
    return [n for n in names if any(word in n for word in here) and pattern.search(n)]


def root_of(name: str) -> str | None:
    """What stands before the layers in the name of a tensor of the text model; None elsewhere.

    >>> root_of("model.layers.0.mlp.gate.weight"), root_of("layers.0.attn.wq.weight")
    ('model.', '')
    >>> root_of("model.visual.blocks.0.attn.qkv.weight"), root_of("model.norm.weight")
    (None, None)
    """
    match = _ROOT.match(name)
    return None if match is None or _is_aside(match[1]) else match[1]


def roots_in(names: Iterable[str]) -> set[str]:
    """The roots of all names."""
    found: set[str] = set()
    begins: tuple[str, ...] = ()
    for name in names:
        if name.startswith(begins):
            continue
        root = root_of(name)
        if root is not None:
            found.add(root)
            begins = _begins(found)
    return found


def _begins(roots: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{root}{each}." for root in roots for each in _LISTS)


@lru_cache(maxsize=1024)
def _is_aside(root: str) -> bool:
    return set_aside(root, frozenset(), None) is not None


def unread_names(family: Family, names: Iterable[str]) -> list[str]:
    """Those of the names in a checkpoint that no runtime of the family reads.

    They hold a word of a wrapper or of an adapter, or lie elsewhere than the family's layers and
    its output head. Parts that are set aside, such as a vision tower, are not judged, nor is what
    lies in a layer.
    """
    right = {*family.roots, *(new for _, new in family.prefixes)}
    tops = {begin.partition(".")[0] for begin in right} | {"lm_head", "score"}
    heads = {"", *(root[: at.end()] for root in right for at in re.finditer(r"[^.]+\.", root))}
    heads -= {*family.roots} - {""}

    begins = _begins(family.roots)

    def is_read(name: str) -> bool:
        if name.startswith(begins):
            return True
        match = _ROOT.match(name)
        if match:
            return match[1] in family.roots or _is_aside(match[1])
        if "" in family.roots or set_aside(name, frozenset(), None):
            return True
        head = _HEAD.match(name)
        return head[1] in heads if head else name.partition(".")[0] in tops

    names = list(names)
    foreign = {*wrapped_names(names), *of_adapters(names)}
    return [name for name in names if name in foreign or not is_read(name)]


def named_twice(family: Family, names: Collection[str]) -> list[tuple[str, str]]:
    """Layers that are there under two roots, as pairs of names: one too many, and its like.

    A part that shares a few names with the text model, as an encoder may, is not its double.

    >>> from .table import find_family
    >>> qwen, rest = find_family("qwen3_moe"), "layers.0.mlp.gate.weight"
    >>> named_twice(qwen, [f"model.{rest}", f"model.language_model.{rest}"])
    [('model.language_model.layers.0.mlp.gate.weight', 'model.layers.0.mlp.gate.weight')]
    """
    if len(roots_in(names)) < 2:
        return []
    by_root: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        root = root_of(name)
        if root is not None:
            by_root[root][name.removeprefix(root)] = name
    order = sorted(by_root, key=lambda root: (root not in family.roots, -len(by_root[root])))
    found: list[tuple[str, str]] = []
    there: dict[str, str] = {}
    for root in order:
        shared = [rest for rest in by_root[root] if rest in there]
        if 2 * len(shared) >= len(there):
            found += [(by_root[root][rest], there[rest]) for rest in shared]
        there = {**by_root[root], **there}
    return found


def refuse_unrestorable(
    family: Family, tensors: Mapping[str, TensorInfo], problems: Problems
) -> None:
    """Report names that only transformers writes, and whose old form is lost."""
    lost = family.not_restorable
    found = [name for name in tensors if any(part in name for part in lost)] if lost else []
    if found:
        problems.add(
            LayoutError,
            f"{show_some(found)}: transformers renamed these when it saved the model, and runtimes "
            f"of {family.name} do not read the new names; save it again with "
            "save_original_format=True",
        )


def restore_names(
    family: Family, experts: list[Experts], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """The names that runtimes read, for tensors that transformers renamed."""
    stacks = {stack_of(found.layer) for found in experts if found.layout != SPLIT}
    consumed = {name for found in experts for name in found.tensors}
    renamed: dict[str, str] = {}
    for name in tensors:
        if name in consumed:
            continue
        new = family.runtime_name(_restore_sibling(family, name, stacks))
        if new != name:
            renamed[name] = new
    return renamed


def _restore_sibling(family: Family, name: str, stacks: Set[str]) -> str:
    """The name of a tensor in a layer of a stack with fused experts."""
    match = re.match(r"((.+?)\.[0-9]+)\.", name) if family.renames else None
    if match is None or match[2] not in stacks:
        return name
    rest = name[match.end() :]
    for old, new in family.renames:
        if rest.startswith(old):
            return f"{match[1]}.{new}{rest.removeprefix(old)}"
    return name
