"""The split at the start of a run: once, before the first step, and nothing but what the preset promises."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs, models
from support.idle import with_idle
from support.plans import digest
from transformers import Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import LensConfig
from chronomoe_hf.errors import ConfigError, LifecycleError
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.verdict import judge
from chronomoe_hf.telemetry import read_jsonl

CONFIG = ChronoConfig.revive(interval=2)


class Begin(TrainerCallback):
    """The weights' digest at the start of the first step."""

    def __init__(self) -> None:
        self.digest = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digest = self.digest or digest(kwargs["model"])


def make(model: Any, output_dir: Path, config: ChronoConfig = CONFIG, **arguments: Any) -> tuple[Trainer, Begin]:
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = Trainer(model, TrainingArguments(str(output_dir), **{**fields, **arguments}), train_dataset=jobs.rows(96))
    begin = Begin()
    trainer.add_callback(begin)
    chronomoe_hf.attach(trainer, config)
    return trainer, begin


@pytest.mark.parametrize("k", [1, 2])
def test_a_run_starts_with_copies_and_says_what_it_rewrote(
    k: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    model = with_idle(k, train=True)
    was = digest(model)
    trainer, begin = make(model, tmp_path)
    assert digest(model) == was, "attach writes no weight"
    trainer.train()
    assert begin.digest not in ("", was)
    records, broken = read_jsonl(tmp_path / "chronomoe" / "lifecycle_splits.jsonl")
    assert broken == 0 and [record["step"] for record in records] == [0] and records[0]["copies"] >= 2
    assert records[0]["copies"] == sum(len(layer["copies"]) for layer in records[0]["layers"])
    assert bool(records[0]["refits"]) == (k > 1)
    assert any("idle experts of 16 become copies" in record.message for record in caplog.records)
    told = {finding.key: finding.seen for finding in judge(load_run(tmp_path)).findings}
    changed = sum(bool(layer["copies"]) for layer in records[0]["layers"])
    layers = "1 layer" if changed == 1 else f"{changed} layers"
    assert told["REVIVED"] == f"At step 0, {records[0]['copies']} experts in {layers} became copies."
    system = chronomoe_hf.system_of(model)
    assert system.governed
    seen = system.last_snapshot
    assert seen is not None and all(not layer.dead_experts for layer in seen.layers)


@pytest.mark.parametrize("k", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_and_splits_once(k: int, tmp_path: Path) -> None:
    whole, _ = make(with_idle(k, train=True), tmp_path / "a", save_strategy="steps", save_steps=2)
    whole.train()
    resumed, _ = make(with_idle(k, train=True), tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert digest(resumed.model) == digest(whole.model)
    ours = (chronomoe_hf.system_of(t.model).state_dict()["tensors"] for t in (whole, resumed))
    for (name, one), (_, two) in zip(*(tensors.items() for tensors in ours), strict=True):
        assert torch.equal(one, two), name
    records, _ = read_jsonl(tmp_path / "a" / "chronomoe" / "lifecycle_splits.jsonl")
    assert [record["step"] for record in records] == [0]


def test_with_nothing_idle_the_run_is_that_of_the_law_alone_to_the_last_bit(tmp_path: Path) -> None:
    """Dropout on: a random number drawn for the plan would show."""

    def model() -> Any:
        made = models.tiny_model("mixtral", attention_dropout=0.1)
        with torch.no_grad():  # nearly equal logits: every expert gets about its share
            for number, layer in enumerate(made.model.layers):
                layer.mlp.gate.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
                layer.mlp.gate.weight -= layer.mlp.gate.weight.mean(0)
        return made

    law_alone = ChronoConfig(
        interval=2, beta=CONFIG.beta, veto=CONFIG.veto, control=CONFIG.control, lens=LensConfig(enabled=False)
    )
    assert dataclasses.replace(law_alone, lifecycle=CONFIG.lifecycle) == CONFIG
    split, _ = make(model(), tmp_path / "a")
    split.train()
    alone, _ = make(model(), tmp_path / "b", law_alone)
    alone.train()
    records, _ = read_jsonl(tmp_path / "a" / "chronomoe" / "lifecycle_splits.jsonl")
    assert records[0]["copies"] == 0 and all(layer["reason"] for layer in records[0]["layers"])
    assert not (tmp_path / "b" / "chronomoe" / "lifecycle_splits.jsonl").exists()
    assert digest(split.model) == digest(alone.model)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (split, alone)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_what_cannot_be_split_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = with_idle(2, train=True)
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.requires_grad_(False)
    trainer, begin = make(model, tmp_path)
    with pytest.raises(LifecycleError, match="frozen"):
        trainer.train()
    assert not begin.digest


@pytest.mark.parametrize("preset", ["observe", "protect", "balance", "original"])
def test_no_other_preset_writes_a_weight(preset: str) -> None:
    assert ChronoConfig.preset(preset).lifecycle.revive.at == "off"
    with pytest.raises(ConfigError, match=r"lifecycle\.revive\.at is 'off' there"):
        ChronoConfig.preset(preset, lifecycle__revive__at="start")


def test_what_counts_as_idle_is_a_setting(tmp_path: Path) -> None:
    def rewritten(idle: float) -> list[float]:
        trainer, _ = make(with_idle(2, train=True), tmp_path / str(idle), CONFIG.replace(lifecycle__revive__idle=idle))
        trainer.train()
        (record,) = read_jsonl(tmp_path / str(idle) / "chronomoe" / "lifecycle_splits.jsonl")[0]
        return [layer["share_before"][copy["target"]] for layer in record["layers"] for copy in layer["copies"]]

    shares = sorted(rewritten(0.9))
    assert len(shares) > 1 and shares[0] < shares[-1] < 0.9
    between = (shares[0] + shares[-1]) / 2
    fewer = rewritten(between)
    assert 0 < len(fewer) < len(shares) and max(fewer) < between
    with pytest.raises(ConfigError, match=r"revive\.idle"):
        ChronoConfig.revive(lifecycle__revive__idle=1.5)
