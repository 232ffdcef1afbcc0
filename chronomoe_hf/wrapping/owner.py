"""How anything finds the system of a wrapped model: one plain attribute of its root."""

from __future__ import annotations

from typing import Any

from torch import nn

from chronomoe_hf.errors import WrapError

SYSTEM = "_chrono_system"
"""Name of the plain attribute of the wrapped root that holds its ChronoSystem."""


def find_system(model: nn.Module) -> Any:
    """The ChronoSystem of `model` or of anything inside it (PEFT, DDP, torch.compile wrappers), or None.

    Raises:
        WrapError: `model` holds several wrapped models.
    """
    owners = [(name, module) for name, module in model.named_modules() if SYSTEM in module.__dict__]
    owners = [(name, module) for name, module in owners if not left_over(module)]
    if len({id(module.__dict__[SYSTEM]) for _, module in owners}) > 1:
        names = ", ".join(f"{name or 'itself'} ({type(module).__name__})" for name, module in owners)
        raise WrapError(
            f"this {type(model).__name__} holds {len(owners)} wrapped models: {names}; give one of them instead"
        )
    return owners[0][1].__dict__[SYSTEM] if owners else None


def left_over(module: nn.Module) -> bool:
    """Whether a root is a shallow copy (``copy.copy``) of one that was unwrapped: its parts are native again."""
    system = module.__dict__.get(SYSTEM)
    return system is not None and system.model.__dict__.get(SYSTEM) is not system
