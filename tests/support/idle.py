"""Models with experts that are hardly chosen."""

from __future__ import annotations

from typing import Any

import torch
from support import models

IDLE = (5, 6, 7)


def with_idle(k: int = 1, *, train: bool = False, **fields: Any) -> Any:
    """A tiny Mixtral whose experts 5, 6 and 7 are hardly chosen: their router rows are short, or point away."""
    model = models.tiny_model("mixtral", train=train, num_experts_per_tok=k, **fields)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[list(IDLE)] *= 0.02 if k == 1 else 0.3
            if k > 1:
                layer.mlp.gate.weight[list(IDLE)] -= 0.3 * layer.mlp.gate.weight[:5].mean(0)
    return model
