"""Which experts could go: the dry run, the evidence, the plan, what it costs, and the refit of what stays."""

import importlib
from typing import Any

from chronomoe_hf.lifecycle.dry_run.cases import PruneDecision
from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.dry_run.proposals import Proposal
from chronomoe_hf.lifecycle.evidence.spec import EvidenceSource, LayerSpec
from chronomoe_hf.lifecycle.evidence.table import Evidence, LayerEvidence
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live.model import layer_specs
from chronomoe_hf.lifecycle.pruning.calibrate import FisherSums, calibrate
from chronomoe_hf.lifecycle.pruning.measure import Effect, MaskEffect, masked, measure
from chronomoe_hf.lifecycle.pruning.plan import PlannedLayer, PrunePlan
from chronomoe_hf.lifecycle.pruning.plan_prune import RANKS, plan_prune, random_plan, worst_plan
from chronomoe_hf.lifecycle.pruning.refit import RefitReport, refit

__all__ = [
    "RANKS",
    "Effect",
    "Evidence",
    "EvidenceSource",
    "FisherSums",
    "LayerEvidence",
    "LayerRefit",
    "LayerSpec",
    "LifecycleCoordinator",
    "MaskEffect",
    "PlannedLayer",
    "Proposal",
    "PruneDecision",
    "PrunePlan",
    "RefitReport",
    "calibrate",
    "layer_specs",
    "masked",
    "measure",
    "plan_prune",
    "random_plan",
    "refit",
    "worst_plan",
]

# Functions of rooms to the right that a user looks for here.
_ELSEWHERE = {
    "chronomoe_hf.export": ("ExportReport", "export", "export_checkpoint"),
    "chronomoe_hf.in_run.proposals": ("measure_proposals",),
    "chronomoe_hf.splitting.apply": ("AppliedSplit", "apply"),
    "chronomoe_hf.splitting.plan": ("ExpertCopy", "LayerSplit", "SplitPlan"),
    "chronomoe_hf.splitting.plan_split": ("plan_split",),
}
_HOME_OF = {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
