"""One optimizer step's arithmetic on the stacked state, from hand-made router calls, against plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from chronomoe_hf import CoherenceBuffer
from chronomoe_hf.config import BetaConfig, VetoConfig
from chronomoe_hf.original import compute_relevance, update_beta
from chronomoe_hf.recording.columns import META, PER_EXPERT, PER_LAYER, Row
from chronomoe_hf.recording.reduce import RouterBatch, routing_parts, routing_table
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.step_state import StepState

EXPERTS = (4, 6)  # two layers of different width: the narrow one has padding columns
WIDTH = max(EXPERTS)


class Forward:
    """Sums of two layers, fed by hand, and the row that a step adds."""

    def __init__(self) -> None:
        self.row_names = Row(WIDTH)
        self.sums_LR = torch.zeros(len(EXPERTS), self.row_names.size, dtype=torch.float64)

    def call(self, layer: int, logits: Tensor, real: list[bool] | None = None, **extra: Any) -> None:
        """One router call of `layer`; `disagreement` per token, `differs` per token."""
        index = logits.topk(2, dim=-1).indices
        native = None
        if extra.get("differs") is not None:  # another expert in the first slot of those tokens
            num = logits.shape[-1]
            other = torch.tensor([next(e for e in range(num) if e not in chosen) for chosen in index.tolist()])
            native = torch.where(extra["differs"][:, None], torch.stack([other, index[:, 1]], 1), index.flip(1))
        measured = None
        if extra.get("disagreement") is not None:
            counted = torch.isfinite(logits).all(-1) & (
                torch.ones(len(logits)).bool() if real is None else torch.tensor(real)
            )
            table = torch.stack([*extra["disagreement"], torch.ones(len(logits))], dim=-1)
            measured = table[counted].double().sum(0)[None]
        batch = RouterBatch(
            logits_GTE=logits[None],
            index_GTK=index[None],
            kept_GTK=None,
            native_GTK=None if native is None else native[None],
            mask_T=None if real is None else torch.tensor(real),
            distribution=lambda z: z.softmax(-1),
        )
        head, tail = routing_table([routing_parts(batch, self.row_names, measured)], self.row_names)
        self.sums_LR[layer, self.row_names.head] += head[0]
        self.sums_LR[layer, self.row_names.tail] += tail[0]

    def row(self) -> Tensor:
        out = self.sums_LR.clone()
        self.sums_LR.zero_()
        return out


def spread(rows: list[list[float]]) -> float:
    """RMS deviation of logits from their own token's mean."""
    squares = [(z - sum(row) / len(row)) ** 2 for row in rows for z in row]
    return math.sqrt(sum(squares) / len(squares))


def test_the_columns_of_a_row_do_not_overlap() -> None:
    row = Row(WIDTH)
    marks = torch.zeros(row.size)
    row.count(marks).add_(1)
    for name in PER_EXPERT:
        row.expert(marks, name).add_(1)
    for name in META:
        row.meta(marks, name).add_(1)
    for name in PER_LAYER:
        row.layer(marks, name).add_(1)
    assert marks.eq(1).all()


def test_logit_std_is_the_bias_corrected_mean_of_the_spread_of_real_tokens() -> None:
    forward, stacked = Forward(), StepState(list(EXPERTS))
    draw = torch.Generator().manual_seed(0)
    series = []
    for step in range(1, 5):
        real = [True, False, True, True, False]
        rows: list[list[float]] = []
        for micro in range(2):
            # A common shift of a token's logits is no spread; padding may hold anything.
            logits = torch.randn(5, 4, generator=draw) * step + 10.0 * torch.randn(5, 1, generator=draw)
            logits[1] = 1e4
            forward.call(0, logits, real)
            rows += [row for row, ok in zip(logits.tolist(), real, strict=True) if ok]
            assert len(rows) == 3 * (micro + 1)
        series.append(spread(rows))
        stacked.update(forward.row(), step, VetoConfig())
        ema = 0.0
        for value in series:
            ema = 0.99 * ema + 0.01 * value
        assert float(stacked.logit_std_L[0]) == pytest.approx(ema / (1 - 0.99 ** len(series)), rel=1e-4)
    assert max(series) > 2 * min(series), "bad test setup: a constant would pass"
    assert float(stacked.logit_std_L[1]) == 1.0 and int(stacked.std_updates_L[1]) == 0, "a layer that was never called"


def test_padding_and_non_finite_tokens_are_in_no_sum() -> None:
    forward = Forward()
    logits = torch.randn(4, 4)
    logits[1, 0], logits[2, 3] = math.nan, math.inf
    disagreement = (torch.full((4,), math.nan), torch.ones(4), torch.ones(4))
    disagreement[0][0] = disagreement[0][3] = 0.5
    forward.call(
        0, logits, [True, True, False, True], disagreement=disagreement, differs=torch.ones(4, dtype=torch.bool)
    )
    row, sums = Row(WIDTH), forward.row()[0]
    assert torch.isfinite(sums).all()
    assert {name: int(row.meta(sums, name)) for name in META} == {"tokens": 2, "dropped": 0, "nonfinite": 1, "calls": 1}
    assert int(row.count(sums).sum()) == 2 * 2
    got = {name: float(row.layer(sums, name)) for name in PER_LAYER[1:]}
    assert got == {"js": 1.0, "flip": 2.0, "overlap": 2.0, "compared": 2.0, "topk_differs": 2.0, "steered_tokens": 2.0}


def test_a_step_without_a_comparison_keeps_disagreement_and_relevance() -> None:
    forward, stacked = Forward(), StepState(list(EXPERTS))
    logits = torch.randn(3, 4)
    forward.call(
        0, logits, disagreement=(torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.0, 1.0, 0.0]), torch.ones(3) / 4)
    )
    stacked.update(forward.row(), 1, VetoConfig())
    forward.call(0, logits)
    stacked.update(forward.row(), 2, VetoConfig())
    stacked.update(forward.row(), 3, VetoConfig())
    assert stacked.js_L.tolist() == pytest.approx([0.4, 0.0])
    assert stacked.flip_L.tolist() == pytest.approx([1 / 3, 0.0])
    assert stacked.overlap_L.tolist() == pytest.approx([0.25, 0.0])
    assert stacked.relevance_L.tolist() == pytest.approx([0.5, 1.0])
    stacked.update(forward.row(), 4, VetoConfig(signal="overlap"))
    assert stacked.relevance_L.tolist() == pytest.approx([0.25, 1.0])
    off = StepState(list(EXPERTS))
    forward.call(0, logits, disagreement=(torch.ones(3), torch.ones(3), torch.ones(3)))
    off.update(forward.row(), 1, VetoConfig(enabled=False))
    assert off.relevance_L.tolist() == [1.0, 1.0] and float(off.js_L[0]) == 1.0


def coherence_row(phi: list[list[float]], weight: list[list[float]], count: list[list[int]]) -> Tensor:
    row = Row(WIDTH)
    out = torch.zeros(len(EXPERTS), row.size, dtype=torch.float64)
    for layer, num in enumerate(EXPERTS):
        w = torch.tensor(weight[layer], dtype=torch.float64)
        row.expert(out[layer], "phi_weighted")[:num] = torch.tensor(phi[layer], dtype=torch.float64) * w
        row.expert(out[layer], "phi_weight")[:num] = w
        row.count(out[layer])[:num] = torch.tensor(count[layer]).double()
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tau", "centred"), [("layer_mean", True), ("layer_mean", False), (0.5, True), (0.5, False)])
def test_the_originals_loop_and_the_stacked_state_give_the_same_numbers(seed: int, tau: Any, centred: bool) -> None:
    """Two layers of different width, stacked, against one buffer and one router state a layer, every constant drawn."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    stacked, forward = StepState(list(EXPERTS)), Forward()
    beta = BetaConfig(
        eta=draw.uniform(0.05, 0.4),
        tau=tau,
        k_max=draw.uniform(0.1, 0.5),
        centred=centred,
        stale_after=draw.choice([2, 1000]),
    )
    veto = VetoConfig(theta=draw.uniform(0.05, 0.3))
    buffers = [CoherenceBuffer(num, layer) for layer, num in enumerate(EXPERTS)]
    states = [RouterState(layer, num, k_max=beta.k_max) for layer, num in enumerate(EXPERTS)]
    relevances = []
    for step in range(1, 9):
        phi = [[draw.uniform(-1, 1) for _ in range(num)] for num in EXPERTS]
        count = [[draw.choice([0, 5, 9]) for _ in range(num)] for num in EXPERTS]
        logits = [torch.randn(7, num, generator=generator) * draw.uniform(0.5, 3.0) for num in EXPERTS]
        js = [torch.rand(7, generator=generator) * veto.threshold * draw.uniform(1.0, 7.0) for _ in EXPERTS]
        for layer, z in enumerate(logits):
            forward.call(layer, z, disagreement=(js[layer], torch.zeros(7), torch.zeros(7)))
        row = forward.row()
        stacked.row.count(row)[:] = 0.0  # of the calls: what the law reads is drawn
        stacked.update(
            row + coherence_row(phi, [[float(n) for n in layer] for layer in count], count), step, veto, compared=True
        )
        stacked.apply_coherence(step, beta)
        stacked.refresh(beta.k_max)
        for layer, (buffer, state) in enumerate(zip(buffers, states, strict=True)):
            active = [expert for expert, n in enumerate(count[layer]) if n]
            buffer.update(torch.tensor(phi[layer], dtype=torch.float64), active, step, torch.tensor(count[layer]))
            state.update_logit_std(logits[layer])
            state.disagreement_js = js[layer].double().mean()
            state.relevance.fill_(compute_relevance(state, veto.threshold))
            update_beta(state, buffer.snapshot(step, beta.stale_after), eta=beta.eta, tau=tau, centred=centred)
            relevances.append(float(state.relevance))
            assert float(stacked.logit_std_L[layer]) == pytest.approx(float(state.logit_std_ema), rel=1e-6)
            assert float(stacked.relevance_L[layer]) == pytest.approx(float(state.relevance), abs=1e-6)
            for mine, theirs in ((stacked.beta_LE, state.beta_coeff), (stacked.beta_applied_LE, state.beta_applied)):
                assert mine[layer, : EXPERTS[layer]].tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
    for layer, buffer in enumerate(buffers):
        want = buffer.snapshot(8, beta.stale_after)
        for expert, state in stacked.coherence(layer).snapshot(8, beta.stale_after).items():
            assert astuple(state) == pytest.approx(astuple(want[expert]), abs=1e-12)
    assert any(0.0 < value < 1.0 for value in relevances), "bad test setup: the veto never acted in part"
    assert all(float(state.beta_coeff.abs().max()) > 0.05 for state in states), "bad test setup: beta hardly moved"
    assert stacked.beta_LE[0, EXPERTS[0] :].eq(0).all()


def test_balance_moves_each_layer_by_its_own_counts_and_leaves_frozen_ones_alone() -> None:
    stacked = StepState(list(EXPERTS))
    count = torch.tensor([[8, 4, 4, 0, 0, 0], [6, 6, 6, 6, 6, 0]])
    for _ in range(2):
        beta = BetaConfig(law="balance", rule="proportional", rate=0.1)
        stacked.apply_balance(count, beta, torch.tensor([False, False]))
    # Fair shares 4 and 5: gaps (-1, 0, 0, 1) and (-0.2 five times, 1), both already centred.
    assert stacked.beta_LE[0].tolist() == pytest.approx([-0.2, 0, 0, 0.2, 0, 0], abs=1e-6)
    assert stacked.beta_LE[1].tolist() == pytest.approx([-0.04] * 5 + [0.2], abs=1e-6)
    before = stacked.beta_LE.clone()
    stacked.apply_balance(count, beta, torch.tensor([True, False]))
    assert torch.equal(stacked.beta_LE[0], before[0]) and not torch.equal(stacked.beta_LE[1], before[1])


def test_what_the_forward_adds_is_relevance_times_clamped_beta_times_logit_std() -> None:
    stacked = StepState(list(EXPERTS))
    state = RouterState(1, 6)
    stacked.bind(state)
    stacked.beta_LE[1] = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, 0.0])
    stacked.logit_std_L[1], stacked.relevance_L[1] = 2.0, 0.25
    stacked.refresh(0.3)
    assert state.beta_full.tolist() == pytest.approx([0.6, -0.6, 0.2, -0.2, 0, 0])
    assert state.beta_applied.tolist() == pytest.approx([0.15, -0.15, 0.05, -0.05, 0, 0])
    stacked.forget(torch.tensor([1.0, 0.5]))
    assert state.beta_coeff.tolist() == pytest.approx([0.25, -0.25, 0.05, -0.05, 0, 0])


def test_topk_disagreement_spans_the_closed_and_the_open_window() -> None:
    forward, stacked = Forward(), StepState(list(EXPERTS))
    assert stacked.topk_disagreement() == [None, None]
    forward.call(0, torch.randn(4, 4), differs=torch.tensor([True, False, False, False]))
    stacked.update(forward.row(), 1, VetoConfig())
    assert stacked.topk_disagreement() == [0.25, None]
    stacked.close_window()
    forward.call(0, torch.randn(4, 4), [True, True, False, False], differs=torch.ones(4, dtype=torch.bool))
    stacked.update(forward.row(), 2, VetoConfig())
    assert stacked.topk_disagreement() == [0.5, None]
    stacked.close_window()
    assert stacked.topk_disagreement() == [1.0, None]


def test_a_snapshot_is_one_transfer() -> None:
    from support.guards import Transfers

    stacked = StepState(list(EXPERTS))
    with Transfers() as seen:
        host = stacked.host()
    assert seen.reads == ["cpu"]
    assert host["window"].shape == (2, stacked.row.size) and host["phi_slow"].shape == (2, WIDTH)


def test_state_returns_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(3)
    stacked, other = StepState(list(EXPERTS)), StepState(list(EXPERTS))
    for name in StepState.NAMES:
        tensor = getattr(stacked, name)
        tensor.copy_((torch.rand(tensor.shape, generator=draw) * 100).to(tensor.dtype))
    other.load_state_dict(stacked.state_dict())
    for name in StepState.NAMES:
        assert torch.equal(getattr(other, name), getattr(stacked, name)), name
