"""Which experts could go: the dry run, the evidence, the plan, what it costs, and the refit of what stays."""

import importlib
from typing import Any

from chronomoe_hf.lifecycle.dry_run.cases import PruneDecision
from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.dry_run.proposals import Proposal
from chronomoe_hf.lifecycle.effect import Effect, MaskEffect
from chronomoe_hf.lifecycle.evidence.spec import EvidenceSource, LayerSpec
from chronomoe_hf.lifecycle.evidence.table import Evidence
from chronomoe_hf.lifecycle.evidence_layer import LayerEvidence
from chronomoe_hf.lifecycle.fisher import FisherSums
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live.model import layer_specs
from chronomoe_hf.lifecycle.proposal_effects import measure_proposals
from chronomoe_hf.lifecycle.pruning.calibrate import calibrate
from chronomoe_hf.lifecycle.pruning.measure import masked, measure
from chronomoe_hf.lifecycle.pruning.plan import PlannedLayer, PrunePlan
from chronomoe_hf.lifecycle.pruning.plan_prune import RANKS, plan_prune, random_plan, worst_plan
from chronomoe_hf.lifecycle.pruning.refit import RefitReport, refit
from chronomoe_hf.splitting.apply import AppliedSplit, apply
from chronomoe_hf.splitting.plan import ExpertCopy, LayerSplit, SplitPlan
from chronomoe_hf.splitting.plan_split import plan_split

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
