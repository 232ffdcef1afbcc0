"""Two processes load a state that one of them can read: all raise alike and change nothing, or all hold the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_batch, tiny_model

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.checkpoint.state_file import read_state, write_state

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def test_both_ranks_raise_alike_or_hold_the_same(tmp_path: Path, start_script: Callable[..., Any]) -> None:
    model = chronomoe_hf.wrap(tiny_model("mixtral"), ChronoConfig.balance(interval=1)).train()
    system = chronomoe_hf.system_of(model)
    for step in (1, 2, 3):
        model(**tiny_batch("mixtral", seed=step))
        system.step(step)
    assert system.save(tmp_path / "sound") and system.step_state.beta_LE.any()
    tensors, meta = read_state(tmp_path / "sound")
    assert write_state(tmp_path / "faulty", {**tensors, "beta_LE": torch.full((2, 8), float("nan"))}, meta)
    returncode, output = start_script(HERE / "state_loading.py", [str(tmp_path)], 2)
    assert returncode == 0, output[-6000:]
    lines = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert lines[0] == lines[1]
    beta = lines[0].pop("beta")
    assert torch.equal(torch.tensor(beta), system.step_state.beta_LE)
    assert lines[0] == {
        "missing": "StateMissingError",
        "faulty": "StateCorruptError",
        "step": "StateError",
        "unchanged": True,
        "wrapped": "StateCorruptError",
        "left": True,
        "sound": "none",
    }
