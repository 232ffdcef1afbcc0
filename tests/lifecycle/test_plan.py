"""plan_prune: invariants over made-up evidence, what it refuses, and the JSON of a plan."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import evidence, spec

from chronomoe_hf.errors import EvidenceError, PlanError
from chronomoe_hf.lifecycle import (
    RANKS,
    Evidence,
    LayerEvidence,
    PlannedLayer,
    PruneDecision,
    PrunePlan,
    plan_prune,
    random_plan,
    worst_plan,
)
from chronomoe_hf.lifecycle.pruning.plan_prune import find_super_experts, shrink


def layer(scores: list[float], counts: list[int] | None = None, layer_id: int = 0, **spec_fields: Any) -> LayerEvidence:
    made = spec(layer_id, num_experts=len(scores), **spec_fields)
    counts = [10] * len(scores) if counts is None else counts
    return LayerEvidence(spec=made, counts=tuple(counts), contribution=tuple(scores))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Evidence, dict[str, Any]]:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    num = groups * draw(st.integers(3, 6))
    kept_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(3, 2 * kept_groups)))
    layers = []
    for layer_id in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(0, 50), min_size=num, max_size=num))
        scores = [0.0 if count == 0 else draw(st.floats(0.0, 100.0)) for count in counts]
        layers.append(layer(scores, counts, layer_id, top_k=top_k, groups=groups, kept=kept_groups))
    settings_ = {
        "keep": draw(st.one_of(st.floats(0.05, 0.95), st.integers(1, num))),
        "rank": draw(st.sampled_from(["contribution", "frequency", "random"])),
        "protect": draw(st.lists(st.tuples(st.integers(0, len(layers) - 1), st.integers(0, num - 1)), max_size=2)),
        "multiple_of": draw(st.sampled_from([1, 1, 2, 4])),
    }
    return evidence(layers), settings_


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_plan_is_uniform_grouped_large_enough_and_ordered(case: tuple[Evidence, dict[str, Any]]) -> None:
    known, chosen = case
    try:
        plan = plan_prune(known, **chosen)
    except PlanError:
        return
    num = known.layers[0].spec.num_experts
    asked = chosen["keep"] if isinstance(chosen["keep"], int) else chosen["keep"] * num
    for planned, seen in zip(plan.layers, known.layers, strict=True):
        made = seen.spec
        assert len(planned.kept) == plan.num_kept < num
        assert plan.num_kept >= max(made.top_k, asked - 1e-6)
        assert plan.num_kept % chosen["multiple_of"] == 0
        per_group = [sum(e // made.group_size == g for e in planned.kept) for g in range(made.num_groups)]
        assert len(set(per_group)) == 1
        named = {expert for layer_id, expert in chosen["protect"] if layer_id == made.layer_id}
        assert named <= set(planned.kept)
        assert sorted(planned.kept + planned.dropped) == list(range(num))
        if chosen["rank"] == "random":
            continue
        for out in planned.dropped:  # in its group, nobody who could go and stayed is worse
            for stays in set(planned.kept) - named:
                if stays // made.group_size == out // made.group_size:
                    score = planned.scores
                    assert (seen.counts[stays] > 0, score[stays]) >= (seen.counts[out] > 0, score[out])
    for control in (random_plan(plan, 3), worst_plan(plan)):
        assert [len(each.kept) for each in control.layers] == [len(each.kept) for each in plan.layers]
        assert [each.protected for each in control.layers] == [each.protected for each in plan.layers]
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_the_lowest_contribution_goes_and_never_routed_experts_before_it() -> None:
    known = evidence([layer([5.0, 1.0, 9.0, 0.0, 2.0, 7.0, 8.0, 3.0], [9, 9, 9, 0, 9, 9, 9, 9])])
    assert plan_prune(known, keep=0.5).layers[0].dropped == (1, 3, 4, 7)
    assert plan_prune(known, keep=7).layers[0].dropped == (3,)
    assert worst_plan(plan_prune(known, keep=7)).layers[0].dropped == (2,)


def test_scores_of_ones_own_are_shrunk_by_their_errors() -> None:
    """A useful expert whose noise came out negative does not go before one that does nothing at all."""
    known = evidence([layer([1.0] * 4)])
    scores, errors = [[-0.02, 0.0, 0.3, 0.2]], [[0.2, 0.0, 0.01, 0.01]]
    assert plan_prune(known, keep=3, rank=scores).layers[0].dropped == (0,)
    assert shrink(-0.02, 0.2) == pytest.approx(-0.02 * 0.0004 / (0.0004 + 0.04))
    assert shrink(0.3, 0.01) == pytest.approx(0.3, rel=2e-3)
    plan = plan_prune(known, keep=3, rank=scores, errors=errors)
    assert plan.layers[0].scores[0] == pytest.approx(shrink(-0.02, 0.2))
    idle = evidence([layer([1.0] * 4, [5, 0, 5, 5])])
    assert plan_prune(idle, keep=3, rank=scores, errors=errors).layers[0].dropped == (1,)


def test_candidates_go_before_others_but_a_withdrawn_case_does_not_count() -> None:
    known = evidence([layer([5.0, 1.0, 9.0, 4.0])])

    def case(expert: int, state: Any) -> PruneDecision:
        return PruneDecision(
            expert_id=f"L0_E{expert}", reason="low_coherence", phi_slow=0.1, total_tokens_seen=9, step=1, state=state
        )

    decisions = [case(2, "candidate"), case(0, "candidate"), case(0, "withdrawn")]
    assert plan_prune(known, keep=3, candidates=decisions).layers[0].dropped == (2,)
    assert plan_prune(known, keep=3, candidates={0: [3]}).layers[0].dropped == (3,)
    assert plan_prune(known, keep=3, candidates=[(0, 3)], protect=[(0, 3)]).layers[0].dropped == (1,)


def test_super_experts_stay_and_without_norms_the_plan_says_so() -> None:
    norms = [1.0, 500.0, 1.1, 0.9]
    known = evidence([layer([5.0, 0.1, 9.0, 4.0]), layer([5.0, 0.1, 9.0, 4.0], layer_id=1)])
    assert "max_norm" in plan_prune(known, keep=2).notes[0]
    with_norms = known.with_vectors(max_norm=[norms, [1.0, 1.0, 1.2, 0.9]])
    assert find_super_experts(with_norms) == [(0, 1)]
    plan = plan_prune(with_norms, keep=2)
    assert plan.layers[0].kept == (1, 2) and plan.layers[0].protected == (1,) and plan.notes == ()
    assert plan_prune(with_norms, keep=2, super_experts=False).layers[0].kept == (0, 2)
    level = known.with_vectors(max_norm=[[1.0, 1.1, 1.2, 0.9], [1.0, 1.0, 1.3, 0.9]])
    assert find_super_experts(level) == []  # the quantile alone would name the largest of any model


@pytest.mark.parametrize(
    ("settings_", "error", "words"),
    [
        ({"keep": 1.0}, PlanError, "fraction in"),
        ({"keep": 0}, PlanError, "keep at least"),
        ({"keep": 1}, PlanError, "keep at least 2"),
        ({"keep": 8}, PlanError, "leaves all 8"),
        ({"keep": 0.97}, PlanError, "leaves all 8"),
        ({"keep": 7, "multiple_of": 8}, PlanError, "cannot be cut in steps of 8"),
        ({"keep": 4, "multiple_of": 0}, PlanError, "multiple_of"),
        ({"keep": math.nan}, PlanError, "fraction"),
        ({"keep": True}, PlanError, "fraction"),
        ({"keep": 4, "rank": "luck"}, PlanError, "must be one of contribution"),
        ({"keep": 4, "rank": "fisher"}, EvidenceError, "FisherSums"),
        ({"keep": 4, "rank": "reap"}, EvidenceError, "saliency"),
        ({"keep": 4, "rank": [[1.0]]}, PlanError, "one score per expert"),
        ({"keep": 2, "protect": {0: [1, 2, 3]}}, PlanError, "protect fewer"),
        ({"keep": 4, "protect": [(0, 8)]}, PlanError, "names expert 8"),
        ({"keep": 4, "candidates": {3: [1]}}, PlanError, "layer 3"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_way_out(
    settings_: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        plan_prune(evidence([layer([float(e) for e in range(8)])]), **settings_)


def test_frequency_is_refused_after_balancing_and_only_there() -> None:
    layers = [layer([3.0, 1.0, 2.0, 4.0], [1, 9, 9, 9])]
    assert plan_prune(evidence(layers, beta_law="none"), keep=3, rank="frequency").layers[0].dropped == (0,)
    with pytest.raises(EvidenceError, match="after balancing"):
        plan_prune(evidence(layers, beta_law="balance"), keep=3, rank="frequency")
    assert plan_prune(evidence(layers, beta_law="balance"), keep=3).layers[0].dropped == (1,)


def test_groups_need_two_survivors_each_and_enough_for_a_token() -> None:
    known = evidence([layer([float(e) for e in range(16)], top_k=4, groups=4, kept=1)])
    with pytest.raises(PlanError, match="no expert can go"):
        plan_prune(known, keep=0.5)  # one group must hold the four experts of a token
    wide = evidence([layer([float(e) for e in range(16)], top_k=2, groups=4, kept=2)])
    assert plan_prune(wide, keep=0.5).layers[0].kept == (2, 3, 6, 7, 10, 11, 14, 15)
    with pytest.raises(PlanError, match="keep at least 8"):
        plan_prune(wide, keep=4)


@pytest.fixture
def plan() -> PrunePlan:
    return plan_prune(evidence([layer([5.0, 1.0, 9.0, 4.0]), layer([5.0, 1.0, 9.0, 4.0], layer_id=1)]), keep=2)


def test_the_json_of_a_plan_is_what_a_reader_needs(plan: PrunePlan, tmp_path: Path) -> None:
    data = json.loads(plan.save(tmp_path / "plan.json").read_text())
    assert data["num_kept"] == 2 and data["layers"][1]["kept"] == [0, 2] and data["layers"][1]["dropped"] == [1, 3]
    assert data["layers"][0]["scores"] == [5.0, 1.0, 9.0, 4.0] and data["layers"][0]["router_class"]
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    assert plan.layers[0].new_ids == {0: 0, 2: 1}
    del data["num_kept"], data["notes"], data["layers"][0]["dropped"]  # what another tool need not write
    assert PrunePlan.from_dict(data).layers == plan.layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="x"), "expected format"),
        (lambda d: d.update(schema=2), "schema"),
        (lambda d: d.update(extra=1), "unknown extra"),
        (lambda d: d.pop("source"), "lacks source"),
        (lambda d: d.update(layers=[]), "layers"),
        (lambda d: d.update(num_kept=3), "num_kept"),
        (lambda d: d["layers"][0].update(kept=[0, 0]), "ascending expert ids"),
        (lambda d: d["layers"][0].update(kept=[2, 0]), "ascending expert ids"),
        (lambda d: d["layers"][0].update(kept=[0, 4]), "0..3"),
        (lambda d: d["layers"][0].update(kept=[1], dropped=[0, 2, 3]), "needs 2"),
        (lambda d: d["layers"][0].update(kept=[0, 1, 2], dropped=[3]), "one number for all layers"),
        (lambda d: d["layers"][0].update(dropped=[1]), "dropped"),
        (lambda d: d["layers"][0].update(scores=[1.0]), "4 values"),
        (lambda d: d["layers"][0].update(protected=[3]), "not kept"),
        (lambda d: d["layers"][0].update(num_experts="4"), "type int"),
        (lambda d: d["layers"][0].update(layer_id=5), "0, 1, 2"),
    ],
)
def test_a_plan_file_that_is_wrong_is_refused(plan: PrunePlan, change: Any, words: str) -> None:
    data = json.loads(plan.to_json())
    change(data)
    with pytest.raises(PlanError, match=words):
        PrunePlan.from_dict(data)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan can be read"):
        PrunePlan.load(tmp_path / "none.json")
    for text in ("", "{", '{"a": NaN}', "[1, 2]"):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(PlanError):
            PrunePlan.load(tmp_path / "broken.json")


def test_layers_of_unequal_groups_are_refused() -> None:
    made = spec(num_experts=8, top_k=2, groups=2, kept=1)
    with pytest.raises(PlanError, match="same number must stay in each"):
        PlannedLayer(spec=made, kept=(0, 1, 2, 4), scores=(0.0,) * 8)
    with pytest.raises(PlanError, match="equal groups"):
        dataclasses.replace(made, num_groups=3)


def test_every_rank_name_is_known() -> None:
    vectors = {name: [[1.0, 2.0, 3.0, 4.0]] for name in ("saliency", "mean_norm", "fisher", "phi_slow")}
    known = evidence([layer([4.0, 3.0, 2.0, 1.0], [4, 4, 4, 5])]).with_vectors(**vectors)
    plans = {rank: plan_prune(known, keep=3, rank=rank, seed=1).layers[0].dropped for rank in RANKS}
    assert plans["contribution"] == (3,) and plans["reap"] == plans["fisher"] == plans["phi"] == (0,)
    assert len(plans["random"]) == 1 and plans["frequency"] == (0,)
