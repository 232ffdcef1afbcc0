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
from support.plans import digest
from support.split_proposals import DONOR, EDITS, IDLE, LAYER, ROLES, held_out, one_idle, propose, watch

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.in_run.proposals import measure_proposals
from chronomoe_hf.lifecycle import LayerSplit, SplitPlan, apply, layer_specs, plan_split
from chronomoe_hf.lifecycle.live.model import live_layers, quiet
from chronomoe_hf.splitting.plan_one import plan_one
from chronomoe_hf.splitting.router_tap import RouterTap, read_calls
from chronomoe_hf.telemetry import read_jsonl


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
    split = plan_split(by_hand, fitted, idle=0.2).layers[LAYER]
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
    assert record["planned_on_tokens"] == sum(int(batch["attention_mask"].sum()) for batch in fitted)
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
    fitted, measured = batches[:3], batches[3:]
    loss, before = loss_of(by_hand, measured), shares(by_hand, measured)
    governed = chronomoe_hf.system_of(chronomoe_hf.wrap(by_hand, ChronoConfig.revive()))
    split = planned(by_hand, governed, fitted)
    assert split.shift_E is not None and min(before) == before[IDLE] < 0.5 < 1.5 < before[DONOR], "bad test setup"
    others_E = split.shift_E[[e for e in range(8) if e not in (DONOR, IDLE)]]
    assert torch.allclose(others_E, others_E[0]), "no other expert is moved"
    assert float(split.shift_E[DONOR]) <= float(others_E[0]) < float(split.shift_E[IDLE])
    undo = apply(by_hand, alone(by_hand, split), refit=False)
    assert governed.router_state(LAYER).beta_on
    assert 0.5 <= shares(by_hand, fitted)[IDLE] and shares(by_hand, fitted)[DONOR] <= 2.0
    assert spawn["delta_loss"] == pytest.approx(loss_of(by_hand, measured) - loss, abs=1e-6)
    after = shares(by_hand, measured)
    assert spawn["fair_shares_before"] == pytest.approx([before[DONOR], before[IDLE]])
    assert spawn["fair_shares_after"] == pytest.approx([after[DONOR], after[IDLE]], abs=1e-6)
    undo()
    all_of_them = plan_split(by_hand, fitted).layers[LAYER]
    apply(by_hand, alone(by_hand, replace(all_of_them, copies=())), refit=False)
    assert balance["delta_loss"] == pytest.approx(loss_of(by_hand, measured) - loss, abs=1e-6)
    assert balance["fair_shares_after"] == pytest.approx([shares(by_hand, measured)[DONOR]], abs=1e-6)
    assert "target" not in balance and prune["measured"] and "fair_shares_after" not in prune


def planned(model: Any, system: Any, batches: list[dict[str, Any]]) -> LayerSplit:
    """Of layer 1 of a wrapped model, between the two experts."""
    spec, layer = layer_specs(model)[LAYER], live_layers(model)[LAYER]
    tap = RouterTap(layer, system.layers[LAYER])
    with quiet(model):
        read_calls(model, [tap], batches)
        return plan_one(tap, spec, DONOR, IDLE, 0.5)


@pytest.mark.parametrize("k", [1, 2])
def test_a_forward_that_fails_leaves_every_bit_as_it_was(k: int) -> None:
    model, batches = one_idle(k=k).train(), held_out()
    system = watch(model)
    propose(system, "split", (DONOR,), [("split", [DONOR])])
    was, state = digest(model), {name: value.clone() for name, value in system.step_state.state_dict().items()}
    changed: list[bool] = []
    before = hooks(model)

    def fail(module: Any, args: Any, output: Any) -> None:
        """In the first forward with the split in force."""
        changed.append(digest(model) != was)
        if changed[-1]:
            raise RuntimeError("stop")

    handle = model.model.layers[LAYER].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        measure_proposals(system, model, batches)
    handle.remove()
    assert digest(model) == was and model.training and system.switches.training
    assert all(torch.equal(value, state[name]) for name, value in system.step_state.state_dict().items())
    assert not system.router_state(LAYER).beta_on
    assert hooks(model) == before, "a hook was left behind"


def hooks(model: Any) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_edits_that_are_the_same_are_measured_once_and_told_on_every_proposal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    model, batches = one_idle(), held_out(count=2)
    system = watch(model)
    system.open_telemetry(tmp_path)
    spawn = ("spawn", [IDLE, DONOR])
    propose(system, "split", (DONOR,), [("split", [DONOR]), spawn, ("prune", [IDLE]), ("balance", [DONOR])])
    propose(system, "spawn", (IDLE, DONOR), [spawn, ("prune", [IDLE]), ("balance", [IDLE])])
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    split, spawn_again = measure_proposals(system, model, batches)
    handle.remove()
    assert len(calls) == 1 + 1 + 3, "one plan; of the other batch the whole model, the copy, the prune, the bias"
    (first, second, *_), (third, *_) = split["edits"], spawn_again["edits"]
    numbers = ("donor", "target", "delta_loss", "kl", "fair_shares_before", "fair_shares_after")
    assert [first[n] for n in numbers] == [second[n] for n in numbers] == [third[n] for n in numbers]
    system.close_telemetry()
    records, broken = read_jsonl(tmp_path / "chronomoe" / "lifecycle_effects.jsonl")
    assert broken == 0 and [record["edits"] for record in records] == [split["edits"], spawn_again["edits"]]
    (line,) = [
        r.message for r in caplog.records if r.message.startswith("[DRY-RUN] step 0 layer 1 split: loss split 3")
    ]
    before, after = (", ".join(f"{v:.2f}" for v in first[f"fair_shares_{when}"]) for when in ("before", "after"))
    assert f"split 3 {first['delta_loss']:+.5f} (load of 3, 6: {before} -> {after}), spawn 6 3" in line


def reasons(system: Any, model: Any, batches: list[dict[str, Any]]) -> dict[str, str]:
    (record,) = measure_proposals(system, model, batches)
    return {edit["edit"]: edit.get("reason", "") for edit in record["edits"]}


def test_what_cannot_be_measured_says_why_and_the_rest_is_measured() -> None:
    model, batches = one_idle(), held_out(count=2)
    system = watch(model)
    propose(system, "split", (DONOR,), EDITS)
    assert set(reasons(system, model, batches).values()) == {""}
    one = reasons(system, model, batches[:1])
    assert one["prune"] == "" and all("two batches" in one[name] for name in ("split", "spawn", "balance"))
    short = reasons(system, model, [models.tiny_batch("mixtral", batch=2, length=8)] * 2)
    assert short["prune"] == "" and all("too few to tell" in short[name] for name in ("split", "spawn", "balance"))
    experts = model.model.layers[LAYER].mlp.experts
    experts.requires_grad_(False)
    frozen = reasons(system, model, batches)
    assert "frozen" in frozen["split"] and "frozen" in frozen["spawn"] and frozen["prune"] == frozen["balance"] == ""
    experts.requires_grad_(True)
    with torch.no_grad():
        weight_ED = model.model.layers[LAYER].mlp.gate.weight
        weight_ED[IDLE] = weight_ED[4] * 1.1  # no expert is idle now, and expert 3 gets nothing
        weight_ED[DONOR] = weight_ED[[0, 1, 2, 4]].mean(0)
    told = reasons(system, model, batches)
    assert "got 0 tokens" in told["spawn"] and told["prune"] == ""


def test_where_no_expert_is_idle_a_split_has_no_place() -> None:
    model, batches = one_idle(), held_out()
    with torch.no_grad():
        weight_ED = model.model.layers[LAYER].mlp.gate.weight
        weight_ED[IDLE] = weight_ED[DONOR] + 0.05 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert min(shares(model, batches[:3])) >= 0.5, "bad test setup"
    system = watch(model)
    propose(system, "split", (DONOR,), EDITS)
    told = reasons(system, model, batches)
    assert "no expert is below 0.5 fair shares" in told["split"] and told["spawn"] == told["prune"] == ""
    model, batches = one_idle(), held_out()
    strict = watch(model, lifecycle__revive__idle=0.01)
    assert shares(model, batches[:3])[IDLE] > 0.01, "bad test setup"
    propose(strict, "split", (DONOR,), EDITS)
    assert "no expert is below 0.01 fair shares" in reasons(strict, model, batches)["split"]


@pytest.mark.parametrize("law", ["observe", "balance"])
def test_a_router_with_a_bias_of_its_own(law: str) -> None:
    """Observed, its logits are shifted for a while; under the balance law its own correction bias is."""
    model: Any = moe_zoo.build("deepseek_v3", num_experts_per_tok=2, n_routed_experts=8, n_group=1, topk_group=1)
    moe_zoo.randomise(model)
    config = ChronoConfig.preset(law, coherence__roles=True)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, config))
    layer = system.layers[LAYER]
    bias_E = layer.adapter.native_bias(layer.router, layer.parent)
    bias_E.data[IDLE] -= 0.4
    ids = torch.randint(2, 60, (4, 8, 32), generator=torch.Generator().manual_seed(1))
    was = digest(model)
    propose(system, "split", (DONOR,), [("split", [DONOR])])
    (record,) = measure_proposals(system, model, [{"input_ids": each, "labels": each} for each in ids])
    (edit,) = record["edits"]
    assert digest(model) == was and layer.native_bias == (law == "balance")
    assert edit["target"] == IDLE and edit["fair_shares_before"][1] < 0.4 and edit["fair_shares_after"][1] > 0.4


def test_a_router_that_takes_no_bias_is_named() -> None:
    model: Any = moe_zoo.build("dbrx")
    system = watch(model)
    propose(system, "split", (1,), [("split", [1]), ("spawn", [2, 1]), ("balance", [1])])
    ids = torch.ones(2, 8, dtype=torch.long)
    told = reasons(system, model, [{"input_ids": ids, "labels": ids}] * 2)
    assert "cannot be told apart" in told["split"] and "no bias can act" in told["balance"]
