"""Three clocks and the buffer that keeps them on the device, against their recurrence written out in plain Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guards import Transfers

from chronomoe_hf import CoherenceBuffer
from chronomoe_hf.coherence import ALPHAS, phase_coherence, read_clocks, update_clocks_

CLOCKS = ("phi_fast", "phi_mid", "phi_slow")


def naive_clocks(series: list[float | None]) -> list[float | None]:
    """Bias-corrected EMAs of the steps in which the expert was seen."""
    out: list[float | None] = []
    for alpha in ALPHAS:
        ema, updates = 0.0, 0
        for phi in series:
            if phi is not None:
                ema, updates = alpha * ema + (1 - alpha) * phi, updates + 1
        out.append(ema / (1 - alpha**updates) if updates else None)
    return out


def test_half_lives_are_about_7_69_and_693_updates() -> None:
    assert [round(math.log(0.5) / math.log(alpha)) for alpha in ALPHAS] == [7, 69, 693]


def test_a_constant_reads_as_itself_from_the_first_update_on() -> None:
    buffer = CoherenceBuffer(2)
    for step in range(1, 4):
        buffer.update(torch.tensor([0.7, -0.2]), [0, 1], step, [10, 20])
        for expert, phi in ((0, 0.7), (1, -0.2)):
            state = buffer.snapshot(step)[expert]
            assert [getattr(state, clock) for clock in CLOCKS] == pytest.approx([phi] * 3, abs=1e-7)
            assert state.delta == pytest.approx(0.0, abs=1e-7)
    assert float(buffer.ema_CE[2, 0]) == pytest.approx(0.7 * (1 - 0.999**3), rel=1e-6), "stored without correction"


def test_two_updates_worked_out_by_hand() -> None:
    """Fast clock after 1 then 0: (0.9 * 0.1) / (1 - 0.81) = 0.09 / 0.19."""
    buffer = CoherenceBuffer(1)
    buffer.update(torch.tensor([1.0]), [0], 1, [1])
    buffer.update(torch.tensor([0.0]), [0], 2, [1])
    state = buffer.snapshot(2)[0]
    assert state.phi_fast == pytest.approx(0.09 / 0.19)
    assert state.phi_mid == pytest.approx(0.0099 / 0.0199)
    assert state.delta is not None and state.delta < 0, "falling coherence"


@pytest.mark.parametrize("num_experts", [8, 64, 128])
def test_clocks_follow_the_recurrence_for_the_experts_that_were_seen(num_experts: int) -> None:
    draw = random.Random(num_experts)
    buffer = CoherenceBuffer(num_experts, layer_id=3)
    series: list[list[float | None]] = [[] for _ in range(num_experts)]
    tokens, last = [0] * num_experts, [-1] * num_experts
    for step in range(1, 40):
        active = sorted(draw.sample(range(num_experts), draw.randrange(num_experts - 1)))  # the last expert may idle
        phi = [draw.uniform(-1, 1) for _ in active]
        number = [draw.randrange(1, 50) for _ in active]
        if step % 2:
            buffer.update(
                torch.tensor(phi, dtype=torch.float64),
                torch.tensor(active),
                step,
                torch.tensor(number, dtype=torch.int64),
            )
        else:  # all experts' values, of which only the active ones count
            wide, counts = torch.full((num_experts,), 9.0, dtype=torch.float64), torch.full((num_experts,), 99)
            wide[active], counts[active] = (
                torch.tensor(phi, dtype=torch.float64),
                torch.tensor(number, dtype=torch.int64),
            )
            buffer.update(wide, active, step, counts)
        for expert in range(num_experts):
            series[expert].append(phi[active.index(expert)] if expert in active else None)
            if expert in active:
                tokens[expert] += number[active.index(expert)]
                last[expert] = step
    snapshot = buffer.snapshot(39)
    assert sorted(snapshot) == list(range(num_experts))
    for expert, state in snapshot.items():
        seen = [phi for phi in series[expert] if phi is not None]
        want = naive_clocks(series[expert])
        got = [getattr(state, clock) for clock in CLOCKS]
        assert got == pytest.approx(want, abs=1e-9) if seen else got == [None] * 3
        assert state.phi_raw == (pytest.approx(seen[-1]) if seen else None)
        assert (state.updates, state.total_tokens_seen, state.last_update_step) == (
            len(seen),
            tokens[expert],
            last[expert],
        )
        assert (state.expert_id, state.layer_id, state.step) == (f"L3_E{expert}", 3, 39)


def test_an_expert_that_was_never_seen_has_no_coherence() -> None:
    state = CoherenceBuffer(2).snapshot(5)[1]
    assert [state.phi_raw, *(getattr(state, clock) for clock in CLOCKS), state.delta] == [None] * 5
    assert (state.updates, state.total_tokens_seen, state.last_update_step) == (0, 0, -1)


def test_bad_shapes_are_refused() -> None:
    buffer = CoherenceBuffer(4)
    with pytest.raises(ValueError, match=r"phi_raw has shape \(3,\)"):
        buffer.update(torch.zeros(3), [0, 1], 1, [1, 1])
    with pytest.raises(ValueError, match="num_tokens"):
        buffer.update(torch.zeros(2), [0, 1], 1, [1, 1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        CoherenceBuffer(0)


def test_only_the_snapshot_talks_to_the_host_and_only_once() -> None:
    buffer = CoherenceBuffer(8)
    active, number = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 3])
    with Transfers() as updating:
        for step in range(1, 6):
            buffer.update(torch.rand(3), active, step, number)
    assert updating.reads == []
    with Transfers() as reading:
        buffer.snapshot(5)
    assert reading.reads == ["cpu"]


# ---- the estimate --------------------------------------------------------------------------------------------------


def test_phase_coherence_is_a_cosine_with_a_verdict_on_evidence() -> None:
    output = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0], [0.0, 0.0], [1.0, 1.0], [math.inf, 0.0]])
    reference = torch.tensor([[6.0, 8.0], [0.0, 5.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    phi, valid = phase_coherence(output, reference)
    assert phi.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert valid.tolist() == [True, True, True, False, False, False]


# ---- invariants ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.tuples(
                st.lists(st.floats(-1, 1), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
            ),
            min_size=1,
            max_size=10,
        )
    ),
    st.randoms(use_true_random=False),
)
def test_clocks_stay_cosines_and_follow_a_renumbering(
    steps: list[tuple[list[float], list[bool]]], shuffler: random.Random
) -> None:
    num = len(steps[0][0])
    order = torch.tensor(shuffler.sample(range(num), num))
    ema, updates = torch.zeros(3, num, dtype=torch.float64), torch.zeros(num, dtype=torch.int64)
    moved, counted = ema.clone(), updates.clone()
    for phi, active in steps:
        value, mask = torch.tensor(phi, dtype=torch.float64), torch.tensor(active)
        update_clocks_(ema, updates, value, mask)
        update_clocks_(moved, counted, value[order], mask[order])
    clocks = read_clocks(ema, updates)
    assert torch.isfinite(clocks).all()
    assert float(clocks.abs().max()) <= 1 + 1e-9
    assert torch.equal(read_clocks(moved, counted), clocks[:, order])
