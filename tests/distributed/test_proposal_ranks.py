"""Proposals measured by two processes: one plan, from the main process; losses and loads over both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.split_proposals import DONOR, EDITS, held_out, one_idle, propose, watch

from chronomoe_hf.in_run.proposals import measure_proposals

WORKER = Path(__file__).parent / "proposal_worker.py"
pytestmark = pytest.mark.slow


def ranks(tmp_path: Path, engine: str, k: int, start_script: Callable[..., tuple[int, str]]) -> list[dict[str, Any]]:
    status, output = start_script(WORKER, [str(tmp_path), engine, str(k)], 2)
    assert status == 0, output[-4000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("k", [1, 2])
def test_two_processes_measure_what_one_does(
    k: int, tmp_path: Path, start_script: Callable[..., tuple[int, str]]
) -> None:
    one, two = ranks(tmp_path, "ddp", k, start_script)
    assert one["record"] == two["record"] and one["same"] and two["same"]
    model = one_idle(k=k)
    system = watch(model)
    propose(system, "split", (DONOR,), EDITS)
    batches = held_out(count=4)
    (alone,) = measure_proposals(system, model, [batches[0], *batches[2:]])  # of three batches the first one plans
    assert alone["tokens"] == one["record"]["tokens"] and all(edit["measured"] for edit in alone["edits"])
    assert alone["planned_on_tokens"] == one["record"]["planned_on_tokens"]
    for mine, its in zip(alone["edits"], one["record"]["edits"], strict=True):
        for name, value in mine.items():
            exact = not isinstance(value, float | list) or name == "experts"
            assert its[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6)), (mine["edit"], name)


def test_sharded_experts_are_refused_by_name_and_the_rest_is_measured(
    tmp_path: Path, start_script: Callable[..., tuple[int, str]]
) -> None:
    one, two = ranks(tmp_path, "fsdp2", 2, start_script)
    assert one["record"] == two["record"]
    told = {edit["edit"]: edit for edit in one["record"]["edits"]}
    assert told["prune"]["measured"]
    assert all("sharded over the ranks" in told[name]["reason"] for name in ("split", "spawn", "balance"))
