"""More of what the verdict tells one to do, done on the run that raised it: layers unseen, NaN, adapters, records."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from support import moe_zoo
from support.still_runs import collapse, narrow_rows, still_trainer
from torch import nn
from transformers import MixtralForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
from chronomoe_hf.cli.main import app
from chronomoe_hf.config import CheckpointConfig
from chronomoe_hf.report import judge_directory
from chronomoe_hf.report.rules import ALERTS, STATES


def build() -> nn.Module:
    model = moe_zoo.build("mixtral")
    moe_zoo.randomise(model)
    return model


def trained(
    directory: Path, model: nn.Module, config: ChronoConfig, kind: type[Trainer] = Trainer, **options: Any
) -> Any:
    """A run of eight steps (or `max_steps`) on narrow text; other options are TrainingArguments'."""
    optimizers, resume = options.pop("optimizers", (None, None)), options.pop("resume", None)
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    made = kind(
        model,
        TrainingArguments(
            str(directory),
            **{"max_steps": 8, "learning_rate": 1e-4, "per_device_train_batch_size": 16, **quiet, **options},
        ),
        train_dataset=narrow_rows(16 * options.get("max_steps", 8)),
        optimizers=optimizers,
    )
    chronomoe_hf.attach(made, config)
    made.train(resume_from_checkpoint=resume)
    return made


def keys(directory: Path) -> list[str]:
    return [finding.key for finding in judge_directory(directory).findings]


def test_a_layer_is_seen_once_the_model_that_trains_is_the_wrapped_one(tmp_path: Path) -> None:
    """NOT_OBSERVED: another object was trained than the one that was wrapped."""
    model = build()
    copied = copy.deepcopy(model)

    class Astray(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return copied(**inputs).loss

    trained(tmp_path / "before", model, ChronoConfig.observe(interval=1), Astray)
    verdict = judge_directory(tmp_path / "before")
    assert verdict.level == "act" and verdict.advice[0] == ALERTS["NOT_OBSERVED"].advice
    assert set(verdict.findings[0].layers) == {"0", "1"}
    trained(tmp_path / "after", copied, ChronoConfig.observe(interval=1))
    assert "NOT_OBSERVED" not in keys(tmp_path / "after") and judge_directory(tmp_path / "after").level == "fine"


def test_a_lower_learning_rate_leaves_no_logit_without_a_number(tmp_path: Path) -> None:
    for name, rate in (("before", 1e38), ("after", 1e-4)):
        config = ChronoConfig.observe(interval=1)
        trained(tmp_path / name, build(), config, learning_rate=rate, max_grad_norm=0.0, lr_scheduler_type="constant")
    verdict = judge_directory(tmp_path / "before")
    assert "NON_FINITE" in keys(tmp_path / "before") and verdict.level == "act"
    assert "lower the learning rate" in ALERTS["NON_FINITE"].advice
    assert "NON_FINITE" not in keys(tmp_path / "after") and judge_directory(tmp_path / "after").level == "fine"


def test_under_an_adapter_a_bias_gives_idle_experts_work(tmp_path: Path) -> None:
    rule = STATES["IDLE_ADAPTER"]
    assert rule.config == "ChronoConfig.balance()"
    idle = {}
    for name, config in (("before", ChronoConfig.observe(interval=2)), ("after", ChronoConfig.balance(interval=2))):
        model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
        trained(tmp_path / name, model, config, max_steps=24)
        found = [finding for finding in judge_directory(tmp_path / name).findings if finding.key == "IDLE_ADAPTER"]
        idle[name] = sum(len(experts) for finding in found for experts in finding.experts.values())
    assert idle["before"] > idle["after"], idle


def test_validate_names_every_line_that_was_left_out(tmp_path: Path) -> None:
    still_trainer(tmp_path, "mixtral", ChronoConfig.observe(interval=2), steps=8).train()
    assert "BROKEN_RECORDS" not in keys(tmp_path)
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [lines[0], lines[1][:40], *lines[2:], '{"half']))
    verdict = judge_directory(tmp_path)
    assert verdict.advice[0] == STATES["BROKEN_RECORDS"].advice and "2 lines" in verdict.findings[0].seen
    done = CliRunner().invoke(app, ["validate", str(tmp_path)])
    assert done.exit_code == 3
    assert all(f"snapshots.jsonl:{number}" in done.output for number in (2, len(lines) + 1)), done.output


def test_weights_that_did_not_come_back_are_repaired_by_the_default(tmp_path: Path) -> None:
    """RESUME_MISMATCH in force: the same resume with the setting of the row, or from a model of the checkpoint."""

    def resumed(name: str, config: ChronoConfig, off: float, model: nn.Module | None = None) -> None:
        shutil.copytree(tmp_path / "first", tmp_path / name)
        model = build() if model is None else model
        for parameter in model.parameters():
            parameter.data.add_(off)  # what Trainer leaves out of its reload keeps these values
        trained(tmp_path / name, model, config, max_steps=8, resume=True)

    trained(tmp_path / "first", build(), ChronoConfig.observe(interval=1), max_steps=4, save_steps=4)
    left = ChronoConfig.observe(interval=1, checkpoint__repair="off")
    resumed("off", left, 0.1)
    assert "RESUME_MISMATCH" in keys(tmp_path / "off") and judge_directory(tmp_path / "off").level == "act"
    rule = ALERTS["RESUME_MISMATCH"]
    names = {"ChronoConfig": ChronoConfig, "CheckpointConfig": CheckpointConfig}
    setting = eval(rule.config, {"__builtins__": {}, **names})
    resumed("repair", left.replace(checkpoint=setting.checkpoint), 0.1)
    assert "RESUME_MISMATCH" not in keys(tmp_path / "repair")
    assert "from_pretrained(checkpoint)" in rule.advice
    own = MixtralForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-4")
    resumed("loaded", left, 0.0, own)
    assert "RESUME_MISMATCH" not in keys(tmp_path / "loaded")


def test_a_lower_learning_rate_slows_the_concentration_down(tmp_path: Path) -> None:
    """PRE_COLLAPSE's other way out. It is about the whole model: of the router alone it changes little here."""
    assert "lower learning rate slows" in ALERTS["PRE_COLLAPSE"].advice
    found = {}
    for name, rate, router_rate in (("high", 1e-3, 1e-3), ("router", 1e-3, 1e-5), ("low", 1e-5, 1e-5)):
        model = build()
        routers = [adapter.weight(router) for adapter, router, _ in moe_zoo.routers_of(model)]
        others = [one for one in model.parameters() if not any(one is router for router in routers)]
        groups = [{"params": routers, "lr": router_rate}, {"params": others, "lr": rate}]
        config = ChronoConfig.observe(interval=2)
        optimizers = (torch.optim.AdamW(groups, weight_decay=0.0), None)
        options = {"max_steps": 32, "lr_scheduler_type": "constant", "optimizers": optimizers}
        trained(tmp_path / name, model, config, **options)
        found[name] = judge_directory(tmp_path / name)
    assert found["high"].level == "act" and found["high"].findings[0].key == "PRE_COLLAPSE"
    assert found["low"].level == "fine"
    fell = {name: verdict.measured["neff_mean_change"] for name, verdict in found.items()}
    assert fell["high"] < -0.2 and fell["router"] < -0.2 and fell["low"] > -0.05, fell


def test_what_a_smaller_model_would_keep_is_what_does_the_work(tmp_path: Path) -> None:
    """AS_IT_CAME leads to `plan`: half of the experts, and most of the assignments."""
    assert "chronomoe plan" in STATES["AS_IT_CAME"].advice
    trainer = still_trainer(tmp_path, "mixtral", ChronoConfig.observe(interval=2), steps=16)
    collapse(trainer.model)
    trainer.train()
    assert "AS_IT_CAME" in keys(tmp_path) and judge_directory(tmp_path).level == "fine"
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--keep", "0.5", "--rank", "frequency", "-o", str(out)])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "chronomoe" / "routing_events.jsonl").open()]
    for layer in lifecycle.PrunePlan.load(out).layers:
        own = [event["expert_token_counts"] for event in records if event["layer_id"] == layer.spec.layer_id]
        sums = torch.tensor(own).sum(0)
        assert sums[list(layer.kept)].sum() > 0.6 * sums.sum()
