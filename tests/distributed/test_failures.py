"""What goes wrong on one rank is known to all, and never a hang; and data that is uneven or empty is counted right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Job
from support.run_records import later_records

GOVERN: dict[str, Any] = {
    "interval": 2,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6},
}
STRICT = {**GOVERN, "checkpoint": {"strict_save": True}}


def block(root: Path, step: int) -> str:
    """An output directory in which the state of `step` cannot be written."""
    target = root / f"checkpoint-{step}" / "chronomoe" / "state.tensors"
    target.mkdir(parents=True)
    (target / "in the way").touch()
    return str(root)


def test_failures_reach_every_rank(tmp_path: Path, launch: Callable[..., Any]) -> None:
    save = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    jobs = [
        Job(output_dir=block(tmp_path / "early", 3), config=STRICT, arguments=save),
        Job(output_dir=block(tmp_path / "last", 6), config=STRICT, arguments=save),
        Job(output_dir=str(tmp_path / "drift"), config=GOVERN, fault=("corrupt beta", 3)),
        Job(output_dir=str(tmp_path / "leader"), config=GOVERN, fault=("corrupt scale", 3), arguments={"max_steps": 4}),
    ]
    early, last, drift, leader = launch(jobs).results
    for rank in (*early, *last):
        assert rank["error"] == "StateWriteError"
        assert "strict_save" in rank["message"]
    assert "checkpoint-3" in early[0]["message"]
    assert {record["step"] for record in later_records(tmp_path / "early")["snapshots"]} == {2}, "raised at step 4"
    assert {record["step"] for record in later_records(tmp_path / "last")["snapshots"]} == {2, 4, 6}
    for rank in drift:
        assert rank["error"] == "ChronoError"
        assert "chronomoe state differs between ranks (checksum spread" in rank["message"]
    assert {record["step"] for record in later_records(tmp_path / "drift")["snapshots"]} == {2}, "raised at step 4"
    # Rank 1 would have halved its lens scale; rank 0's numbers are in force on both.
    assert leader[1]["meta"]["controller"] != leader[0]["meta"]["controller"]
    assert leader[1]["decisions"][0]["scale"] < leader[0]["decisions"][0]["scale"]
    for name, value in leader[0]["tensors"].items():
        assert torch.equal(value, leader[1]["tensors"][name]), name
    assert float(leader[1]["tensors"]["lens.0.scale"]) == leader[0]["decisions"][0]["scale"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "fsdp"])
def test_a_fault_in_the_host_part_of_one_rank_hangs_and_parts_nobody(
    engine: str, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    """The window closes at step 4 with lenses open, so that under FSDP2 every rank gathers router weights there."""
    arguments = {"max_steps": 6}
    faults = {"other": ("break host", 4), "main": ("break main host", 4)}
    jobs = [
        Job(output_dir=str(tmp_path / name), engine=engine, config=GOVERN, fault=fault, arguments=arguments)
        for name, fault in faults.items()
    ]
    raising = {**GOVERN, "telemetry": {"on_error": "raise"}}
    jobs += [
        Job(
            output_dir=str(tmp_path / f"{name} raises"), engine=engine, config=raising, fault=fault, arguments=arguments
        )
        for name, fault in faults.items()
    ]
    jobs.append(Job(output_dir=str(tmp_path / "sound"), engine=engine, config=GOVERN, arguments=arguments))
    launched = launch(jobs)
    other, main, other_raises, main_raises, sound = launched.results
    for ranks in (other, main, sound):
        for name, value in ranks[0]["tensors"].items():
            assert torch.equal(value, ranks[1]["tensors"][name]), name
        assert ranks[0]["meta"]["step"] == ranks[1]["meta"]["step"] == 6
    scale = sound[0]["tensors"]["lens.0.scale"]
    assert float(scale) > 0.0, "bad test setup: no lens was open"
    # Where the deciding process is sound, nothing is lost but the other's own view of the window.
    for name, value in sound[0]["tensors"].items():
        assert torch.equal(value, other[0]["tensors"][name]), name
    assert not torch.equal(main[0]["tensors"]["beta_LE"], sound[0]["tensors"]["beta_LE"]) or not torch.equal(
        main[0]["tensors"]["lens.0.scale"], scale
    ), "the window that was lost decided something"
    steps = {
        name: [record["step"] for record in later_records(tmp_path / name)["snapshots"]] for name in ("other", "main")
    }
    assert steps == {"other": [2, 4, 6], "main": [2, 6]}
    words = "step 4: chronomoe_hf failed to evaluate a window on 1 of 2 processes"
    for rank in (*other_raises, *main_raises):
        assert rank["error"] == "ChronoError" and words in rank["message"]
    assert launched.output.count(f"{words}; see the traceback in that process's log; training goes on") == 4
    assert launched.output.count("ZeroDivisionError: a mistake of ours on rank") == 4


ODD: dict[str, Any] = {
    # 13 rows are 4 batches a rank, the last ones filled up by repetition: they count as often as they train.
    "uneven": {"examples": 13, "arguments": {"max_steps": 6}},
    # Row by row in order: rank 1 gets nothing but padding, in every layer and step.
    "blank": {
        "blank": True,
        "arguments": {"max_steps": 4, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "fsdp"])
def test_uneven_and_empty_micro_batches(engine: str, tmp_path: Path, launch: Callable[..., Any]) -> None:
    config = {**GOVERN, "interval": 1}
    jobs = [Job(output_dir=str(tmp_path / name), engine=engine, config=config, **ODD[name]) for name in ODD]
    uneven, blank = results = launch(jobs).results
    sizes = [{len(batch["input_ids"]) for step in rank["fed"] for batch in step} for rank in uneven]
    assert sizes == [{2}, {2}], "accelerate fills short batches up with rows that have been seen"
    assert not any(batch["attention_mask"].any() for step in blank[1]["fed"] for batch in step)
    for job, ranks in zip(jobs, results, strict=True):
        records = later_records(job.output_dir)["routing_events"]
        steps = sorted({record["step"] for record in records})
        for step in steps:
            real = sum(int(batch["attention_mask"].sum()) for rank in ranks for batch in rank["fed"][step])
            for record in records:
                if record["step"] == step:
                    assert record["tokens"] == real > 0
                    assert sum(record["expert_token_counts"]) == 2 * real
                    assert record["nonfinite_tokens"] == 0
        assert steps == list(range(1, job.arguments["max_steps"] + 1))
        assert ranks[0]["meta"] == ranks[1]["meta"]
        for name, value in ranks[0]["tensors"].items():
            assert torch.equal(value, ranks[1]["tensors"][name]), name
            assert torch.isfinite(value.double()).all(), name
