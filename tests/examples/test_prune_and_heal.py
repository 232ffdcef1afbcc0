"""The job from a run to a smaller checkpoint, end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import _text_job as job
import prune_and_heal
import pytest
import torch

from chronomoe_hf import lifecycle

SMALL = job.ModelSize(layers=2, hidden=32, intermediate=32, heads=2, experts=8, top_k=2, vocab=400, length=32)


def test_routers_alone_learn_from_the_full_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other weight moves, and the model comes closer to the full one than it was after the cut."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    training = job.Training(steps=30, learning_rate=3e-3)
    base = job.pretrain_base("mixtral", SMALL, training)
    text = job.load_domain("code", AutoTokenizer.from_pretrained(base), SMALL, "mixtral")
    text = job.TextDomain(text.train, text.valid.select(range(64)))
    model = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False)
    full = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False)
    evidence = lifecycle.calibrate(model, prune_and_heal.batches(text.train, 32))
    plan = lifecycle.plan_prune(evidence, keep=0.5, rank="random")
    held_out = prune_and_heal.batches(text.valid, 64)
    before = lifecycle.measure(model, plan, held_out, controls=0, worst=False).plan.kl
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options = prune_and_heal.Options(output_dir=tmp_path)
    with lifecycle.masked(model, plan):
        prune_and_heal.train(model, text, options, 40, tmp_path / "heal", teacher=full, plan=plan)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert moved == {f"{layer.spec.name}.weight" for layer in plan.layers}
    with lifecycle.masked(model, plan):
        distance = prune_and_heal.RoutersTowardsTeacher  # the loss that was trained, on text that was not
        found = [
            distance.compute_loss(SimpleNamespace(teacher=full.eval()), model.train(), dict(batch)).item()
            for batch in held_out
        ]
    assert sum(found) / len(found) < 0.9 * before


def test_it_ends_in_a_small_model_that_is_the_healed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = prune_and_heal.Options(
        steps=30, heal_steps=10, pretrain_steps=30, blocks=32, output_dir=tmp_path / "out", size=SMALL
    )
    losses = prune_and_heal.run(options)
    assert losses["small, loaded again"] == pytest.approx(losses["healed"], abs=1e-5)
    assert losses["healed"] < losses["refitted"], "ten steps of training must show"
    assert len(set(losses.values())) >= 4
    config = json.loads((tmp_path / "out" / "small" / "config.json").read_text())
    assert config["num_local_experts"] == 4
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["num_kept"] == 4
    assert "random" in capsys.readouterr().out
