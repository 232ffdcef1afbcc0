"""Which experts could go: the dry run, the evidence, the plan, what it costs, and the refit of what stays."""

import importlib
from typing import Any

from chronomoe_hf.lifecycle.calibrate import calibrate
from chronomoe_hf.lifecycle.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.decisions import PruneDecision
from chronomoe_hf.lifecycle.effect import Effect, MaskEffect
from chronomoe_hf.lifecycle.evidence import Evidence
from chronomoe_hf.lifecycle.evidence_layer import LayerEvidence
from chronomoe_hf.lifecycle.fisher import FisherSums
from chronomoe_hf.lifecycle.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live import layer_specs
from chronomoe_hf.lifecycle.masking import masked
from chronomoe_hf.lifecycle.measure import measure
from chronomoe_hf.lifecycle.plan import PlannedLayer, PrunePlan
from chronomoe_hf.lifecycle.planner import RANKS, plan_prune, random_plan, worst_plan
from chronomoe_hf.lifecycle.proposal_effects import measure_proposals
from chronomoe_hf.lifecycle.proposals import Proposal
from chronomoe_hf.lifecycle.records import EvidenceSource, LayerSpec
from chronomoe_hf.lifecycle.refit import RefitReport, refit
from chronomoe_hf.lifecycle.split import AppliedSplit, apply
from chronomoe_hf.lifecycle.split_plan import ExpertCopy, LayerSplit, SplitPlan
from chronomoe_hf.lifecycle.split_planner import plan_split

__all__ = [
    "RANKS",
    "AppliedSplit",
    "Effect",
    "Evidence",
    "EvidenceSource",
    "ExpertCopy",
    "FisherSums",
    "LayerEvidence",
    "LayerRefit",
    "LayerSpec",
    "LayerSplit",
    "LifecycleCoordinator",
    "MaskEffect",
    "PlannedLayer",
    "Proposal",
    "PruneDecision",
    "PrunePlan",
    "RefitReport",
    "SplitPlan",
    "apply",
    "calibrate",
    "layer_specs",
    "masked",
    "measure",
    "measure_proposals",
    "plan_prune",
    "plan_split",
    "random_plan",
    "refit",
    "worst_plan",
]

_EXPORT = ("ExportReport", "export", "export_checkpoint")


def __getattr__(name: str) -> Any:
    """The export lies in a room to the right (it cuts the state on disk along), but belongs to these functions."""
    if name in _EXPORT:
        return getattr(importlib.import_module("chronomoe_hf.export"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
