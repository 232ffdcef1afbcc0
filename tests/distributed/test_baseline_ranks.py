"""A forward baseline in two processes: the counts of both, and not a bit of the run is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Job
from support.models import NUM_EXPERTS, tiny_model

from chronomoe_hf.in_run.baseline import FORWARD_BATCHES
from chronomoe_hf.telemetry import read_jsonl


@pytest.mark.parametrize("engine", ["plain", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_forward_baseline_is_of_all_ranks_and_changes_nothing(
    engine: str, launch: Callable[..., Any], tmp_path: Path
) -> None:
    jobs = [
        Job(
            output_dir=str(tmp_path / source),
            engine=engine,
            preset="balance",
            config={"interval": 2, "telemetry": {"baseline": source}},
            model={"attention_dropout": 0.5},
        )
        for source in ("windows", "forward")
    ]
    one, two = launch(jobs).results
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == right["loss"]
        assert all(torch.equal(weight, right["weights"][name]) for name, weight in left["weights"].items())
        assert all(torch.equal(value, right["tensors"][name]) for name, value in left["tensors"].items())
    layers = [each["meta"]["alerts"]["reference"]["layers"] for each in two]
    assert layers[0] == layers[1], "every rank has the same baseline"
    (record,) = read_jsonl(tmp_path / "forward" / "chronomoe" / "baselines.jsonl")[0]
    assert record["source"] == "forward"
    assert [row["expert_token_counts"] for row in record["layers"]] == recount(two)


def recount(results: list[dict[str, Any]]) -> list[list[int]]:
    """Top 2 of every real token of the first batches of every rank, on the model as it was made."""
    model = tiny_model("mixtral", train=False)
    count = [[0] * NUM_EXPERTS for _ in range(2)]
    for result in results:
        for batch in [batch for step in result["fed"] for batch in step][:FORWARD_BATCHES]:
            with torch.no_grad():
                logits = model(**batch, output_router_logits=True).router_logits
            for layer, rows in enumerate(logits):
                for scores, real in zip(rows.tolist(), batch["attention_mask"].reshape(-1).tolist(), strict=True):
                    for expert in sorted(range(NUM_EXPERTS), key=lambda e: -scores[e])[:2] if real else ():
                        count[layer][expert] += 1
    return count
