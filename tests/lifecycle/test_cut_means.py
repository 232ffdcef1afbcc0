"""What is recorded of a run after its cut: the numbers of the model without those experts, which is built here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import family_checks, moe_zoo
from support.cut_plans import plan_of

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig
from chronomoe_hf.export.cut_model import REFUSED
from chronomoe_hf.lifecycle import export, masked
from chronomoe_hf.recording import tape
from chronomoe_hf.recording.columns import META, PER_EXPERT, PER_LAYER

FAST = ("mixtral", "deepseek_v3", "gpt_oss", "switch_transformers")
PLAIN = [name for name in moe_zoo.ROUTED if name not in REFUSED]
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]


def settings(family: str = "mixtral") -> ChronoConfig:
    preset = "observe" if family in family_checks.NO_BETA else "protect"
    return ChronoConfig.preset(preset, interval=50, coherence=CoherenceConfig(max_tokens=None))


def recorded(model: Any, config: ChronoConfig, cut: Any, beta: Any) -> Any:
    """The sums of one batch, with a beta that was set by hand, of the whole model under a cut or of a small one."""
    chronomoe_hf.wrap(model.eval(), config)
    system = chronomoe_hf.system_of(model)
    if cut is not None:
        system.cut.put(cut, 1)
    system.step_state.beta_LE.copy_(beta)
    system.step_state.refresh(cap=1.0)
    system.switch_beta_on()
    with torch.no_grad(), system.recording_eval():
        model(**family_checks.inputs(model))
    return system, system.take_sums("eval")


def assert_same(system: Any, whole_LR: Any, small_LR: Any, other: Any, plan: Any) -> None:
    row, small = system.step_state.row, other.step_state.row
    for layer in plan.layers:
        at, kept, gone = layer.spec.layer_id, list(layer.kept), list(layer.dropped)
        for name in PER_EXPERT:
            mine_E, its_E = row.expert(whole_LR[at], name), small.expert(small_LR[at], name)[: len(kept)]
            torch.testing.assert_close(mine_E[kept], its_E, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert not mine_E[gone].any(), name
        assert torch.equal(row.count(whole_LR[at])[kept], small.count(small_LR[at])[: len(kept)])
        for names, of, its in ((META, row.meta, small.meta), (PER_LAYER, row.layer, small.layer)):
            for name in names:
                assert float(of(whole_LR[at], name)) == pytest.approx(
                    float(its(small_LR[at], name)), rel=1e-5, abs=1e-5
                )
        tokens = float(row.meta(whole_LR[at], "tokens"))
        assert float(row.expert(whole_LR[at], "prob")[kept].sum()) == pytest.approx(tokens, rel=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_the_sums_of_a_cut_model_are_those_of_the_sliced_one(family: str, tmp_path: Path) -> None:
    """Scores, logit variance, disagreement and every other column, in softmax and in sigmoid families."""
    model = family_checks.build(family).eval()
    plan = plan_of(model)
    export(model, plan, tmp_path / "small")
    small = type(model).from_pretrained(tmp_path / "small")
    config = settings(family)
    generator = torch.Generator().manual_seed(0)
    beta_LE = torch.randn(len(plan.layers), max(spec.num_experts for spec in plan.specs), generator=generator) * 0.3
    kept = torch.tensor([layer.kept for layer in plan.layers])
    for layer in plan.layers:
        beta_LE[layer.spec.layer_id, list(layer.dropped)] = 0.0
    system, whole_LR = recorded(model, config, plan, beta_LE)
    other, small_LR = recorded(small, config, None, beta_LE.gather(1, kept))
    assert_same(system, whole_LR, small_LR, other, plan)
    if family not in family_checks.NO_BETA:
        assert system.step_state.row.disagreement(whole_LR).any(), "bad test setup: beta moves nothing"


@pytest.fixture
def mixtral() -> Any:
    model = family_checks.build("mixtral")
    return model, plan_of(model)


def sums(model: Any, plan: Any) -> Any:
    return recorded(model, settings(), plan, 0.1 * torch.arange(8))


def test_in_pieces_and_inside_masked_the_sums_are_the_same(mixtral: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = mixtral
    other = copy.deepcopy(model)
    system, want_LR = sums(copy.deepcopy(model), plan)
    monkeypatch.setattr(tape, "LIMIT", 2000)  # a call is summed some rows at a time
    torch.testing.assert_close(sums(model, plan)[1], want_LR, rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    with masked(other, plan):
        torch.testing.assert_close(sums(other, None)[1], want_LR, rtol=1e-6, atol=1e-6)
    assert system.step_state.row.disagreement(want_LR).all(), "bad test setup"


def test_broken_logits_of_a_cut_expert_break_no_token(mixtral: Any) -> None:
    model, plan = mixtral
    broken, worse = copy.deepcopy(model), copy.deepcopy(model)
    system, want_LR = sums(model, plan)
    row, tokens = system.step_state.row, int(family_checks.inputs(model)["attention_mask"].sum())
    with torch.no_grad():
        system.layers[0].adapter.weight(broken.model.layers[0].mlp.gate)[plan.layers[0].dropped[0]] = torch.nan
        system.layers[0].adapter.weight(worse.model.layers[0].mlp.gate)[plan.layers[0].kept[0]] = torch.nan
    assert torch.equal(sums(broken, plan)[1], want_LR) and row.meta(want_LR[0], "tokens") == tokens
    worse_LR = sums(worse, plan)[1]
    assert row.meta(worse_LR[0], "nonfinite") == tokens and not row.expert(worse_LR[0], "prob").any()


def test_the_window_after_the_cut_is_over_the_survivors() -> None:
    """A run: mean scores, and the logit spread that beta is measured in, of training steps."""
    config = ChronoConfig.observe(interval=2, lifecycle__cut__at=2, lifecycle__cut__keep=0.5)
    model = chronomoe_hf.wrap(family_checks.build("mixtral").train(), config)
    system = chronomoe_hf.system_of(model)
    for step in range(1, 5):
        model(**family_checks.inputs(model))
        snapshot = system.step(step)
    assert snapshot is not None and system.cut.step == 2
    gates = [layer.router for layer in system.layers]
    seen: list[Any] = []
    hook = gates[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(**family_checks.inputs(model))
    hook.remove()
    kept = list(system.cut.plan.layers[0].kept)
    real = family_checks.inputs(model)["attention_mask"].flatten().bool()
    z_TE = (seen[0].reshape(real.shape[0], -1) @ gates[0].weight.detach().T)[real]
    mean_E, layer = z_TE[:, kept].softmax(-1).mean(0), snapshot.layers[0]
    assert [layer.prob_mean[e] for e in kept] == pytest.approx(mean_E.tolist(), rel=1e-5)
    assert all(layer.prob_mean[e] == 0.0 for e in layer.cut) and len(layer.cut) == 4
    variance = [sum((z - sum(row) / 4) ** 2 for z in row) / 4 for row in z_TE[:, kept].tolist()]
    row = system.take_sums()[0]
    assert float(system.step_state.row.layer(row, "logit_var")) == pytest.approx(sum(variance), rel=1e-5)
