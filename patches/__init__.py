"""Routers of the supported families: what they return and how they choose, one `Adapter` per router class.

`find(router)` returns the adapter of a router; `chrono_class` the class that a wrapped router gets. Those classes are
attributes of this module (``chronomoe_hf.patches.ChronoMixtralTopKRouter``), created on first use, so a pickled model
loads in a fresh process.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from chronomoe_hf.patches import (
    deepseek,
    mixtral,
    phimoe,
    qwen_moe,
    sigmoid_families,
    singletons,
    softmax_families,
    switch_transformers,
    topk_squash,
)
from chronomoe_hf.patches.contract import probe
from chronomoe_hf.patches.registry import (
    Adapter,
    all_adapters,
    chrono_class,
    find,
    match,
    refusal,
    refused_classes,
    register,
    register_refusal,
)

__all__ = [
    "Adapter",
    "all_adapters",
    "chrono_class",
    "find",
    "match",
    "probe",
    "refusal",
    "refused_classes",
    "register",
    "register_refusal",
]

_FAMILY_FILES: tuple[tuple[Adapter, ...], ...] = (
    mixtral.ADAPTERS,
    qwen_moe.ADAPTERS,
    softmax_families.ADAPTERS,
    deepseek.ADAPTERS,
    sigmoid_families.ADAPTERS,
    topk_squash.ADAPTERS,
    switch_transformers.ADAPTERS,
    phimoe.ADAPTERS,
    singletons.ADAPTERS,
)
for _adapters in _FAMILY_FILES:
    for _adapter in _adapters:
        register(_adapter)
for (_module, _class_name), _reason in singletons.REFUSED.items():
    register_refusal(_module, _class_name, _reason)


def __getattr__(name: str) -> type[nn.Module]:
    """Resolve ``Chrono<RouterClass>`` by importing the module that defines the router class (PEP 562)."""
    for adapter in all_adapters() if name.startswith("Chrono") else ():
        if adapter.router_class == name.removeprefix("Chrono"):
            try:
                original = getattr(import_module(adapter.module), adapter.router_class)
            except (ImportError, AttributeError) as error:
                raise AttributeError(f"{name}: {adapter.router_class} is not in the installed transformers") from error
            return chrono_class(adapter, original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
