"""Roles in several processes: what each rank sees, and what they must agree on."""

from __future__ import annotations

from typing import Any

from support import models

from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig

SIZES = (6, 2)  # sequences of a micro-batch, by rank
CONFIG = ChronoConfig.observe(interval=2, coherence=CoherenceConfig(roles=True, max_tokens=None))


def batch_of(step: int, rank: int) -> dict[str, Any]:
    """What a rank sees in a step."""
    return models.tiny_batch("mixtral", seed=10 * step + rank, batch=SIZES[rank], padded=True)


def outcome(system: Any) -> dict[str, Any]:
    """Everything about roles that ranks must agree on."""
    state = {name: value for name, value in system.state_dict()["tensors"].items() if name.startswith("role.")}
    roles = [layer.roles for layer in system.last_snapshot.layers]
    return {"state": state, "roles": roles, "memory": system.lifecycle.state_dict()["roles"]}
