"""Counts, coherence, beta and decisions under every engine: exact sums, equal on all ranks, equal to one process.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support.jobs import Job
from support.models import NUM_EXPERTS, tiny_model
from support.run_records import assert_same

from chronomoe_hf.telemetry import read_jsonl

STEPS = 6
WATCH = {"interval": 1, "alerts": {"min_window_tokens": 1}}
# Every gate wide open: in six steps of a tiny model beta moves, is forgotten, and the lens steers.
GOVERN = {
    "interval": 2,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6},
}
# Adam divides by the gradient's own size: with its usual epsilon of 1e-8 the rounding noise of a sum in another order
# becomes a full step wherever a gradient is nearly zero, and two engines could not be compared to 1e-5.
EVALUATE = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": STEPS, "adam_epsilon": 1e-4}

ENGINES = [
    pytest.param("plain", id="ddp"),
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param("zero2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=pytest.mark.slow),
]


def recount(result: dict[str, Any], others: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Counts by step, layer and expert from the definition: replay every rank's micro-batches on a plain model."""
    model = tiny_model("mixtral", train=False)
    out = []
    for step, weights in enumerate(result["trace"]):
        model.load_state_dict(weights)
        count = [[0] * NUM_EXPERTS for _ in range(2)]
        for rank in [result, *others]:
            for batch in rank["fed"][step + 1]:
                with torch.no_grad():
                    logits = model(**batch, output_router_logits=True).router_logits
                real = batch["attention_mask"].reshape(-1).tolist()
                for layer, rows in enumerate(logits):
                    for scores, counts in zip(rows.tolist(), real, strict=True):
                        if counts:
                            for expert in sorted(range(NUM_EXPERTS), key=lambda e: -scores[e])[:2]:
                                count[layer][expert] += 1
        out.append(count)
    return out


def recorded_counts(output_dir: str) -> list[list[list[int]]]:
    records, broken = read_jsonl(Path(output_dir) / "chronomoe" / "routing_events.jsonl")
    assert broken == 0
    train = [record for record in records if record["mode"] == "TRAIN"]
    assert [record["step"] for record in train] == [1 + index // 2 for index in range(2 * STEPS)]
    return [[train[2 * step + layer]["expert_token_counts"] for layer in range(2)] for step in range(STEPS)]


def first_events(output_dir: str) -> list[dict[str, Any]]:
    """The events of the first window, one a layer."""
    records, _ = read_jsonl(Path(output_dir) / "chronomoe" / "routing_events.jsonl")
    return [record for record in records if record["mode"] == "TRAIN"][:2]


def recorded_loss_tokens(output_dir: str) -> list[int]:
    records, _ = read_jsonl(Path(output_dir) / "chronomoe" / "snapshots.jsonl")
    return [record["loss_tokens"] for record in records if record["mode"] == "TRAIN"]


def labels_fed(ranks: list[dict[str, Any]]) -> list[int]:
    """Labels that were predicted, by step, over all ranks."""
    fed = [[batch["labels"][:, 1:] for rank in ranks for batch in rank["fed"][step + 1]] for step in range(STEPS)]
    return [sum(int((labels != -100).sum()) for labels in step) for step in fed]


def assert_equal_ranks(results: list[dict[str, Any]]) -> None:
    first, *others = results
    assert others
    for other in others:
        assert first["meta"] == other["meta"]
        assert first["decisions"] == other["decisions"]
        for name in ("tensors", "weights"):
            assert_same(first[name], other[name])


def make_jobs(engine: str, root: Path, checkpointing: list[bool]) -> list[Job]:
    jobs = []
    for on in checkpointing:
        arguments = {**EVALUATE, "activation_checkpointing": on}
        if engine == "fsdp" and on:
            arguments = {**EVALUATE, "fsdp_config": {"activation_checkpointing": True}}
        watch = Job(output_dir=str(root / f"watch-{on}"), engine=engine, preset="observe", config=WATCH, trace=True)
        govern = Job(output_dir=str(root / f"govern-{on}"), engine=engine, config=GOVERN)
        jobs += [dataclasses.replace(job, arguments=arguments) for job in (watch, govern)]
    return jobs


def check_governed(result: dict[str, Any]) -> None:
    """Nothing below is worth much if beta, forgetting or the lens stood still."""
    assert all(record["scale"] > 0 for record in result["decisions"])
    assert any(record["beta_multiplier"] < 1 for record in result["decisions"])
    assert result["tensors"]["beta_LE"].abs().max() > 0.01
    assert result["tensors"]["js_L"].min() > 0
    assert all(result["tensors"][f"lens.{layer}.U"].norm() > 0 for layer in range(2))


def one_process(engine_jobs: list[Job], root: Path) -> list[dict[str, Any]]:
    """The same micro-batches in one process: twice the accumulation."""
    results = []
    for index, job in enumerate(engine_jobs):
        arguments = {**job.arguments, "gradient_accumulation_steps": 4}
        arguments.pop("fsdp_config", None)
        alone = dataclasses.replace(job, engine="plain", arguments=arguments, output_dir=str(root / f"one-{index}"))
        results.append(training_job.run(alone))
    return results


def test_counts_in_one_process(tmp_path: Path) -> None:
    for on in (False, True):
        watch, govern = make_jobs("plain", tmp_path, [on])
        result = training_job.run(watch)
        assert recorded_counts(watch.output_dir) == recount(result, [])
        check_governed(training_job.run(govern))


@pytest.mark.parametrize("engine", ENGINES)
def test_counts_and_agreement(engine: str, tmp_path: Path, launch: Callable[..., Any]) -> None:
    jobs = make_jobs(engine, tmp_path, [False, True])
    runs = launch(jobs).results
    kinds = {"plain": "MULTI_CPU", "fsdp": "FSDP"}
    for job, ranks in zip(jobs, runs, strict=True):
        assert [rank["distributed_type"] for rank in ranks] == [f"DistributedType.{kinds.get(engine, 'DEEPSPEED')}"] * 2
        assert_equal_ranks(ranks)
        fed = [[batch["input_ids"].tolist() for step in rank["fed"] for batch in step] for rank in ranks]
        assert len(fed[0]) == len(fed[1]) == 2 * STEPS and not any(batch in fed[1] for batch in fed[0])
        if job.trace:
            counts = recorded_counts(job.output_dir)
            assert counts == recount(ranks[0], ranks[1:])
            assert sum(map(sum, counts[0])) > 0
            assert recorded_loss_tokens(job.output_dir) == labels_fed(ranks)
        else:
            check_governed(ranks[0])
    for index, (job, ranks, alone) in enumerate(zip(jobs, runs, one_process(jobs, tmp_path), strict=True)):
        compare_with_one_process(ranks, alone)
        together, apart = (first_events(directory) for directory in (job.output_dir, str(tmp_path / f"one-{index}")))
        for ours, theirs in zip(together, apart, strict=True):  # weights have hardly parted there
            for name in ("contribution", "saliency", "gate_sum", "mean_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def compare_with_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    together = sorted(batch["input_ids"].tolist() for rank in ranks for step in rank["fed"] for batch in step)
    assert together == sorted(batch["input_ids"].tolist() for step in alone["fed"] for batch in step)
    ours, theirs = ranks[0]["tensors"], alone["tensors"]
    for name in ("tokens_LE", "updates_LE", "last_step_LE", "std_updates_L"):
        assert torch.equal(ours[name], theirs[name]), name
    # Engines add gradients up in another order, by the processor's vector width too: the weights then differ in their
    # last bits after some steps, and what is measured on them differs as much.
    names = [name for name in ranks[0]["weights"] if name in alone["weights"]]
    apart = max(
        float((ranks[0]["weights"][name].float() - alone["weights"][name].float()).abs().max()) for name in names
    )
    assert apart < 1e-4
    for name in ("ema_CLE", "phi_raw_LE", "beta_LE", "std_L", "js_L"):
        assert torch.allclose(ours[name].double(), theirs[name].double(), atol=max(1e-5, 2 * apart), rtol=0), (
            name,
            (ours[name] - theirs[name]).abs().max(),
        )


@pytest.mark.slow
def test_weights_that_are_partitioned_before_the_wrap(tmp_path: Path, launch: Callable[..., Any]) -> None:
    """Under an active ZeRO-3 configuration from_pretrained gives every rank empty tensors, and wrap gets those."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    made, loaded = (Job(output_dir=str(tmp_path / name), engine="zero3", config=GOVERN) for name in ("made", "loaded"))
    loaded.pretrained = str(tmp_path / "base")
    expected, found = launch([made, loaded]).results
    assert [rank["sharded_at_wrap"] for rank in expected + found] == [False, False, True, True]
    check_governed(found[0])
    for rank in found:
        assert_same(rank["weights"], expected[0]["weights"])
        assert_same(rank["tensors"], expected[0]["tensors"])
