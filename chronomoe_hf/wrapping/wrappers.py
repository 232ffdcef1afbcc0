"""Modules that other libraries put around those of a model, and which of their children runs.

Most insert one level (``base_layer``, ``_orig_mod``, ...). Some of PEFT hold *copies* of a module and run one of them:
``modules_to_save`` (the adapter's copy, or the original while the adapter is off) and LN tuning. A layer keeps its name
through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

INSERTED = (
    "_orig_mod",
    "base_model",
    "module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "base_layer",
    "original_module",
)
"""Child names that wrappers insert: torch.compile, PEFT, DDP, activation checkpointing, FSDP."""
_COPIES = (("original_module", "modules_to_save"), ("base_layer", "ln_tuning_layers"))
"""(kept, copies): the child that holds the original, and the ModuleDict that holds a copy for each adapter."""


@dataclass(frozen=True)
class Place:
    """A module and where it stands.

    Args:
        name: its path without the names that wrappers insert.
        module: the module.
        above: the modules on the way to it, outermost first.
        runs: False for a copy that its wrapper does not run now.
    """

    name: str
    module: nn.Module
    above: tuple[nn.Module, ...]
    runs: bool


def alternatives(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The children of which `module` runs just one, the one that runs now first; None for every other module."""
    children = module._modules
    for kept, copies in _COPIES:
        original, held = children.get(kept), children.get(copies)
        if original is not None and isinstance(held, nn.ModuleDict):
            options = {name: copy for name, copy in held.items()} | {kept: original}
            first = _active(module, held) or kept
            return [(first, options.pop(first)), *options.items()]
    return None


def _active(wrapper: Any, held: nn.ModuleDict) -> str | None:
    """The adapter whose copy runs, as PEFT decides it; None: the original runs."""
    if wrapper.disable_adapters or getattr(wrapper, "merged", False):
        return None
    names = wrapper.active_adapters
    return names[0] if names and names[0] in held else None


def inner(module: nn.Module) -> nn.Module | None:
    """The child that a wrapper calls now, or None where `module` is no wrapper."""
    options = alternatives(module)
    if options is not None:
        return options[0][1]
    return next((child for name in INSERTED if (child := module._modules.get(name)) is not None), None)


def leaves(module: nn.Module) -> list[nn.Module]:
    """What the wrappers around a module hold: the module that runs first, then its copies."""
    options = alternatives(module)
    if options is not None:
        return [leaf for _, child in options for leaf in leaves(child)]
    base = module._modules.get("base_layer")
    return [module] if base is None else leaves(base)


def walk(model: nn.Module) -> Iterator[Place]:
    """Every module once, in module order; of copies, the one that runs first."""
    seen: set[int] = set()

    def visit(module: nn.Module, parts: tuple[str, ...], above: tuple[nn.Module, ...], runs: bool) -> Iterator[Place]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield Place(".".join(parts), module, above, runs)
        options = alternatives(module) or []
        for number, (_, child) in enumerate(options):
            yield from visit(child, parts, (*above, module), runs and number == 0)
        for name, below in module._modules.items():
            if below is not None and not (options and isinstance(below, nn.ModuleDict)):
                step = parts if name in INSERTED else (*parts, name)
                yield from visit(below, step, (*above, module), runs)

    yield from visit(model, (), (), True)


def clean_name(path: str) -> str:
    """`path` without the names that wrappers insert."""
    return ".".join(part for part in path.split(".") if part not in INSERTED)


def locate(root: nn.Module, name: str) -> tuple[nn.Module, ...] | None:
    """The modules from `root` to the module of a clean name, copies and wrappers entered as they run now.

    Returns:
        The way, ending with the first module of that name (a wrapper, where there is one), or None: not there.
    """
    way = [root]
    for part in name.split("."):
        while part not in way[-1]._modules:
            below = inner(way[-1])
            if below is None:
                return None
            way.append(below)
        child = way[-1]._modules[part]
        if child is None:
            return None
        way.append(child)
    return tuple(way)
