"""Plans for tiny models: which experts stay is drawn at random, the same number in every layer and routing group."""

from __future__ import annotations

import random
from typing import Any

from chronomoe_hf.lifecycle import EvidenceSource, PlannedLayer, PrunePlan, layer_specs


def plan_of(model: Any, seed: int = 0) -> PrunePlan:
    """About half to three quarters of the experts stay, in no regular pattern, different ones in each layer."""
    generator = random.Random(seed)
    layers = []
    for spec in layer_specs(model):
        size = spec.group_size
        per_group = max(size // 2 + (size > 4), -(-spec.top_k // spec.groups_kept), min(2, size))
        kept = [
            group * size + expert
            for group in range(spec.num_groups)
            for expert in generator.sample(range(size), per_group)
        ]
        layers.append(PlannedLayer(spec=spec, kept=tuple(sorted(kept)), scores=(None,) * spec.num_experts))
    return PrunePlan(layers=tuple(layers), rank="random", source=EvidenceSource(kind="run", run_id="test"))
