"""measure sums over ranks: two processes with half of the batches each give the numbers of one process with all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.plans import keeping

from chronomoe_hf.lifecycle import measure

WORKER = Path(__file__).parent / "measure_worker.py"
KEPT = [[0, 2, 3, 5, 7], [1, 2, 4, 6, 7]]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does(
    engine: str, tmp_path: Path, start_script: Callable[..., tuple[int, str]]
) -> None:
    status, output = start_script(WORKER, [str(tmp_path), engine], 2)
    assert status == 0, output[-4000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["effect"] == ranks[1]["effect"]
    model = models.tiny_model("mixtral")
    batches = [models.tiny_batch("mixtral", seed=100 + index, padded=True) for index in range(4)]
    alone = measure(model, keeping(model, KEPT), batches, controls=1, seed=3).to_record()
    assert (
        alone["tokens"] == ranks[0]["effect"]["tokens"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    )
    for name in ("plan", "worst"):
        for key, value in alone[name].items():
            assert ranks[0]["effect"][name][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
    assert all("number of batches" in rank["uneven"] for rank in ranks)
