"""TRL's server mode against a process of its own that answers as a vLLM server does: routes, weights.

TRL's client, its generation and its sync run as they are; gloo carries the tensors where NCCL does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Glm4MoeConfig
from trl.generation import vllm_client, vllm_generation

import chronomoe_hf
from chronomoe_hf import ChronoConfig

from .grpo_job import WORDS, Passes, make

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def build() -> Any:
    """Four decoder layers, the first of which is dense; sigmoid scores and a correction bias that is a buffer."""
    torch.manual_seed(0)
    fields = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "intermediate_size": 32}
    config = Glm4MoeConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        **fields,
    )
    return AutoModelForCausalLM.from_config(config)


class Client(vllm_client.VLLMClient):
    """TRL's client; it meets the server in a gloo group, since TRL's own insists on CUDA."""

    def init_communicator(self, device: Any = 0) -> None:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
        with ThreadPoolExecutor(1) as executor:
            asked = executor.submit(
                self._post, f"{self.base_url}/init_weight_transfer_engine", json={"port": store.port}
            )
            self.communicator = dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=60))
            asked.result()

    def close_communicator(self) -> None:
        self.communicator = None


def broadcast(iterator: Any, group: Any, src: int, post_iter_func: Any) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).detach().contiguous(), src).wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a running server of :func:`build`'s weights; TRL takes it for vLLM 0.28 or newer."""
    build().save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("server_process.py")
    command = [sys.executable, str(script), str(tmp_path / "model")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        port = next(line.strip() for line in lines if line.strip().isdigit())
        for module in (vllm_client, vllm_generation):
            monkeypatch.setattr(module, "is_vllm_available", lambda *a, **k: True)
        monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
        monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", broadcast, raising=False)
        monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def trainer_of(url: str, directory: Path, **fields: Any) -> Any:
    fields = {"num_iterations": 2, "beta": 0.0, "epsilon": 5.0, "max_completion_length": 24, **fields}
    return make("GRPO", build(), directory, use_vllm=True, vllm_mode="server", vllm_server_base_url=url, **fields)


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
