"""The control law against numbers worked out by hand from its definition."""

from __future__ import annotations

import math

import pytest
from support.laws import HAND

from chronomoe_hf.config import ControlConfig, HarmGuardConfig
from chronomoe_hf.controller import policy

CONFIG = ControlConfig(**HAND)
ORIGINAL = ControlConfig(**HAND, gate="pressure")


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_effective", "top2_share", "dead_experts", "parts", "total"),
    [
        # Balanced layers owe nothing, whatever k and E.
        (8, 1, 8.0, 0.25, 0, (0.0, 0.0, 0.0), 0.0),
        (64, 2, 64.0, 2 / 64, 0, (0.0, 0.0, 0.0), 0.0),
        (128, 8, 128.0, 2 / 128, 0, (0.0, 0.0, 0.0), 0.0),
        # All tokens on one expert (k = 1): Neff 1, top-2 share 1, E - 1 dead.
        (8, 1, 1.0, 1.0, 7, ((4.8 - 1) / 4.8, 1.0, 1.0), 0.4 * 3.8 / 4.8 + 0.4 + 0.2),
        (64, 1, 1.0, 1.0, 63, ((38.4 - 1) / 38.4, 1.0, 1.0), 0.4 * 37.4 / 38.4 + 0.6),
        # All tokens on the same k experts: Neff k, top-2 share 2/k, E - k dead; t is 1 all the same.
        (8, 2, 2.0, 1.0, 6, (2.8 / 4.8, 1.0, 6 / 7), 0.4 * 2.8 / 4.8 + 0.4 + 0.2 * 6 / 7),
        (64, 8, 8.0, 0.25, 56, (30.4 / 38.4, 1.0, 56 / 63), 0.4 * 30.4 / 38.4 + 0.4 + 0.2 * 56 / 63),
        (128, 8, 8.0, 0.25, 120, (68.8 / 76.8, 1.0, 120 / 127), 0.4 * 68.8 / 76.8 + 0.4 + 0.2 * 120 / 127),
        # Half way into the top-2 range: t = 0.875.
        (8, 1, 4.8, 0.875, 0, (0.0, 0.5, 0.0), 0.2),
        (128, 8, 100.0, 0.875 * 0.25, 0, (0.0, 0.5, 0.0), 0.2),
        # Exactly on both thresholds.
        (8, 2, 4.8, 0.75, 0, (0.0, 0.0, 0.0), 0.0),
        # Only dead experts.
        (64, 2, 50.0, 0.1, 10, (0.0, 0.0, 10 / 63), 2 / 63),
    ],
)
def test_debt(n_experts, top_k, n_effective, top2_share, dead_experts, parts, total):
    debt = policy.topology_debt(
        n_effective=n_effective, top2_share=top2_share, dead_experts=dead_experts, n_experts=n_experts, top_k=top_k
    )
    assert (debt.n_effective, debt.top2, debt.dead) == pytest.approx(parts, abs=1e-12)
    assert debt.total == pytest.approx(total, abs=1e-12)


def test_raw_top2_would_never_reach_the_threshold_at_k_8():
    """The reason for t: a fully collapsed top-8 layer has a plain top-2 share of only 0.25."""
    collapsed = policy.topology_debt(n_effective=8.0, top2_share=0.25, dead_experts=56, n_experts=64, top_k=8)
    assert collapsed.top2 == 1.0
    assert policy.topology_debt(n_effective=8.0, top2_share=0.25, dead_experts=56, n_experts=64, top_k=2).top2 == 0.0


@pytest.mark.parametrize(("n_experts", "top_k"), [(2, 1), (2, 2), (4, 3), (4, 4), (8, 7), (8, 8), (1, 1)])
def test_a_balanced_layer_owes_nothing_even_where_k_is_close_to_e(n_experts, top_k):
    shares = [1 / n_experts] * n_experts
    top2 = min(1.0, 2 / n_experts)
    debt = policy.topology_debt(
        n_effective=float(n_experts), top2_share=top2, dead_experts=0, n_experts=n_experts, top_k=top_k
    )
    assert debt.total == 0.0
    assert policy.quota_of(shares, top2_share=top2, dead_experts=0, top_k=top_k, config=CONFIG) is None


def test_pressure_is_a_moving_average_of_debt():
    pressure, seen = 0.0, []
    for debt in (1.0, 1.0, 0.5, 0.0):
        pressure = policy.next_pressure(pressure, debt, CONFIG)
        seen.append(pressure)
    assert seen == pytest.approx([0.2, 0.36, 0.388, 0.3104], abs=1e-12)


@pytest.mark.parametrize(("pressure", "forgetting"), [(0.0, 0.02), (0.5, 0.07), (1.0, 0.12)])
def test_forgetting(pressure, forgetting):
    assert policy.forgetting_of(pressure, CONFIG) == pytest.approx(forgetting, abs=1e-15)


def test_beta_is_kept_exactly_below_min_pressure():
    assert policy.beta_multiplier(0.0, CONFIG) == 1.0
    assert policy.beta_multiplier(math.nextafter(0.01, 0.0), CONFIG) == 1.0
    assert policy.beta_multiplier(0.01, CONFIG) == pytest.approx(1 - 0.021, abs=1e-15)


def test_integral_leaks_accumulates_and_does_not_wind_up():
    # Neff/E = 0.45: shortfall 0.2, gain 0.5.
    first = policy.next_integral(0.0, n_effective=3.6, n_experts=8, config=CONFIG)
    second = policy.next_integral(first, n_effective=3.6, n_experts=8, config=CONFIG)
    assert (first, second) == pytest.approx((0.1, 0.198), abs=1e-12)
    healed = policy.next_integral(second, n_effective=8.0, n_experts=8, config=CONFIG)
    assert healed == pytest.approx(0.98 * 0.198, abs=1e-12)
    for _ in range(200):
        first = policy.next_integral(first, n_effective=1.0, n_experts=128, config=CONFIG)
    assert first == CONFIG.scale_max
    assert policy.next_integral(0.0, n_effective=0.65 * 64, n_experts=64, config=CONFIG) == 0.0


@pytest.mark.parametrize(
    ("fraction", "min_share", "shortfall"),
    [
        (0.97, 0.0, 0.1),  # one dead expert in a wide, otherwise even layer
        (0.97, 0.05 / 32, 0.05),
        (0.97, 0.1 / 32, 0.0),
        (0.45, 0.0, 0.2),  # the larger of the two counts
    ],
)
def test_integral_sees_an_idle_expert_that_neff_does_not(fraction, min_share, shortfall):
    kwargs = {"n_effective": fraction * 32, "n_experts": 32, "min_share": min_share}
    seeing = ControlConfig(**HAND, integral_min_share=0.1)
    assert policy.next_integral(0.0, **kwargs, config=seeing) == pytest.approx(0.5 * shortfall, abs=1e-12)
    blind = ControlConfig(**HAND, integral_min_share=0.0)
    assert policy.next_integral(0.0, **kwargs, config=blind) == pytest.approx(0.5 * max(0.0, 0.65 - fraction))


def test_drive_of_both_gates():
    assert policy.drive_of(0.7, 0.3, ORIGINAL) == 0.5  # pressure counts at most pressure_cap
    assert policy.drive_of(0.2, 0.3, ORIGINAL) == 0.2
    assert policy.drive_of(0.2, 0.3, CONFIG) == 0.3
    assert policy.drive_of(0.4, 0.3, CONFIG) == 0.4


def test_scale_gains_caps_warm_up_and_backoff():
    config = ControlConfig(**HAND, c1=2.0, c2=0.5)
    assert policy.lens_scale(drive=0.1, heat=0.2, harm_backoff=1.0, step=100, config=config) == pytest.approx(0.3)
    assert policy.lens_scale(drive=0.4, heat=0.9, harm_backoff=1.0, step=100, config=config) == 0.5
    assert policy.lens_scale(drive=0.4, heat=0.9, harm_backoff=0.25, step=100, config=config) == 0.125
    assert policy.lens_scale(drive=0.4, heat=0.9, harm_backoff=1.0, step=99, config=config) == 0.02
    low = ControlConfig(scale_max=0.01)
    assert policy.lens_scale(drive=0.4, heat=0.0, harm_backoff=1.0, step=0, config=low) == 0.01


@pytest.mark.parametrize(
    ("last_scale", "rise", "harm"),
    [(0.011, 0.021, True), (0.01, 0.021, False), (0.5, 0.02, False), (0.5, -0.3, False), (0.5, None, False)],
)
def test_harm(last_scale, rise, harm):
    assert policy.is_harm(last_scale, rise, CONFIG) is harm


def run_backoff(verdicts: list[bool], config: ControlConfig) -> list[float]:
    backoff, hold, seen = 1.0, 0, []
    for harmed in verdicts:
        backoff, hold = policy.next_harm_backoff(backoff, hold, harmed, config)
        seen.append(backoff)
    return seen


def test_backoff_halves_to_its_floor_and_recovers_a_fifth_of_the_gap():
    seen = run_backoff(
        [True, True, True, True, False, False], ControlConfig(harm=HarmGuardConfig(hold=0, restart=False))
    )
    assert seen == pytest.approx([0.5, 0.25, 0.125, 0.1, 0.28, 0.424], abs=1e-12)


def test_backoff_waits_out_the_hold_only_after_it_led_to_abstention():
    config = ControlConfig(harm=HarmGuardConfig(hold=2, restart=False))
    seen = run_backoff([True, False, True, True, True, False, False, False], config)
    assert seen == pytest.approx([0.5, 0.6, 0.3, 0.15, 0.1, 0.1, 0.1, 0.28], abs=1e-12)


def test_with_a_restart_every_verdict_rests_the_backoff_for_one_evaluation():
    seen = run_backoff([True, False, False, True, False], ControlConfig(harm=HarmGuardConfig(hold=2, restart=True)))
    assert seen == pytest.approx([0.5, 0.5, 0.6, 0.3, 0.3], abs=1e-12)


@pytest.mark.parametrize(
    ("drive", "backoff", "sufficient", "supported", "spread", "reason"),
    [
        (0.5, 1.0, True, True, None, None),
        (0.01, 0.15, True, True, 0.5, None),
        (0.0, 0.1, False, False, 0.6, "insufficient_evidence"),
        (0.009, 0.1, True, False, 0.6, "no_pressure"),
        (0.5, 0.1, True, False, 0.6, "lens_unsupported"),
        (0.5, 0.1, True, True, 0.6, "lens_unfit"),
        (0.5, 0.149, True, True, 0.5, "harm_backoff"),
    ],
)
def test_abstain_reasons_and_their_order(drive, backoff, sufficient, supported, spread, reason):
    got = policy.abstain_reason(
        drive=drive,
        harm_backoff=backoff,
        sufficient=sufficient,
        lens_supported=supported,
        lens_spread=spread,
        config=CONFIG,
    )
    assert got == reason


def test_quota_caps_the_two_dominant_experts_at_the_fair_share():
    shares = [0.02, 0.50, 0.03, 0.45]
    quota = policy.quota_of(shares, top2_share=0.95, dead_experts=0, top_k=1, config=CONFIG)
    assert quota is not None
    assert quota.dominant == (1, 3)
    assert quota.share_E == (1.0, 0.25, 1.0, 0.25)
    assert policy.quota_of([0.05, 0.5, 0.05, 0.4], top2_share=0.9, dead_experts=0, top_k=1, config=CONFIG) is None


def test_quota_is_called_for_by_one_dead_expert_and_by_relative_dominance():
    assert policy.quota_of([0.0, 0.4, 0.3, 0.3], top2_share=0.7, dead_experts=1, top_k=2, config=CONFIG) is not None
    eight = [0.12, 0.12] + [0.76 / 62] * 62  # k = 8: t = 0.24 / 0.25 = 0.96
    quota = policy.quota_of(eight, top2_share=0.24, dead_experts=0, top_k=8, config=CONFIG)
    assert quota is not None
    assert quota.dominant == (0, 1)
    assert policy.quota_of(eight, top2_share=0.24, dead_experts=0, top_k=2, config=CONFIG) is None
