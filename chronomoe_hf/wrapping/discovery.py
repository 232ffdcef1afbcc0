"""Finding the MoE layers of a model: routers with their adapters, experts, and owners; and what is refused, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from chronomoe_hf.patches import Adapter, match, refusal
from chronomoe_hf.recording.experts import chrono_experts_class

_WRAPPER_PREFIXES = ("_orig_mod", "base_model", "module", "_checkpoint_wrapped_module", "base_layer")


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
    """

    name: str
    router: nn.Module
    adapter: Adapter
    parent: nn.Module
    owner: nn.Module
    experts: nn.Module | None
    unreadable: str | None


@dataclass(frozen=True)
class RefusedLayer:
    """One MoE layer that is left alone."""

    name: str
    class_name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def root_of(model: nn.Module) -> nn.Module:
    """The outermost PreTrainedModel inside the wrappers around it (PEFT, torch.compile, DDP), where there is just one.

    State that lives there survives the wrappers, and layers are called the same with and without them.
    """
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if inner and sum(isinstance(module, PreTrainedModel) for module in inner[0].modules()) == len(inner):
        return inner[0]
    return model


def find_layers(model: nn.Module) -> tuple[list[FoundLayer], list[RefusedLayer]]:
    """Every MoE layer of `model`, in module order: what can be wrapped, and what is refused by name."""
    found: list[FoundLayer] = []
    refused: list[RefusedLayer] = []
    declared = declared_routers(model)
    for path, module in model.named_modules():
        name, class_name, adapter = clean_name(path), type(module).__name__, match(module)
        reason = refusal(module) if adapter is None else adapter.refused("observe")
        if adapter is None and reason is None and _is_declared(name, module, declared):
            # jetmoe records its attention blocks, whose inner router has an adapter: then nothing is left alone.
            if not any(match(inner) for inner in module.modules()):
                reason = f"{class_name} has no adapter in this version of chronomoe_hf"
        if reason is not None:
            refused.append(RefusedLayer(name, class_name, reason))
        elif adapter is not None:
            found.append(_found(model, path, module, adapter))
    return found, refused


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


def clean_name(path: str) -> str:
    """`path` without the names that PEFT, torch.compile, DDP and FSDP insert."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPER_PREFIXES)


def _found(model: nn.Module, path: str, router: nn.Module, adapter: Adapter) -> FoundLayer:
    above: list[nn.Module] = [model]
    for part in path.split(".")[:-1]:
        above.append(getattr(above[-1], part))
    owner = next((module for module in reversed(above) if isinstance(module, PreTrainedModel)), model)
    parent = next((m for m in reversed(above) if adapter.experts in m._modules), above[-1])
    experts = _experts_module(parent, adapter)
    return FoundLayer(clean_name(path), router, adapter, parent, owner, experts, _unreadable(experts, adapter))


def _experts_module(parent: nn.Module, adapter: Adapter) -> nn.Module | None:
    if adapter.experts is None:
        return None
    module = parent.get_submodule(adapter.experts)
    while "base_layer" in module._modules:  # PEFT parameter wrappers call through to this module
        module = module.get_submodule("base_layer")
    return module


def _unreadable(experts: nn.Module | None, adapter: Adapter) -> str | None:
    refused = adapter.refused("coherence")
    if refused is not None:
        return refused
    if experts is None:
        return f"the experts of {adapter.family} cannot be reached"
    if chrono_experts_class(adapter.experts_call, type(experts)) is None:
        return f"no reader for the experts of {adapter.family} ({adapter.experts_call})"
    if "forward" in experts.__dict__ and "_old_forward" not in experts.__dict__:
        return "the experts' forward was replaced on the instance (expert or tensor parallel)"
    return None
