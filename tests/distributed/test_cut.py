"""A cut in the middle of a run with two real processes: one plan, one mask, also after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job
from support.run_records import assert_same

from chronomoe_hf.lifecycle import PrunePlan
from chronomoe_hf.telemetry import read_jsonl


@pytest.mark.parametrize("engine", [pytest.param("plain", id="ddp"), pytest.param("fsdp", marks=pytest.mark.slow)])
def test_every_rank_holds_the_same_mask_and_a_resume_brings_it_back(
    engine: str, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    lifecycle = {"cut_at": 3, "keep": 0.5, "router_drift": True}
    config = {"interval": 2, "alerts": {"min_window_tokens": 1}, "lifecycle": lifecycle}
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    whole = Job(output_dir=str(tmp_path / "whole"), engine=engine, config=config, arguments=arguments)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = Job(
        output_dir=str(tmp_path / "resumed"), engine=engine, config=config, arguments=arguments, resume=str(checkpoint)
    )
    first, second = launch([whole, resumed]).results
    for ranks in (first, second):
        assert ranks[0]["meta"]["cut"] == ranks[1]["meta"]["cut"] and ranks[0]["meta"]["cut"]["step"] == 3
        assert_same(ranks[0]["tensors"], ranks[1]["tensors"])
        assert_same(ranks[0]["weights"], ranks[1]["weights"])
    assert first[0]["meta"]["cut"] == second[0]["meta"]["cut"]
    assert_same(first[0]["weights"], second[0]["weights"])
    assert_same(first[0]["tensors"], second[0]["tensors"])
    plan = PrunePlan.from_dict(first[1]["meta"]["cut"]["plan"])
    assert PrunePlan.load(tmp_path / "whole" / "chronomoe" / "prune_plan.json") == plan and plan.num_kept == 4
    records, broken = read_jsonl(tmp_path / "whole" / "chronomoe" / "routing_events.jsonl")
    assert broken == 0 and {record["step"] for record in records} == {2, 3, 4, 6}
    for record in records:
        routed = sum(record["expert_token_counts"][expert] for expert in plan.layers[record["layer_id"]].dropped)
        masked = record["step"] > 3 or (record["step"] == 3 and record["mode"] == "EVAL")
        assert (routed == 0) == masked and ("cut" in record) == masked
    drifts = {name: last_drift(tmp_path / name) for name in ("whole", "resumed")}
    assert drifts["resumed"] == drifts["whole"], "measured from the start of the first run"
    if engine == "plain":
        assert all(value > 0.0 for layer in drifts["whole"] for value in layer)
    else:
        assert drifts["whole"] == [None, None], "sharded outside a forward"


def last_drift(directory: Path) -> list[Any]:
    records, _ = read_jsonl(directory / "chronomoe" / "routing_events.jsonl")
    return [record["router_drift"] for record in records if record["mode"] == "TRAIN"][-2:]
