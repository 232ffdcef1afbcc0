"""Under engines too, the model that Trainer makes anew is the one that is governed, saved and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job
from support.laws import FULL
from support.run_records import assert_same

from chronomoe_hf.checkpoint.state_file import read_state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "family", "kind"), [("plain", "mixtral", "MULTI_CPU"), ("fsdp", "qwen3_moe", "FSDP")]
)
def test_a_model_made_anew_is_governed_and_resumed_from_elsewhere(
    engine: str, family: str, kind: str, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    whole = Job(
        output_dir=str(tmp_path / "whole"),
        family=family,
        engine=engine,
        preset="balance",
        config={"interval": 2, "beta": FULL},
        arguments={"max_steps": 6, "save_strategy": "steps", "save_steps": 3},
        remade=True,
    )
    resume = str(tmp_path / "whole" / "checkpoint-3")
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"), resume=resume)
    first, second = launch([whole, parted]).results
    assert first[0]["distributed_type"].endswith(kind)
    for ranks in (first, second):
        assert_same(ranks[0]["tensors"], ranks[1]["tensors"])
        assert ranks[0]["meta"]["step"] == 6
    assert first[0]["tensors"]["beta_LE"].abs().max() > 0.05
    assert_same(second[0]["weights"], first[0]["weights"])
    assert_same(second[0]["tensors"], first[0]["tensors"])
    ids = {name: read_state(tmp_path / name / "checkpoint-6")[1]["run_id"] for name in ("whole", "parted")}
    assert ids["whole"] == ids["parted"], "a resume keeps the run id, on every process"
