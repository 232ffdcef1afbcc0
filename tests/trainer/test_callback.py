"""What people see while training: scalars in the trackers, records on disk, one line when something fails."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from support import jobs as training_job
from support import models as tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig
from chronomoe_hf.config import AlertConfig, ControlConfig
from chronomoe_hf.telemetry import read_jsonl, read_manifest

INTERVAL = 2


def trainer_for(output_dir: Path, *, callbacks: list[TrainerCallback] | None = None, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    return Trainer(
        tiny.tiny_model("mixtral"),
        TrainingArguments(str(output_dir), **settings),
        train_dataset=training_job.rows(64),
        eval_dataset=training_job.rows(8, seed=1),
        callbacks=callbacks,
    )


def moe(entry: dict[str, Any], prefix: str = "moe/") -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key.startswith(prefix)}


def test_tensorboard_receives_training_and_evaluation_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = trainer_for(tmp_path, report_to=["tensorboard"], eval_strategy="steps", eval_steps=3)
    system = chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL)).system
    trainer.train()
    assert system is not None and system.last_snapshot is not None
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events.out*")).parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/moe/neff_min", "eval/moe/neff_min", "train/loss"} <= tags
    ours = {tag for tag in tags if tag.startswith("train/moe/")}
    assert 5 <= len(ours) <= 14
    points = events.Scalars("train/moe/neff_min")
    assert [point.step for point in points] == [2, 4, 6], "one point a window, at its own step"
    worst = min(layer.n_effective for layer in system.last_snapshot.layers)
    assert points[-1].value == pytest.approx(worst, rel=1e-6)


def test_log_history_carries_plain_floats_once_a_window(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    with_numbers = [entry["step"] for entry in entries if moe(entry)]
    assert with_numbers == [2, 4, 6]
    values = moe(entries[-1])
    assert len(values) <= 14
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_evaluation_is_kept_apart(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    system = chronomoe_hf.attach(trainer, ChronoConfig(interval=100)).system
    assert system is not None
    metrics = trainer.evaluate()
    assert 1.0 <= metrics["eval_moe/neff_min"] <= 8.0
    assert system.last_evaluation is not None
    real = sum(int(row["attention_mask"].sum()) for row in training_job.rows(8, seed=1))
    assert [layer.tokens for layer in system.last_evaluation.layers] == [real, real]
    assert sum(system.snapshot().layers[0].expert_token_counts) == 0
    plain = trainer_for(tmp_path / "plain").evaluate()
    assert metrics["eval_loss"] == plain["eval_loss"]


def test_per_layer_scalars_on_request(tmp_path: Path) -> None:
    from chronomoe_hf.config import TelemetryConfig

    trainer = trainer_for(tmp_path)
    chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL, telemetry=TelemetryConfig(per_layer_scalars=True)))
    trainer.train()
    last = next(entry for entry in reversed(trainer.state.log_history) if moe(entry))
    assert {"moe/layer_00/neff", "moe/layer_01/neff"} <= set(last)


def test_records_on_disk_are_strict_json_and_complete(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    system = chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL)).system
    trainer.train()
    assert system is not None
    folder = tmp_path / "chronomoe"
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["run_id"] == system.run_id
    assert [layer["router_class"] for layer in manifest["layers"]] == ["MixtralTopKRouter"] * 2
    for kind, expected in (("routing_events", 6), ("snapshots", 3), ("control_decisions", 6)):
        records, broken = read_jsonl(folder / f"{kind}.jsonl")
        assert (len(records), broken) == (expected, 0), kind
        assert all({"schema", "run_id", "attempt", "step"} <= set(record) for record in records)
        for line in (folder / f"{kind}.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_last_shorter_window_is_reported(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=5)
    chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL))
    trainer.train()
    records, _ = read_jsonl(tmp_path / "chronomoe" / "snapshots.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert moe(next(entry for entry in trainer.state.log_history if entry["step"] == 5 and "loss" in entry))


def test_an_unwritable_output_directory_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from chronomoe_hf.config import TelemetryConfig

    (tmp_path / "taken").write_text("a file where a directory is wanted")
    config = ChronoConfig(interval=INTERVAL, telemetry=TelemetryConfig(output_dir=str(tmp_path / "taken")))
    trainer = trainer_for(tmp_path / "out")
    chronomoe_hf.attach(trainer, config)
    with caplog.at_level(logging.ERROR, logger="chronomoe_hf"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert any(moe(entry) for entry in trainer.state.log_history)
    assert sum("without record files" in record.message for record in caplog.records) == 1


def test_layers_that_no_lens_can_help_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    control = ControlConfig(integral_target=1.0, lens_spread_max=0.0)
    trainer = trainer_for(tmp_path)
    chronomoe_hf.attach(
        trainer, ChronoConfig(interval=INTERVAL, control=control, alerts=AlertConfig(min_window_tokens=1))
    )
    with caplog.at_level(logging.WARNING, logger="chronomoe_hf"):
        trainer.train()
    system = chronomoe_hf.system_of(trainer.model)
    assert len([decision for decision in system.decisions if decision.abstain_reason == "lens_unfit"]) == 2
    (line,) = [record.getMessage() for record in caplog.records if "lens_spread_max" in record.message]
    assert "step 2: layers 0, 1 call for support" in line and "ChronoConfig.balance()" in line


def test_a_sink_that_fails_midway_is_switched_off_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Vanish(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                folder = tmp_path / "chronomoe"
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
                folder.write_text("now a file")

    trainer = trainer_for(tmp_path, callbacks=[Vanish()])
    chronomoe_hf.attach(trainer, ChronoConfig(interval=INTERVAL))
    with caplog.at_level(logging.WARNING, logger="chronomoe_hf"):
        trainer.train()
    assert trainer.state.global_step == 6
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "one line when the sink is switched off"
    assert any("dropped" in record.message for record in caplog.records), "and the count at the end"


def test_a_plain_callback_goes_first_by_itself(tmp_path: Path) -> None:
    callback = ChronoCallback(ChronoConfig(interval=INTERVAL))
    trainer = trainer_for(tmp_path, callbacks=[callback])
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    assert callback.system is not None and callback.system.last_snapshot is not None
    assert callback.system.last_snapshot.step == 6


def test_attach_is_idempotent_and_comes_first(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    callback = chronomoe_hf.attach(trainer)
    assert chronomoe_hf.attach(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback
    assert sum(isinstance(c, ChronoCallback) for c in trainer.callback_handler.callbacks) == 1


def test_the_progress_of_a_governed_run_is_bit_equal_until_beta_acts(tmp_path: Path) -> None:
    losses = {}
    for preset in ("observe", "protect"):
        trainer = trainer_for(tmp_path / preset, max_steps=8)
        chronomoe_hf.attach(trainer, ChronoConfig.preset(preset, interval=4))
        trainer.train()
        losses[preset] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["observe"][:4] == losses["protect"][:4]
    assert losses["observe"][4:] != losses["protect"][4:], "bad test setup: beta never acted"


def test_a_resume_that_had_to_be_repaired_is_on_record(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    first = trainer_for(tmp_path, max_steps=2, **settings)
    chronomoe_hf.attach(first, ChronoConfig(interval=INTERVAL))
    first.train()
    second = trainer_for(tmp_path, max_steps=4, **settings)
    for parameter in second.model.parameters():
        parameter.data.add_(0.1)  # what Trainer leaves out of its reload would keep these values
    chronomoe_hf.attach(second, ChronoConfig(interval=INTERVAL))
    second.train(resume_from_checkpoint=True)
    records, _ = read_jsonl(tmp_path / "chronomoe" / "alerts.jsonl")
    edges = [(record["state"], record["step"]) for record in records if record["kind"] == "RESUME_MISMATCH"]
    assert edges == [("raised", 2), ("cleared", 2)]
