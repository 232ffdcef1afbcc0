"""The five steps of the original implementation plan, on plain tensors and with the plan's own names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chronomoe_hf import ChronoConfig, CoherenceBuffer, CoherenceState, LifecycleCoordinator, PruneDecision, RouterState
from chronomoe_hf.coherence import phase_coherence
from chronomoe_hf.metrics import compute_flip_rate, compute_js_divergence
from chronomoe_hf.router import compute_relevance, update_beta

E, D, TOP_K, TOKENS, INTERVAL = 8, 16, 2, 256, 100
TURNED, IDLE = 5, 7


class PlainLayer:
    """A mixture of linear experts around the plan's router: no wrapped model, no system."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate_ED = torch.randn(E, D, generator=generator)
        base_DD = torch.randn(D, D, generator=generator)
        self.experts = [base_DD + 0.3 * torch.randn(D, D, generator=generator) for _ in range(E)]
        self.experts[TURNED] = -base_DD  # works against the others
        self.router_state = RouterState(layer_id=0, num_experts=E, beta_coeff=torch.zeros(E))
        self.generator = generator

    def tokens(self) -> Tensor:
        return torch.randn(TOKENS, D, generator=self.generator)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 1 and 4: clean and biased distributions, disagreement, and the choice with the vetoed bias."""
        state = self.router_state
        z_clean = x_TD @ self.gate_ED.T
        z_clean[:, IDLE] -= 100.0  # nobody ever asks for it
        state.update_logit_std(z_clean)
        r = compute_relevance(state, threshold=0.2)
        beta_eff = state.compute_beta_eff()
        p_clean = z_clean.softmax(-1)
        p_full = (z_clean + beta_eff).softmax(-1)
        state.disagreement_js = compute_js_divergence(p_clean, p_full)
        state.disagreement_flip = compute_flip_rate(p_clean, p_full, TOP_K)
        top_k_probs, top_k_indices = (z_clean + r * beta_eff).softmax(-1).topk(TOP_K, dim=-1)
        return top_k_probs / top_k_probs.sum(-1, keepdim=True), top_k_indices

    def coherence(self, x_TD: Tensor, probs_TK: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per active expert: phi against the mixture without its own part, its id, its tokens."""
        outputs_TED = torch.stack([x_TD @ weight_DD for weight_DD in self.experts], dim=1)
        gate_TE = torch.zeros(TOKENS, E).scatter_(1, index_TK, probs_TK)
        mixture_TD = (gate_TE[..., None] * outputs_TED).sum(1)
        chosen_TE = gate_TE > 0
        output_ED, reference_ED = torch.zeros(E, D), torch.zeros(E, D)
        for e in range(E):
            rows = chosen_TE[:, e]
            output_ED[e] = outputs_TED[rows, e].sum(0)
            reference_ED[e] = (mixture_TD[rows] - gate_TE[rows, e, None] * outputs_TED[rows, e]).sum(0)
        phi_E, valid_E = phase_coherence(output_ED, reference_ED)
        active = valid_E.nonzero().flatten()
        return phi_E[active], active, chosen_TE.sum(0)[active]


@pytest.fixture(scope="module")
def run() -> tuple[PlainLayer, CoherenceBuffer, LifecycleCoordinator, list[list[float]], list[PruneDecision]]:
    layer = PlainLayer()
    coherence_buffer = CoherenceBuffer(num_experts=E, device="cpu")
    config = ChronoConfig.original(lifecycle__prune_threshold=0.0, lifecycle__starvation_threshold=0.0)
    lifecycle = LifecycleCoordinator(config)
    betas, found = [], []
    for step in range(1, 12 * INTERVAL + 1):
        x = layer.tokens()
        phi_raw, active_ids, num_tokens = layer.coherence(x, *layer.route(x))
        coherence_buffer.update(phi_raw, active_ids, step, num_tokens)
        if step % INTERVAL == 0:
            snapshot = coherence_buffer.snapshot(step)
            update_beta(router_state=layer.router_state, coherence_snapshot=snapshot, eta=0.01, tau=0.5)
            betas.append(layer.router_state.beta_coeff.tolist())
            found += lifecycle.evaluate(snapshot, layer.router_state, step)
    return layer, coherence_buffer, lifecycle, betas, found


def test_step_1_the_two_distributions_differ_by_beta(run) -> None:
    layer = run[0]
    state = layer.router_state
    clamped = [max(-0.3, min(0.3, beta)) for beta in state.beta_coeff.tolist()]
    scale = float(state.logit_std_ema)
    assert scale > 1.0, "the EMA has left its neutral value"
    assert state.compute_beta_eff().tolist() == pytest.approx([scale * beta for beta in clamped], rel=1e-5)
    assert 0.0 < state.disagreement_js < 0.2 and 0.0 < state.disagreement_flip < 0.5


def test_step_2_the_buffer_holds_the_clocks_of_the_experts_that_were_seen(run) -> None:
    buffer = run[1]
    states = buffer.snapshot(12 * INTERVAL)
    assert [states[e].expert_id for e in range(E)] == [f"L0_E{e}" for e in range(E)]
    for e in range(E):
        clocks = [float(clock[e]) for clock in (buffer.phi_fast, buffer.phi_mid, buffer.phi_slow)]
        assert int(buffer.total_tokens_seen[e]) == states[e].total_tokens_seen
        assert int(buffer.last_update_step[e]) == states[e].last_update_step
        if e == IDLE:
            assert (states[e].phi_slow, states[e].last_update_step, states[e].is_being_observed) == (None, -1, False)
        else:
            assert [states[e].phi_fast, states[e].phi_mid, states[e].phi_slow] == pytest.approx(clocks)
            assert states[e].is_being_observed and states[e].last_update_step == 12 * INTERVAL
    assert sum(state.total_tokens_seen for state in states.values()) == 12 * INTERVAL * TOKENS * TOP_K


def test_step_3_beta_follows_coherence(run) -> None:
    _, buffer, _, betas, _ = run
    assert buffer.phi_slow[TURNED] < -0.3 and buffer.phi_slow[:TURNED].min() > 0.3, "bad test setup"
    assert betas[-1][TURNED] == min(betas[-1]) < betas[0][TURNED] < 0.0
    assert max(map(abs, betas[-1])) <= 0.3 + 1e-7
    assert abs(sum(betas[-1])) < 1e-6
    plain = RouterState(layer_id=0, num_experts=E)
    states = buffer.snapshot(12 * INTERVAL)
    update_beta(plain, states, eta=0.01, tau=0.5, centred=False)
    moves = [0.0 if s.phi_slow is None else 0.01 * (s.phi_slow - 0.5) for s in states.values()]
    assert plain.beta_coeff.tolist() == pytest.approx(moves, abs=1e-7), "the plan's rule, without centring"


def test_step_4_disagreement_takes_beta_back(run) -> None:
    state = run[0].router_state
    for js, want in ((0.0, 1.0), (0.2, 1.0), (0.3, 0.75), (0.4, 0.5), (0.6, 0.0), (math.log(2), 0.0)):
        assert compute_relevance(replace(state, disagreement_js=js)) == pytest.approx(want, abs=1e-6)
    assert compute_relevance(state, threshold=0.001) < compute_relevance(state, threshold=0.2) == 1.0


def test_step_5_decisions_only(run) -> None:
    layer, buffer, lifecycle, _, found = run
    assert lifecycle.decisions == found
    cases = {(decision.expert_id, decision.reason, decision.state) for decision in found}
    assert cases == {
        (f"L0_E{TURNED}", "low_coherence", "candidate"),
        (f"L0_E{TURNED}", "low_coherence", "confirmed"),
        (f"L0_E{IDLE}", "low_observability", "candidate"),
        (f"L0_E{IDLE}", "low_observability", "confirmed"),
    }
    idle = next(decision for decision in found if decision.reason == "low_observability")
    assert (idle.step, idle.total_tokens_seen, idle.phi_slow) == (1100, 0, None), "judged after step 1000"
    turned = next(decision for decision in found if decision.reason == "low_coherence")
    assert turned.phi_slow == pytest.approx(turned.evidence["phi_slow"]) and turned.total_tokens_seen > 1000
    before = layer.router_state.beta_coeff.clone()
    lifecycle.evaluate(buffer.snapshot(12 * INTERVAL), layer.router_state)
    assert torch.equal(layer.router_state.beta_coeff, before)


def test_the_plans_records_can_be_written_by_hand() -> None:
    state = CoherenceState(
        expert_id="L3_E7",
        layer_id=3,
        phi_fast=0.1,
        phi_mid=0.2,
        phi_slow=0.3,
        last_update_step=9,
        total_tokens_seen=4,
    )
    assert state.is_being_observed
    decision = PruneDecision(
        expert_id=state.expert_id,
        reason="low_coherence",
        phi_slow=state.phi_slow,
        total_tokens_seen=state.total_tokens_seen,
        step=1200,
    )
    assert (decision.layer_id, decision.expert, decision.state) == (3, 7, "candidate")
    assert decision.to_record()["expert_id"] == "L3_E7"
    with pytest.raises(ValueError, match="L3_E7"):
        PruneDecision(expert_id="7", reason="low_coherence", phi_slow=None, total_tokens_seen=None, step=1)
