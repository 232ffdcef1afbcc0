"""What the verdict tells one to do, done on the run that raised it: it changes what the sentence names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe_zoo
from support.still_runs import Collapse, collapse, narrow_rows, still_trainer
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
from chronomoe_hf.cli.main import app
from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.report import judge_directory
from chronomoe_hf.report.rules import ALERTS, STATES

STEPS = 24


def config_of(line: str, **overrides: Any) -> ChronoConfig:
    """The setting that a row of the table gives."""
    made = eval(line, {"__builtins__": {}, "ChronoConfig": ChronoConfig})
    assert isinstance(made, ChronoConfig)
    return made.replace(**overrides)


def collapsed_trainer(directory: Path, config: ChronoConfig, steps: int = STEPS, silent: bool = False) -> Trainer:
    """A run that goes on from a model whose routing has collapsed; `silent`: and whose last two experts get nothing."""
    model = moe_zoo.build("mixtral")
    moe_zoo.randomise(model)
    collapse(model)
    for adapter, router, _ in moe_zoo.routers_of(model) if silent else ():
        with torch.no_grad():
            weight_ED = adapter.weight(router)
            weight_ED[-2:] = 20.0 * weight_ED[-3]  # far below every other expert on this text
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        learning_rate=1e-4,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=narrow_rows(16 * steps))
    chronomoe_hf.attach(trainer, config)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def concentrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which a collapse was planted: PRE_COLLAPSE, experts that died, DRIFT."""
    directory = tmp_path_factory.mktemp("concentrated")
    still_trainer(directory, "mixtral", ChronoConfig.observe(interval=1), steps=16, callbacks=[Collapse(8)]).train()
    return directory


def test_the_run_raises_what_is_tested_below(concentrated: Path) -> None:
    keys = {finding.key for finding in judge_directory(concentrated).findings}
    assert {"PRE_COLLAPSE", "DRIFT"} <= keys
    assert judge_directory(concentrated).advice[1] == "ChronoConfig.balance()"


def test_the_setting_for_concentration_spreads_the_load(tmp_path: Path) -> None:
    """Going on from the collapsed weights with that setting uses more experts than going on without it."""
    keys = ("PRE_COLLAPSE", "COLLAPSE_CONFIRMED", "DRIFT", "DIED", "CEILING")
    lines = {(ALERTS.get(key) or STATES[key]).config for key in keys}
    assert len(lines) == 1, "one setting stands for all of them; another one needs a test of its own"
    used = {}
    for name, config in (("without", ChronoConfig.observe()), ("with", config_of(lines.pop(), beta__rate=1.0))):
        collapsed_trainer(tmp_path / name, config)
        used[name] = judge_directory(tmp_path / name).measured["neff_mean"]
    assert used["with"] > used["without"] + 0.05, used


def test_a_dead_expert_leads_to_plan_and_plan_drops_it(tmp_path: Path) -> None:
    collapsed_trainer(tmp_path, ChronoConfig.observe(interval=2), steps=8, silent=True)
    verdict = judge_directory(tmp_path)
    (dead,) = [finding for finding in verdict.findings if finding.key == "DEAD"]
    assert "chronomoe plan" in dead.rule.advice and dead.level == "fine"
    last = [json.loads(line) for line in (tmp_path / "chronomoe" / "routing_events.jsonl").open()][-2:]
    silent = {str(e["layer_id"]): [i for i, n in enumerate(e["expert_token_counts"]) if not n] for e in last}
    died = next((f.experts for f in verdict.findings if f.key == "DIED"), {})
    left = {layer_id: [e for e in ids if e not in died.get(layer_id, [])] for layer_id, ids in silent.items()}
    assert dead.experts == {layer_id: ids for layer_id, ids in left.items() if ids}
    layer_id, ids = next(iter(dead.experts.items()))
    assert f"layer {layer_id} (expert" in dead.seen and all(str(expert) in dead.seen for expert in ids)
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--keep", "0.5", "--rank", "frequency", "-o", str(out)])
    assert done.exit_code == 0, done.exception
    plan = lifecycle.PrunePlan.load(out)
    events = [json.loads(line) for line in (tmp_path / "chronomoe" / "routing_events.jsonl").open()]
    named = 0
    for layer in plan.layers:
        own = [event["expert_token_counts"] for event in events if event["layer_id"] == layer.spec.layer_id]
        silent = [expert for expert in range(layer.spec.num_experts) if not any(row[expert] for row in own)]
        named += len(silent)
        assert set(silent[: len(layer.dropped)]) <= set(layer.dropped)
    assert named > 0


def test_too_little_evidence_goes_with_larger_windows(tmp_path: Path) -> None:
    """Of two runs of the same steps, the one with the larger windows can be judged."""
    found = []
    for interval in (1, 8):
        directory = tmp_path / str(interval)
        config = ChronoConfig.observe(interval=interval, alerts__min_window_tokens=300)
        still_trainer(directory, "mixtral", config, steps=16).train()
        found.append("INSUFFICIENT" in [finding.key for finding in judge_directory(directory).findings])
    assert found == [True, False] and config_of(STATES["INSUFFICIENT"].config).interval > 100


def test_a_run_without_windows_gets_some_by_leaving_the_interval_out(tmp_path: Path) -> None:
    still_trainer(tmp_path / "before", "mixtral", ChronoConfig.observe(interval=1000), steps=20).train()
    assert judge_directory(tmp_path / "before").findings[0].key == "ONE_WINDOW"
    interval = config_of(STATES["ONE_WINDOW"].config).interval
    assert interval is config_of(STATES["EMPTY"].config).interval is None
    still_trainer(tmp_path / "after", "mixtral", ChronoConfig.observe(interval=interval), steps=20).train()
    assert judge_directory(tmp_path / "after").measured["windows"] == 20


def test_idle_experts_have_work_after_revive(tmp_path: Path) -> None:
    rule = STATES["IDLE"]
    idle = []
    for name, config in (("before", ChronoConfig.observe()), ("after", config_of(rule.config))):
        still_trainer(tmp_path / name, "mixtral", config).train()
        events = [json.loads(line) for line in (tmp_path / name / "chronomoe" / "routing_events.jsonl").open()]
        last = [event for event in events if event["step"] == max(e["step"] for e in events)]
        threshold = LifecycleConfig().split_idle
        idle.append(
            sum(
                count * 8 < threshold * sum(e["expert_token_counts"])
                for e in last
                for count in e["expert_token_counts"]
            )
        )
    assert idle[0] > idle[1], idle


def test_training_the_last_part_without_steering_makes_a_plain_server_route_alike(tmp_path: Path) -> None:
    """The first way out of UNFOLDED: the same run, resumed under the setting of the row."""

    def trainer(steps: int, config: ChronoConfig) -> Trainer:
        torch.manual_seed(0)
        model = moe_zoo.build("mixtral")
        moe_zoo.randomise(model)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            learning_rate=1e-4,
            per_device_train_batch_size=16,
            save_steps=24,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        made = Trainer(model, arguments, train_dataset=narrow_rows(16 * 32))
        chronomoe_hf.attach(made, config)
        return made

    rule = STATES["UNFOLDED"]
    trainer(24, ChronoConfig.balance(beta__rate=1.0, interval=2)).train()
    before = judge_directory(tmp_path)
    assert before.level == "watch" and before.advice == (rule.advice, rule.config), before.sentence
    trainer(32, config_of(rule.config, interval=2)).train(resume_from_checkpoint=True)
    after = judge_directory(tmp_path)
    assert "UNFOLDED" not in [finding.key for finding in after.findings], after.sentence


def test_the_wrapped_model_routes_as_it_was_trained_and_a_plain_one_does_not(tmp_path: Path) -> None:
    """The other way out: `wrap(model, state=checkpoint)`."""
    made = collapsed_trainer(tmp_path / "run", ChronoConfig.balance(beta__rate=1.0, interval=2))
    (found,) = [finding for finding in judge_directory(tmp_path / "run").findings if finding.key == "UNFOLDED"]
    assert found.level == "act"
    made.save_model(str(tmp_path / "saved"))
    batch = {name: torch.stack([row[name] for row in narrow_rows(8, labels=False)]) for name in ("input_ids",)}
    trained = made.model.eval()(**batch).logits
    wrapped = chronomoe_hf.wrap(type(made.model).from_pretrained(tmp_path / "saved"), state=tmp_path / "saved").eval()
    plain = type(made.model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(wrapped(**batch).logits, trained)
        assert not torch.allclose(plain(**batch).logits, trained, atol=1e-4)


def test_nothing_says_that_balancing_is_free() -> None:
    for rule in (*ALERTS.values(), *STATES.values()):
        text = f"{rule.meaning} {rule.cause} {rule.advice}".lower()
        assert "costs no" not in text and "cost no" not in text and "for free" not in text
