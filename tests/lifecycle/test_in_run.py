"""The dry run inside a Trainer: measured at every evaluation, and no bit of the training moves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs, models
from support.made_runs import run_with_roles, train_into
from support.plans import digest
from support.split_proposals import IDLE, LAYER, train_with_an_idle_expert
from transformers import Trainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig, PruneDecision
from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.lifecycle import Evidence, measure, plan_prune
from chronomoe_hf.lifecycle.live.model import first_batches, untouched_randomness
from chronomoe_hf.telemetry import read_jsonl


def train(output_dir: Path, **lifecycle: Any) -> tuple[Trainer, Any]:
    trainer = Trainer(
        models.tiny_model("mixtral", attention_dropout=0.1),
        jobs.evaluated_arguments(
            output_dir,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
        ),
        train_dataset=jobs.rows(64),
        eval_dataset=jobs.rows(24, seed=1),
    )
    system = chronomoe_hf.attach(trainer, ChronoConfig(interval=2, lifecycle=LifecycleConfig(**lifecycle))).system
    trainer.train()
    return trainer, system


def test_an_evaluation_measures_the_plan_of_the_moment_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    measured, _ = train(tmp_path / "a", measure=True, keep=0.5, measure_batches=3, measure_controls=2)
    plain, _ = train(tmp_path / "b")
    assert digest(measured.model) == digest(plain.model)
    histories = [
        [
            (entry["step"], entry[name])
            for entry in t.state.log_history
            for name in ("loss", "eval_loss")
            if name in entry
        ]
        for t in (measured, plain)
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 9
    records, broken = read_jsonl(tmp_path / "a" / "chronomoe" / "lifecycle_effects.jsonl")
    assert broken == 0 and [record["step"] for record in records] == [2, 4, 6]
    assert all(record["dry_run"] and len(record["random"]) == 2 for record in records)
    assert not (tmp_path / "b" / "chronomoe" / "lifecycle_effects.jsonl").exists()
    lines = [record.message for record in caplog.records if record.message.startswith("[DRY-RUN] step 6")]
    assert any("4 experts a layer" in line and "random" in line for line in lines)
    # the last one again, by hand: same evidence, same three batches
    known = Evidence.from_directory(tmp_path / "a", windows=1, mode="TRAIN")
    assert [list(layer.kept) for layer in plan_prune(known, keep=0.5).layers] == records[-1]["kept"]
    held_out = first_batches(measured.get_eval_dataloader(), 3)
    again = measure(measured.model, plan_prune(known, keep=0.5), held_out, controls=2)
    assert again.plan.delta_loss == pytest.approx(records[-1]["plan"]["delta_loss"], rel=1e-5)
    assert again.tokens == records[-1]["tokens"]


def test_roles_and_their_measured_proposals_change_nothing(tmp_path: Path) -> None:
    trainer = run_with_roles(tmp_path / "on", lr_scheduler_type="constant")
    plain = train_into(
        tmp_path / "off",
        steps=8,
        interval=2,
        arguments={"per_device_train_batch_size": 16, "lr_scheduler_type": "constant"},
        examples=128,
    )
    assert digest(trainer.model) == digest(plain.model)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, plain)]
    assert losses[0] == losses[1] and losses[0]
    records, _ = read_jsonl(tmp_path / "on" / "chronomoe" / "lifecycle_effects.jsonl")
    assert {"plan", "edits"} == {name for record in records for name in ("plan", "edits") if name in record}


@pytest.mark.parametrize("k", [1, 2])
def test_a_spawn_is_measured_while_training_and_no_bit_of_it_moves(k: int, tmp_path: Path) -> None:
    """Dropout on: a random number drawn for a plan would show."""
    trainers = [train_with_an_idle_expert(tmp_path / str(measured), k, measured=measured) for measured in (True, False)]
    assert digest(trainers[0].model) == digest(trainers[1].model)
    kept = ("loss", "grad_norm", "eval_loss")
    losses = [[entry[n] for entry in t.state.log_history for n in kept if n in entry] for t in trainers]
    assert losses[0] == losses[1] and len(losses[0]) == 6 + 6 + 3
    records, _ = read_jsonl(tmp_path / "True" / "chronomoe" / "lifecycle_effects.jsonl")
    found = [record for record in records if record.get("proposal") == "spawn" and record["layer_id"] == LAYER]
    assert [(record["step"], record["experts"][0]) for record in found] == [(2, IDLE), (4, IDLE), (6, IDLE)]
    spawn, prune, balance = found[-1]["edits"]
    assert found[-1]["state"] == "confirmed" and spawn["measured"] and prune["measured"] and balance["measured"]
    assert spawn["target"] == IDLE and spawn["fair_shares_before"][1] < 0.1 < spawn["fair_shares_after"][1]
    assert spawn["delta_loss"] != 0.0 and found[-1]["planned_on_tokens"] > 0


def test_a_plan_that_cannot_be_made_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = train(tmp_path, measure=True, keep=0.1)
    assert trainer.state.global_step == 6
    assert sum("no plan was measured" in record.message for record in caplog.records) == 3
    for keep in (0.0, 1.0):
        with pytest.raises(ConfigError, match="keep"):
            LifecycleConfig(keep=keep)


def test_leaving_a_loader_early_leaves_no_trace_of_it() -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    rows = [{"input_ids": torch.tensor([index])} for index in range(10)]
    loader = accelerator.prepare(DataLoader(rows, batch_size=2, shuffle=True))  # type: ignore[arg-type]
    state, open_before = torch.get_rng_state(), accelerator.gradient_state.dataloader_references
    with untouched_randomness():
        batches = first_batches(loader, 2)
    assert len(batches) == 2 and torch.equal(torch.get_rng_state(), state)
    assert accelerator.gradient_state.dataloader_references == open_before
    with untouched_randomness():
        assert len(first_batches(loader, 99)) == 5
    assert accelerator.gradient_state.dataloader_references == open_before


def test_confirmed_cases_are_measured_alone() -> None:
    from chronomoe_hf.in_run.dry_run import measure_dry_run

    model = chronomoe_hf.wrap(
        models.tiny_model("mixtral"), ChronoConfig(interval=1, lifecycle=LifecycleConfig(measure=True, keep=0.75))
    )
    system = chronomoe_hf.system_of(model)
    assert measure_dry_run(system, model, [models.tiny_batch("mixtral")]) is None  # nothing seen yet
    model(**models.tiny_batch("mixtral")).loss.backward()
    system.step(1)
    for expert, state in ((3, "confirmed"), (5, "candidate"), (6, "confirmed"), (6, "withdrawn")):
        system.prune_decisions.append(
            PruneDecision(
                expert_id=f"L1_E{expert}",
                reason="low_coherence",
                phi_slow=0.1,
                total_tokens_seen=9,
                step=1,
                state=state,  # type: ignore[arg-type]
            )
        )
    effect = measure_dry_run(system, model, [models.tiny_batch("mixtral", seed=5)])
    assert effect is not None and list(effect.leave_one_out) == [(1, 3)]
