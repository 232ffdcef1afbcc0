"""Runs of one Trainer or one directory: each has its id and logs every window, and a resume finds its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from support.jobs import whole_weights
from support.laws import full_balance
from support.run_records import assert_same
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import read_manifest
from chronomoe_hf.wrapping.owner import find_system

GOVERN = full_balance(interval=1)


def trainer_for(output_dir: Path, callbacks: list[TrainerCallback] | None = None, **overrides: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **overrides,
    }
    return Trainer(
        tiny.tiny_model("mixtral"),
        TrainingArguments(str(output_dir), **settings),
        train_dataset=training_job.rows(64),
        eval_dataset=training_job.rows(8, seed=1),
        callbacks=callbacks,
    )


def lines(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Every record of a kind as it lies in the file."""
    return [json.loads(line) for line in (output_dir / "chronomoe" / f"{kind}.jsonl").read_text().splitlines()]


# ---- resumed from wherever it lies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False], ids=["attach", "callbacks="])
@pytest.mark.parametrize("form", [str, Path, True], ids=["str", "Path", "True"])
def test_a_resume_finds_its_checkpoint(form: Any, attached: bool, tmp_path: Path) -> None:
    """Also from another output_dir, in which a checkpoint of the same step, but of another run, lies."""

    def build(output_dir: Path, steps: int = 6) -> Trainer:
        callbacks = None if attached else [ChronoCallback(GOVERN)]
        trainer = trainer_for(output_dir, callbacks, save_strategy="steps", save_steps=3, max_steps=steps)
        if attached:
            chronomoe_hf.attach(trainer, GOVERN)
        return trainer

    whole = build(tmp_path / "c")
    whole.train()
    resumed_in = tmp_path / ("c" if form is True else "d")
    if form is not True:
        decoy = build(resumed_in, steps=3)
        with torch.no_grad():
            for parameter in decoy.model.parameters():
                parameter.add_(0.01)
        decoy.train()
        assert (resumed_in / "checkpoint-3" / "trainer_state.json").is_file()
    else:
        (tmp_path / "c" / "checkpoint-6").rename(tmp_path / "away")
    again = build(resumed_in)
    again.train(resume_from_checkpoint=True if form is True else form(tmp_path / "c" / "checkpoint-3"))
    assert_same(whole_weights(again.model), whole_weights(whole.model))
    ours, theirs = (chronomoe_hf.system_of(trainer.model) for trainer in (again, whole))
    assert_same(ours.state_dict()["tensors"], theirs.state_dict()["tensors"])
    assert theirs.step_state.beta_LE.abs().max() > 0.05, "bad test setup: beta never acted"
    assert ours.run_id == theirs.run_id
    starts = [(line["event"], line["run_id"] == ours.run_id) for line in lines(resumed_in, "attempts")]
    assert starts == [("start", form is True), ("resume", True)]


def test_a_callback_added_too_late_to_know_what_is_resumed_says_so(tmp_path: Path) -> None:
    first = trainer_for(tmp_path, save_strategy="steps", save_steps=3)
    chronomoe_hf.attach(first, GOVERN)
    first.train()
    late = trainer_for(tmp_path)
    late.add_callback(ChronoCallback(GOVERN))
    with pytest.raises(ConfigError, match=r"added to a Trainer that exists already.*attach\(trainer\)"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    late.train()
    assert chronomoe_hf.system_of(late.model).global_step == 6


# ---- run ids and records ---------------------------------------------------------------------------------------------


def test_two_trainings_of_one_model_are_two_runs(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
    ids = []
    for steps in (6, 3):
        trainer.args.max_steps = steps
        trainer.train()
        assert callback.system is not None
        ids.append(callback.system.run_id)
        manifest = read_manifest(tmp_path)
        assert manifest is not None and manifest["run_id"] == ids[-1]
    assert ids[0] != ids[1]
    found = [(record["run_id"], record["step"], record["attempt"]) for record in lines(tmp_path, "snapshots")]
    assert found == [(ids[0], step, 0) for step in (2, 4, 6)] + [(ids[1], step, 1) for step in (2, 3)]
    attempts = lines(tmp_path, "attempts")
    assert [(a["run_id"], a["event"], a["manifest"]["run_id"]) for a in attempts] == [(i, "start", i) for i in ids]


def test_a_resumed_run_keeps_its_id_and_counts_its_attempts(tmp_path: Path) -> None:
    ids = []
    for resume in (None, True, True):
        trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2, max_steps=2 if resume is None else 6)
        callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
        trainer.train(resume_from_checkpoint=resume)
        assert callback.system is not None
        ids.append((callback.system.run_id, callback.system.attempt))
        if resume:
            for step in (4, 6):
                (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"away-{step}-{len(ids)}")
    assert ids == [(ids[0][0], 0), (ids[0][0], 1), (ids[0][0], 2)]
    manifest = read_manifest(tmp_path)
    assert manifest is not None and (manifest["run_id"], manifest["attempt"]) == ids[0]


class Crowded(Trainer):
    """Runs out of memory in the second step, until the batch is small enough."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2 and self.state.global_step == 1:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_retry_with_a_smaller_batch_is_the_same_run(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Crowded(tiny.tiny_model("mixtral"), arguments, train_dataset=training_job.rows(64))
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
    trainer.train()
    assert callback.system is not None
    starts = lines(tmp_path, "attempts")
    assert {start["run_id"] for start in starts} == {callback.system.run_id}
    assert [start["event"] for start in starts] == ["start"] + ["resume"] * (len(starts) - 1) and len(starts) > 1


class Stop(TrainerCallback):
    """Ctrl-C inside the second micro-batch's forward of step 4."""

    def __init__(self, model: Any) -> None:
        self.step = 0
        model.model.layers[1].mlp.experts.register_forward_pre_hook(self._press)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def _press(self, module: Any, args: Any) -> None:
        if self.step == 4:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_recorded_and_leaves_no_forward_open(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
    trainer.add_callback(Stop(trainer.model))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [record["step"] for record in lines(tmp_path, "snapshots")] == [2, 3]
    system = callback.system
    assert system is not None and system.records.writer is None
    # A block called alone is no training forward, and nothing of the half step is left.
    trainer.model.model.layers[0].mlp(torch.randn(1, 5, 32))
    assert [layer.tokens for layer in system.snapshot().layers] == [0, 0]
    system.step(4)
    assert [layer.tokens for layer in system.snapshot().layers] == [0, 0]


# ---- every window reaches the log ------------------------------------------------------------------------------------


def windows(trainer: Trainer) -> list[int]:
    """Steps of the log entries that carry our scalars."""
    return [entry["step"] for entry in trainer.state.log_history if "moe/neff_mean" in entry]


@pytest.mark.parametrize(
    ("attached", "interval", "steps", "logging"),
    [
        pytest.param(True, 2, 6, {}, id="shorter than logging_steps"),
        pytest.param(True, 3, 7, {"logging_steps": 2}, id="max_steps not divided"),
        pytest.param(False, 3, 7, {"logging_steps": 2}, id="max_steps not divided, callbacks="),
        pytest.param(False, 1, 4, {"logging_steps": 2}, id="several windows an entry, callbacks="),
        pytest.param(True, 100, 5, {"logging_steps": 2}, id="shorter than a window"),
        pytest.param(True, 2, 5, {"logging_strategy": "no"}, id="no logging"),
        pytest.param(True, 2, 5, {"logging_strategy": "epoch"}, id="by epoch"),
        pytest.param(True, 1, 3, {"logging_steps": 10, "logging_first_step": True}, id="first step"),
    ],
)
def test_every_window_is_in_the_history_at_its_own_step(
    attached: bool, interval: int, steps: int, logging: dict[str, Any], tmp_path: Path
) -> None:
    config = ChronoConfig.observe(interval=interval)
    trainer = trainer_for(
        tmp_path, None if attached else [ChronoCallback(config)], max_steps=steps, num_train_epochs=1, **logging
    )
    if attached:
        chronomoe_hf.attach(trainer, config)
    output = trainer.train()
    expected = [step for step in range(1, steps + 1) if step % interval == 0 or step == steps]
    assert windows(trainer) == expected == [record["step"] for record in lines(tmp_path, "snapshots")]
    plain = trainer_for(tmp_path / "plain", max_steps=steps, **logging)
    plain.train()

    def losses(trainer: Trainer) -> list[tuple[int, float]]:
        return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    assert losses(trainer) == losses(plain), "Trainer's own entries are all there, at their steps"
    if logging.get("logging_strategy") != "epoch":  # known only once the epoch ends, after the window was logged
        merged = {entry["step"] for entry in trainer.state.log_history if {"moe/neff_mean", "loss"} <= entry.keys()}
        assert merged == {step for step, _ in losses(trainer)} & set(expected), "one entry where Trainer logs"
    assert "train_loss" in output.metrics


def test_the_last_window_is_logged_after_early_stopping(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)],
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=3))
    trainer.train()
    assert trainer.state.global_step == 4, "bad test setup"
    assert windows(trainer) == [3, 4]


def test_trackers_receive_every_window_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = trainer_for(tmp_path, max_steps=5, report_to=["tensorboard"])
    chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2))
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events.out*")).parent))
    events.Reload()
    assert [point.step for point in events.Scalars("train/moe/neff_min")] == [2, 4, 5]


def test_no_scalars_on_request(tmp_path: Path) -> None:
    from chronomoe_hf.config import TelemetryConfig

    trainer = trainer_for(tmp_path)
    chronomoe_hf.attach(trainer, ChronoConfig(interval=2, telemetry=TelemetryConfig(scalars=False)))
    trainer.train()
    assert windows(trainer) == [] and find_system(trainer.model) is not None
