"""Trainers that make their model anew: the one that trains is the one that is watched, governed, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from support.jobs import whole_weights
from support.laws import full_balance
from support.run_records import assert_same
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig, ChronoRouter
from chronomoe_hf.checkpoint.state_file import read_state
from chronomoe_hf.errors import AlreadyWrappedError
from chronomoe_hf.telemetry import read_jsonl
from chronomoe_hf.wrapping.owner import find_system

STEPS = 4


def arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(output_dir), **{**settings, **overrides})


def init() -> Any:
    return tiny.tiny_model("mixtral")


def trainer_for(output_dir: Path, model_init: Any = init, **overrides: Any) -> Trainer:
    callbacks = overrides.pop("callbacks", None)
    return Trainer(
        model_init=model_init,
        args=arguments(output_dir, **overrides),
        train_dataset=training_job.rows(64),
        eval_dataset=training_job.rows(8, seed=1),
        callbacks=callbacks,
    )


def tokens(output_dir: Path, run_id: str) -> int:
    records, _ = read_jsonl(output_dir / "chronomoe" / "routing_events.jsonl")
    return sum(r["tokens"] for r in records if r["run_id"] == run_id and r["mode"] == "TRAIN" and r["layer_id"] == 0)


@pytest.mark.parametrize("way", ["attach", "callback", "wrapped by the user"])
def test_the_model_that_trains_is_governed_saved_and_resumed(way: str, tmp_path: Path) -> None:
    config = full_balance(interval=1)
    made = []

    def make() -> Any:
        made.append(chronomoe_hf.wrap(init(), config) if way == "wrapped by the user" else init())
        return made[-1]

    def build(output_dir: Path) -> Trainer:
        callbacks = [ChronoCallback(config)] if way == "callback" else None
        trainer = trainer_for(output_dir, make, callbacks=callbacks)
        if way != "callback":
            chronomoe_hf.attach(trainer, config)
        return trainer

    trainer = build(tmp_path / "a")
    trainer.train()
    system = chronomoe_hf.system_of(trainer.model)
    assert trainer.model is made[1], "bad test setup: train() made no new model"
    assert system.global_step == STEPS and system.step_state.beta_LE.abs().max() > 0.05
    assert [layer.tokens > 0 for layer in system.last_snapshot.layers] == [True, True]
    fed = {r["run_id"] for r in read_jsonl(tmp_path / "a" / "chronomoe" / "routing_events.jsonl")[0]}
    assert fed == {system.run_id} and tokens(tmp_path / "a", system.run_id) > 0
    released = find_system(made[0]) is None
    assert released is (way != "wrapped by the user"), "what the callback wrapped is unwrapped"
    # The fingerprint is that of the weights beside it.
    saved = type(trainer.model).from_pretrained(tmp_path / "a" / "checkpoint-4")
    _, meta = read_state(tmp_path / "a" / "checkpoint-4")
    assert meta["step"] == STEPS
    again = chronomoe_hf.wrap(saved, config)
    chronomoe_hf.system_of(again).save(tmp_path / "again")
    assert read_state(tmp_path / "again")[1]["fingerprint"] == meta["fingerprint"]

    resumed = build(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(whole_weights(resumed.model), whole_weights(trainer.model))
    other = chronomoe_hf.system_of(resumed.model)
    assert torch.equal(other.step_state.beta_LE, system.step_state.beta_LE)
    assert other.run_id == system.run_id


def test_wrapping_the_new_model_changes_no_number(tmp_path: Path) -> None:
    losses = []
    for observed in (False, True):
        trainer = trainer_for(tmp_path / str(observed), save_strategy="no")
        if observed:
            chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_another_model_put_into_the_trainer_after_attach_is_followed(tmp_path: Path) -> None:
    trainer = Trainer(init(), arguments(tmp_path, save_strategy="no"), train_dataset=training_job.rows(64))
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
    first, second = trainer.model, tiny.tiny_model("mixtral", seed=1)
    trainer.model = trainer.model_wrapped = second
    trainer.train()
    assert callback.system is chronomoe_hf.system_of(second) and callback.system.global_step == STEPS
    assert find_system(first) is None
    assert not any(alert.kind == "NOT_OBSERVED" for alert in callback.system.last_snapshot.active_alerts)


def test_a_new_model_with_other_settings_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="no")
    chronomoe_hf.attach(trainer, ChronoConfig.observe())
    trainer.model_init = lambda: chronomoe_hf.wrap(init(), full_balance())
    with pytest.raises(AlreadyWrappedError, match="unwrap"):
        trainer.train()


def test_hyperparameter_search(tmp_path: Path) -> None:
    """A real search: every trial's model is governed by itself, and the best trial can be trained again and resumed."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made: list[Any] = []

    def make() -> Any:
        assert not any(isinstance(m, ChronoRouter) for model in made for m in model.modules()), "still held"
        made.append(init())
        return made[-1]

    trainer = trainer_for(tmp_path, make, eval_strategy="steps", eval_steps=2, save_steps=4)
    callback = chronomoe_hf.attach(trainer, full_balance(interval=1))
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2)},
        backend="optuna",
        n_trials=3,
        direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert len(made) == 4 and callback.system is not None and callback.system.model is made[-1]
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    runs = list(dict.fromkeys(record["run_id"] for record in records))
    assert [[r["step"] for r in records if r["run_id"] == run] for run in runs] == [[1, 2, 3, 4]] * 3
    states = [read_state(tmp_path / f"run-{number}" / "checkpoint-4") for number in range(3)]
    assert [meta["run_id"] for _, meta in states] == runs
    betas = [tensors["beta_LE"] for tensors, _ in states]
    assert all(beta.abs().max() > 0.05 for beta in betas) and not torch.equal(betas[0], betas[1])
    for number, (_, meta) in enumerate(states):
        plain = type(made[-1]).from_pretrained(tmp_path / f"run-{number}" / "checkpoint-4")
        system = chronomoe_hf.system_of(chronomoe_hf.wrap(plain, full_balance(interval=1)))
        system.save(tmp_path / "again")
        assert read_state(tmp_path / "again")[1]["fingerprint"] == meta["fingerprint"], number

    # The best trial once more: bit for bit, and resumed from its middle.
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.args.output_dir = str(tmp_path / "best")
    trainer.args.save_steps = trainer.state.save_steps = 2
    trainer.train()
    beta = callback.system.step_state.beta_LE.clone()
    assert torch.equal(beta, betas[int(best.run_id)])
    weights = copy.deepcopy(whole_weights(trainer.model))
    trainer.train(resume_from_checkpoint=str(tmp_path / "best" / "checkpoint-2"))
    assert_same(whole_weights(trainer.model), weights)
    assert torch.equal(callback.system.step_state.beta_LE, beta)


def test_a_pruned_trial_closes_its_files(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Always(optuna.pruners.BasePruner):  # type: ignore[misc,name-defined]
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 0

    trainer = trainer_for(tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no")
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2)},
        backend="optuna",
        n_trials=2,
        direction="minimize",
        pruner=Always(),
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    runs = list(dict.fromkeys(record["run_id"] for record in records))
    assert [[r["step"] for r in records if r["run_id"] == run] for run in runs] == [[2, 3], [2, 4]]
    assert callback.system is not None and callback.system.records.writer is None
