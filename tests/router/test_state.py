"""RouterState: neutral by default, and its two updates against their definitions in plain Python."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any

import pytest
import torch
from support.oracles import naive_js

from chronomoe_hf import RouterState
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.metrics import compute_flip_rate, compute_js_divergence
from chronomoe_hf.step_state import StepState


def naive_std(z: list[list[float]]) -> float:
    """Root of the mean over tokens of the population variance over experts."""
    total = 0.0
    for row in z:
        mean = sum(row) / len(row)
        total += sum((value - mean) ** 2 for value in row) / len(row)
    return math.sqrt(total / len(z))


def test_a_state_of_its_own_is_neutral() -> None:
    state = RouterState(layer_id=3, num_experts=5)
    assert (state.layer_id, state.num_experts, state.k_max, state.logit_std_alpha) == (3, 5, 0.3, 0.99)
    assert (state.scope, state.beta_on) == ("routing", False)
    assert state.beta_coeff.tolist() == [0.0] * 5 and state.beta_coeff.dtype == torch.float32
    assert (float(state.logit_std_ema), float(state.relevance), float(state.disagreement_js)) == (1.0, 1.0, 0.0)
    assert (float(state.disagreement_flip), float(state.overlap_only), int(state.logit_std_updates)) == (0.0, 0.0, 0)
    other = RouterState(layer_id=3, num_experts=5)
    other.beta_coeff.fill_(1.0)
    assert state.beta_coeff.eq(0).all(), "two states share a tensor"


def test_numbers_become_tensors_and_the_bias_follows_its_parts() -> None:
    beta = torch.tensor([0.5, -0.5, 0.1, -0.1])
    state = RouterState(0, 4, beta_coeff=beta, logit_std_ema=2.0, disagreement_js=0.25, relevance=0.5)  # type: ignore[arg-type]
    assert state.compute_beta_eff().tolist() == pytest.approx([0.6, -0.6, 0.2, -0.2])
    assert state.beta_full.tolist() == pytest.approx([0.6, -0.6, 0.2, -0.2])
    assert state.beta_applied.tolist() == pytest.approx([0.3, -0.3, 0.1, -0.1])
    assert state.disagreement_js.shape == () and float(state.disagreement_js) == 0.25
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(again.beta_applied, state.beta_applied)
        assert float(again.logit_std_ema) == 2.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"beta_coeff": torch.zeros(3)}, r"\(4,\), got \(3,\)"),
        ({"beta_coeff": torch.zeros(1, 4)}, "beta_coeff"),
        ({"k_max": 0.0}, "k_max"),
        ({"logit_std_alpha": 1.0}, "logit_std_alpha"),
    ],
)
def test_a_state_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RouterState(**{"layer_id": 0, "num_experts": 4, **fields})


def test_the_logit_scale_follows_the_bias_corrected_recurrence() -> None:
    draw = random.Random(0)
    state = RouterState(0, 6, logit_std_alpha=0.9)
    ema = 0.0
    for update in range(1, 30):
        z = [[draw.gauss(0, 3) for _ in range(6)] for _ in range(7)]
        state.update_logit_std(torch.tensor(z, dtype=torch.float64).view(1, 7, 6))
        ema = 0.9 * ema + 0.1 * naive_std(z)
        assert float(state.logit_std_ema) == pytest.approx(ema / (1 - 0.9**update), rel=1e-5)
        assert int(state.logit_std_updates) == update
    before = float(state.logit_std_ema)
    for nothing in (torch.ones(3, 6), torch.full((2, 6), float("nan")), torch.zeros(0, 6)):
        state.update_logit_std(nothing)
    assert (float(state.logit_std_ema), int(state.logit_std_updates)) == (before, 29)
    with pytest.raises(ConfigError, match=r"\(\.\.\., 6\)"):
        state.update_logit_std(torch.ones(3, 5))


def test_the_state_of_a_wrapped_router_is_a_view_of_the_stacked_state() -> None:
    stacked = StepState([4, 6])
    state = RouterState(1, 6)
    stacked.bind(state)
    stacked.std_updates_L[1] = 7
    stacked.logit_std_L[1] = 2.0
    stacked.beta_LE[1, 2] = 0.1
    assert (int(state.logit_std_updates), float(state.logit_std_ema)) == (7, 2.0)
    stacked.refresh(0.3)
    assert state.compute_beta_eff().tolist() == pytest.approx([0, 0, 0.2, 0, 0, 0])
    assert torch.equal(state.compute_beta_eff(), state.beta_full)


def test_divergence_and_flip_rate_of_a_batch_equal_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    p, q = z.softmax(-1), (z + torch.randn(8, generator=generator)).softmax(-1)
    rows = list(zip(p.tolist(), q.tolist(), strict=True))
    assert compute_js_divergence(p, q) == pytest.approx(sum(naive_js(a, b) for a, b in rows) / 40, rel=1e-9)
    flips = sum(a.index(max(a)) != b.index(max(b)) for a, b in rows) / 40
    assert 0.1 < flips < 0.9, "bad test setup"
    assert compute_flip_rate(p, q, top_k=1) == compute_flip_rate(p, q, top_k=4) == pytest.approx(flips)
    assert compute_js_divergence(p[:0], q[:0]) is None and compute_flip_rate(p[:0], q[:0], top_k=2) is None
    for bad in (0, 9):
        with pytest.raises(ConfigError, match=r"\[1, 8\]"):
            compute_flip_rate(p, q, top_k=bad)
