"""Definitions written out in plain Python: recounts of what routers chose, and phi token by token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from chronomoe_hf import ChronoRouter


class Recount:
    """Counts assignments from the routers' outputs with forward hooks, token by token, given the real rows."""

    def __init__(self, model: Any, family: str) -> None:
        self.family = family
        self.routers = [m for m in model.modules() if isinstance(m, ChronoRouter)]
        self.counts: list[Counter[int]] = [Counter() for _ in self.routers]
        self.dropped = [0] * len(self.routers)
        self.mask: list[bool] | None = None
        self.enabled = True
        for position, router in enumerate(self.routers):
            router.register_forward_hook(self._hook(position))

    def _hook(self, position: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not self.enabled or torch._C._current_graph_task_id() != -1:
                return
            if self.family == "switch_transformers":
                rows = [[e for e, hit in enumerate(row) if hit] for row in output[0].flatten(0, 1).tolist()]
            else:
                rows = output[2].tolist()
            real = self.mask or [True] * len(rows)
            assert len(real) == len(rows)
            for row, counts_here in zip(rows, real, strict=True):
                if counts_here:
                    self.counts[position].update(row)
                    self.dropped[position] += (1 if self.family == "switch_transformers" else len(row)) - len(row)

        return hook

    def lists(self) -> list[list[int]]:
        return [[c[e] for e in range(8)] for c in self.counts]


def train_step(model: Any, batch: dict[str, Any], recount: Recount | None = None) -> None:
    if recount is not None:
        recount.mask = [bool(v) for v in batch["attention_mask"].flatten().tolist()]
    model(**batch).loss.backward()


def naive_phi(
    outputs: list[list[list[float]]],
    weights: list[list[float]],
    index: list[list[int]],
    real: list[bool],
    reference: str,
) -> tuple[dict[int, float], dict[int, float]]:
    """phi and sum(gate * |y|) per expert from the definition, one token and one expert at a time."""
    width = len(outputs[0][0])
    tokens = [t for t, ok in enumerate(real) if ok]
    mixture = {
        t: [sum(w * y[d] for w, y in zip(weights[t], outputs[t], strict=True)) for d in range(width)] for t in tokens
    }
    phi: dict[int, float] = {}
    saliency: dict[int, float] = {}
    mean_mixture = [sum(mixture[t][d] for t in tokens) / len(tokens) for d in range(width)]
    for expert in sorted({e for t in tokens for e in index[t]}):
        mine = [(t, index[t].index(expert)) for t in tokens if expert in index[t]]
        mean = [sum(outputs[t][j][d] for t, j in mine) / len(mine) for d in range(width)]
        if reference == "mixture":
            other = mean_mixture
        else:
            other = [
                sum(mixture[t][d] - weights[t][j] * outputs[t][j][d] for t, j in mine) / len(mine) for d in range(width)
            ]
        dot = sum(a * b for a, b in zip(mean, other, strict=True))
        phi[expert] = dot / (math.hypot(*mean) * math.hypot(*other))
        saliency[expert] = sum(weights[t][j] * math.hypot(*outputs[t][j]) for t, j in mine)
    return phi, saliency


def softmax(row: list[float]) -> list[float]:
    """exp(z) / sum(exp(z)) of one row."""
    high = max(row)
    parts = [math.exp(z - high) for z in row]
    return [p / sum(parts) for p in parts]


def naive_js(p: list[float], q: list[float]) -> float:
    """Jensen-Shannon divergence of two distributions, nats."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += (a * math.log(a / middle) if a else 0.0) / 2 + (b * math.log(b / middle) if b else 0.0) / 2
    return total
