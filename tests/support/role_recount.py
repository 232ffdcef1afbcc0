"""Role sums recounted in plain Python: every expert's output on every real token, from the definition.

Legend: L layers, E experts, K experts per token, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from chronomoe_hf.recording.role_sums import ALPHA

Rows = list[tuple[list[int], list[list[float]]]]
"""Per real token: the ids of its experts, and their unweighted outputs."""


def outputs_of(model: Any, batch: dict[str, Any]) -> list[Rows]:
    """Per layer, what every chosen expert of a plain Mixtral or Qwen3-MoE gives on every real token."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layers = [layer.mlp for layer in model.model.layers]
    handles = [
        block.experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach(), args[1])))
        for block in layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers), "bad test setup"
    real = batch["attention_mask"].flatten().tolist()
    out = []
    for block, (hidden_TD, index_TK) in zip(layers, seen, strict=True):
        up, down = block.experts.gate_up_proj.detach().double(), block.experts.down_proj.detach().double()
        rows: Rows = []
        for x, ids, counts in zip(hidden_TD.flatten(0, -2).double(), index_TK.tolist(), real, strict=True):
            if counts:
                given = []
                for expert in ids:
                    gate, linear = (up[expert] @ x).chunk(2)
                    given.append((down[expert] @ (F.silu(gate) * linear)).tolist())
                rows.append((ids, given))
        out.append(rows)
    return out


class RoleRecount:
    """The roles of one layer, window by window.

    Args:
        direction: first direction of every expert, E x D.
    """

    def __init__(self, direction: list[list[float]]) -> None:
        self.direction = [list(row) for row in direction]
        num, width = len(direction), len(direction[0])
        self.offset = [0.0] * num
        self.mean = [[0.0] * width for _ in range(num)]
        self.updates = [0] * num
        self.moments: list[list[float]] = []
        self.together = [[0.0] * num for _ in range(num)]
        self.agreement = [[0.0] * num for _ in range(num)]

    def close(self, rows: Rows) -> None:
        """Take in all tokens of one window."""
        num = len(self.direction)
        tokens: list[list[list[float]]] = [[] for _ in range(num)]
        self.together = [[ALPHA * value for value in row] for row in self.together]
        self.agreement = [[ALPHA * value for value in row] for row in self.agreement]
        for ids, given in rows:
            for one, y in zip(ids, given, strict=True):
                tokens[one].append(y)
                for other, its in zip(ids, given, strict=True):
                    self.together[one][other] += 1.0
                    self.agreement[one][other] += cosine(y, its)
        self.moments = []
        for expert, outputs in enumerate(tokens):
            u, c = self.direction[expert], self.offset[expert]
            t = [dot(y, u) - c for y in outputs]
            above = [value for value in t if value > 0.0]
            n = float(len(t))
            self.moments.append([n, float(len(above)), sum(t), sum(above), sum(v * v for v in t), n])
            if not outputs:
                continue
            mean = [sum(column) / n for column in zip(*outputs, strict=True)]
            old = self.mean[expert]
            self.mean[expert] = [ALPHA * a + (1.0 - ALPHA) * b for a, b in zip(old, mean, strict=True)]
            self.updates[expert] += 1
            turned = [0.0] * len(u)
            for value, y in zip(t, outputs, strict=True):
                for at, (own, centre) in enumerate(zip(y, mean, strict=True)):
                    turned[at] += value * (own - centre)
            length = math.sqrt(dot(turned, turned))
            if length > 0.0:
                self.direction[expert] = [value / length for value in turned]
            self.offset[expert] = dot(mean, self.direction[expert])

    def role_vectors(self) -> list[list[float]]:
        """r_e, bias-corrected; zeros where nothing was seen."""
        return [
            [value / (1.0 - ALPHA**n) if n else 0.0 for value in row]
            for row, n in zip(self.mean, self.updates, strict=True)
        ]

    def cosines(self, centred: bool) -> list[list[float]]:
        """Of all pairs of role vectors, centred over the known ones if asked for."""
        roles, known = self.role_vectors(), [n > 0 for n in self.updates]
        if centred:
            own = [role for role, ok in zip(roles, known, strict=True) if ok]
            centre = [sum(column) / len(own) for column in zip(*own, strict=True)]
            roles = [
                [a - b for a, b in zip(role, centre, strict=True)] if ok else [0.0] * len(role)
                for role, ok in zip(roles, known, strict=True)
            ]
        return [[cosine(one, other) for other in roles] for one in roles]


def dot(one: list[float], other: list[float]) -> float:
    """Inner product."""
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    """Cosine, 0 where either is zero."""
    length = math.sqrt(dot(one, one) * dot(other, other))
    return dot(one, other) / length if length > 0.0 else 0.0
