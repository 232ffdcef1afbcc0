"""One sample state per step, and the check that a directory holds exactly that state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chronomoe_hf.checkpoint.manifest import MANIFEST_FILE, TENSOR_FILE
from chronomoe_hf.checkpoint.state_file import read_state

State = tuple[dict[str, torch.Tensor], dict[str, Any]]


def make_state(step: int) -> State:
    """Every value depends on `step`, so two states cannot be mixed without a difference."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "beta.0": torch.randn(4, generator=generator),
        "beta.1": torch.randn(8, generator=generator, dtype=torch.float64),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "updates": torch.arange(step, step + 6).reshape(2, 3),
        "scalar": torch.tensor(float(step)),
        "seen": torch.tensor([True, False, step % 2 == 0]),
        "empty": torch.zeros(0, 7),
    }
    layers = [
        {
            "name": f"model.layers.{i}.mlp.gate",
            "router_class": "MixtralTopKRouter",
            "num_experts": 4 * i + 4,
            "top_k": 2,
        }
        for i in range(2)
    ]
    meta = {
        "step": step,
        "layers": layers,
        "config": {"interval": 100},
        "controller": {"pressure": [0.1 * step, 1e-300, None], "name": "caf\u00e9 \u2028 \x1b[31m"},
        "fingerprint": {"model.layers.0.mlp.gate.weight": f"float32 4x8 {step:064x}"},
        "world_size": 2,
        "anything": {"nested": [[], {}, True]},
    }
    return tensors, meta


def assert_equal_state(tensors: dict[str, torch.Tensor], meta: dict[str, Any], step: int) -> None:
    expected, expected_meta = make_state(step)
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name
    assert {key: meta[key] for key in expected_meta} == expected_meta


def held_step(directory: Path) -> int:
    """Read `directory` and prove that all of it belongs to one step; returns that step."""
    tensors, meta = read_state(directory)
    assert_equal_state(tensors, meta, meta["step"])
    return int(meta["step"])


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked process and return its exit status (negative: the signal that ended it)."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


FILES = {TENSOR_FILE, MANIFEST_FILE}


@pytest.fixture
def sample_state() -> Callable[[int], State]:
    return make_state


@pytest.fixture
def step_in() -> Callable[[Path], int]:
    return held_step


@pytest.fixture
def forked() -> Callable[[Callable[[], int]], int]:
    return in_child
