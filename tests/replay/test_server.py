"""TRL's server mode against a process of its own that answers as a vLLM server does; see ``serving.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

import chronomoe_hf
from chronomoe_hf import ChronoConfig

from .grpo_job import Passes
from .serving import serving, taken_for_vllm, trainer_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for module, name, value in taken_for_vllm():
        monkeypatch.setattr(module, name, value, raising=False)
    with serving(tmp_path) as url:
        yield url


def test_routes_of_a_server_are_replayed_and_moved_biases_reach_it(server: str, tmp_path: Path) -> None:
    trainer = trainer_of(server, tmp_path)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.balance(interval=1, replay__mode="rollout"))
    system = callback.system
    assert system is not None
    passes, windows = Passes(trainer, system), []
    window = system.replay.window
    system.replay.window = lambda device: windows.append(window(device)) or windows[-1]  # type: ignore[method-assign]
    trainer.train()
    assert passes.choices > 0 and passes.flips == 0, "what the server chose was not used"
    assert {record["coverage"] for record in windows} == {1.0} and not any(record["unknown_rows"] for record in windows)
    compared = [record["pairs"]["rollout_old"] for record in windows if "rollout_old" in record["pairs"]]
    assert len(compared) == 2 and all(pair["mean"] < 0.5 for pair in compared), "two rollouts, each of synced weights"
    assert sum(pair["mean"] for pair in compared) > 0.0, "bf16 and fp32 chose alike everywhere: shows nothing"
    scored = [record["logps"]["rollout_old"] for record in windows if "rollout_old" in record["logps"]]
    assert all(each["tokens"] > 0 and each["k3"] < 0.05 for each in scored), "log-probabilities are of other tokens"
    assert not {"REPLAY_UNCOVERED", "REPLAY_INVALID", "REPLAY_IDLE"} & {a.kind for a in system.alerts.active}

    state = trainer.model.state_dict()
    names = [name for name in state if name.endswith("e_score_correction_bias")]
    assert len(names) == 3 and all(state[name].abs().sum() > 0 for name in names), "the law moved nothing"
    trainer.vllm_generation.sync_weights()
    held = requests.get(f"{server}/biases", timeout=60).json()
    assert held["updates"] >= 2 and set(names) <= set(held["received"])
    for name in names:
        assert torch.equal(torch.tensor(held["biases"][name]), state[name]), "the engine routes by another bias"
    chronomoe_hf.detach(trainer)
    assert set(names).isdisjoint(dict(trainer.vllm_generation._iter_named_params()))
    assert "_post" not in vars(trainer.vllm_generation.vllm_client) and "generate" not in vars(trainer.vllm_generation)


def test_a_server_that_was_started_without_the_switch_is_named(server: str, tmp_path: Path) -> None:
    requests.post(f"{server}/silent", timeout=60)
    trainer = trainer_of(server, tmp_path, max_steps=2, num_iterations=1)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1, replay__mode="rollout"))
    trainer.train()
    active = {a.kind: a.detail for a in callback.system.alerts.active}  # type: ignore[union-attr]
    assert {"REPLAY_IDLE", "REPLAY_INVALID", "REPLAY_UNCOVERED"} <= set(active)
    assert "--enable-return-routed-experts" in active["REPLAY_INVALID"]
