"""TRL's server mode without a GPU: a process in vLLM's place, and TRL's own client in a gloo group with it.

TRL's client, its generation and its sync run as they are; gloo carries the tensors where NCCL does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Glm4MoeConfig
from trl.generation import vllm_client, vllm_generation

from .grpo_job import WORDS, make


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


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The address of a process that serves :func:`build`'s weights."""
    build().save_pretrained(directory / "model")
    command = [sys.executable, str(Path(__file__).with_name("server_process.py")), str(directory / "model")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    )
    try:
        assert process.stdout is not None
        port = next(line.strip() for line in iter(process.stdout.readline, "") if line.strip().isdigit())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def taken_for_vllm() -> list[tuple[Any, str, Any]]:
    """What has to be set for TRL to take that process for vLLM 0.28 or newer: (module, name, value)."""
    return [
        (vllm_client, "is_vllm_available", lambda *args, **kwargs: True),
        (vllm_generation, "is_vllm_available", lambda *args, **kwargs: True),
        (vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True),
        (vllm_client, "packed_nccl_broadcast_producer", broadcast),
        (vllm_generation, "VLLMClient", Client),
    ]


def trainer_of(url: str, directory: Path, **fields: Any) -> Any:
    fields = {"num_iterations": 2, "beta": 0.0, "epsilon": 5.0, "max_completion_length": 24, **fields}
    return make("GRPO", build(), directory, use_vllm=True, vllm_mode="server", vllm_server_base_url=url, **fields)
