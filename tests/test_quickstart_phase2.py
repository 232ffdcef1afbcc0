"""The governance quick start of the original ChronoMoE README, verbatim but for the package name."""

from __future__ import annotations

from typing import Any

import torch

from chronomoe_hf import RoutingEvent, SystemSnapshot

QUICK_START = """
from chronomoe import ChronoLens
from chronomoe.controller import Controller, ControlConfig

# Initialize controller
controller = Controller(
    n_layers=4,
    n_experts_per_layer=[8, 8, 8, 8],
    config=ControlConfig(),
)
controller.initialize(run_id="my_run")

# Create lenses for each MoE layer
lenses = {
    layer_id: ChronoLens(d_model=512, rank=8, layer_id=layer_id)
    for layer_id in range(4)
}

# At each eval checkpoint:
decisions = controller.update(snapshot, lenses)
"""


def _snapshot() -> SystemSnapshot:
    used_capacity = [torch.full((8,), 1000)] * 3 + [torch.tensor([4000, 4000, 0, 0, 0, 0, 0, 0])]
    events = [
        RoutingEvent.from_router_output(
            run_id="my_run", step=100, mode="TRAIN", layer_id=i, used_capacity=counts, n_experts=8, top_k=2
        )
        for i, counts in enumerate(used_capacity)
    ]
    return SystemSnapshot.from_events(
        events=events,
        step=100,
        train_loss=2.5,
        val_loss=2.8,
        run_id="my_run",
        model_name="MyMoE",
        n_layers=4,
        alert_history={},
    )


def test_the_quick_start_runs_and_does_what_its_comments_promise():
    namespace: dict[str, Any] = {"snapshot": _snapshot()}
    exec(QUICK_START.replace("chronomoe", "chronomoe_hf"), namespace)
    decisions, lenses = namespace["decisions"], namespace["lenses"]
    assert [decision.layer_id for decision in decisions] == [0, 1, 2, 3]
    # 1. topology debt from metrics, 2. pressure, heat, forgetting: only the collapsed layer has a debt.
    assert [decision.debt.total > 0.5 for decision in decisions] == [False, False, False, True]
    assert [decision.pressure > 0.1 for decision in decisions] == [False, False, False, True]
    # 3. sets the lens scale
    assert [lens.s for lens in lenses.values()] == [decision.scale for decision in decisions]
    assert lenses[3].s > 0.1
    assert lenses[0].s == 0.0
    # 4. a record of every decision, ready for control_decisions.jsonl
    assert [decision.to_record()["run_id"] for decision in decisions] == ["my_run"] * 4
