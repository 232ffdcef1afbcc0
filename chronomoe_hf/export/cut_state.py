"""Our own state of a model, without the experts that go: what belongs to an expert moves to its new id.

Shape suffixes: L layers, E experts (padded to the widest layer), C clocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import PlanMismatchError
from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.evidence.drift import START
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import AlertHistory


def cut_state(
    tensors: dict[str, Tensor], meta: dict[str, Any], plan: PrunePlan
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as ``system.state_dict()`` or a state file has it, for the model that `plan` leaves.

    beta, clocks, counters, gains and router rows move with their experts; lenses and the controller's pressures stay,
    they belong to a layer. What speaks of the old experts as a whole starts afresh: the open window, alerts, lifecycle
    cases, roles.

    Args:
        tensors: by name, on the CPU.
        meta: JSON-ready.
        plan: what stays.

    Raises:
        PlanMismatchError: the state is of other layers than the plan.
    """
    rows = [(row["name"], row["num_experts"]) for row in meta["layers"]]
    if rows != [(spec.name, spec.num_experts) for spec in plan.specs]:
        raise PlanMismatchError(
            f"the chronomoe state has layers {rows[:2]}..., the plan is for {[s.name for s in plan.specs[:2]]}...; "
            "make a plan from evidence of this model"
        )
    fresh = StepState([len(layer.kept) for layer in plan.layers]).state_dict()
    widest = max(spec.num_experts for spec in plan.specs)
    out = {name: value for name, value in tensors.items() if name not in fresh and not name.startswith("role.")}
    for name, empty in fresh.items():
        if name in tensors:
            out[name] = _moved(tensors[name], empty, plan, widest)
    for name in out:
        if match := START.fullmatch(name):
            layer = plan.layers[int(match[1])]
            others = range(layer.spec.num_experts, out[name].shape[0])  # rows of classes that are no experts
            out[name] = out[name][[*layer.kept, *others]]
    layers = [{**row, "num_experts": plan.num_kept} for row in meta["layers"]]
    cut = {
        **meta,
        "layers": layers,
        "window_steps": 0,
        "controller": {**meta["controller"], "n_experts_per_layer": [plan.num_kept] * len(layers)},
        "lifecycle": LifecycleCoordinator(LifecycleConfig(), n_layers=len(layers)).state_dict(),
        "alerts": AlertHistory().state_dict(),
    }
    cut.pop("topk_disagreement", None)
    cut.pop("cut", None)  # speaks of the old ids; what it dropped is gone
    return out, cut


def _moved(value: Tensor, empty: Tensor, plan: PrunePlan, widest: int) -> Tensor:
    """`value` in the shape of `empty`, with the columns of the kept experts of each layer; `empty` if it has none."""
    if value.shape[:-1] != empty.shape[:-1] or value.dim() < 2 or value.shape[-1] != widest:
        return value if value.shape == empty.shape else empty
    out = empty.clone()
    for at, layer in enumerate(plan.layers):
        out[..., at, : len(layer.kept)] = value[..., at, :].index_select(-1, torch.tensor(layer.kept))
    return out
