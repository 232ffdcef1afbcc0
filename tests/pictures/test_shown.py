"""Objects that a person looks at: one line, a card, a table whose numbers are theirs, a picture."""

from __future__ import annotations

from typing import Any

import pytest
from support import models as tiny
from support import texts

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle, system_of

KINDS = ("snapshot", "profile", "plan", "effect", "trace", "system")


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    model = tiny.tiny_model("mixtral", vocab_size=texts.VOCAB)
    docs = {"a": list(texts.documents(4)), "b": list(texts.documents(8))[4:]}
    profile = chronomoe_hf.profile(model, texts.tokenizer(), docs, model_name="<tiny>")
    trace = chronomoe_hf.trace(model, texts.tokenizer(), "some text to look at", model_name="<tiny>")
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    model.train()
    for step in range(1, 4):
        batch = {**tiny.tiny_batch("mixtral", seed=step)}
        model(**batch).loss.backward()
        system_of(model).step(step)
    system = system_of(model)
    plan = lifecycle.plan_prune(system.evidence(), keep=6)
    effect = lifecycle.measure(model, plan, [tiny.tiny_batch("mixtral", seed=9)], controls=2)
    found = (system.snapshot(), profile, plan, effect, trace, system)
    return dict(zip(KINDS, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_a_card_and_a_picture(kind: str, objects: dict[str, Any]) -> None:
    shown = objects[kind]
    assert len(repr(shown)) < 160 and "\n" not in repr(shown) and repr(shown).startswith("<")
    card = shown._repr_html_()
    assert card.startswith("<div") and "<svg" in card and "<tiny>" not in card
    assert len(card) < 60_000
    assert shown.figure().svg().startswith("<svg")


def test_the_table_of_a_snapshot_and_of_the_system(objects: dict[str, Any]) -> None:
    snapshot = objects["snapshot"]
    table = snapshot.to_pandas()
    assert len(table) == sum(layer.n_experts for layer in snapshot.layers)
    for layer in snapshot.layers:
        rows = table[table.layer == layer.layer_id]
        assert rows.assignments.tolist() == layer.expert_token_counts
        assert rows.share.tolist() == pytest.approx(layer.shares)
        assert rows.phi_slow.tolist() == pytest.approx(layer.phi_slow, nan_ok=True)
    assert len(objects["system"].to_pandas()) == len(table)


def test_the_table_of_a_profile(objects: dict[str, Any]) -> None:
    table = objects["profile"].to_pandas()
    for name, part in objects["profile"].domains.items():
        for at, counts in enumerate(part.counts):
            rows = table[(table.domain == name) & (table.layer == at)]
            assert rows.assignments.tolist() == counts and rows.contribution.tolist() == part.contribution[at]
            assert sum(part.contribution[at]) > 0


def test_the_tables_of_a_plan_and_its_effect(objects: dict[str, Any]) -> None:
    plan, effect = objects["plan"], objects["effect"]
    table = plan.to_pandas()
    for at, layer in enumerate(plan.layers):
        rows = table[table.layer == at]
        assert tuple(rows.expert[rows.kept]) == layer.kept and tuple(rows.expert[~rows.kept]) == layer.dropped
    rows = effect.to_pandas()
    assert rows.what.tolist() == ["plan", "random 1", "random 2", "worst"]
    assert rows.delta_loss[0] == effect.plan.delta_loss and rows.delta_loss[3] == effect.worst.delta_loss
    assert str(effect).startswith(effect.rank), "str is still the line for a terminal"


def test_what_was_equal_is_equal(objects: dict[str, Any]) -> None:
    import dataclasses

    assert dataclasses.replace(objects["plan"]) == objects["plan"]
    assert dataclasses.replace(objects["effect"]) == objects["effect"]
