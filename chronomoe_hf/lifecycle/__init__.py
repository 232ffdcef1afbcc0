"""Which experts could go: the dry run, the evidence, the plan, what it costs, and the refit of what stays."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from chronomoe_hf.export import ExportReport as ExportReport
    from chronomoe_hf.export import export as export
    from chronomoe_hf.export import export_checkpoint as export_checkpoint
    from chronomoe_hf.in_run.proposals import measure_proposals as measure_proposals
    from chronomoe_hf.splitting.apply import AppliedSplit as AppliedSplit
    from chronomoe_hf.splitting.apply import apply as apply
    from chronomoe_hf.splitting.plan import ExpertCopy as ExpertCopy
    from chronomoe_hf.splitting.plan import LayerSplit as LayerSplit
    from chronomoe_hf.splitting.plan import SplitPlan as SplitPlan
    from chronomoe_hf.splitting.plan_split import plan_split as plan_split

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

# Names of rooms to the right that a user looks for here; tests/test_lazy.py compares them with the imports above.
_ELSEWHERE = {
    "chronomoe_hf.export": ("ExportReport", "export", "export_checkpoint"),
    "chronomoe_hf.in_run.proposals": ("measure_proposals",),
    "chronomoe_hf.splitting.apply": ("AppliedSplit", "apply"),
    "chronomoe_hf.splitting.plan": ("ExpertCopy", "LayerSplit", "SplitPlan"),
    "chronomoe_hf.splitting.plan_split": ("plan_split",),
}
_HOME_OF = {name: module for module, names in _ELSEWHERE.items() for name in names}


# A type checker reads the imports above; it would take any name for granted if it saw this function.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            return getattr(importlib.import_module(_HOME_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
