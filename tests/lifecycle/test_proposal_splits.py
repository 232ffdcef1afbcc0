"""Split and spawn proposals: their measured effect is that of the same split carried out, and every bit comes back."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models, moe_zoo
from support.idle import with_idle
from support.plans import digest
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig, LifecycleConfig
from chronomoe_hf.lifecycle import LayerSplit, Proposal, SplitPlan, apply, layer_specs, plan_split
from chronomoe_hf.lifecycle.live import live_layers
from chronomoe_hf.lifecycle.proposal_effects import measure_proposals
from chronomoe_hf.telemetry import read_jsonl

ROLES = {"coherence": CoherenceConfig(roles=True)}
LAYER, DONOR, IDLE = 1, 3, 6


def one_idle(family: str = "mixtral", k: int = 1) -> Any:
    """In layer 1 expert 3 is overloaded and expert 6 idle; the rest of the model is as it was made."""
    fields = {"num_experts_per_tok": k} if family == "mixtral" else {}
    model = models.tiny_model(family, train=False, **fields)
    layer = live_layers(model)[LAYER]
    weight_ED = layer.adapter.weight(layer.router).detach()
    generator = torch.Generator().manual_seed(2)
    weight_ED.copy_(torch.randn(weight_ED.shape, generator=generator) * 0.3)
    weight_ED[DONOR] *= 2.0 if k == 1 else 1.5
    weight_ED[IDLE] = -2.0 * weight_ED[[e for e in range(8) if e != IDLE]].mean(0)
    return model


def held_out(family: str = "mixtral", count: int = 6) -> list[dict[str, Any]]:
    return [models.tiny_batch(family, seed=300 + i, batch=8, length=48, padded=True) for i in range(count)]


def watch(model: Any, **config: Any) -> Any:
    return chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.observe(**ROLES, **config)))


def propose(system: Any, kind: Any, experts: tuple[int, ...], competing: list[tuple[str, list[int]]]) -> None:
    """A confirmed proposal, as the roles of a run would have left it."""
    listed = [{"edit": name, "experts": ids, "delta_free_energy": None} for name, ids in competing]
    proposal = Proposal(
        kind=kind, layer_id=LAYER, experts=experts, step=2, state="confirmed", streak=2, competing=tuple(listed)
    )
    system.lifecycle.roles.standing[LAYER, kind, experts] = proposal


def loss_of(model: Any, batches: list[dict[str, Any]]) -> float:
    """Mean cross-entropy over all tokens with a label."""
    total = number = 0.0
    with torch.no_grad():
        for batch in batches:
            output = model.eval()(**batch)
            shift = 0 if model.config.is_encoder_decoder else 1
            labels = batch["labels"][:, shift:].reshape(-1)
            logits = output.logits[:, : output.logits.shape[1] - shift].reshape(len(labels), -1).double()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            number += int((labels != -100).sum())
    return total / number


def shares(model: Any, batches: list[dict[str, Any]]) -> list[float]:
    """Fair shares of layer 1, by a hook on its router, padding left out (encoder layers alone see the mask of ids)."""
    layer, count_E = live_layers(model)[LAYER], torch.zeros(8, dtype=torch.float64)
    mask = torch.empty(0)

    def listen(module: Any, args: Any, output: Any) -> None:
        index_TK = layer.adapter.read(module, output).index_TK[mask.reshape(-1).bool()]
        count_E.add_(torch.bincount(index_TK.reshape(-1), minlength=8))

    handle = layer.router.register_forward_hook(listen)
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"]
            model.eval()(**batch)
    handle.remove()
    return [float(value) for value in count_E * 8 / count_E.sum()]


def alone(model: Any, split: LayerSplit) -> SplitPlan:
    """A plan that changes layer 1 and nothing else."""
    specs = layer_specs(model)
    return SplitPlan(layers=tuple(split if s.layer_id == LAYER else LayerSplit(spec=s) for s in specs), tokens=0)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_a_measured_split_is_the_split_that_plan_split_and_apply_make(family: str) -> None:
    model, batches = one_idle(family), held_out(family)
    by_hand, was = copy.deepcopy(model), digest(model)
    system = watch(model)
    propose(system, "split", (DONOR,), [("split", [DONOR])])
    (record,) = measure_proposals(system, model, batches)
    (edit,) = record["edits"]
    assert digest(model) == was and record["dry_run"]
    fitted, measured = batches[:3], batches[3:]
    split = plan_split(by_hand, fitted).layers[LAYER]
    assert [(one.donor, one.target) for one in split.copies] == [(DONOR, IDLE)], "bad test setup: one act to compare"
    before, loss = shares(by_hand, measured), loss_of(by_hand, measured)
    apply(by_hand, alone(by_hand, split), refit=False)
    after = shares(by_hand, measured)
    assert (edit["measured"], edit["donor"], edit["target"], edit["refit"]) == (True, DONOR, IDLE, False)
    assert record["loss"] == pytest.approx(loss, abs=1e-6)
    assert edit["delta_loss"] == pytest.approx(loss_of(by_hand, measured) - loss, abs=1e-6)
    assert edit["fair_shares_before"] == pytest.approx([before[DONOR], before[IDLE]])
    assert edit["fair_shares_after"] == pytest.approx([after[DONOR], after[IDLE]])
    assert before[DONOR] > 1.5 and before[IDLE] < 0.5, "bad test setup"
    assert max(after[DONOR], after[IDLE]) < 0.75 * before[DONOR], "the load is shared"
    assert edit["delta_loss_error"] > 0.0 and edit["kl"] > 0.0 and edit["overlap"] < 1.0
    mask = "decoder_attention_mask" if family == "switch_transformers" else "attention_mask"
    assert record["planned_on_tokens"] == sum(int(batch[mask].sum()) for batch in fitted)
    assert record["tokens"] == sum(int((b["labels"][:, family == "mixtral" :] != -100).sum()) for b in measured)


@pytest.mark.parametrize("preset", ["observe", "protect"])
def test_with_several_experts_a_token_the_bias_acts_for_a_while_whatever_the_law(preset: str) -> None:
    model, batches = one_idle(k=2), held_out()
    by_hand, was = copy.deepcopy(model), digest(model)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.preset(preset, **ROLES)))
    state = {name: value.clone() for name, value in system.step_state.state_dict().items()}
    propose(system, "spawn", (IDLE, DONOR), [("spawn", [IDLE, DONOR]), ("prune", [IDLE]), ("balance", [DONOR])])
    (record,) = measure_proposals(system, model, batches)
    spawn, prune, balance = record["edits"]
    assert digest(model) == was and not system.governed
    assert all(torch.equal(value, state[name]) for name, value in system.step_state.state_dict().items())
    assert not any(layer.handle.state.beta_on for layer in system.layers)
    # by hand: the bias that is applied, as a bias of the router itself, solved here by bisection for the idle expert
    measured, layer = batches[3:], live_layers(by_hand)[LAYER]
    loss, before = loss_of(by_hand, measured), shares(by_hand, measured)
    governed = chronomoe_hf.system_of(chronomoe_hf.wrap(by_hand, ChronoConfig.revive()))
    plan = plan_split(by_hand, batches[:3]).layers[LAYER]
    assert plan.shift_E is not None and before[IDLE] < 0.5
    shift_E = planned_shift(copy.deepcopy(one_idle(k=2)), batches[:3])
    others = [e for e in range(8) if e not in (DONOR, IDLE)]
    assert torch.allclose(shift_E[others], shift_E[others].mean(), atol=1e-6), "no other expert is moved"
    assert shift_E[IDLE] > shift_E[others[0]] >= shift_E[DONOR] - 1e-6
    one = replace(plan.copies[0] if plan.copies else copy_of(DONOR, IDLE), donor=DONOR, target=IDLE)
    undo = apply(by_hand, alone(by_hand, replace(plan, copies=(one,), shift_E=shift_E)), refit=False)
    assert governed.router_state(LAYER).beta_on
    assert spawn["delta_loss"] == pytest.approx(loss_of(by_hand, measured) - loss, abs=1e-6)
    after = shares(by_hand, measured)
    assert spawn["fair_shares_after"] == pytest.approx([after[DONOR], after[IDLE]], abs=1e-6)
    assert spawn["fair_shares_before"] == pytest.approx([before[DONOR], before[IDLE]]) and after[IDLE] > 0.4
    undo()
    apply(by_hand, alone(by_hand, replace(plan, copies=())), refit=False)
    assert balance["delta_loss"] == pytest.approx(loss_of(by_hand, measured) - loss, abs=1e-6)
    assert balance["fair_shares_after"] == pytest.approx([shares(by_hand, measured)[DONOR]], abs=1e-6)
    assert "target" not in balance and layer is not None
    assert prune["measured"] and "fair_shares_after" not in prune
