"""One optimizer step's arithmetic on the stacked state, from hand-made router calls, against plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from chronomoe_hf.config import BetaConfig, CoherenceConfig, VetoConfig
from chronomoe_hf.recording.scope import RecordingWindow, Switches
from chronomoe_hf.recording.sums import META, PER_EXPERT, PER_LAYER, Accumulators, LayerRecorder
from chronomoe_hf.router.forward import RouterState, Routing
from chronomoe_hf.step_state import Row, StateBank

EXPERTS = (4, 6)  # two layers of different width: the narrow one has padding columns
WIDTH = max(EXPERTS)


class Forward:
    """Recorders of two layers, fed by hand, and the row that a step folds."""

    def __init__(self) -> None:
        self.window = RecordingWindow(Switches(), (), None)
        self.recorders = []
        for layer_id, num in enumerate(EXPERTS):
            recorder = LayerRecorder(layer_id, num, WIDTH, self.window, CoherenceConfig())
            recorder.train, recorder.eval = Accumulators.zeros(WIDTH), Accumulators.zeros(WIDTH)
            self.recorders.append(recorder)

    def call(self, layer: int, logits: Tensor, real: list[bool] | None = None, **extra: Any) -> None:
        self.window.mode = "train"
        self.window.mask_T = None if real is None else torch.tensor(real)
        routing = Routing(logits, logits.topk(2, dim=-1).indices)
        self.recorders[layer].routing(routing, lambda z: z.softmax(-1), extra.get("disagreement"), extra.get("differs"))
        self.window.close()

    def row(self) -> Tensor:
        sums = [recorder.train for recorder in self.recorders]
        out = torch.stack([torch.cat([s.ints.double(), s.floats]) for s in sums])
        for s in sums:
            s.ints.zero_()
            s.floats.zero_()
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
    forward, bank = Forward(), StateBank(list(EXPERTS))
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
        bank.fold(forward.row(), step, VetoConfig())
        ema = 0.0
        for value in series:
            ema = 0.99 * ema + 0.01 * value
        assert float(bank.logit_std_L[0]) == pytest.approx(ema / (1 - 0.99 ** len(series)), rel=1e-4)
    assert max(series) > 2 * min(series), "bad test setup: a constant would pass"
    assert float(bank.logit_std_L[1]) == 1.0 and int(bank.std_updates_L[1]) == 0, "a layer that was never called"


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
    assert got == {"js": 1.0, "flip": 2.0, "overlap": 2.0, "compared": 2.0, "topk_differs": 2.0, "steered": 2.0}


def test_a_step_without_a_comparison_keeps_disagreement_and_relevance() -> None:
    forward, bank = Forward(), StateBank(list(EXPERTS))
    logits = torch.randn(3, 4)
    forward.call(
        0, logits, disagreement=(torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.0, 1.0, 0.0]), torch.ones(3) / 4)
    )
    bank.fold(forward.row(), 1, VetoConfig())
    forward.call(0, logits)
    bank.fold(forward.row(), 2, VetoConfig())
    bank.fold(forward.row(), 3, VetoConfig())
    assert bank.js_L.tolist() == pytest.approx([0.4, 0.0])
    assert bank.flip_L.tolist() == pytest.approx([1 / 3, 0.0])
    assert bank.overlap_L.tolist() == pytest.approx([0.25, 0.0])
    assert bank.relevance_L.tolist() == pytest.approx([0.5, 1.0])
    bank.fold(forward.row(), 4, VetoConfig(signal="overlap"))
    assert bank.relevance_L.tolist() == pytest.approx([0.25, 1.0])
    off = StateBank(list(EXPERTS))
    forward.call(0, logits, disagreement=(torch.ones(3), torch.ones(3), torch.ones(3)))
    off.fold(forward.row(), 1, VetoConfig(enabled=False))
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


def test_the_bank_and_a_buffer_of_its_own_agree_on_clocks_and_beta() -> None:
    """Two layers of different width in one bank against one plain buffer and one plain router state per layer."""
    from chronomoe_hf import CoherenceBuffer
    from chronomoe_hf.router.forward import update_beta

    draw = random.Random(0)
    bank = StateBank(list(EXPERTS))
    buffers = [CoherenceBuffer(num) for num in EXPERTS]
    states = [RouterState.fresh(layer, num, 0.3) for layer, num in enumerate(EXPERTS)]
    config = BetaConfig(eta=0.2)
    for step in range(1, 8):
        phi = [[draw.uniform(-1, 1) for _ in range(num)] for num in EXPERTS]
        count = [[draw.choice([0, 5, 9]) for _ in range(num)] for num in EXPERTS]
        bank.fold(coherence_row(phi, [[float(n) for n in layer] for layer in count], count), step, VetoConfig())
        bank.apply_coherence(step, config)
        for layer, buffer in enumerate(buffers):
            active = [e for e, n in enumerate(count[layer]) if n]
            buffer.update(torch.tensor(phi[layer], dtype=torch.float64), active, step, torch.tensor(count[layer]))
            update_beta(states[layer], buffer.snapshot(step), eta=0.2)
    for layer, num in enumerate(EXPERTS):
        want = buffers[layer].snapshot(7)
        for expert, state in bank.coherence(layer).snapshot(7).items():
            assert astuple(state) == pytest.approx(astuple(want[expert]), abs=1e-12)
        assert float(states[layer].beta_coeff.abs().max()) > 0.1, "bad test setup"
        assert bank.beta_LE[layer, :num].tolist() == pytest.approx(states[layer].beta_coeff.tolist(), abs=1e-6)
    assert bank.beta_LE[0, EXPERTS[0] :].eq(0).all()


def test_balance_moves_each_layer_by_its_own_counts_and_leaves_frozen_ones_alone() -> None:
    bank = StateBank(list(EXPERTS))
    count = torch.tensor([[8, 4, 4, 0, 0, 0], [6, 6, 6, 6, 6, 0]])
    for _ in range(2):
        beta = BetaConfig(law="balance", rule="proportional", rate=0.1)
        bank.apply_balance(count, beta, torch.tensor([False, False]))
    # Fair shares 4 and 5: gaps (-1, 0, 0, 1) and (-0.2 five times, 1), both already centred.
    assert bank.beta_LE[0].tolist() == pytest.approx([-0.2, 0, 0, 0.2, 0, 0], abs=1e-6)
    assert bank.beta_LE[1].tolist() == pytest.approx([-0.04] * 5 + [0.2], abs=1e-6)
    before = bank.beta_LE.clone()
    bank.apply_balance(count, beta, torch.tensor([True, False]))
    assert torch.equal(bank.beta_LE[0], before[0]) and not torch.equal(bank.beta_LE[1], before[1])


def test_what_the_forward_adds_is_relevance_times_clamped_beta_times_logit_std() -> None:
    bank = StateBank(list(EXPERTS))
    state = RouterState.fresh(1, 6)
    bank.bind(state)
    bank.beta_LE[1] = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, 0.0])
    bank.logit_std_L[1], bank.relevance_L[1] = 2.0, 0.25
    bank.refresh(0.3)
    assert state.beta_full.tolist() == pytest.approx([0.6, -0.6, 0.2, -0.2, 0, 0])
    assert state.beta_applied.tolist() == pytest.approx([0.15, -0.15, 0.05, -0.05, 0, 0])
    bank.forget(torch.tensor([1.0, 0.5]))
    assert state.beta_coeff.tolist() == pytest.approx([0.25, -0.25, 0.05, -0.05, 0, 0])


def test_topk_disagreement_spans_the_closed_and_the_open_window() -> None:
    forward, bank = Forward(), StateBank(list(EXPERTS))
    assert bank.topk_disagreement() == [None, None]
    forward.call(0, torch.randn(4, 4), differs=torch.tensor([True, False, False, False]))
    bank.fold(forward.row(), 1, VetoConfig())
    assert bank.topk_disagreement() == [0.25, None]
    bank.close_window()
    forward.call(0, torch.randn(4, 4), [True, True, False, False], differs=torch.ones(4, dtype=torch.bool))
    bank.fold(forward.row(), 2, VetoConfig())
    assert bank.topk_disagreement() == [0.5, None]
    bank.close_window()
    assert bank.topk_disagreement() == [1.0, None]


def test_a_snapshot_is_one_transfer() -> None:
    from support.guards import Transfers

    bank = StateBank(list(EXPERTS))
    with Transfers() as seen:
        host = bank.host()
    assert seen.reads == ["cpu"]
    assert host["window"].shape == (2, bank.row.size) and host["phi_slow"].shape == (2, WIDTH)


def test_state_returns_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(3)
    bank, other = StateBank(list(EXPERTS)), StateBank(list(EXPERTS))
    for name in StateBank.NAMES:
        tensor = getattr(bank, name)
        tensor.copy_((torch.rand(tensor.shape, generator=draw) * 100).to(tensor.dtype))
    other.load_state_dict(bank.state_dict())
    for name in StateBank.NAMES:
        assert torch.equal(getattr(other, name), getattr(bank, name)), name
