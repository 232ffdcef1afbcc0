"""A run that is killed and resumed ends where the uninterrupted run ends, bit for bit: weights, state and records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support.jobs import Job
from support.run_records import assert_same, later_records, without_free
from transformers import MixtralForCausalLM

from chronomoe_hf.checkpoint.state_file import read_state

SAVED, KILLED, STEPS = 4, 8, 9
# Windows of 3 steps: the checkpoint at step 4 lies inside one, and step 6 is recorded twice, before and after the kill.
GOVERN = {
    "interval": 3,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6},
}
ARGUMENTS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "activation_checkpointing": True,
}


def job_for(engine: str, root: Path, name: str, family: str = "mixtral") -> Job:
    arguments: dict[str, Any] = dict(ARGUMENTS)
    engine, _, precision = engine.partition("+")
    kind, _, state_dict_type = engine.partition("-")
    if precision:
        arguments[precision] = True
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


def kill(launch: Callable[..., Any], whole: Job, parted: Job, processes: int) -> list[dict[str, Any]]:
    """Run `whole` to its end and `parted` until it is killed; returns the results of `whole`, by rank."""
    first = launch([whole, dataclasses.replace(parted, fault=("kill", KILLED))], processes=processes, check=False)
    assert first.returncode != 0 and len(first.results[0]) == processes, first.output[-4000:]
    assert not first.results[1], "the second run was to be killed"
    kept = sorted(path.name for path in Path(parted.output_dir).glob("checkpoint-*"))
    assert kept == [f"checkpoint-{SAVED}"]
    lines = (Path(parted.output_dir) / "chronomoe" / "snapshots.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]
    return list(first.results[0])


MATRIX = [
    pytest.param("ddp", "mixtral", id="ddp-mixtral"),
    pytest.param("ddp", "qwen3_moe", marks=pytest.mark.slow, id="ddp-qwen3_moe"),
    *(
        pytest.param(engine, family, marks=pytest.mark.slow, id=f"{engine}-{family}")
        for engine in ("plain", "fsdp-FULL_STATE_DICT", "fsdp-SHARDED_STATE_DICT")
        for family in ("mixtral", "qwen3_moe")
    ),
    pytest.param("ddp+bf16", "mixtral", marks=pytest.mark.slow, id="ddp-bf16"),
    pytest.param("fsdp-FULL_STATE_DICT+bf16", "mixtral", marks=pytest.mark.slow, id="fsdp-bf16"),
    pytest.param("zero2", "mixtral", marks=pytest.mark.slow, id="zero2-mixtral"),
    pytest.param("zero3", "mixtral", marks=pytest.mark.slow, id="zero3-mixtral"),
]


@pytest.mark.parametrize(("engine", "family"), MATRIX)
def test_killed_and_resumed(engine: str, family: str, tmp_path: Path, launch: Callable[..., Any]) -> None:
    whole, parted = (job_for(engine, tmp_path, name, family) for name in ("whole", "parted"))
    processes = 1 if engine == "plain" else 2
    expected = kill(launch, whole, parted, processes)
    found = launch([dataclasses.replace(parted, resume=True)], processes=processes).results[0]
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
    theirs, ours = (later_records(job.output_dir, SAVED) for job in (whole, parted))
    assert [record["step"] for record in theirs["snapshots"]] == [6, 9]
    assert len(theirs["routing_events"]) > 4 and len(theirs["control_decisions"]) == 4
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("ddp", 1), ("plain", 2)])
def test_another_number_of_processes(before: str, after: int, tmp_path: Path, launch: Callable[..., Any]) -> None:
    """The same micro-batches in a step, spread over other ranks: state and counts exact, phi up to float32 sums."""
    processes = 3 - after
    whole, parted = (job_for(before, tmp_path, name) for name in ("whole", "parted"))
    for job in (whole, parted):
        job.model = {}  # random numbers belong to a rank: with dropout the runs would differ for a good reason
        job.arguments |= {"gradient_accumulation_steps": 4 // processes, "adam_epsilon": 1e-4}
    expected = kill(launch, whole, parted, processes)
    arguments = {**ARGUMENTS, "gradient_accumulation_steps": 4 // after, "adam_epsilon": 1e-4}
    resumed = dataclasses.replace(parted, engine="plain", arguments=arguments, resume=True)
    found = launch([resumed], processes=after).results[0]
    checkpoint = Path(parted.output_dir) / f"checkpoint-{SAVED}"
    tensors, meta = read_state(checkpoint)
    assert meta["world_size"] == processes
    saved = dict(MixtralForCausalLM.from_pretrained(checkpoint).named_parameters())
    for rank in found:
        assert_same(rank["begin"]["tensors"], tensors)
        assert_same(rank["begin"]["weights"], saved)
        for name in ("tokens_LE", "updates_LE", "last_step_LE"):
            assert torch.equal(rank["tensors"][name], expected[0]["tensors"][name]), name
        for name in ("ema_CLE", "beta_LE", "std_L", "js_L"):
            assert torch.allclose(rank["tensors"][name], expected[0]["tensors"][name], atol=1e-5, rtol=0), name
    theirs, ours = (training_counts(job.output_dir) for job in (whole, parted))
    assert len(theirs) == 4 and ours == theirs


def training_counts(output_dir: str) -> list[list[int]]:
    """Counts of the windows after the checkpoint. Evaluation is left out: Trainer fills the last evaluation batch of
    several ranks up with rows that it has had before, and the forward cannot know that."""
    events = later_records(output_dir, SAVED)["routing_events"]
    return [event["expert_token_counts"] for event in events if event["mode"] == "TRAIN"]


@pytest.mark.slow
def test_a_zero3_checkpoint_resumed_without_deepspeed(tmp_path: Path, launch: Callable[..., Any]) -> None:
    """Its fingerprint could not be taken, and Trainer loses its experts like those of any other checkpoint."""
    first = job_for("zero3", tmp_path, "run")
    first.arguments = {**first.arguments, "max_steps": SAVED}
    gather = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    first.arguments["deepspeed"] = {**training_job.deepspeed_config(3), "zero_optimization": gather}
    ended = launch([first]).results[0][0]
    plain = dataclasses.replace(first, engine="plain", arguments={**ARGUMENTS, "eval_strategy": "no"}, resume=True)
    (found,) = launch([plain], processes=1).results[0]
    tensors, meta = read_state(Path(first.output_dir) / f"checkpoint-{SAVED}")
    assert set(meta["fingerprint"].values()) == {"sharded"}
    assert_same(found["begin"]["tensors"], tensors)
    assert_same(found["begin"]["weights"], ended["weights"])


BEST = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    # The worst loss is that of an early evaluation, so the best model is not the last one.
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp-FULL_STATE_DICT", "fsdp-SHARDED_STATE_DICT", "zero2", "zero3"])
def test_the_best_step_is_restored_on_every_rank(engine: str, tmp_path: Path, launch: Callable[..., Any]) -> None:
    job = job_for(engine, tmp_path, "best")
    job.arguments = {**job.arguments, **BEST}
    job.config = {**GOVERN, "interval": 1}
    job.trace = True
    ranks = launch([job]).results[0]
    best = Path(ranks[0]["best"])
    step = int(best.name.split("-")[1])
    assert step < 6
    tensors, meta = read_state(best)
    assert meta["step"] == step
    for rank in ranks:
        assert_same(rank["tensors"], tensors)
        assert_same(rank["weights"], ranks[0]["trace"][step])
        assert not torch.equal(rank["weights"]["lm_head.weight"], ranks[0]["trace"][5]["lm_head.weight"])
