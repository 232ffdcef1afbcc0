"""Merge, split and spawn proposals on real models with planted faults; what they would cost; and that nothing moves."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.plans import digest, keeping

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig, LifecycleConfig
from chronomoe_hf.errors import LifecycleError, StateCorruptError
from chronomoe_hf.in_run.proposals import measure_proposals, merged
from chronomoe_hf.lifecycle import LifecycleCoordinator, layer_specs, measure
from chronomoe_hf.lifecycle.dry_run.proposals import SeenRoles, competing_edits
from chronomoe_hf.lifecycle.dry_run.role_numbers import DUPLICATES, SIZE, TWO_ROLES, Pair, TwoRoles, free_energy
from chronomoe_hf.lifecycle.live.masking import mask_experts
from chronomoe_hf.lifecycle.live.model import live_layers
from chronomoe_hf.lifecycle.live.weights import ExpertWeights, slice_of
from chronomoe_hf.lifecycle.pruning.measure import Edit, measure_edits
from chronomoe_hf.telemetry import read_jsonl

INTERVAL = 2


def equal_experts(model: Any) -> None:
    """Experts 0 and 5 of layer 0 get the same weights; their rows in the router stay apart."""
    for value in model.model.layers[0].mlp.experts.parameters():
        value.data[5] = value.data[0]


def two_kinds_of_tokens(model: Any) -> None:
    """Every token goes to expert 3 of layer 0, which sees words alone; a text of two words is two kinds of tokens."""
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    seen: list[torch.Tensor] = []
    block = model.model.layers[0].mlp
    handle = block.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=words(0, 2)["input_ids"])
    handle.remove()
    block.gate.weight.data[3] = 20.0 * seen[0].mean(0) / seen[0].mean(0).norm()


def words(seed: int, vocabulary: int) -> dict[str, Any]:
    batch = models.tiny_batch("mixtral", seed=seed, batch=24)
    ids = batch["input_ids"] % vocabulary
    return {**batch, "input_ids": ids, "labels": ids}


def trained(
    plant: Callable[[Any], None] | None,
    vocabulary: int = models.VOCAB,
    windows: int = 4,
    output_dir: Path | None = None,
    top_k: int = 2,
    **lifecycle: Any,
) -> tuple[Any, Any]:
    model = models.tiny_model("mixtral", num_experts_per_tok=top_k)
    if plant is not None:
        plant(model)
    config = ChronoConfig.observe(
        interval=INTERVAL,
        coherence=CoherenceConfig(roles=True, max_tokens=None),
        lifecycle=LifecycleConfig(**{"confirmations": 2, **lifecycle}),
    )
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, config))
    if output_dir is not None:
        system.open_telemetry(output_dir)
    for step in range(1, windows * INTERVAL + 1):
        model(**words(step, vocabulary)).loss.backward()
        system.step(step)
    return model, system


def proposed(system: Any, kind: str) -> list[Any]:
    return [each for each in system.lifecycle.roles.standing.values() if each.kind == kind]


def test_two_experts_of_equal_weights_are_the_first_merge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    _, system = trained(equal_experts, windows=8, output_dir=tmp_path)
    (top, *_) = system.last_snapshot.layers[0].roles["pairs"]
    assert {top["first"], top["second"]} == {0, 5} and top["score"] == pytest.approx(1.0, abs=1e-5)
    assert top["cosine"] < 0.9, "their role vectors are not the same: their routers send them other tokens"
    (merge,) = proposed(system, "merge")
    assert (merge.layer_id, merge.experts, merge.state) == (0, (0, 5), "confirmed")
    energy = system.last_snapshot.layers[0].roles["free_energy"]
    assert energy["duplicates"] == pytest.approx(DUPLICATES)
    edits = [(each["edit"], each["delta_free_energy"]) for each in merge.competing]
    assert edits == [(name, pytest.approx(-SIZE - DUPLICATES)) for name in ("merge", "prune", "prune")]
    assert sorted(each["experts"] for each in merge.competing[1:]) == [[0], [5]]
    system.close_telemetry()
    records, broken = read_jsonl(tmp_path / "chronomoe" / "lifecycle_decisions.jsonl")
    assert broken == 0
    found = [(record["state"], record["expert_ids"]) for record in records if record.get("proposal") == "merge"]
    assert found == [("candidate", ["L0_E0", "L0_E5"]), ("confirmed", ["L0_E0", "L0_E5"])]
    assert all(record["dry_run"] for record in records)
    assert sum("merge L0_E0 L0_E5: confirmed" in record.message for record in caplog.records) == 1


def test_an_expert_with_two_kinds_of_tokens_is_proposed_for_a_split() -> None:
    _, system = trained(two_kinds_of_tokens, vocabulary=2, windows=6)
    layer = system.last_snapshot.layers[0]
    assert layer.shares[3] == pytest.approx(0.5), "bad test setup: every token's first choice"
    (top, *_) = layer.roles["two_roles"]
    assert top["expert"] == 3 and top["score"] > 0.5
    (split,) = [each for each in proposed(system, "split") if each.layer_id == 0]
    assert split.experts == (3,) and split.state == "confirmed" and split.evidence["idle_experts"] > 0
    assert split.competing[0]["delta_free_energy"] == pytest.approx(SIZE - TWO_ROLES)
    assert [each["edit"] for each in split.competing] == ["split", "spawn", "prune", "balance"]
    spawns = [each for each in proposed(system, "spawn") if each.layer_id == 0]
    assert spawns and spawns[0].experts[1] == 3 and layer.shares[spawns[0].experts[0]] < 0.01
    assert [each["edit"] for each in spawns[0].competing] == ["spawn", "prune", "balance"]


def test_near_duplicates_of_the_layer_compete_with_a_split_and_a_spawn() -> None:
    _, system = trained(two_kinds_of_tokens, vocabulary=2, windows=6)
    layer = system.last_snapshot.layers[0]
    pairs = [Pair(first, second, 0.95, 0.9, 0.9, None, 0.0) for first, second in ((3, 1), (1, 2), (2, 4))]
    seen = SeenRoles(layer, layer.shares, None, pairs, [TwoRoles(3, 0.8, 0.9, 0.9)], free_energy(0.5, 4, 3, 1))
    idle = seen.idle[0]
    split, spawn = competing_edits("split", (3,), seen), competing_edits("spawn", (idle, 3), seen)
    names = [(each["edit"], each["experts"]) for each in split]
    rest = [("prune", [idle]), ("merge", [1, 2])]  # the closest pair without the overloaded one
    assert names == [("split", [3]), ("spawn", [idle, 3]), *rest, ("balance", [3])]
    assert [(each["edit"], each["experts"]) for each in spawn] == [("spawn", [idle, 3]), *rest, ("balance", [idle])]
    assert all(each["share"] == [layer.shares[expert] for expert in each["experts"]] for each in split)
    merge = split[3]
    used = layer.shares[2] > 0.0
    assert merge["delta_free_energy"] == pytest.approx(-SIZE * used - 2 * DUPLICATES), "expert 2 is in two pairs"


def test_a_healthy_model_gives_no_proposal() -> None:
    _, system = trained(None, windows=6)
    assert system.lifecycle.roles.standing == {}
    for layer in system.last_snapshot.layers:
        assert layer.roles["pairs"] and layer.roles["two_roles"], "bad test setup: nothing was judged"
        energy = layer.roles["free_energy"]
        assert energy["size"] == pytest.approx(SIZE * models.NUM_EXPERTS) and energy["duplicates"] == 0.0
        assert energy["total"] == pytest.approx(energy["incoherence"] + energy["size"] + energy["two_roles"])
        assert layer.roles["history"] == {"basin": 0, "windows": 6, "left": None, "known": 1}
    before = copy.deepcopy(system.last_snapshot)
    found = system.lifecycle.roles.evaluate(system.last_snapshot, {})
    assert (found.records, found.unread, found.proposals) == ({}, [0, 1], [])
    shown = system.last_snapshot.with_roles(found.records, found.unread)
    assert system.last_snapshot == before, "what a reader finds is not written into the window that it read"
    assert all(layer.notes[-1].startswith("no roles") and layer.roles is None for layer in shown.layers)


def test_little_evidence_neither_makes_nor_withdraws_a_proposal() -> None:
    model, system = trained(equal_experts, windows=8)
    before = dict(system.lifecycle.roles.standing)
    assert before
    for step in range(17, 19):
        model(**models.tiny_batch("mixtral", seed=step, batch=2, length=8)).loss.backward()
        system.step(step)
    assert system.lifecycle.roles.standing == before
    assert system.last_snapshot.layers[0].roles["two_roles"] == []


def test_what_no_longer_holds_is_withdrawn_and_another_load_is_an_event(tmp_path: Path) -> None:
    model, system = trained(equal_experts, windows=8, output_dir=tmp_path)
    for value in model.model.layers[0].mlp.experts.parameters():
        value.data[5] = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(1)) * models.INIT
    for step in range(17, 21):
        model(**words(step, 4)).loss.backward()
        system.step(step)
    system.close_telemetry()
    records, _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_decisions.jsonl")
    merges = [record for record in records if record.get("proposal") == "merge"]
    shared = system.last_snapshot.layers[0].roles["pairs"]
    assert shared and (merges[-1]["state"], merges[-1]["step"]) in {("withdrawn", 18), ("withdrawn", 20)}
    moved = [record for record in records if record.get("event") == "basin" and record["layer_id"] == 0]
    assert [(record["step"], record["evidence"]["basin"], record["evidence"]["left"]) for record in moved] == [
        (18, 1, 0)
    ]


def test_memory_survives_as_json_and_bad_memory_is_refused() -> None:
    _, system = trained(equal_experts, windows=8)
    state = json.loads(json.dumps(system.lifecycle.state_dict()))
    config = system.config
    again = LifecycleCoordinator(config, n_layers=2)
    again.load_state_dict(state)
    assert again.state_dict() == system.lifecycle.state_dict()
    assert again.roles is not None and again.roles.standing == system.lifecycle.roles.standing
    without = LifecycleCoordinator(config.lifecycle, n_layers=2)
    without.load_state_dict(state)
    assert without.roles is None and "roles" not in without.state_dict()
    for spoiled in ({"standing": 3}, {"standing": [{"proposal": "melt"}]}, {"layers": {"x": {}}}, {"layers": []}):
        with pytest.raises(StateCorruptError, match="lifecycle"):
            again.load_state_dict({**state, "roles": {**state["roles"], **spoiled}})
    assert again.state_dict() == system.lifecycle.state_dict()


# ---- measured ----------------------------------------------------------------------------------------------


def test_merging_and_pruning_are_measured_and_every_bit_comes_back(tmp_path: Path) -> None:
    model, system = trained(equal_experts, windows=8, output_dir=tmp_path)
    before, held_out = digest(model), [words(seed, models.VOCAB) for seed in (100, 101)]
    (record,) = measure_proposals(system, model, held_out)
    assert digest(model) == before
    merge, one, other = record["edits"]
    survivor, gone = merge["experts"]
    assert (merge["edit"], one["experts"], other["experts"]) == ("merge", [gone], [survivor])
    plan = keeping(model, [list(range(7)), list(range(7))])
    alone = measure(model, plan, held_out, controls=0, worst=False, leave_one_out=[(0, gone), (0, survivor)])
    for edit in (one, other):
        assert edit["delta_loss"] == pytest.approx(alone.leave_one_out[0, edit["experts"][0]].delta_loss, rel=1e-5)
    assert merge["delta_loss"] == pytest.approx(one["delta_loss"], rel=1e-3), "the mean of equal weights is the same"
    assert record["loss"] == pytest.approx(alone.loss) and record["tokens"] == alone.tokens
    assert one["delta_loss_error"] > 0.0 and other["delta_loss"] != one["delta_loss"]
    system.close_telemetry()
    (written,), _ = read_jsonl(tmp_path / "chronomoe" / "lifecycle_effects.jsonl")
    assert {name: written[name] for name in record} == record


def test_a_split_of_two_kinds_of_tokens_halves_the_load_and_leaves_the_loss(tmp_path: Path) -> None:
    """One expert a token: both copies compute what the one expert did, and each gets one of the two words."""
    model, system = trained(two_kinds_of_tokens, vocabulary=2, windows=6, top_k=1, output_dir=tmp_path)
    was, batches = digest(model), [words(seed, 2) for seed in (100, 101)]
    records = measure_proposals(system, model, batches)
    assert digest(model) == was
    record = next(each for each in records if each["proposal"] == "split" and each["layer_id"] == 0)
    edits = {edit["edit"]: edit for edit in record["edits"]}
    assert all(edit["measured"] for edit in edits.values()) and list(edits) == ["split", "spawn", "prune", "balance"]
    split = edits["split"]
    word = float((batches[1]["input_ids"][batches[1]["attention_mask"].bool()] == 0).double().mean())
    assert split["donor"] == 3 and split["fair_shares_before"] == pytest.approx([8.0, 0.0])
    assert sorted(split["fair_shares_after"]) == pytest.approx(sorted([8.0 * word, 8.0 * (1.0 - word)]))
    assert abs(split["delta_loss"]) < 1e-5 and abs(edits["prune"]["delta_loss"]) < 1e-5
    assert edits["balance"]["delta_loss"] != 0.0, "a bias sends the same tokens to experts that never saw them"
    spawn = next(each for each in records if each["proposal"] == "spawn" and each["layer_id"] == 0)
    assert spawn["edits"][0]["donor"] == 3 and spawn["edits"][0]["target"] == spawn["experts"][0]


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_a_merge_is_the_weighted_mean_and_is_given_back(family: str) -> None:
    model = models.tiny_model(family)
    layer = live_layers(model)[0]
    before = digest(model)
    weights = ExpertWeights(layer, "merge", trains=False)
    own = [[slice_of(*each) for each in weights.parts(expert)] for expert in range(8)]
    assert sum(v.numel() for e in own for v in e) == sum(v.numel() for v in layer.experts.parameters())
    want = [0.25 * a + 0.75 * b for a, b in zip(own[1], own[6], strict=True)]
    rest = [value.clone() for value in own[6]]
    with merged(layer, 1, 6, 0.25):
        for value, expected in zip(own[1], want, strict=True):
            torch.testing.assert_close(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(own[6], rest, strict=True))
    assert digest(model) == before
    with pytest.raises(RuntimeError, match="stop"), merged(layer, 1, 6, 0.25):
        raise RuntimeError("stop")
    assert digest(model) == before


def test_the_effect_of_a_merge_is_that_of_a_model_merged_by_hand() -> None:
    model, held_out = models.tiny_model("mixtral"), [words(seed, models.VOCAB) for seed in (1, 2)]
    layer = live_layers(model)[1]
    edit = Edit({1: (6,)}, functools.partial(merged, layer, 1, 6, 0.25))
    loss, tokens, (effect,) = measure_edits(model, layer_specs(model), [edit], held_out)
    by_hand = copy.deepcopy(model)
    for value in by_hand.model.layers[1].mlp.experts.parameters():
        value.data[1] = 0.25 * value.data[1] + 0.75 * value.data[6]
    losses = []
    for one, dropped in ((model, ()), (by_hand, (6,))):
        one.eval()
        with torch.no_grad(), mask_experts(live_layers(one), [(), dropped]):
            losses.append(sum(float(one(**batch).loss) for batch in held_out) / len(held_out))
    assert loss == pytest.approx(losses[0], rel=1e-5) and tokens == sum(
        int(b["labels"][:, 1:].numel()) for b in held_out
    )
    assert effect.delta_loss == pytest.approx(losses[1] - losses[0], rel=1e-3) and abs(effect.delta_loss) > 1e-3


def test_weights_that_cannot_be_told_apart_are_named_and_the_rest_is_measured() -> None:
    model, system = trained(equal_experts, windows=8)
    experts = model.model.layers[0].mlp.experts
    experts.scale = torch.nn.Parameter(torch.ones(3, 2))  # belongs to no single expert
    (record,) = measure_proposals(system, model, [words(100, models.VOCAB)])
    assert [edit["measured"] for edit in record["edits"]] == [False, True, True]
    assert "cannot be told apart" in record["edits"][0]["reason"]
    del experts.scale
    with pytest.raises(LifecycleError, match="offloaded"):
        ExpertWeights(live_layers(models.tiny_model("mixtral").to("meta"))[0], "merge", trains=False)
