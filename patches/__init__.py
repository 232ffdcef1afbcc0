"""Routers of the supported families: what they return and how they choose, one `Adapter` per router class.

`find(router)` returns the adapter of a router, or says which come close.
"""

from __future__ import annotations

from chronomoe_hf.patches import (
    deepseek,
    own_rules,
    phimoe,
    sigmoid_families,
    softmax_families,
    switch_transformers,
    topk_squash,
)
from chronomoe_hf.patches.contract import probe
from chronomoe_hf.patches.registry import (
    Adapter,
    all_adapters,
    find,
    match,
    match_class,
    refusal,
    refused_classes,
    register,
    register_refusal,
)

__all__ = [
    "Adapter",
    "all_adapters",
    "find",
    "match",
    "match_class",
    "probe",
    "refusal",
    "refused_classes",
    "register",
    "register_refusal",
]

_FAMILY_FILES: tuple[tuple[Adapter, ...], ...] = (
    softmax_families.ADAPTERS,
    deepseek.ADAPTERS,
    sigmoid_families.ADAPTERS,
    topk_squash.ADAPTERS,
    switch_transformers.ADAPTERS,
    phimoe.ADAPTERS,
    own_rules.ADAPTERS,
)
for _adapters in _FAMILY_FILES:
    for _adapter in _adapters:
        register(_adapter)
for (_module, _class_name), _reason in own_rules.REFUSED.items():
    register_refusal(_module, _class_name, _reason)
