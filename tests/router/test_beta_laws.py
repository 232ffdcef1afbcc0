"""The two bias laws and the veto, against their definitions written out in plain Python, and their invariants."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe_hf import CoherenceBuffer, RouterState
from chronomoe_hf.config import VetoConfig
from chronomoe_hf.original import compute_relevance, update_beta
from chronomoe_hf.router.laws import (
    balance_error,
    balance_step,
    centre_and_clamp,
    coherence_law,
    next_gain,
    relevance_of,
)

K_MAX = 0.3


def naive_centre(values: list[float], cap: float) -> list[float]:
    """The one common shift after which the clamped values sum to zero, by bisection."""

    def clamped(shift: float) -> list[float]:
        return [min(cap, max(-cap, value - shift)) for value in values]

    low, high = min(values) - cap, max(values) + cap
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clamped(middle)) > 0 else (low, middle)
    return clamped((low + high) / 2)


def naive_coherence(
    beta: list[float], phi: list[float], seen: list[bool], tokens: list[int], eta: float, tau: float | str
) -> list[float]:
    if tau == "layer_mean":
        weight = sum(n for n, ok in zip(tokens, seen, strict=True) if ok)
        tau = sum(p * n for p, n, ok in zip(phi, tokens, seen, strict=True) if ok) / weight
    moved = [b + eta * (p - float(tau)) if ok else b for b, p, ok in zip(beta, phi, seen, strict=True)]
    return naive_centre(moved, K_MAX)


def naive_balance(count: list[int], rule: str) -> list[float]:
    fair = sum(count) / len(count)
    if fair == 0:
        return [0.0] * len(count)
    out = []
    for number in count:
        gap = (fair - number) / fair
        error = min(1.0, max(-1.0, gap))
        size = {"sign": float(gap != 0), "proportional": abs(error), "quadratic": error * error}[rule]
        out.append(math.copysign(size, gap))
    return out


# ---- coherence law -----------------------------------------------------------------------------------------------


def test_the_coherence_law_on_numbers_worked_out_by_hand() -> None:
    """Layer mean 0.5: the changes are +-0.1 eta and +-0.3 eta, and already sum to zero."""
    beta = torch.zeros(4)
    phi = torch.tensor([0.8, 0.6, 0.4, 0.2])
    seen = torch.ones(4, dtype=torch.bool)
    got = coherence_law(beta, phi, seen, torch.tensor([7, 7, 7, 7]), eta=0.01, tau="layer_mean", k_max=K_MAX)
    assert got.tolist() == pytest.approx([0.003, 0.001, -0.001, -0.003], abs=1e-8)
    # A number shifts all alike, and the common part is centred away again.
    again = coherence_law(beta, phi, seen, torch.tensor([7, 7, 7, 7]), eta=0.01, tau=0.9, k_max=K_MAX)
    assert again.tolist() == pytest.approx(got.tolist(), abs=1e-8)


def test_token_weights_and_unseen_experts_enter_the_layer_mean_as_stated() -> None:
    """Mean of the seen two, weighted 3:1, is 0.7; the unseen one does not move before centring."""
    phi = torch.tensor([0.8, 0.4, -1.0])
    seen = torch.tensor([True, True, False])
    got = coherence_law(torch.zeros(3), phi, seen, torch.tensor([3, 1, 99]), eta=0.1, tau="layer_mean", k_max=K_MAX)
    raw = [0.1 * (0.8 - 0.7), 0.1 * (0.4 - 0.7), 0.0]
    mean = sum(raw) / 3
    assert got.tolist() == pytest.approx([value - mean for value in raw], abs=1e-8)


@pytest.mark.parametrize("tau", ["layer_mean", 0.5, -0.25])
@pytest.mark.parametrize("num_experts", [8, 64, 128])
@pytest.mark.parametrize("spread", [0.05, 0.5], ids=["inside", "at the cap"])
def test_the_coherence_law_equals_the_definition(num_experts: int, tau: float | str, spread: float) -> None:
    draw = random.Random(num_experts)
    beta = naive_centre([draw.uniform(-spread, spread) for _ in range(num_experts)], K_MAX)
    phi = [draw.uniform(-1, 1) for _ in range(num_experts)]
    seen = [draw.random() < 0.7 for _ in range(num_experts)]
    tokens = [draw.randrange(1, 1000) for _ in range(num_experts)]
    want = naive_coherence(beta, phi, seen, tokens, 0.05, tau)
    assert (max(map(abs, want)) == pytest.approx(K_MAX)) == (spread > K_MAX), "bad test setup"
    got = coherence_law(
        torch.tensor(beta), torch.tensor(phi), torch.tensor(seen), torch.tensor(tokens), eta=0.05, tau=tau, k_max=K_MAX
    )
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(want, abs=2e-7)


def test_padding_columns_stay_zero_and_change_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    beta, phi = torch.rand(5, generator=draw) - 0.5, torch.rand(5, generator=draw)
    options: dict[str, Any] = {"eta": 0.1, "tau": "layer_mean", "k_max": K_MAX}
    alone = coherence_law(beta, phi, torch.ones(5, dtype=torch.bool), torch.arange(1, 6), **options)
    mask = torch.tensor([True] * 5 + [False] * 3)
    wide = coherence_law(
        torch.cat([beta, torch.zeros(3)]),
        torch.cat([phi, torch.zeros(3)]),
        mask,
        torch.cat([torch.arange(1, 6), torch.zeros(3, dtype=torch.long)]),
        mask_LE=mask,
        **options,
    )
    assert wide[5:].eq(0).all()
    assert wide[:5].tolist() == pytest.approx(alone.tolist(), abs=1e-8)


def buffer_with(phi: list[float], tokens: list[int], step: int) -> CoherenceBuffer:
    buffer = CoherenceBuffer(len(phi))
    buffer.update(torch.tensor(phi), list(range(len(phi))), step, torch.tensor(tokens))
    return buffer


def test_without_centring_the_law_only_clamps() -> None:
    beta, phi = torch.tensor([0.2, 0.0, -0.29, 0.1]), torch.tensor([0.9, 0.4, 0.1, 0.9])
    seen, tokens = torch.tensor([True, True, True, False]), torch.tensor([1, 1, 1, 1])
    got = coherence_law(beta, phi, seen, tokens, eta=0.5, tau=0.5, k_max=K_MAX, centred=False)
    assert got.tolist() == pytest.approx([0.3, -0.05, -0.3, 0.1])  # 0.2 + 0.2 and -0.29 - 0.2 meet the cap
    mask = torch.tensor([True, True, False, False])
    masked = coherence_law(beta, phi, seen, tokens, eta=0.5, tau=0.5, k_max=K_MAX, centred=False, mask_LE=mask)
    assert masked.tolist() == pytest.approx([0.3, -0.05, 0.0, 0.0])
    states = [RouterState(0, 4, beta_coeff=beta.clone(), k_max=K_MAX) for _ in range(2)]
    for state, centred in zip(states, (True, False), strict=True):
        update_beta(state, buffer_with(phi.tolist(), [1, 1, 1, 1], 1).snapshot(1), eta=0.5, tau=0.5, centred=centred)
    assert states[1].beta_coeff.tolist() == pytest.approx([0.3, -0.05, -0.3, 0.3])
    assert abs(float(states[0].beta_coeff.sum())) < 1e-6


@pytest.mark.parametrize("tau", ["layer_mean", 0.5])
@pytest.mark.parametrize("num_experts", [8, 64, 128])
def test_update_beta_moves_a_router_state_by_the_definition(num_experts: int, tau: float | str) -> None:
    draw = random.Random(1)
    phi = [draw.uniform(-1, 1) for _ in range(num_experts)]
    tokens = [draw.randrange(1, 500) for _ in range(num_experts)]
    state = RouterState(0, num_experts, k_max=K_MAX)
    state.logit_std_ema.fill_(2.5)
    state.relevance.fill_(0.5)
    update_beta(state, buffer_with(phi, tokens, 1).snapshot(1), eta=0.1, tau=tau)
    want = naive_coherence([0.0] * num_experts, phi, [True] * num_experts, tokens, 0.1, tau)
    assert state.beta_on
    assert state.beta_coeff.tolist() == pytest.approx(want, abs=2e-7)
    assert state.beta_full.tolist() == pytest.approx([2.5 * b for b in want], abs=1e-6)
    assert state.beta_applied.tolist() == pytest.approx([1.25 * b for b in want], abs=1e-6)


def test_an_expert_rests_while_it_has_not_been_seen_for_a_thousand_steps() -> None:
    phi = [1.0, 0.0, 0.5, 0.5]
    for gap, moves in ((1000, True), (1001, False)):
        buffer = buffer_with(phi, [1] * 4, step=1)
        buffer.update(torch.tensor(phi[1:]), [1, 2, 3], 1 + gap, torch.ones(3, dtype=torch.long))
        state = RouterState(0, 4, k_max=K_MAX)
        update_beta(state, buffer.snapshot(1 + gap), eta=0.1, tau=0.5)
        # Common parts are centred away, so the resting expert is compared with one that sits exactly at tau.
        assert (float(state.beta_coeff[0] - state.beta_coeff[2]) > 0.04) == moves
        assert float(state.beta_coeff[1] - state.beta_coeff[2]) == pytest.approx(-0.05, abs=1e-7)


def test_an_expert_that_was_never_seen_does_not_move() -> None:
    buffer = CoherenceBuffer(3)
    buffer.update(torch.tensor([0.9, 0.1]), [0, 1], 1, [5, 5])
    state = RouterState(0, 3, k_max=K_MAX)
    update_beta(state, buffer.snapshot(1), eta=0.1)
    assert state.beta_coeff.tolist() == pytest.approx([0.04, -0.04, 0.0], abs=1e-7)


def test_update_beta_refuses_another_layers_snapshot() -> None:
    with pytest.raises(ValueError, match="the router has 4"):
        update_beta(RouterState(0, 4), buffer_with([0.1, 0.2], [1, 1], 1).snapshot(1))
    with pytest.raises(ValueError, match="layer_mean"):
        update_beta(RouterState(0, 2), buffer_with([0.1, 0.2], [1, 1], 1).snapshot(1), tau="mean")


# ---- balance law -------------------------------------------------------------------------------------------------


def test_the_balance_step_on_numbers_worked_out_by_hand() -> None:
    count = torch.tensor([5, 2, 1, 0])  # fair share 2
    assert balance_step(balance_error(count, 4), "proportional").tolist() == [-1.0, 0.0, 0.5, 1.0]
    assert balance_step(balance_error(count, 4)).tolist() == [-1.0, 0.0, 0.25, 1.0]
    # Above the fair share the sign survives the square: 3 against 2 is an error of -1/2.
    three = torch.tensor([3, 2, 2, 1])
    assert balance_step(balance_error(three, 4), "quadratic").tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert balance_step(balance_error(count, 4), "sign").tolist() == [-1.0, 0.0, 1.0, 1.0]
    assert balance_error(torch.zeros(4, dtype=torch.long), 4).eq(0).all()
    with pytest.raises(ValueError, match="quadratic"):
        balance_step(balance_error(count, 4), "cubic")


def test_an_expert_that_swings_takes_smaller_steps_until_it_settles() -> None:
    """Errors of one expert and the factor on its next step, worked out by hand; the sign is that of the last error."""
    gain = torch.zeros(1)
    seen = []
    for error in (-1.0, 0.8, -0.6, 0.2, 0.1, 0.0, -0.31):
        gain = next_gain(gain, torch.tensor([error], dtype=torch.float64))
        seen.append(float(gain))
    # First error: nothing to compare. Two swings halve twice. A small error on the other side rests; then it grows.
    expected = [-1.0, 0.5, -0.25, 0.25, 0.275, 0.275, -0.1375]
    assert seen == pytest.approx(expected, rel=1e-6)
    for _ in range(8):
        gain = next_gain(-gain.abs(), torch.tensor([1.0], dtype=torch.float64))
    assert float(gain) == pytest.approx(0.1), "never smaller"
    for _ in range(40):
        gain = next_gain(gain.abs(), torch.tensor([1.0], dtype=torch.float64))
    assert float(gain) == 1.0, "never larger"


def test_a_layer_without_a_count_keeps_its_gains_and_gains_shrink_only_the_quadratic_step() -> None:
    gain = torch.tensor([[0.5, -0.25], [0.5, -0.25]])
    count = torch.tensor([[0, 0], [0, 4]])
    got = next_gain(gain, balance_error(count, 2))
    assert got.tolist() == [[0.5, -0.25], pytest.approx([0.55, -0.275])]
    error = balance_error(count, 2)
    assert torch.equal(balance_step(error, "quadratic", gain), balance_step(error) * gain.abs())
    for rule in ("proportional", "sign"):
        assert torch.equal(balance_step(error, rule, gain), balance_step(error, rule))


def test_gains_end_a_swing_that_the_plain_rule_keeps_up() -> None:
    """Two experts and tokens that all look alike: whoever is ahead by a hair takes nearly all of them."""

    def share_of_first(beta: float) -> float:
        return 1.0 / (1.0 + math.exp(-40.0 * (0.5 + beta)))

    def late_errors(damped: bool) -> list[float]:
        beta, gain, errors = 0.0, torch.zeros(2), []
        for _ in range(60):
            share = share_of_first(beta)
            count = torch.tensor([round(1000 * share), 1000 - round(1000 * share)])
            error = balance_error(count, 2)
            gain = next_gain(gain, error)
            step = 0.3 * balance_step(error, "quadratic", gain if damped else None)
            beta += float(step[0] - step[1])
            errors.append(float(error.abs().max()))
        return errors[-20:]

    assert min(late_errors(damped=False)) > 0.5, "bad test setup: the plain rule settles"
    assert max(late_errors(damped=True)) < 0.3


@pytest.mark.parametrize("rule", ["quadratic", "proportional", "sign"])
@pytest.mark.parametrize("num_k", [1, 2, 8])
@pytest.mark.parametrize("num_experts", [8, 64, 128])
def test_the_balance_step_equals_the_definition(num_experts: int, num_k: int, rule: str) -> None:
    draw = random.Random(num_k)
    count = [0] * num_experts
    for _ in range(200):  # tokens choose k distinct experts, low ids more often
        order = sorted(range(num_experts), key=lambda e: draw.random() * (e + 1))
        for expert in order[:num_k]:
            count[expert] += 1
    assert sum(count) == 200 * num_k
    assert num_k == num_experts or len(set(count)) > 1, "bad test setup: nothing to balance"
    got = balance_step(balance_error(torch.tensor(count), num_experts), rule)
    assert got.tolist() == pytest.approx(naive_balance(count, rule), abs=1e-12)


# ---- centring and the veto -----------------------------------------------------------------------------------------


def test_centre_and_clamp_on_numbers_worked_out_by_hand() -> None:
    # Shift 0.1: the first hits the cap, the others share its -0.3.
    got = centre_and_clamp(torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.3)
    assert got.tolist() == pytest.approx([0.3, -0.1, -0.1, -0.1], abs=1e-6)
    assert centre_and_clamp(torch.tensor([0.2, 0.0, 0.1]), 0.3).tolist() == pytest.approx([0.1, -0.1, 0.0], abs=1e-8)
    assert centre_and_clamp(torch.tensor([7.0]), 0.3).tolist() == [0.0]
    mask = torch.tensor([True, True, True, True, False])
    wide = centre_and_clamp(torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0]), 0.3, mask)
    assert wide.tolist() == pytest.approx([0.3, -0.1, -0.1, -0.1, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("theta", "values"), [(0.2, [0.0, 0.2, 0.3, 0.4, 0.6, 0.69]), (0.1, [0.0, 0.1, 0.15, 0.2, 0.3, 1.0])]
)
def test_relevance_on_numbers_worked_out_by_hand(theta: float, values: list[float]) -> None:
    want = [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    assert relevance_of(torch.tensor(values), theta).tolist() == pytest.approx(want, abs=1e-6)
    states = [RouterState(0, 4, disagreement_js=torch.tensor(d)) for d in values]
    assert [compute_relevance(state, theta) for state in states] == pytest.approx(want, abs=1e-6)


def test_each_signal_has_its_own_threshold() -> None:
    assert VetoConfig(signal="js").threshold == 0.2
    assert VetoConfig(signal="overlap").threshold == 0.1
    assert VetoConfig(signal="overlap", theta=0.3).threshold == 0.3
    with pytest.raises(ValueError, match="positive"):
        compute_relevance(RouterState(0, 4), 0.0)


# ---- invariants ----------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-1.0, 1.0, allow_nan=False)


@st.composite
def updates(draw: st.DrawFn) -> tuple[int, list[tuple[list[float], list[bool], list[int]]]]:
    num = draw(st.integers(1, 20))
    one = st.tuples(
        st.lists(NUMBERS, min_size=num, max_size=num),
        st.lists(st.booleans(), min_size=num, max_size=num),
        st.lists(st.integers(0, 10**9), min_size=num, max_size=num),
    )
    return num, draw(st.lists(one, min_size=1, max_size=6))


@settings(max_examples=80, deadline=None)
@given(updates(), st.sampled_from([0.01, 0.3, 5.0]), st.one_of(st.just("layer_mean"), NUMBERS))
def test_beta_stays_zero_centred_and_within_its_cap(
    sequence: tuple[int, list[tuple[list[float], list[bool], list[int]]]], eta: float, tau: float | str
) -> None:
    num, steps = sequence
    beta = torch.zeros(num)
    for phi, seen, tokens in steps:
        beta = coherence_law(
            beta, torch.tensor(phi), torch.tensor(seen), torch.tensor(tokens), eta=eta, tau=tau, k_max=K_MAX
        )
        assert torch.isfinite(beta).all()
        assert float(beta.abs().max()) <= K_MAX + 1e-7
        assert abs(float(beta.double().mean())) < 1e-6


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, allow_nan=False), min_size=1, max_size=64), st.sampled_from([0.3, 4.0]))
def test_any_bias_can_be_centred_and_keeps_its_order(values: list[float], cap: float) -> None:
    got = centre_and_clamp(torch.tensor(values, dtype=torch.float64), cap)
    assert float(got.abs().max()) <= cap
    assert abs(float(got.mean())) < 1e-6
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(got[a] <= got[b] for a, b in pairwise(order))
    again = centre_and_clamp(got, cap)
    assert again.tolist() == pytest.approx(got.tolist(), abs=2e-6), "a centred bias is left alone"


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(1e-3, 1.0))
def test_relevance_is_in_the_unit_interval_and_falls(first: float, second: float, theta: float) -> None:
    low, high = sorted((first, second))
    calm, wild = relevance_of(torch.tensor([low, high], dtype=torch.float64), theta).tolist()
    assert 0.0 <= wild <= calm <= 1.0


@settings(max_examples=60, deadline=None)
@given(updates(), st.randoms(use_true_random=False), st.sampled_from(["layer_mean", 0.3]))
def test_renumbering_experts_renumbers_beta(
    sequence: tuple[int, list[tuple[list[float], list[bool], list[int]]]], shuffler: random.Random, tau: float | str
) -> None:
    num, steps = sequence
    order = torch.tensor(shuffler.sample(range(num), num))
    beta, moved = torch.zeros(num), torch.zeros(num)
    for phi, seen, tokens in steps:
        inputs = torch.tensor(phi), torch.tensor(seen), torch.tensor(tokens)
        beta = coherence_law(beta, *inputs, eta=0.2, tau=tau, k_max=K_MAX)
        moved = coherence_law(moved, *(value[order] for value in inputs), eta=0.2, tau=tau, k_max=K_MAX)
        count = torch.tensor(tokens)
        assert torch.equal(
            balance_step(balance_error(count[order], num)), balance_step(balance_error(count, num))[order]
        )
    assert moved.tolist() == pytest.approx(beta[order].tolist(), abs=1e-6)
