"""Duplicates, two roles, free energy and basins against their definitions, on planted and on healthy data."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.role_recount import cosine

from chronomoe_hf.lifecycle.dry_run.role_numbers import (
    BASINS,
    HISTORY,
    MIN_ROWS,
    MIN_SHARED,
    NEAR,
    Pairs,
    RoutingHistory,
    free_energy,
    load_distance,
    two_roles_of,
)
from chronomoe_hf.recording.expert_sums import Reading
from chronomoe_hf.recording.role_sums import RoleReading, RoleState

# ---- two roles ---------------------------------------------------------------------------------------------


def moments(values: Sequence[float]) -> list[float]:
    above = [value for value in values if value > 0]
    return [len(values), len(above), sum(values), sum(above), sum(v * v for v in values), len(values)]


def reading_with(rows: list[list[float]]) -> RoleReading:
    num = len(rows)
    zero = np.zeros((num, num))
    return RoleReading(np.array(rows, dtype=float), np.zeros((2, num, num)), zero, zero, np.ones(num, dtype=np.int64))


def explained(values: Sequence[float]) -> float:
    """Part of the variance that the two sides of zero explain."""
    mean = sum(values) / len(values)
    sides = [[v for v in values if v > 0], [v for v in values if v <= 0]]
    between = sum(len(side) * (sum(side) / len(side) - mean) ** 2 for side in sides if side)
    return between / sum((v - mean) ** 2 for v in values)


def draws(kind: str, count: int = 4000) -> list[float]:
    generator = random.Random(0)
    normal = [generator.gauss(0.0, 1.0) for _ in range(count)]
    if kind == "normal":
        return normal
    if kind == "shifted":
        return [value + 0.4 for value in normal]
    if kind == "heavy":
        return [generator.choice((-1.0, 1.0)) * generator.expovariate(1.0) for _ in range(count)]
    if kind == "points":
        return [(-1.0, 1.0)[index % 2] for index in range(count)]
    if kind == "three to one":
        return [value + (6.0 if index % 4 == 0 else -2.0) for index, value in enumerate(normal)]
    return [value + (3.0 if index % 2 else -3.0) for index, value in enumerate(normal)]


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("normal", 0.0, 0.06),
        ("shifted", 0.0, 0.06),
        ("heavy", 0.0, 0.0),
        ("two humps", 0.65, 0.8),
        ("three to one", 0.2, 0.3),
        ("points", 1.0, 1.0),
    ],
)
def test_two_roles_are_told_from_one(kind: str, low: float, high: float) -> None:
    values = draws(kind)
    (found,) = two_roles_of(reading_with([moments(values)]))
    assert found.score is not None and found.separation is not None and found.balance is not None
    separation = min(1.0, max(0.0, (explained(values) - 2 / math.pi) / (1 - 2 / math.pi)))
    upper = sum(v > 0 for v in values)
    assert found.separation == pytest.approx(separation, abs=1e-9)
    assert found.balance == pytest.approx(min(upper, len(values) - upper) / max(upper, len(values) - upper))
    assert found.score == pytest.approx(found.separation * found.balance)
    assert low - 1e-9 <= found.score <= high + 1e-9


def test_few_rows_say_nothing_and_no_spread_is_no_second_role() -> None:
    rows = [moments(draws("points", MIN_ROWS - 1)), moments([0.0] * 500), moments([1.0] * 500), [0.0] * 6]
    found = {each.expert: each for each in two_roles_of(reading_with(rows))}
    assert found[0].score is None and found[3].score is None
    assert found[1].score == 0.0 and found[2].score == 0.0


def windows(rows_of: Any, count: int = 4, tokens: int = 300, width: int = 64) -> RoleReading:
    """Windows of one expert in a wide space, the last one read."""
    state = RoleState([1])
    for window in range(count):
        rows_SKD = rows_of(torch.Generator().manual_seed(window), tokens, width)[:, None]
        state.add(
            [0], Reading(rows_SKD[None], torch.ones(1, tokens, 1, dtype=torch.bool), None, rows_SKD.sum(0)[None], 1.0)
        )
        reading = state.close(torch.device("cpu"), 1)[0]
    return reading


def test_a_planted_second_role_is_found_in_a_wide_space_and_none_in_a_cloud() -> None:
    axis_D = torch.zeros(64)
    axis_D[5] = 1.0

    def cloud(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
        return torch.randn(tokens, width, generator=generator) + 3.0

    def two(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
        side_S1 = torch.where(torch.rand(tokens, 1, generator=generator) < 0.5, 4.0, -4.0)
        return cloud(generator, tokens, width) + side_S1 * axis_D

    def wide(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
        return cloud(generator, tokens, width) * (1.0 + 9.0 * axis_D)

    (planted,), (healthy,), (stretched,) = (two_roles_of(windows(each)) for each in (two, cloud, wide))
    assert planted.score is not None and planted.score > 0.65
    assert healthy.score is not None and healthy.score < 0.15, "300 tokens in 64 dimensions look like one cloud"
    assert stretched.score is not None and stretched.score < 0.15, "wide is not two"


# ---- duplicates --------------------------------------------------------------------------------------------


def pair_reading(
    roles: list[list[float]], rows: list[float], shared: dict[tuple[int, int], tuple[float, float]]
) -> Any:
    num = len(roles)
    centre = [sum(column) / num for column in zip(*roles, strict=True)]
    centred = [[a - b for a, b in zip(role, centre, strict=True)] for role in roles]
    pairs_PEE = np.zeros((2, num, num))
    pairs_PEE[0] = pairs_PEE[1] = np.diag(rows)
    for (one, other), (together, total) in shared.items():
        pairs_PEE[:, one, other] = pairs_PEE[:, other, one] = together, total
    table = [[row, 0.0, 0.0, 0.0, 0.0, row] for row in rows]
    table_EE = [np.array([[cosine(a, b) for b in each] for a in each]) for each in (roles, centred)]
    return RoleReading(np.array(table), pairs_PEE, *table_EE, np.array([row > 0 for row in rows], dtype=np.int64))


def test_pairs_are_scored_by_agreement_and_without_it_by_both_cosines() -> None:
    roles = [[1.0, 0.0, 2.0], [1.0, 0.1, 2.0], [0.0, 1.0, 2.0], [-1.0, 0.5, 2.0], [0.3, -1.0, 2.0]]
    shared = {(0, 3): (MIN_SHARED, 0.95 * MIN_SHARED), (1, 2): (MIN_SHARED - 1.0, MIN_SHARED - 1.0)}
    reading = pair_reading(roles, [500.0, 600.0, 500.0, MIN_ROWS - 1.0, 400.0], shared)
    pairs = Pairs(reading)
    agreeing = pairs.get(3, 0)
    assert agreeing[:2] == (0, 3) and agreeing.score == pytest.approx(0.95) == agreeing.agreement
    assert agreeing.shared == pytest.approx(MIN_SHARED / (MIN_ROWS - 1.0))
    close = pairs.get(0, 1)
    assert close[:2] == (1, 0), "the one with more rows first"
    assert close.agreement is None and close.score == pytest.approx(min(close.cosine, close.centred))
    assert close.cosine == pytest.approx(cosine(roles[0], roles[1]))
    assert pairs.get(1, 2).agreement is None, "too few tokens are shared"
    assert pairs.get(2, 3).score is None, "too few rows, and no shared token"
    top = pairs.top(3)
    assert [pair[:2] for pair in top[:2]] == [(1, 0), (0, 3)] or [pair[:2] for pair in top[:2]] == [(0, 3), (1, 0)]
    everything = [pairs.get(i, j).score for i in range(5) for j in range(i + 1, 5)]
    known = sorted((score for score in everything if score is not None), reverse=True)
    assert [pair.score for pair in pairs.top(99)] == pytest.approx(known)
    assert [pair.score for pair in pairs.above(0.5)] == pytest.approx([score for score in known if score > 0.5])


def test_neither_a_common_direction_nor_one_expert_far_off_makes_duplicates() -> None:
    common = [[1.0, 0.0, 30.0], [0.0, 1.0, 30.0], [-1.0, 0.0, 30.0], [0.0, -1.0, 30.0]]
    far_off = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-90.0, -90.0, -90.0]]
    for roles, misled in ((common, "cosine"), (far_off, "centred")):
        pairs = Pairs(pair_reading(roles, [500.0] * 4, {}))
        assert max(getattr(pairs.get(i, j), misled) for i in range(3) for j in range(i)) > 0.9, "bad test setup"
        assert pairs.above(0.9) == []


# ---- free energy -------------------------------------------------------------------------------------------


def test_free_energy_is_the_sum_of_its_parts() -> None:
    energy = free_energy(0.7, 8, 2, 1)
    assert energy.incoherence == pytest.approx(0.3)
    assert energy[1:4] == pytest.approx((0.08, 0.2, 0.1))
    assert energy.total == pytest.approx((1 - 0.7) + 0.01 * 8 + 0.1 * 2 + 0.1 * 1)
    assert free_energy(None, 8, 0, 0).total is None


# ---- basins ------------------------------------------------------------------------------------------------


def sampled(shares: Sequence[float], tokens: int, seed: int) -> list[float]:
    picks = random.Random(seed).choices(range(len(shares)), shares, k=tokens)
    return [picks.count(expert) / tokens for expert in range(len(shares))]


def test_samples_of_one_load_are_near_and_of_two_loads_are_not() -> None:
    even, skewed = [1 / 8] * 8, [0.3, 0.3, *[0.4 / 6] * 6]
    for seed in range(20):
        one, other = sampled(even, 300, seed), sampled(even, 200, 100 + seed)
        assert load_distance(one, other, 300, 200) < NEAR
        moved = load_distance(one, sampled(skewed, 300, seed), 300, 300)
        assert NEAR < moved < 0.45  # total variation of the loads themselves: 0.35
    assert load_distance(even, skewed, 1e9, 1e9) == pytest.approx(0.35, abs=1e-3)
    assert load_distance(even, even, 10, 10) == 0.0


def test_a_layer_returns_to_a_basin_that_it_knows() -> None:
    loads = {"a": [0.25] * 4, "b": [0.7, 0.1, 0.1, 0.1]}
    history, seen = RoutingHistory(), []
    for step, name in enumerate("aaabba", 1):
        basin, left = history.visit(step, sampled(loads[name], 2000, step), 2000.0)
        seen.append((basin.basin_id, left))
    assert seen == [(0, None), (0, None), (0, None), (1, 0), (1, None), (0, 1)]
    first = history.basins[0]
    assert (first.windows, first.last_step, first.tokens) == (4, 6, 8000.0)
    assert sum(first.shares) == pytest.approx(1.0)
    again = RoutingHistory.from_state(json.loads(json.dumps(history.state_dict())))
    assert again == history


def test_histories_stay_small() -> None:
    history = RoutingHistory()
    for step in range(1, 2 * HISTORY):
        shares = [0.0] * 40
        shares[step % 40] = 1.0
        history.visit(step, shares, 1e6)
    assert len(history.basins) == BASINS and len(history.visits) == HISTORY
    assert [visit[0] for visit in history.visits] == list(range(HISTORY, 2 * HISTORY))
    with pytest.raises(ValueError, match="tokens"):
        RoutingHistory.from_state({"basins": [[0, [1.0], 0.0, 1, 1]], "visits": [], "next_id": 1})
