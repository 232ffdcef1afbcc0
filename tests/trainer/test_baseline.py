"""The baseline under a Trainer: exact counts, nothing of the run changes, resumes; and the verdict on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import jobs as training_job
from support import texts
from support.jobs import Job, make_trainer
from support.models import NUM_EXPERTS, tiny_model
from support.still_runs import TEN, Collapse, still_trainer
from torch import Tensor
from transformers import TrainerCallback

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import PRESETS
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.in_run.baseline import FORWARD_BATCHES, set_baseline
from chronomoe_hf.report import judge_directory
from chronomoe_hf.telemetry import read_jsonl

FORWARD = {"telemetry": {"baseline": "forward"}}


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    return read_jsonl(directory / "chronomoe" / f"{kind}.jsonl")[0]


# ---- what it is ------------------------------------------------------------------------------------------------------


def recount(batches: list[dict[str, Tensor]], **overrides: Any) -> list[list[int]]:
    """Counts of the model as it was made, from its router logits: top 2 of every real token."""
    model = tiny_model("mixtral", train=False, **overrides)
    count = [[0] * NUM_EXPERTS for _ in range(2)]
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch, output_router_logits=True).router_logits
        for layer, rows in enumerate(logits):
            for scores, real in zip(rows.tolist(), batch["attention_mask"].reshape(-1).tolist(), strict=True):
                for expert in sorted(range(NUM_EXPERTS), key=lambda e: -scores[e])[:2] if real else ():
                    count[layer][expert] += 1
    return count


def test_a_forward_baseline_counts_the_first_batches_before_anything_is_learned(tmp_path: Path) -> None:
    trainer = make_trainer(Job(output_dir=str(tmp_path), preset="observe", config=FORWARD))
    trainer.train()
    fed = [batch for step in trainer.fed for batch in step][:FORWARD_BATCHES]
    (record,) = records(tmp_path, "baselines")
    assert record["source"] == "forward" and record["step"] == 0
    expected = recount(fed)
    assert [row["expert_token_counts"] for row in record["layers"]] == expected
    last = records(tmp_path, "snapshots")[-1]["layers"]
    for layer, counts in zip(last, expected, strict=True):
        shares = np.array(counts) / sum(counts)
        neff = np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
        assert layer["change"]["n_effective"] == pytest.approx(layer["n_effective"] - neff, abs=1e-4)
        assert layer["error"]["n_effective"] > 0


def test_by_default_the_first_windows_are_the_baseline(tmp_path: Path) -> None:
    make_trainer(Job(output_dir=str(tmp_path), preset="observe", config={"interval": 1})).train()
    events = [event for event in records(tmp_path, "routing_events") if event["layer_id"] == 0]
    (record,) = records(tmp_path, "baselines")
    total, windows = np.zeros(NUM_EXPERTS, dtype=int), 0
    while total.sum() < 50 * NUM_EXPERTS:
        total += events[windows]["expert_token_counts"]
        windows += 1
    row = record["layers"][0]
    assert row["expert_token_counts"] == total.tolist() and row["windows"] == windows > 1
    assert record["source"] == "windows" and row["step"] == windows


def test_a_profile_is_a_baseline(tmp_path: Path) -> None:
    docs = texts.documents(6)
    model = tiny_model("mixtral", vocab_size=texts.VOCAB)
    report = chronomoe_hf.profile(
        model, texts.tokenizer(), {"a": docs[:3], "b": docs[3:]}, output_dir=tmp_path / "profile", progress=False
    )
    config = {"telemetry": {"baseline": str(tmp_path / "profile")}}
    make_trainer(Job(output_dir=str(tmp_path / "run"), preset="observe", config=config)).train()
    (record,) = records(tmp_path / "run", "baselines")
    sums = np.sum([domain.counts for domain in report.domains.values()], axis=0)
    assert record["source"] == "profile" and [r["expert_token_counts"] for r in record["layers"]] == sums.tolist()
    for wrong, words in ((tmp_path / "nowhere", "holds no profile"), (tmp_path / "other", "of another model")):
        if wrong.name == "other":
            other = tiny_model("qwen3_moe", vocab_size=texts.VOCAB, num_experts=4)
            chronomoe_hf.profile(other, texts.tokenizer(), {"a": docs}, output_dir=wrong, progress=False)
        trainer = make_trainer(
            Job(output_dir=str(tmp_path / "wrong"), preset="observe", config={"telemetry": {"baseline": str(wrong)}})
        )
        with pytest.raises(ConfigError, match=words):
            trainer.train()


# ---- nothing of the run changes --------------------------------------------------------------------------------------


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]


@pytest.mark.parametrize("preset", ["observe", "protect", "balance"])
def test_a_forward_baseline_changes_no_bit_of_the_run(preset: str, tmp_path: Path) -> None:
    """With dropout, so that one random number more would show; with a sampler that draws, and an evaluation."""
    seen = []
    for source in ("windows", "forward"):
        job = Job(
            output_dir=str(tmp_path / source),
            preset=preset,
            config={"interval": 2, "telemetry": {"baseline": source}},
            model={"attention_dropout": 0.5},
            arguments={"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6},
            trace=True,
        )
        result = training_job.run(job)
        seen.append((result, states()))
    (one, ones), (two, twos) = seen
    assert one["loss"] == two["loss"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
    for left, right in zip(one["fed"], two["fed"], strict=True):
        for a, b in zip(left, right, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert ones[:2] == twos[:2] and torch.equal(ones[2], twos[2])
    for name, value in one["tensors"].items():
        assert torch.equal(value, two["tensors"][name]), name
    assert records(tmp_path / "forward", "baselines")[0]["source"] == "forward"


def test_batches_that_no_forward_takes_leave_the_first_windows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(Job(output_dir=str(tmp_path), preset="observe", config=FORWARD))
    trainer.data_collator = lambda rows: {"prompt": [1] * len(rows), **_stacked(rows)}
    plain = trainer.get_train_dataloader

    class Renamed:
        def __iter__(self) -> Any:
            return ({"prompt": batch["input_ids"]} for batch in plain())

    system = chronomoe_hf.system_of(trainer.model)
    set_baseline(system, trainer.model, Renamed())  # type: ignore[arg-type]
    assert "first windows of the run are the baseline" in caplog.text
    assert system.alerts.reference.data["layers"] == {}


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["windows", "forward"])
def test_a_resumed_run_keeps_its_baseline(source: str, tmp_path: Path) -> None:
    config = {"interval": 2, "telemetry": {"baseline": source}}
    saves = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    make_trainer(Job(output_dir=str(tmp_path / "whole"), preset="observe", config=config, arguments=saves)).train()
    job = Job(output_dir=str(tmp_path / "parts"), preset="observe", config=config, arguments=saves)

    class Killed(Exception):
        pass

    first = make_trainer(job)
    first.add_callback(_Stop(6, Killed))
    with pytest.raises(Killed):
        first.train()
    second = make_trainer(job)
    second.train(resume_from_checkpoint=True)
    whole, parts = (records(tmp_path / name, "snapshots") for name in ("whole", "parts"))
    assert [each["step"] for each in whole] == [each["step"] for each in parts]
    for one, two in zip(whole, parts, strict=True):
        assert [layer["change"] for layer in one["layers"] if "change" in layer] == [
            layer["change"] for layer in two["layers"] if "change" in layer
        ]
    newest = records(tmp_path / "parts", "baselines")[-1]
    assert newest["layers"] == records(tmp_path / "whole", "baselines")[-1]["layers"] and newest["source"] == source
    ends = records(tmp_path / "parts", "ends")
    assert [(end["attempt"], end["completed"]) for end in ends] == [(1, True)]


class _Stop(TrainerCallback):
    def __init__(self, step: int, error: type[Exception]) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error


# ---- the interval and the two lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "interval"), [(6, 1), (60, 3)])
def test_a_window_is_a_twentieth_of_the_run(
    steps: int, interval: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(
        output_dir=str(tmp_path),
        preset="observe",
        arguments={"max_steps": steps, "save_strategy": "steps", "save_steps": steps, "gradient_accumulation_steps": 1},
    )
    trainer = make_trainer(job)
    attached = capsys.readouterr().err
    assert f"2 MoE layers of {NUM_EXPERTS} experts are watched; nothing acts on the routing" in attached
    assert f"first numbers at step {interval}" in attached and f"chronomoe tail {tmp_path} --follow" in attached
    trainer.train()
    ended = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.startswith("chronomoe_hf: ") and f"chronomoe report {tmp_path}" in ended
    assert judge_directory(tmp_path).sentence in ended
    assert [each["step"] for each in records(tmp_path, "snapshots")] == list(range(interval, steps + 1, interval))
    manifest = json.loads((tmp_path / "chronomoe" / "run_manifest.json").read_text())
    assert manifest["interval"] == interval and manifest["config"]["interval"] is None
    state = json.loads((tmp_path / f"checkpoint-{steps}" / "chronomoe" / "state.json").read_text())
    assert state["interval"] == interval
    longer = make_trainer(Job(output_dir=str(tmp_path), preset="observe", arguments={"max_steps": steps + 100}))
    longer.args.max_steps = steps + 2
    longer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert chronomoe_hf.system_of(longer.model).interval == interval, "a resumed run keeps its windows"


def test_a_loop_of_ones_own_has_windows_of_a_hundred_steps() -> None:
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(tiny_model("mixtral"), ChronoConfig.observe()))
    assert system.interval == 100
    system.fit_interval(10**6)
    assert system.interval == 100


# ---- the verdict -----------------------------------------------------------------------------------------------------


def config_of(preset: str) -> ChronoConfig:
    # The original's interval of 100 steps is longer than these runs.
    return ChronoConfig.preset(preset, **({"interval": 2} if preset == "original" else {}))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_run_that_learns_nothing_ends_healthy(preset: str, tmp_path: Path) -> None:
    still_trainer(tmp_path, "mixtral", config_of(preset)).train()
    verdict = judge_directory(tmp_path)
    assert verdict.level == "fine", verdict.sentence
    assert not any(alert["since"] == "got_worse" for alert in records(tmp_path, "alerts"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("family", TEN)
def test_a_run_that_learns_nothing_ends_healthy_in_every_family(family: str, preset: str, tmp_path: Path) -> None:
    still_trainer(tmp_path, family, config_of(preset), steps=40).train()
    verdict = judge_directory(tmp_path)
    assert verdict.level == "fine", verdict.sentence


def test_the_narrow_text_of_these_runs_is_below_the_level(tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    still_trainer(tmp_path, "mixtral", ChronoConfig.observe()).train()
    raised = [alert for alert in records(tmp_path, "alerts") if alert["kind"] == "PRE_COLLAPSE"]
    assert raised and all(alert["since"] == "as_it_came" for alert in raised)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_planted_collapse_is_red_within_five_windows(family: str, tmp_path: Path) -> None:
    still_trainer(tmp_path, family, ChronoConfig.observe(interval=1), steps=13, callbacks=[Collapse(8)]).train()
    verdict = judge_directory(tmp_path)
    assert verdict.level == "act" and "concentrating" in verdict.sentence, verdict.sentence
    worse = [alert for alert in records(tmp_path, "alerts") if alert["since"] == "got_worse"]
    assert worse and min(alert["step"] for alert in worse) > 8
