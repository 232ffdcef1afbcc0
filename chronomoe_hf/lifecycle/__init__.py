"""Which experts could go: the dry run, the evidence, and the plan."""

from chronomoe_hf.lifecycle.coordinator import LifecycleCoordinator, PruneDecision
from chronomoe_hf.lifecycle.evidence import Evidence, LayerEvidence
from chronomoe_hf.lifecycle.plan import PlannedLayer, PrunePlan
from chronomoe_hf.lifecycle.records import EvidenceSource, LayerSpec

__all__ = [
    "Evidence",
    "EvidenceSource",
    "LayerEvidence",
    "LayerSpec",
    "LifecycleCoordinator",
    "PlannedLayer",
    "PruneDecision",
    "PrunePlan",
]
