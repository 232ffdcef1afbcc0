"""The balance law's dead zone and its rule for the first layer, against a plain definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from chronomoe_hf.config import BetaConfig, ChronoConfig
from chronomoe_hf.router.laws import balance_error, balance_step, next_gain, zone_bounds, zone_error
from chronomoe_hf.step_state import StepState

ZONE = (0.7, 2.0)
GUARD = ChronoConfig.balance().beta


def naive_error(count: list[int], low: float, high: float) -> list[float]:
    fair = sum(count) / len(count)
    if fair == 0:
        return [0.0] * len(count)
    out = []
    for number in count:
        share = number / fair
        gap = low - share if share < low else high - share if share > high else 0.0
        out.append(min(1.0, max(-1.0, gap)))
    return out


def edges(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[low]], dtype=torch.float64), torch.tensor([[high]], dtype=torch.float64)


def test_errors_are_measured_from_the_edge_on_numbers_worked_out_by_hand() -> None:
    count = torch.tensor([[25, 14, 7, 5, 5, 4, 0, 20]])  # fair share 10
    got = zone_error(count, 8, *edges(*ZONE))[0].tolist()
    assert got == pytest.approx([-0.5, 0.0, 0.0, 0.2, 0.2, 0.3, 0.7, 0.0])
    assert got[1] == got[2] == got[7] == 0.0, "7 and 20 lie on the edges; nothing there, not even rounding"
    assert zone_error(torch.tensor([[36, 1, 1, 2]]), 4, *edges(0.7, 2.0))[0, 0] == -1.0, "never above 1"
    assert zone_error(torch.zeros(1, 4, dtype=torch.long), 4, *edges(*ZONE)).eq(0).all(), "no count, no error"


@pytest.mark.parametrize("num_experts", [3, 8, 128])
@pytest.mark.parametrize(("low", "high"), [(0.7, 2.0), (0.0, 1e9), (0.3, 1e9), (1.0, 1.0), (0.5, 1.5)])
def test_errors_equal_the_definition(num_experts: int, low: float, high: float) -> None:
    draw = random.Random(num_experts)
    for _ in range(20):
        count = [draw.randrange(0, draw.choice([2, 50, 3000])) for _ in range(num_experts)]
        got = zone_error(torch.tensor([count]), num_experts, *edges(low, high))
        assert got[0].tolist() == pytest.approx(naive_error(count, low, high), abs=1e-12)


def test_a_zone_of_no_width_is_the_law_without_one() -> None:
    count = torch.tensor([[8, 4, 4, 0], [1, 2, 3, 6]])
    assert torch.allclose(zone_error(count, 4, *edges(1.0, 1.0)), balance_error(count, 4), atol=1e-15)


def test_the_upper_edge_stays_below_what_a_share_can_reach() -> None:
    """With E = 8 no share exceeds 8/k fair ones: at k = 1 that is 8, at k = 4 it is 2, at k = 8 it is 1."""
    _, high = zone_bounds([8, 8, 8, 32], [1, 4, 8, 4], ZONE, "same", 0.3)
    assert high[:, 0].tolist() == [2.0, 1.5, 1.0, 2.0]
    assert zone_bounds([8], None, ZONE, "same", 0.3)[1].item() == 2.0
    assert zone_bounds([8], [4], (0.3, None), "same", 0.3)[1].item() == 1e9, "a floor alone"


def test_the_first_of_several_layers_has_its_own_rule() -> None:
    def of(rule: Any, layers: int = 3) -> list[list[float]]:
        return [each[:, 0].tolist() for each in zone_bounds([8] * layers, [2] * layers, ZONE, rule, 0.3)]

    assert of("same") == [[0.7, 0.7, 0.7], [2.0, 2.0, 2.0]]
    assert of("floor") == [[0.3, 0.7, 0.7], [1e9, 2.0, 2.0]]
    assert of("off") == [[0.0, 0.7, 0.7], [1e9, 2.0, 2.0]]
    assert of("floor", layers=1) == [[0.7], [2.0]], "the only layer is governed like any other"


def test_nothing_moves_while_every_share_is_in_its_zone() -> None:
    state = StepState([4, 4], top_k=[1, 1])
    state.beta_LE.copy_(torch.tensor([[0.3, -0.1, -0.1, -0.1], [0.2, 0.0, -0.2, 0.0]]))
    before, gain = state.beta_LE.clone(), state.gain_LE.clone()
    step = state.apply_balance(torch.tensor([[97, 1, 1, 1], [20, 8, 8, 8]]), GUARD.replace(first_layer="off"))
    assert torch.equal(step, torch.zeros_like(step)) and torch.equal(state.beta_LE, before)
    assert torch.equal(state.gain_LE, gain)
    # Layer 1: fair share 10, one expert outside. The others keep their distance from each other.
    state.apply_balance(torch.tensor([[25, 25, 25, 25], [14, 12, 10, 4]]), GUARD)
    assert torch.equal(state.beta_LE[0], before[0])
    moved = (state.beta_LE[1] - before[1]).tolist()
    size = 0.05 * 0.3 * 0.3  # rate * (0.7 - 0.4)^2
    assert moved == pytest.approx([-size / 4, -size / 4, -size / 4, 0.75 * size], abs=1e-7)


def test_the_floor_pushes_idle_experts_of_the_first_layer_up_and_none_down() -> None:
    state = StepState([4, 4], top_k=[1, 1])
    count = torch.tensor([[91, 4, 4, 1], [91, 4, 4, 1]])  # 25 are fair
    state.apply_balance(count, GUARD.replace(rule="proportional", rate=1.0))
    first, second = state.beta_LE.tolist()
    up = [0.0, 0.3 - 0.16, 0.3 - 0.16, 0.3 - 0.04]
    assert first == pytest.approx([value - sum(up) / 4 for value in up], abs=1e-6)
    both = [-1.0, 0.7 - 0.16, 0.7 - 0.16, 0.7 - 0.04]
    assert second == pytest.approx([value - sum(both) / 4 for value in both], abs=1e-6)


def test_layers_of_different_width_have_zones_of_their_own() -> None:
    state = StepState([4, 6], top_k=[1, 1])
    count = torch.tensor([[5, 4, 4, 3, 0, 0], [30, 6, 6, 6, 6, 6]])
    state.apply_balance(count, GUARD.replace(rule="proportional", rate=1.0, first_layer="same"))
    assert state.beta_LE[0].eq(0).all(), "its padding is no idle expert"
    want = [-1.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert state.beta_LE[1].tolist() == pytest.approx([value - sum(want) / 6 for value in want], abs=1e-6)


def test_without_zone_and_first_layer_rule_the_law_is_that_of_0_2_bit_for_bit() -> None:
    """Written out from the functions that did it: error, gain, square, centre, add, clamp."""
    old = ChronoConfig.balance(beta__dead_zone=None, beta__rate=0.3, beta__first_layer="same").beta
    assert old == BetaConfig(law="balance", scope="selection")
    state, beta, gain = StepState([8, 8], top_k=[2, 2]), torch.zeros(2, 8), torch.zeros(2, 8)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        count = torch.randint(0, 90, (2, 8), generator=draw) ** 2
        error = balance_error(count, 8)
        gain.copy_(next_gain(gain, error))
        step = gain * error.square()
        assert torch.allclose(step, balance_step(error, "quadratic", gain), atol=1e-15)
        step = step - step.mean(-1, keepdim=True)
        beta.addcmul_(step, torch.ones(2, 8, dtype=torch.float64), value=0.3).clamp_(-4.0, 4.0)
        assert torch.equal(state.apply_balance(count, old), step)
        assert torch.equal(state.beta_LE, beta)
