"""Every model type of the installed transformers that has experts is in the table, or refused.

Two signs are looked for, each enough: the configuration of a model type, or of a part of it, counts
experts; or the module that builds it defines a class of experts, or has transformers' own code run
them. A new release of transformers that brings a family fails here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_ckpt.layouts.table import FAMILIES, UNSUPPORTED

transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto.configuration_auto")

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = Path(transformers.__file__).parent / "models"
# n_shared_experts, num_experts_per_tok and the like are of dense models too, and of routers.
COUNTS = re.compile(r"(num|n|moe_num)(_local|_routed)?_experts")
EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(", re.MULTILINE)
KNOWN = {t for family in FAMILIES for t in family.model_types} | UNSUPPORTED.keys()


def counts_experts(config):
    """Whether a configuration class, or one of its parts, has a key that counts experts."""
    keys = {key for each in config.__mro__ for key in vars(each).get("__annotations__", ())}
    keys |= set(config.attribute_map) | set(config.attribute_map.values())
    return any(map(COUNTS.fullmatch, keys)) or any(
        counts_experts(part)
        for part in config.sub_configs.values()
        if part is not config and part.__name__ != "AutoConfig"
    )


def in_modules():
    """Folders of transformers whose models have a class of experts."""
    return {
        folder.name
        for folder in MODELS.iterdir()
        for file in folder.glob("modeling_*.py")
        if EXPERTS.search(file.read_text())
    }


@pytest.mark.slow
def test_every_configuration_that_counts_experts_is_known():
    found = {t for t in auto.CONFIG_MAPPING_NAMES if counts_experts(auto.CONFIG_MAPPING[t])}
    assert len(found) > 60
    assert sorted(found - KNOWN) == []


def test_every_module_with_experts_is_known():
    folders = in_modules()
    assert len(folders) > 50
    known = set(map(auto.model_type_to_module_name, KNOWN & auto.CONFIG_MAPPING_NAMES.keys()))
    assert sorted(folders - known) == []


def test_families_that_say_so_are_in_transformers():
    """What the table says transformers has, it has, under these or under types of theirs."""
    said = {t for f in FAMILIES if f.in_transformers for t in f.model_types}
    others = {"ernie4_5_moe_vl", "kimi_k2", "mimo_v2", "minimax_m3"}  # built as other types
    assert sorted(said - auto.CONFIG_MAPPING_NAMES.keys()) == sorted(others)
