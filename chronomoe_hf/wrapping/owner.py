"""How anything finds the system of a wrapped model: one plain attribute of its root."""

from __future__ import annotations

from typing import Any

from torch import nn

SYSTEM = "_chrono_system"
"""Name of the plain attribute of the wrapped root that holds its ChronoSystem."""


def find_system(model: nn.Module) -> Any:
    """The ChronoSystem of `model` or of anything inside it (PEFT, DDP, torch.compile wrappers), or None."""
    for module in model.modules():
        system = module.__dict__.get(SYSTEM)
        if system is not None:
            return system
    return None
