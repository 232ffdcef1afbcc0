"""Alerts of replay: what raises each, what does not, and the way out that each names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import ReplayConfig
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.figures_replay import replay as figures
from chronomoe_hf.telemetry import AlertHistory
from chronomoe_hf.telemetry.replay import replay_alerts

from .grpo_job import make, tokenizer


def record(**changes: Any) -> dict[str, Any]:
    """A window in which everything is well."""
    pair = {"mismatch": [0.02, 0.04], "choices": [100, 100], "by_position": [0.03], "mean": 0.03}
    made: dict[str, Any] = {
        "passes": {"rollout": 1, "old": 1, "gradient": 1, "recompute": 0},
        "tokens_wanted": 100,
        "coverage": 1.0,
        "rows": 4,
        "unknown_rows": 0,
        "tokens_repeated": 100,
        "masked": None,
        "pairs": {"rollout_old": pair},
        "logps": {"rollout_old": {"tokens": 50, "logp_diff_mean": 0.0, "logp_diff_max": 0.5, "k3": 1e-5}},
        "layers": [1, 3],
        "store": {"records": 4, "bytes": 100, "dropped": 0},
        "invalid": None,
        "misaligned": None,
    }
    return {**made, **changes}


def logps(name: str, k3: float) -> dict[str, Any]:
    return {name: {"tokens": 50, "logp_diff_mean": 0.1, "logp_diff_max": 0.5, "k3": k3, "above_ln2": 0.0}}


def raised(*windows: dict[str, Any], mode: str = "rollout") -> dict[str, str]:
    """Kind -> detail of what is in force after these windows."""
    history = AlertHistory()
    for at, window in enumerate(windows):
        replay_alerts(window, history, at + 1, ReplayConfig(mode=mode))  # type: ignore[arg-type]
    return {alert.kind: alert.detail for alert in history.active}


def test_a_window_in_which_all_is_well_raises_nothing() -> None:
    for mode in ("measure", "old", "rollout"):
        assert raised(record(), record(), record(), mode=mode) == {}


def test_a_mismatch_is_named_only_where_k3_is_high_too_and_not_at_once() -> None:
    high, none = logps("rollout_old", 0.02), {"rollout_old": {**record()["pairs"]["rollout_old"], "mean": 0.0}}
    assert raised(record(), record(), record()) == {}, "choices that differ are no damage by themselves"
    assert raised(record(logps=high, pairs=none), record(logps=high, pairs=none)) == {}, "k3 alone is no mismatch"
    assert raised(record(logps=high)) == {}, "one window"
    assert raised(record(logps=high), record(), record(logps=high)) == {}
    (detail,) = raised(record(logps=high), record(logps=high), mode="measure").values()
    assert "3.00% of (token, layer)" in detail and "0.02 nats" in detail and "in layers 3, 1" in detail
    assert "replay.mode='rollout'" in detail and "weight sync" in detail
    (detail,) = raised(record(logps=high), record(logps=high)).values()
    assert "repeated already" in detail and "stale weights" in detail
    pair = {"old_gradient": record()["pairs"]["rollout_old"]}
    moved = record(pairs=pair, logps=logps("old_gradient", 0.02))
    (detail,) = raised(moved, moved, mode="measure").values()
    assert "'rollout' or 'old'" in detail and "weight sync" not in detail


def test_weights_that_moved_between_two_passes_of_the_trainer_are_not_laid_on_the_engine() -> None:
    pair = record()["pairs"]["rollout_old"]
    high = logps("rollout_gradient", 0.02)
    alone = record(pairs={"rollout_gradient": pair}, logps=high)
    assert "rollout and gradient pass" in raised(alone, alone)["ROUTING_MISMATCH"], "the only pass there is"
    both = record(pairs={"rollout_old": pair, "rollout_gradient": pair}, logps=logps("rollout_old", 1e-5) | high)
    assert raised(both, both, both) == {}
    later = record(pairs={"rollout_gradient": pair, "old_gradient": pair}, logps=high | logps("old_gradient", 1e-5))
    assert raised(later, later, later) == {}
    later["pairs"].pop("old_gradient")  # not compared where the rollout is repeated
    assert raised(later, later, later) == {}
    stale = record(logps=logps("rollout_old", 0.02))
    assert "ROUTING_MISMATCH" in raised(stale, later, stale), "a window that cannot tell has cleared it"
    assert "ROUTING_MISMATCH" not in raised(stale, stale, record())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store": {"records": 1, "bytes": 9, "dropped": 7}}, "7 records went because of replay.max_bytes"),
        ({"unknown_rows": 4}, "no row is known"),
        ({"unknown_rows": 1}, "1 of 4 rows are unknown"),
        ({}, "rows are known only in part"),
    ],
)
def test_too_few_records_are_named_with_their_cause(changes: dict[str, Any], words: str) -> None:
    assert raised(record(coverage=0.9, **changes)) == {}
    (detail,) = raised(record(coverage=0.89, **changes)).values()
    assert "89% of the tokens" in detail and words in detail


def test_an_idle_mode_names_its_own_way_out() -> None:
    idle = record(tokens_repeated=0)
    assert raised(idle, mode="measure") == {}
    assert "num_iterations=2" in raised(idle, mode="old")["REPLAY_IDLE"]
    assert "--enable-return-routed-experts" in raised(idle)["REPLAY_IDLE"]


class Engine:
    """A ``rollout_func`` of a copy of the model in fp32; `synced`, it gets the weights before every rollout."""

    def __init__(self, model: Any, synced: bool) -> None:
        self.model, self.synced, self.words = copy.deepcopy(model).eval(), synced, tokenizer()
        chronomoe_hf.wrap(self.model, ChronoConfig.observe(replay__mode="measure"))
        self.replay = chronomoe_hf.system_of(self.model).replay

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        if self.synced:
            self.model.load_state_dict(trainer.model.state_dict())
        out: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "routed_experts": []}
        for prompt in prompts:
            ids = torch.tensor([self.words(prompt)["input_ids"]])
            with self.replay.rollout(pad_token_id=0) as tape, torch.no_grad():
                tape.end(self.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=True, pad_token_id=0))
            (row,) = tape.records(self.replay.passes.dtype)
            out["prompt_ids"].append(ids[0].tolist())
            out["completion_ids"].append(row.tokens_N[ids.shape[1] :].tolist())
            out["logprobs"].append(row.logps_N[ids.shape[1] :].tolist())
            out["routed_experts"].append(row.routes_NLK)
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("synced", [True, False])
def test_an_engine_that_is_never_synced_is_seen_before_half_of_its_choices_differ(synced: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.tiny_model("qwen3_moe", num_experts_per_tok=2)
    fields = {"num_iterations": 2, "beta": 0.0, "max_steps": 8, "rollout_func": Engine(model, synced)}
    trainer = make("GRPO", model, tmp_path, **fields)
    config = ChronoConfig.observe(interval=2, replay__mode="measure")
    callback = chronomoe_hf.attach(trainer, config)
    trainer.train()
    active = {alert.kind: alert.detail for alert in callback.system.alerts.active}  # type: ignore[union-attr]
    shown = figures(load_run(tmp_path))
    page = {figure.key: figure.sentence for figure in shown}
    (places,) = [panel for panel in shown[1].spec["panels"] if "x_texts" in panel]  # type: ignore[index]
    assert places["x_texts"] == ["0", "1", "2-3", "4-7"], "completions of eight tokens"
    assert "REPLAY_INVALID" not in active, "more than half of the choices differ: shows nothing"
    named = active.get("ROUTING_MISMATCH", "")  # between the trainer's own passes the weights have moved
    assert named.startswith("rollout and old-policy pass") == (not synced), named
    assert ("weight sync" in page["replay_numbers"]) == (not synced)
    assert ("weight sync" in named) == (not synced)
