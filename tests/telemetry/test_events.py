"""RoutingEvent: what goes in, what is derived, what reaches JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chronomoe_hf import metrics
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import RoutingEvent
from chronomoe_hf.telemetry.values import finite, finite_list


def event(counts=(4, 2, 1, 1), top_k=2, **fields) -> RoutingEvent:
    base = {"run_id": "r", "step": 10, "mode": "TRAIN", "layer_id": 0, "n_experts": len(counts), "top_k": top_k}
    return RoutingEvent.from_router_output(**{**base, "used_capacity": torch.tensor(counts), **fields})


@pytest.mark.parametrize(
    "capacity",
    [
        [4, 2, 1, 1],
        (4.0, 2.0, 1.0, 1.0),
        np.array([4, 2, 1, 1]),
        torch.tensor([4, 2, 1, 1]),
        torch.tensor([4, 2, 1, 1], dtype=torch.bfloat16),
        torch.tensor([4.0, 2.0, 1.0, 1.0], requires_grad=True),
        [torch.tensor(4), torch.tensor(2), np.int64(1), 1],
    ],
    ids=["list", "floats", "numpy", "int64", "bf16", "grad", "mixed"],
)
def test_counts_come_in_any_shape_a_router_gives(capacity):
    got = event(used_capacity=capacity, n_experts=4)
    assert got.expert_token_counts == [4, 2, 1, 1]
    assert all(type(count) is int for count in got.expert_token_counts)


@pytest.mark.parametrize(
    "bad", [[1, 2, 3], torch.ones(2, 2), [1, 2, 3, -1], [1, 2, 3, 0.5], [1, 2, 3, math.nan]], ids=repr
)
def test_what_is_no_count_is_refused(bad):
    with pytest.raises(ConfigError, match=r"one value per expert|whole numbers"):
        event(used_capacity=bad, n_experts=4)


def test_refusals_name_the_way_out():
    with pytest.raises(ConfigError, match="prob_meen.*close: prob_mean"):
        event(prob_meen=[0.1] * 4)
    with pytest.raises(ConfigError, match="TRAIN, INFER, EVAL"):
        event(mode="train")
    with pytest.raises(ConfigError, match=r"\[1, 4\]"):
        event(top_k=5)
    with pytest.raises(ConfigError, match=r"phi_slow.*\(4,\)"):
        event(phi_slow=[0.5])
    with pytest.raises(ConfigError, match="layer_id"):
        event(layer_id=-1)


def test_derived_numbers_are_those_of_the_counts():
    got = event()
    assert got.token_count == 8
    assert got.shares == [0.5, 0.25, 0.125, 0.125]
    assert got.n_effective == pytest.approx(2**1.75)
    assert got.entropy == pytest.approx(1.75 * math.log(2))
    assert (got.top2_share, got.max_violation, got.max_violation_ceiling) == (0.75, 1.0, 1.0)
    assert (got.dead_experts, got.nearly_dead_count) == (0, 0)
    assert got.gini == pytest.approx(metrics.gini([4, 2, 1, 1]))


def test_an_empty_window_is_null_everywhere():
    got = event(counts=(0, 0, 0, 0))
    assert got.shares is None
    record = got.to_record()
    for name in (
        "entropy",
        "n_effective",
        "top2_share",
        "dead_experts",
        "nearly_dead_count",
        "max_violation",
        "gini",
        "load_cv",
    ):
        assert record[name] is None, name
    assert record["max_violation_ceiling"] == 1.0
    json.dumps(record, allow_nan=False)


def test_nan_means_no_evidence_and_never_reaches_json():
    vector = torch.tensor([0.5, math.nan, math.inf, -math.inf])
    got = event(phi_slow=vector, prob_mean=vector, beta=vector, logit_std=torch.tensor(math.nan), relevance=math.inf)
    assert got.phi_slow == [0.5, None, None, None]
    assert got.logit_std is None
    record = json.loads(json.dumps(got.to_record(), allow_nan=False))
    assert record["phi_slow"] == record["prob_mean"] == record["beta"] == [0.5, None, None, None]
    assert record["logit_std"] is None and record["relevance"] is None


def test_a_hand_made_event_with_nan_is_still_strict_json():
    raw = RoutingEvent(
        run_id="r",
        step=1,
        mode="EVAL",
        layer_id=0,
        n_experts=2,
        top_k=1,
        expert_token_counts=[1, 1],
        phi_fast=[math.nan, 0.25],
        overlap_only=math.inf,
    )
    record = json.loads(json.dumps(raw.to_record(), allow_nan=False))
    assert record["phi_fast"] == [None, 0.25] and record["overlap_only"] is None


def test_the_record_says_which_run_layer_and_window():
    record = event(attempt=2, layer_name="model.layers.0.mlp.gate", window_steps=100, calls=400, dropped=3).to_record()
    wanted = {
        "schema": 2,
        "run_id": "r",
        "attempt": 2,
        "step": 10,
        "mode": "TRAIN",
        "layer_id": 0,
        "layer_name": "model.layers.0.mlp.gate",
        "window_steps": 100,
        "calls": 400,
        "dropped": 3,
        "expert_token_counts": [4, 2, 1, 1],
        "token_count": 8,
    }
    assert {name: record[name] for name in wanted} == wanted


@given(st.lists(st.one_of(st.none(), st.floats()), max_size=20))
def test_vectors_in_records_keep_seven_digits_and_lose_nan(values):
    got = finite_list(values)
    assert len(got) == len(values)
    for have, value in zip(got, values, strict=True):
        if value is None or not math.isfinite(value):
            assert have is None
        elif abs(value) < 1e-290:
            assert abs(have) <= 1e-289
        else:
            assert have == pytest.approx(value, rel=1e-6, abs=0)
            assert finite(value) == pytest.approx(value, rel=1e-6, abs=0)
    json.dumps(got, allow_nan=False)


def test_records_stay_short_and_integers_exact():
    assert finite_list(torch.tensor([0.1, 1 / 3, 123456.789]).tolist()) == [0.1, 0.3333333, 123456.8]
    assert finite_list([2**53 + 1, 7]) == [2**53 + 1, 7]
    assert finite_list(None) is None
    assert finite(1 / 3) == 0.3333333
