"""metrics: hand-computed values, definitions in plain Python, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import naive_js

from chronomoe_hf import metrics
from chronomoe_hf.errors import ChronoError, ConfigError

counts_strategy = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)
HOST = (
    metrics.compute_entropy,
    metrics.effective_experts,
    metrics.top2_share,
    metrics.dead_experts,
    metrics.nearly_dead_count,
    metrics.max_violation,
    metrics.gini,
    metrics.load_cv,
)


def naive(counts: list[int]) -> dict[str, float]:
    """The definitions, one expert at a time."""
    total, size = sum(counts), len(counts)
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return {
        "compute_entropy": entropy,
        "effective_experts": math.exp(entropy),
        "top2_share": sum(sorted(shares, reverse=True)[:2]),
        "dead_experts": sum(count == 0 for count in counts),
        "nearly_dead_count": sum(0 < share < min(0.01, 0.1 / size) for share in shares),
        "max_violation": max(counts) / (total / size) - 1,
        "gini": sum(abs(a - b) for a in shares for b in shares) / (2 * size),
        "load_cv": math.sqrt(sum((share * size - 1) ** 2 for share in shares) / size),
    }


def test_values_worked_out_by_hand():
    counts = [4, 2, 1, 1]  # shares 1/2 1/4 1/8 1/8
    assert metrics.compute_entropy(counts) == pytest.approx(1.75 * math.log(2))
    assert metrics.effective_experts(counts) == pytest.approx(2**1.75)
    assert metrics.top2_share(counts) == 0.75
    assert metrics.max_violation(counts) == 1.0  # 4 / 2 - 1
    assert metrics.gini(counts) == pytest.approx(10 / 32)  # pairs differ by 2 3 3 1 1 0 = 10 (of 8); * 2 / (2 * 4 * 8)
    assert metrics.load_cv(counts) == pytest.approx(math.sqrt(6 / 4) / 2)  # deviations 2 0 -1 -1
    assert (metrics.dead_experts(counts), metrics.nearly_dead_count(counts)) == (0, 0)
    assert metrics.dead_experts([5, 0, 0]) == 2


@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_total_collapse_reaches_the_ceilings(size, k):
    counts = [0] * size
    for expert in range(k):
        counts[(expert * 5 + 1) % size] = 1000
    assert metrics.effective_experts(counts) == pytest.approx(k, rel=1e-12)
    assert metrics.top2_share(counts) == pytest.approx(min(1.0, 2 / k))
    assert metrics.relative_top2(metrics.top2_share(counts), k) == pytest.approx(1.0)
    assert metrics.max_violation(counts) == pytest.approx(metrics.max_violation_ceiling(size, k))
    assert metrics.max_violation_ceiling(size, k) == size / k - 1
    assert metrics.dead_experts(counts) == size - k


@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_balance(size):
    counts = [37] * size
    assert metrics.compute_entropy(counts) == pytest.approx(math.log(size))
    assert metrics.effective_experts(counts) == pytest.approx(size)
    assert metrics.effective_experts(counts) <= size
    assert metrics.max_violation(counts) == 0.0
    assert metrics.gini(counts) == pytest.approx(0.0, abs=1e-12)
    assert metrics.load_cv(counts) == 0.0
    assert metrics.top2_share(counts) == pytest.approx(2 / size)


def test_one_expert_takes_everything_exactly():
    counts = [0, 0, 12345, 0, 0, 0, 0, 0]
    assert metrics.compute_entropy(counts) == 0.0
    assert metrics.effective_experts(counts) == 1.0
    assert metrics.top2_share(counts) == 1.0
    assert metrics.max_violation(counts) == 7.0
    assert metrics.gini(counts) == pytest.approx(1 - 1 / 8)
    assert metrics.dead_experts(counts) == 7


@pytest.mark.parametrize(
    ("size", "threshold"), [(4, 0.01), (10, 0.01), (64, 0.1 / 64), (128, 0.1 / 128)], ids=lambda value: f"{value:.4g}"
)
def test_nearly_dead_threshold_is_strict_on_both_sides(size, threshold):
    for share, expected in ((0.0, 0), (threshold * 0.99, 1), (threshold * 1.01, 0)):
        rest = (1 - share) / (size - 1)
        assert metrics.nearly_dead_count([share] + [rest] * (size - 1)) == expected
        assert metrics.nearly_dead_count([share] + [rest] * (size - 1), size) == expected


@pytest.mark.parametrize("function", HOST, ids=lambda function: function.__name__)
def test_an_empty_window_is_undefined_not_nan(function):
    assert function([0, 0, 0, 0]) is None
    assert function(torch.zeros(4, dtype=torch.int64)) is None


@pytest.mark.parametrize("function", HOST, ids=lambda function: function.__name__)
@pytest.mark.parametrize("bad", [[], [[1, 2], [3, 4]], [1, -1], [1, float("nan")], [1, float("inf")]], ids=repr)
def test_what_is_no_load_is_refused(function, bad):
    with pytest.raises(ConfigError, match=r"shape|finite"):
        function(bad)


def test_refused_numbers_are_named():
    with pytest.raises(ChronoError, match="got 9"):
        metrics.max_violation_ceiling(8, 9)
    with pytest.raises(ChronoError, match="got 0"):
        metrics.relative_top2(0.5, 0)


@given(counts_strategy)
def test_every_metric_is_its_definition(counts):
    if sum(counts) == 0:
        assert all(function(counts) is None for function in HOST)
        return
    want = naive(counts)
    for function in HOST:
        assert function(counts) == pytest.approx(want[function.__name__], rel=1e-9, abs=1e-9), function.__name__


@given(counts_strategy, st.randoms(use_true_random=False))
def test_the_order_of_experts_changes_no_bit(counts, random):
    shuffled = counts[:]
    random.shuffle(shuffled)
    for function in HOST:
        assert function(counts) == function(shuffled), function.__name__


@given(counts_strategy)
def test_ranges_hold_whatever_the_counts(counts):
    if sum(counts) == 0:
        return
    size = len(counts)
    assert 0.0 <= metrics.compute_entropy(counts) <= math.log(size) + 1e-12
    assert 1.0 <= metrics.effective_experts(counts) <= size
    assert 0.0 < metrics.top2_share(counts) <= 1.0
    assert -1e-12 <= metrics.max_violation(counts) <= size - 1 + 1e-9
    assert 0.0 <= metrics.gini(counts) <= 1 - 1 / size + 1e-9
    assert metrics.dead_experts(counts) + metrics.nearly_dead_count(counts) < size


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=16).filter(sum))
def test_lists_arrays_tensors_counts_and_shares_agree(counts):
    total = sum(counts)
    forms = [np.array(counts), torch.tensor(counts), torch.tensor(counts, dtype=torch.float64) / total]
    for function in HOST:
        want = function(counts)
        for form in forms:
            assert function(form) == pytest.approx(want, rel=1e-9, abs=1e-9), function.__name__


# Tensor functions on distributions.


def rows(tokens: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(tokens, size, generator=generator, dtype=torch.float64), -1).to(dtype)


def test_js_is_its_definition():
    p_TE, q_TE = rows(50, 6, 0), rows(50, 6, 1)
    want = [naive_js(p, q) for p, q in zip(p_TE.tolist(), q_TE.tolist(), strict=True)]
    assert min(want) > 1e-4, "bad test setup: the rows do not differ"
    assert metrics.js(p_TE, q_TE).tolist() == pytest.approx(want, rel=1e-10)
    assert metrics.js(p_TE.float(), q_TE.float()).tolist() == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_js_at_its_ends():
    p_TE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q_TE = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    assert metrics.js(p_TE, q_TE).tolist() == pytest.approx([math.log(2), math.log(2), 0.0])
    assert metrics.js(p_TE, q_TE)[2] == 0.0
    assert metrics.js(p_TE, q_TE).dtype == torch.float32
    assert metrics.js(p_TE.bfloat16(), q_TE.bfloat16()).dtype == torch.float32
    assert metrics.js(p_TE[:0], q_TE[:0]).shape == (0,)


def test_js_resolves_small_differences_in_float32():
    """A change of 0.1 % of one probability: far below what H(m) - (H(p) + H(q)) / 2 resolves in float32."""
    p_TE = torch.full((1, 128), 1 / 128, dtype=torch.float64)
    q_TE = p_TE.clone()
    q_TE[0, 0] *= 1.001
    q_TE[0, 1] *= 0.999
    want = naive_js(p_TE[0].tolist(), q_TE[0].tolist())
    assert metrics.js(p_TE.float(), q_TE.float()).item() == pytest.approx(want, rel=0.05)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_js_is_symmetric_bounded_and_blind_to_the_order_of_experts(seed, size):
    p_TE, q_TE = rows(4, size, seed), rows(4, size, seed + 1)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    js_T = metrics.js(p_TE, q_TE)
    torch.testing.assert_close(js_T, metrics.js(q_TE, p_TE))
    torch.testing.assert_close(js_T, metrics.js(p_TE[:, order], q_TE[:, order]))
    assert bool(((js_T >= 0) & (js_T <= math.log(2) + 1e-12)).all())


def test_flips_by_hand():
    p_TE = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.5, 0.5], [0.5, 0.5]])
    q_TE = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.4, 0.6], [0.6, 0.4]])
    assert metrics.top1_flip(p_TE, q_TE).tolist() == [False, True, False, False]  # a tie is no flip, on either side
    assert metrics.compute_flip_rate(p_TE, q_TE) == 0.25
    assert metrics.compute_flip_rate(p_TE, p_TE) == 0.0
    assert metrics.compute_flip_rate(p_TE[:0], q_TE[:0]) is None


def test_overlap_only_is_the_moved_mass():
    clean_TE = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    biased_TE = torch.tensor([[0.4, 0.5, 0.1], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    assert metrics.overlap_only(biased_TE, clean_TE).tolist() == pytest.approx([0.2, 0.0, 1.0], abs=1e-6)
    p_TE, q_TE = rows(20, 8, 3), rows(20, 8, 4)
    torch.testing.assert_close(metrics.overlap_only(p_TE, q_TE), 0.5 * (p_TE - q_TE).abs().sum(-1))


def test_n_effective_takes_an_entropy_as_in_the_original() -> None:
    assert metrics.compute_n_effective(0.0) == 1.0 and metrics.compute_n_effective(None) is None
    assert metrics.compute_n_effective(math.log(8.0)) == pytest.approx(8.0)
    for wrong in ([0.5, 0.5], -0.1, math.nan, math.inf, True, "1"):
        with pytest.raises(ConfigError, match="effective_experts"):
            metrics.compute_n_effective(wrong)  # type: ignore[arg-type]
