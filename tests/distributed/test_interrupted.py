"""A run that is killed and resumed ends where the uninterrupted run ends, bit for bit: weights, state and records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_job import Job

from chronomoe_hf.checkpoint import read_state
from chronomoe_hf.telemetry import read_jsonl

SAVED, KILLED, STEPS = 4, 8, 9
# Windows of 3 steps: the checkpoint at step 4 lies inside one, and step 6 is recorded twice, before and after the kill.
GOVERN = {
    "interval": 3,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "warmup_scale_max": 0.5},
}
ARGUMENTS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "activation_checkpointing": True,
}
# What may differ between two runs of the same training: their names and their clocks.
FREE = ("run_id", "attempt", "time", "timestamp", "overhead_ms")


def job_for(engine: str, root: Path, name: str, family: str = "mixtral") -> Job:
    arguments: dict[str, Any] = dict(ARGUMENTS)
    kind, _, state_dict_type = engine.partition("-")
    if kind == "fsdp":
        del arguments["activation_checkpointing"]
        arguments["fsdp_config"] = {"state_dict_type": state_dict_type, "activation_checkpointing": True}
    return Job(
        output_dir=str(root / name),
        family=family,
        engine="plain" if kind == "ddp" else kind,
        config=GOVERN,
        arguments=arguments,
        model={"attention_dropout": 0.1},  # so that the random number generators matter
    )


def later_records(output_dir: str) -> dict[str, list[dict[str, Any]]]:
    """Records of the steps after the checkpoint, as a reader gets them, without FREE fields."""
    out = {}
    for kind in ("routing_events", "snapshots", "control_decisions", "lifecycle_decisions", "alerts"):
        records, broken = read_jsonl(Path(output_dir) / "chronomoe" / f"{kind}.jsonl")
        assert broken == 0
        out[kind] = [without_free(record) for record in records if record["step"] > SAVED]
    return out


def without_free(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_free(item) for name, item in value.items() if name not in FREE}
    return [without_free(item) for item in value] if isinstance(value, list) else value


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right) and left
    for name, value in left.items():
        assert torch.equal(value, right[name]), (name, (value - right[name]).abs().max())


def kill_and_resume(
    launch: Callable[..., Any], whole: Job, parted: Job, processes: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    first = launch([whole, dataclasses.replace(parted, kill_at=KILLED)], processes=processes, check=False)
    assert first.returncode != 0 and len(first.results[0]) == processes, first.output[-4000:]
    assert not first.results[1], "the second run was to be killed"
    kept = sorted(path.name for path in Path(parted.output_dir).glob("checkpoint-*"))
    assert kept == [f"checkpoint-{SAVED}"]
    lines = (Path(parted.output_dir) / "chronomoe" / "snapshots.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]
    second = launch([dataclasses.replace(parted, resume=True)], processes=processes)
    return first.results[0], second.results[0]


MATRIX = [
    pytest.param("ddp", "mixtral", id="ddp-mixtral"),
    pytest.param("ddp", "qwen3_moe", marks=pytest.mark.slow, id="ddp-qwen3_moe"),
    *(
        pytest.param(engine, family, marks=pytest.mark.slow, id=f"{engine}-{family}")
        for engine in ("plain", "fsdp-FULL_STATE_DICT", "fsdp-SHARDED_STATE_DICT")
        for family in ("mixtral", "qwen3_moe")
    ),
    pytest.param("zero2", "mixtral", marks=pytest.mark.slow, id="zero2-mixtral"),
    pytest.param("zero3", "mixtral", marks=pytest.mark.slow, id="zero3-mixtral"),
]


@pytest.mark.parametrize(("engine", "family"), MATRIX)
def test_killed_and_resumed(engine: str, family: str, tmp_path: Path, launch: Callable[..., Any]) -> None:
    whole, parted = (job_for(engine, tmp_path, name, family) for name in ("whole", "parted"))
    processes = 1 if engine == "plain" else 2
    expected, found = kill_and_resume(launch, whole, parted, processes)
    checkpoint = Path(parted.output_dir) / f"checkpoint-{SAVED}"
    tensors, meta = read_state(checkpoint)
    assert meta["step"] == SAVED and meta["window_steps"] == 1
    for before, after in zip(expected, found, strict=True):
        assert_same(after["begin"]["tensors"], tensors)
        assert_same(after["weights"], before["weights"])
        assert_same(after["tensors"], before["tensors"])
        assert after["meta"] == before["meta"]
        assert without_free(after["decisions"]) == without_free(before["decisions"])
    # Vacuity: something steered, and the weights went on moving after the checkpoint.
    assert all(record["scale"] > 0 for record in expected[0]["decisions"])
    assert expected[0]["tensors"]["beta_LE"].abs().max() > 0.01
    moved = found[0]["begin"]["weights"]
    assert all(not torch.equal(value, moved[name]) for name, value in found[0]["weights"].items() if "experts" in name)
    theirs, ours = later_records(whole.output_dir), later_records(parted.output_dir)
    assert [record["step"] for record in theirs["snapshots"]] == [6, 9]
    assert len(theirs["routing_events"]) > 4 and len(theirs["control_decisions"]) == 4
    assert ours == theirs
