"""Models that Transformers distributes itself (DistributedConfig): every token is counted once, whoever computes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny

HERE = Path(__file__).resolve().parent
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp_size": 2},
    "tp2+ep2": {"tp_size": 2, "ep_size": 2},
    "fsdp2": {"fsdp_size": 2},
    "fsdp2+ep2": {"fsdp_size": 2, "ep_size": 2},
}
REPLACED = "no coherence: the experts' forward was replaced on the instance by "


def launch(directory: Path, family: str, layout: dict[str, int], preset: str) -> list[dict[str, Any]]:
    output = directory / "result"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(directory), family, json.dumps(layout), preset, str(output)]
    done = subprocess.run(
        [*command, str(HERE / "parallel_worker.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory / f"result.{rank}").read_text()) for rank in range(2)]


def single_process_counts(model: Any, family: str, replicas: int) -> list[list[list[int]]]:
    """[step][layer][expert] from the recorded logits of the undistributed model, token by token."""
    table = []
    for step in (1, 2):
        counts = [[0] * tiny.NUM_EXPERTS for _ in range(2)]
        for replica in range(replicas):
            batch = tiny.tiny_batch(family, seed=10 * step + replica, padded=True)
            with torch.no_grad():
                logits = model(**batch, output_router_logits=True).router_logits
            for layer, rows in enumerate(logits):
                for row, real in zip(rows.tolist(), batch["attention_mask"].flatten().tolist(), strict=True):
                    for expert in sorted(range(len(row)), key=lambda e: -row[e])[:2] if real else []:
                        counts[layer][expert] += 1
        table.append(counts)
    return table


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_counts_are_those_of_one_process(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    model.save_pretrained(tmp_path)
    sizes = LAYOUTS[layout]
    replicas = 2 // sizes.get("tp_size", 1)
    ranks = launch(tmp_path, family, sizes, "observe")
    assert "error" not in ranks[0], ranks[0]
    assert ranks[0] == ranks[1]
    want = single_process_counts(model, family, replicas)
    assert [[layer[0] for layer in window] for window in ranks[0]["windows"]] == want
    assert all(layer[1:] == [58 * replicas, replicas] for window in ranks[0]["windows"] for layer in window)
    assert all(name.startswith("Chrono") for name in ranks[0]["native_class"])
    # Read where the experts are whole; refused, and said so, where their forward was replaced.
    assert ranks[0]["experts_forward_replaced"] is (layout != "fsdp2"), "bad test setup"
    if ranks[0]["experts_forward_replaced"]:
        assert [len(notes) for notes in ranks[0]["notes"]] == [1, 1]
        assert all(notes[0].startswith(REPLACED) for notes in ranks[0]["notes"]) and ranks[0]["phi"] == [None, None]
    else:
        assert ranks[0]["notes"] == [[], []]
        assert sum(value is not None for value in ranks[0]["phi"][0]) >= 6


@pytest.mark.parametrize("layout", ["tp2", "fsdp2"])
def test_balance_acts_alike_on_every_rank(layout: str, tmp_path: Path) -> None:
    tiny.tiny_model("mixtral").save_pretrained(tmp_path)
    ranks = launch(tmp_path, "mixtral", LAYOUTS[layout], "balance")
    assert ranks[0] == ranks[1]
    assert max(abs(value) for row in ranks[0]["beta"] for value in row) > 0.01
