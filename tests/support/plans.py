"""Evidence and plans for tests: made up, or of a live model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from chronomoe_hf.lifecycle import (
    Evidence,
    EvidenceSource,
    LayerEvidence,
    LayerSpec,
    PlannedLayer,
    PrunePlan,
    layer_specs,
)


def spec(layer_id: int = 0, *, num_experts: int = 8, top_k: int = 2, groups: int = 1, kept: int = 1) -> LayerSpec:
    """A layer by hand."""
    return LayerSpec(
        layer_id=layer_id,
        name=f"model.layers.{layer_id}.mlp.gate",
        family="mixtral",
        router_class="MixtralTopKRouter",
        num_experts=num_experts,
        top_k=top_k,
        num_groups=groups,
        groups_kept=kept,
    )


def evidence(layers: Sequence[LayerEvidence], **source: object) -> Evidence:
    """Evidence by hand."""
    return Evidence(source=EvidenceSource(kind="run", **source), layers=tuple(layers))  # type: ignore[arg-type]


def keeping(model: nn.Module, kept: Sequence[Sequence[int]]) -> PrunePlan:
    """A plan for a live model that keeps these experts."""
    layers = [
        PlannedLayer(spec=each, kept=tuple(ids), scores=tuple(float(e) for e in range(each.num_experts)))
        for each, ids in zip(layer_specs(model), kept, strict=True)
    ]
    return PrunePlan(layers=tuple(layers), rank="given", source=EvidenceSource(kind="run"))


def digest(model: nn.Module) -> str:
    """SHA-256 over every name, type and bit of a model's state."""
    out = hashlib.sha256()
    for name, value in model.state_dict().items():
        out.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        out.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
