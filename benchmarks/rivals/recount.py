"""What a tool of benchmarks/rivals/run.py reports, and the token-by-token recount that it is compared with.

The recount walks over the tokens one by one in plain Python; with the tools it shares only how a router is found and
the formula of the entropy.

Legend: L MoE layers, E experts, k experts per token, T tokens of a forward (padding included).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch

Counts = list[list[int]]


def entropy_of(counts: list[int]) -> float:
    """Shannon entropy of the shares, nats."""
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n) if total else 0.0


@dataclasses.dataclass
class Reading:
    """What a tool reports at the end of a run.

    Args:
        counts: assignments per layer and expert.
        dead: experts reported dead, per layer.
        entropy: nats per layer: of the shares, or what the tool's documentation defines.
        neff: exp of the entropy of the shares, per layer; of the tool's own counts where it reports none.
        per_token: whether `entropy` is the mean entropy of each token's router probabilities instead.
    """

    counts: Counts
    dead: list[list[int]]
    entropy: list[float]
    neff: list[float]
    per_token: bool = False

    @classmethod
    def of_counts(cls, counts: Counts) -> Reading:
        """Everything from counts alone: dead is an expert without a token."""
        entropy = [entropy_of(layer) for layer in counts]
        dead = [[expert for expert, n in enumerate(layer) if n == 0] for layer in counts]
        return cls(counts, dead, entropy, [math.exp(value) for value in entropy])


def routers_of(model: Any) -> list[Any]:
    """The routers of a model that nobody has changed yet: they return (logits, weights, ids)."""
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


class Recount:
    """Token by token: the real tokens (attention mask 1) of passes inside `compute_loss` in training mode, once each.

    Gradient checkpointing computes again inside the backward, which `compute_loss` does not contain; an evaluation is
    in eval mode; generation and reference models do not run inside `compute_loss` of the policy.
    """

    def __init__(self, trainer: Any) -> None:
        self.inside, self.mask = False, [True]
        self.routers = routers_of(trainer.model)
        self.counts: list[Counter[int]] = [Counter() for _ in self.routers]
        self.first: list[Counter[int]] = [Counter() for _ in self.routers]
        self.spread: list[list[float]] = [[] for _ in self.routers]
        self.experts = self.routers[0].weight.shape[0]
        self.original = trainer.compute_loss
        trainer.compute_loss = self._compute_loss
        trainer.model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(lambda m, a, out, layer=layer: self._count(layer, out))

    def _compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.inside = model.training
        try:
            return self.original(model, *args, **kwargs)
        finally:
            self.inside = False

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        self.mask = [bool(v) for v in (torch.ones_like(ids) if mask is None else mask).flatten().tolist()]

    def _count(self, layer: int, output: Any) -> None:
        if not self.inside:
            return
        logits, chosen = output[0].detach().double().tolist(), output[2].tolist()
        for row, experts, real in zip(logits, chosen, self.mask, strict=True):
            if real:
                self.counts[layer].update(experts)
                high = max(row)
                self.first[layer][row.index(high)] += 1
                total = sum(math.exp(z - high) for z in row)
                parts = [math.exp(z - high) / total for z in row]
                self.spread[layer].append(-sum(p * math.log(p) for p in parts if p))

    def first_choices(self) -> Counts:
        """The expert of the largest logit of each real token, counted."""
        return [[c[e] for e in range(self.experts)] for c in self.first]

    def reading(self, per_token: bool = False) -> Reading:
        """The truth; with `per_token` its entropy is the mean entropy of each token's probabilities."""
        truth = Reading.of_counts([[c[e] for e in range(self.experts)] for c in self.counts])
        if per_token:
            truth = dataclasses.replace(truth, entropy=[sum(s) / len(s) for s in self.spread], per_token=True)
        return truth
