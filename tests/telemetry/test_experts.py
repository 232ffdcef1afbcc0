"""ExpertState: every expert's row of an event, against the definitions."""

from __future__ import annotations

import torch

from chronomoe_hf import RoutingEvent
from chronomoe_hf.telemetry import ExpertState


def test_one_row_for_each_expert() -> None:
    counts = [0, 5, 995, 1000]  # shares 0, 0.0025, 0.4975, 0.5; nearly dead below min(0.01, 0.1 / 4) = 0.01
    event = RoutingEvent.from_router_output(
        run_id="r",
        step=1,
        mode="TRAIN",
        layer_id=3,
        used_capacity=torch.tensor(counts),
        n_experts=4,
        top_k=2,
        phi_slow=[None, 0.1, 0.2, 0.3],
    )
    rows = event.expert_states
    assert [row.expert_id for row in rows] == ["L3_E0", "L3_E1", "L3_E2", "L3_E3"]
    assert [(row.layer_id, row.token_count, row.share) for row in rows] == [
        (3, 0, 0.0),
        (3, 5, 0.0025),
        (3, 995, 0.4975),
        (3, 1000, 0.5),
    ]
    assert [row.dead for row in rows] == [True, False, False, False]
    assert [row.nearly_dead for row in rows] == [False, True, False, False]
    assert (event.dead_experts, event.nearly_dead_count, event.token_count) == (1, 1, 2000)
    assert [row.phi_slow for row in rows] == [None, 0.1, 0.2, 0.3]
    assert {row.phi_fast for row in rows} == {None}


def test_an_empty_window_says_nothing_about_its_experts() -> None:
    event = RoutingEvent.from_router_output(
        run_id="r", step=1, mode="TRAIN", layer_id=0, used_capacity=[0, 0], n_experts=2, top_k=1
    )
    state = ExpertState(expert_id="L0_E1", layer_id=0, token_count=0, share=None, dead=None, nearly_dead=None)
    assert event.expert_states[1] == state
