"""What a run's page shows of replay: the records of a real GRPO run, recounted; and drawn in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import models
from support.browser import colours, opened, plots

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.report import write_report
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.figures_replay import PAIRS, replay
from chronomoe_hf.telemetry import read_jsonl

from .grpo_job import make

pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = ("replay_layers", "replay_numbers")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes over every batch under other weights, with recomputed activations; nothing is repeated."""
    directory = tmp_path_factory.mktemp("measured")
    fields = {"num_iterations": 2, "gradient_checkpointing": True, "max_steps": 6}
    trainer = make("GRPO", models.tiny_model("qwen3_moe", num_experts_per_tok=2), directory, beta=0.0, **fields)
    config = ChronoConfig.observe(interval=2, replay__mode="measure", replay__recompute="count")
    chronomoe_hf.attach(trainer, config)
    trainer.train()
    return directory


def test_the_figures_hold_what_was_recorded(measured: Path) -> None:
    layers, numbers = replay(load_run(measured))
    assert (layers.key, numbers.key) == KEYS
    records, _ = read_jsonl(measured / "chronomoe" / "replay.jsonl")
    assert len(records) == 3
    main = max(PAIRS, key=lambda name: max(record["pairs"].get(name, {}).get("mean") or 0.0 for record in records))
    assert main != "rollout_old", "bad test setup: rollout and old-policy pass hold the same weights"
    last = [value for value in records[-1]["pairs"][main]["mismatch"] if value is not None]
    assert max(last) > 0.0, "bad test setup: no choice differs"
    assert f"{np.mean(last):.2%} of (token, layer)" in layers.sentence and "mode measure" in layers.sentence
    assert f"layer {int(np.argmax(last))}, {max(last):.2%}" in layers.sentence
    assert [row[-1] for row in layers.rows] == [f"{value:.2%}" for value in last]
    known = {name: records[-1]["logps"][name] for name in PAIRS if name in records[-1]["logps"]}
    assert f"The k3 KL of {PAIRS[main]} was" in numbers.sentence
    assert known and [row[0] for row in numbers.rows] == [PAIRS[name] for name in known]
    assert [row[1] for row in numbers.rows] == [f"{each['k3']:.2e}" for each in known.values()]
    panels = {panel["title"]: panel for panel in numbers.spec["panels"]}  # type: ignore[index]
    assert {"k3 KL (1/1000 nats)", "choices that flip in the recompute, worst layer"} <= set(panels)
    assert panels["mismatch by position, last window"]["x_name"] == "position in the completion"


def test_a_run_without_replay_has_no_such_section(tmp_path: Path) -> None:
    trainer = make("GRPO", models.tiny_model("qwen3_moe", num_experts_per_tok=2), tmp_path, beta=0.0, max_steps=1)
    chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
    trainer.train()
    assert replay(load_run(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn(width: int, scheme: str, measured: Path, tmp_path: Path) -> None:
    with opened(write_report(measured, tmp_path / "page.html"), width, scheme) as (page, said, _):
        drawn = plots(page)
        assert said == [] and all(drawn[key]["drawn"] == "yes" and min(colours(page, key)) > 2 for key in KEYS)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
