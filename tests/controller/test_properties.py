"""What must hold for every layer, history and order of experts."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe_hf.config import ControlConfig
from chronomoe_hf.controller import policy
from chronomoe_hf.lens.basis import steering_target
from chronomoe_hf.metrics import dead_experts, effective_experts, top2_share

SIZES = st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16, 64]), st.integers(1, 8)).filter(lambda size: size[1] <= size[0])
GATES = st.sampled_from([ControlConfig(), ControlConfig(gate="pressure"), ControlConfig(c2=1.0, scale_max=0.8)])


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Counts that k distinct experts per token can produce, and k."""
    n_experts, top_k = draw(SIZES)
    tokens = draw(st.integers(1, 10_000))
    counts = draw(st.lists(st.integers(0, tokens), min_size=n_experts, max_size=n_experts))
    # At least k experts take part, as in any real window.
    counts = [tokens if expert < top_k and count == 0 else count for expert, count in enumerate(counts)]
    return counts, top_k


def observe(counts: list[int], top_k: int) -> tuple[policy.Debt, float]:
    neff, top2, idle = effective_experts(counts), top2_share(counts), dead_experts(counts)
    assert neff is not None and top2 is not None and idle is not None
    debt = policy.topology_debt(
        n_effective=neff, top2_share=top2, dead_experts=idle, n_experts=len(counts), top_k=top_k
    )
    return debt, neff


@given(windows())
def test_debt_and_its_parts_are_fractions(window):
    debt, _ = observe(*window)
    for part in (debt.n_effective, debt.top2, debt.dead, debt.total):
        assert 0.0 <= part <= 1.0


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8, 64]), GATES, st.data())
@settings(deadline=None)
def test_every_signal_stays_in_its_range_over_any_history(step, n_experts, config, data):
    pressure = integral = scale = 0.0
    backoff, hold, last = 1.0, 0, None
    for _ in range(data.draw(st.integers(1, 12))):
        neff = data.draw(st.floats(1.0, float(n_experts)))
        top2 = data.draw(st.floats(0.0, 1.0))
        idle = data.draw(st.integers(0, n_experts - 1))
        debt = policy.topology_debt(n_effective=neff, top2_share=top2, dead_experts=idle, n_experts=n_experts, top_k=1)
        harmed = policy.is_harm(scale, None if last is None else top2 - last, config)
        backoff, hold = policy.next_harm_backoff(backoff, hold, harmed, config)
        last = top2
        pressure = policy.next_pressure(pressure, debt.total, config)
        integral = policy.next_integral(integral, n_effective=neff, n_experts=n_experts, config=config)
        drive = policy.drive_of(pressure, integral, config)
        scale = policy.lens_scale(drive=drive, heat=pressure, harm_backoff=backoff, step=step, config=config)
        assert 0.0 <= pressure <= 1.0
        assert 0.0 <= integral <= config.scale_max
        assert config.harm.floor <= backoff <= 1.0
        assert 0.0 <= scale <= policy.scale_cap(step, config) <= config.scale_max
        assert 0.0 < policy.beta_multiplier(pressure, config) <= 1.0


@given(windows(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_experts_does_not_matter(window, random):
    counts, top_k = window
    order = list(range(len(counts)))
    random.shuffle(order)
    shuffled = [counts[expert] for expert in order]
    assert observe(shuffled, top_k)[0] == observe(counts, top_k)[0]

    total = sum(counts)
    shares, shuffled_shares = [count / total for count in counts], [count / total for count in shuffled]
    target = steering_target(shares).tolist()
    for position, expert in enumerate(order):
        assert math.isclose(steering_target(shuffled_shares)[position], target[expert], abs_tol=1e-12)

    top2 = top2_share(counts)
    kwargs = {"top2_share": top2, "dead_experts": 1, "top_k": top_k, "config": ControlConfig()}
    quota, other = policy.quota_of(shares, **kwargs), policy.quota_of(shuffled_shares, **kwargs)
    # The same shares are capped; which of two equal experts carries the cap is a matter of order.
    assert sorted(zip(shares, quota.share_E, strict=True)) == sorted(zip(shuffled_shares, other.share_E, strict=True))
    if len(set(counts)) == len(counts):
        assert [quota.share_E[expert] for expert in order] == list(other.share_E)
        assert [order[position] for position in other.dominant] == list(quota.dominant)


@given(windows())
def test_the_target_lifts_the_idle_never_the_busiest_and_sums_to_zero(window):
    counts, _ = window
    total = sum(counts)
    target = steering_target([count / total for count in counts]).tolist()
    assert math.isclose(sum(target), 0.0, abs_tol=1e-9)
    assert max(abs(value) for value in target) <= 2.0
    busiest, idlest = counts.index(max(counts)), counts.index(min(counts))
    assert target[busiest] <= 1e-12 <= target[idlest] + 2e-12
