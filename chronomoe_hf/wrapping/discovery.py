"""Finding the MoE layers of a model: routers with their adapters, experts, and owners; and what is refused, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from chronomoe_hf.patches import Adapter, match, refusal
from chronomoe_hf.recording.experts import experts_mixin

# Modules that other libraries put around those of a model, and which of their children runs.
#
# Most insert one level (``base_layer``, ``_orig_mod``, ...). Some of PEFT hold *copies* of a module and run one of
# them: ``modules_to_save`` (the adapter's copy, or the original while the adapter is off) and LN tuning. A layer keeps
# its name through all of them.

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


@dataclass(frozen=True)
class FoundLayer:
    """One MoE layer that can be wrapped.

    Args:
        name: path of the router in the searched model, without the names that wrappers insert.
        router: the router module.
        adapter: the facts of its class.
        parent: the block that holds router and experts.
        owner: innermost PreTrainedModel around the router: its forward opens the recording window.
        experts: the module that computes the experts, or None.
        unreadable: why expert outputs cannot be read, or None.
        experts_copies: copies of the experts that another adapter of PEFT runs.
        copies: copies of the whole layer (router, or the block around it) that another adapter of PEFT runs.
    """

    name: str
    router: nn.Module
    adapter: Adapter
    parent: nn.Module
    owner: nn.Module
    experts: nn.Module | None
    unreadable: str | None
    experts_copies: tuple[nn.Module, ...] = ()
    copies: tuple[FoundLayer, ...] = ()

    def modules(self) -> list[tuple[FoundLayer, nn.Module, bool]]:
        """(layer or copy, module, whether it is a router) of all that gets another class when wrapped."""
        out = []
        for layer in (self, *self.copies):
            out.append((layer, layer.router, True))
            if layer.experts is not None and layer.unreadable is None:
                out += [(layer, experts, False) for experts in (layer.experts, *layer.experts_copies)]
        return list({id(module): (layer, module, routes) for layer, module, routes in out}.values())


@dataclass(frozen=True)
class RefusedLayer:
    """One MoE layer that is left alone."""

    name: str
    class_name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Modules:
    """The modules of a layer that run now: another adapter may be active than when the model was wrapped."""

    router: nn.Module
    parent: nn.Module
    experts: nn.Module | None = field(default=None)


def root_of(model: nn.Module) -> nn.Module:
    """The outermost PreTrainedModel inside the wrappers around it (PEFT, torch.compile, DDP), where there is just one.

    State that lives there survives the wrappers, and layers are called the same with and without them.
    """
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if found and sum(isinstance(module, PreTrainedModel) for module in found[0].modules()) == len(found):
        return found[0]
    return model


def find_layers(model: nn.Module) -> tuple[list[FoundLayer], list[RefusedLayer]]:
    """Every MoE layer of `model`, in module order: what can be wrapped, and what is refused by name."""
    found: list[FoundLayer] = []
    copies: dict[str, list[FoundLayer]] = {}
    refused: dict[str, RefusedLayer] = {}
    declared = declared_routers(model)
    for place in walk(model):
        name, module, adapter = place.name, place.module, match(place.module)
        class_name = type(module).__name__
        reason = refusal(module) if adapter is None else adapter.refused("observe")
        if adapter is None and reason is None and _is_declared(name, module, declared):
            # jetmoe records its attention blocks, whose inner router has an adapter: then nothing is left alone.
            if not any(match(inside) for inside in module.modules()):
                reason = f"{class_name} has no adapter in this version of chronomoe_hf"
        if reason is not None:
            refused.setdefault(name, RefusedLayer(name, class_name, reason))
        elif adapter is not None and not any(refusal(above) for above in place.above):
            layer = _found(model, place, adapter)
            other = _other_layout(layer)
            if other is not None:
                refused.setdefault(name, RefusedLayer(name, class_name, other))
            elif place.runs:
                found.append(layer)
            else:
                copies.setdefault(name, []).append(layer)
    return [replace(layer, copies=tuple(copies.get(layer.name, ()))) for layer in found], list(refused.values())


def _other_layout(layer: FoundLayer) -> str | None:
    """Why a router of a known class cannot be read in the installed Transformers, or None: releases differ."""
    adapter, router = layer.adapter, layer.router
    before = dict(router.__dict__)
    try:
        adapter.bind(router, layer.parent)
        adapter.num_experts(router), adapter.top_k(router), adapter.weight(router)
    except AttributeError as error:
        return (
            f"{adapter.router_class} is laid out otherwise in Transformers {version('transformers')} ({error}); "
            f"{adapter.family} needs a newer release, see docs/families.md"
        )
    finally:
        router.__dict__.clear()
        router.__dict__.update(before)
    return None


def declared_routers(model: nn.Module) -> list[tuple[type, str | None]]:
    """(class, part of the module path) of what the model's own library records as router logits.

    With it an unknown family is named, not missed.
    """
    declared: list[tuple[type, str | None]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders = getattr(module, "_can_record_outputs", None) or {}
            entries = recorders.get("router_logits", [])
            for entry in entries if isinstance(entries, list | tuple) else [entries]:
                target = getattr(entry, "target_class", entry)
                if isinstance(target, type):
                    declared.append((target, getattr(entry, "layer_name", None)))
    return declared


def _is_declared(name: str, module: nn.Module, declared: list[tuple[type, str | None]]) -> bool:
    return any(isinstance(module, cls) and (part is None or part in name) for cls, part in declared)


def running_modules(root: nn.Module, name: str, adapter: Adapter) -> Modules | None:
    """The modules that a layer's forward goes through now, or None: the model no longer has a layer of that name.

    Args:
        root: the model that was searched.
        name: the layer's name, see `FoundLayer`.
        adapter: the facts of its router's class.
    """
    way = locate(root, name)
    if way is None:
        return None
    router = next((leaf for leaf in leaves(way[-1])[:1] if match(leaf) is not None), None)
    if router is None:
        return None
    parent = _block_of(way[:-1], adapter)
    experts = _experts_modules(parent, adapter)
    return Modules(router, parent, experts[0] if experts else None)


def _found(model: nn.Module, place: Place, adapter: Adapter) -> FoundLayer:
    above = place.above or (model,)
    owner = next((module for module in reversed(above) if isinstance(module, PreTrainedModel)), model)
    parent = _block_of(above, adapter)
    experts = _experts_modules(parent, adapter)
    first = experts[0] if experts else None
    return FoundLayer(
        name=place.name,
        router=place.module,
        adapter=adapter,
        parent=parent,
        owner=owner,
        experts=first,
        unreadable=_unreadable(first, adapter),
        experts_copies=tuple(experts[1:]),
    )


def _block_of(above: tuple[nn.Module, ...], adapter: Adapter) -> nn.Module:
    """The module that holds router and experts."""
    return next((module for module in reversed(above) if adapter.experts in module._modules), above[-1])


def _experts_modules(parent: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The module that computes the experts, inside PEFT's wrappers, and its copies."""
    if adapter.experts is None or adapter.experts not in parent._modules:
        return []
    return leaves(parent.get_submodule(adapter.experts))


def _unreadable(experts: nn.Module | None, adapter: Adapter) -> str | None:
    refused = adapter.refused("coherence")
    if refused is not None:
        return refused
    if experts is None:
        return f"the experts of {adapter.family} cannot be reached"
    if experts_mixin(adapter.experts_call) is None:
        return f"no reader for the experts of {adapter.family} ({adapter.experts_call})"
    if "forward" in experts.__dict__ and "_old_forward" not in experts.__dict__:
        own = experts.__dict__["forward"]
        name = getattr(own, "__qualname__", type(own).__name__)
        return f"the experts' forward was replaced on the instance by {name} (a kernel, expert or tensor parallel)"
    return None
