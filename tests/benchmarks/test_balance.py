"""The balance benchmark: its measures against their definitions, its claims on made-up runs, and a quick real run."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return load("_balance_table")


@pytest.fixture(scope="module")
def job() -> ModuleType:
    pytest.importorskip("tokenizers")
    return load("_balance_job")


@pytest.fixture(scope="module")
def measure(job: ModuleType) -> ModuleType:
    return load("_balance_measure")


def naive_neff_fraction(counts: list[int]) -> float:
    shares = [count / sum(counts) for count in counts]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0)) / len(counts)


def test_neff_fraction_is_the_definition(measure: ModuleType) -> None:
    count = torch.randint(0, 50, (5, 3, 8), generator=torch.Generator().manual_seed(0))
    count[0, 0, :4] = 0
    got = measure.neff_fraction(count)
    for step in range(5):
        for layer in range(3):
            assert float(got[step, layer]) == pytest.approx(naive_neff_fraction(count[step, layer].tolist()), abs=1e-12)


def test_updates_to_reach_waits_for_the_worst_layer_and_ignores_a_spike(measure: ModuleType) -> None:
    neff = torch.full((40, 2), 0.95)
    neff[:20, 1] = 0.5
    neff[3, 1] = 1.0  # one good step is not balance
    # The first ten steps that average 0.9: at most one of them may be 0.5.
    assert measure.updates_to_reach(neff) == 20
    assert measure.updates_to_reach(torch.full((40, 2), 0.89)) is None
    assert measure.updates_to_reach(torch.full((40, 2), 0.91)) == 1


def test_every_arm_has_its_rule(job: ModuleType) -> None:
    assert job.arm_config("sign", 0.01).beta.rule == "sign"
    assert job.arm_config("sign", 0.01).beta.rate == 0.01
    assert job.arm_config("sign@0.1", 0.01).beta.rate == 0.1
    assert job.arm_config("balance", 0.01).beta.rule == "quadratic"
    assert job.arm_config("none", 0.01).beta.law == job.arm_config("aux", 0.01).beta.law == "none"
    coherence = job.arm_config("coherence", 0.01)
    assert coherence.beta.law == "coherence"
    assert not (coherence.lens.enabled or coherence.veto.enabled or coherence.control.enabled)


def row(arm: str, **changes: Any) -> dict[str, Any]:
    base = {
        "setting": "e8",
        "arm": arm,
        "seed": 0,
        "valid_loss": 3.0,
        "worst_neff_tail": 0.7,
        "worst_neff_window": 0.7,
        "updates_to_reach": 10,
        "max_violation_tail": 0.5,
        "max_violation_valid": 0.5,
        "dead_tail": 0,
        "floor_misses": [],
        "decisions": {},
        "alerts": [],
        "first_action": None,
        "loss_bits": ["0x1p+0", "0x1p+1"],
    }
    return {**base, **changes}


def claims_of(table: ModuleType, setting: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    runs = [{**each, "setting": setting} for each in rows]
    found: list[dict[str, Any]] = table.claims({"settings": {setting: {}}, "runs": runs, "sign_rate": {setting: 0.1}})
    return found


def verdicts(table: ModuleType, setting: str, *rows: dict[str, Any]) -> list[bool]:
    return [claim["holds"] for claim in claims_of(table, setting, *rows)]


def test_half_the_updates_is_judged_seed_by_seed(table: ModuleType) -> None:
    for ours, theirs, holds in ((5, 10, True), (6, 10, False), (5, None, True), (None, 10, False)):
        rows = [row("balance", updates_to_reach=ours), row("sign", updates_to_reach=theirs)]
        assert verdicts(table, "e8", *rows) == [holds, True], (ours, theirs)
    rows = [row("balance", max_violation_tail=0.6, updates_to_reach=5), row("sign")]
    assert verdicts(table, "e8", *rows) == [True, False]


def test_the_loss_is_judged_by_paired_seeds(table: ModuleType) -> None:
    def arm(name: str, losses: list[float]) -> list[dict[str, Any]]:
        return [row(name, seed=seed, valid_loss=loss) for seed, loss in enumerate(losses)]

    aux = arm("aux", [3.0, 4.0, 5.0])
    # Differences +0.01 each: a standard error of nearly 0, although the seeds are far apart.
    assert verdicts(table, "e8", *aux, *arm("balance", [3.01, 4.01, 5.01])) == [True, False]
    assert verdicts(table, "e8", *aux, *arm("balance", [3.03, 3.98, 5.02])) == [True, True]
    assert verdicts(table, "e8", *aux, *arm("balance", [2.9, 3.9, 4.9])) == [True, True]
    assert verdicts(table, "e8", *aux, *arm("balance", [3.03, 4.03, 5.03])) == [False, False]
    (found,) = {claim["numbers"] for claim in claims_of(table, "e8", *aux, *arm("balance", [3.03, 3.98, 5.02]))}
    # Mean of 0.03, -0.02, 0.02; their standard deviation is sqrt(0.0007), over sqrt(3).
    assert found == "+0.0100 with standard error 0.0153; by seed +0.0300, -0.0200, +0.0200"


def test_a_layer_below_the_floor_must_be_explained(table: ModuleType) -> None:
    none = row("none")
    acting, abstaining = ({"layer": 1, "dead": 2, "abstained": why} for why in ({}, {"lens_unfit": 3}))
    for misses, holds in (([], True), ([acting], False), ([abstaining], True), ([abstaining, acting], False)):
        found = verdicts(table, "e8", none, row("protect", dead_tail=2 * len(misses), floor_misses=misses))
        assert found[:2] == [holds, holds], "a dead expert and a layer below the floor, each explained or not"
    assert verdicts(table, "e8", none, row("protect", valid_loss=3.1))[2] is False


def test_a_healthy_run_is_compared_bit_by_bit_until_the_first_action(table: ModuleType) -> None:
    none = row("none", loss_bits=["a", "b", "c"])
    quiet = {"no_pressure": 4}
    later = row("protect", decisions=quiet, first_action=2, loss_bits=["a", "b", "x"])
    early = row("protect", decisions=quiet, first_action=2, loss_bits=["a", "x", "c"])
    assert verdicts(table, "healthy", none, later) == [True, True, True]
    assert verdicts(table, "healthy", none, early) == [True, True, False]
    acted = row("protect", decisions={"no_pressure": 3, "acted": 1}, alerts=["DRIFT"], loss_bits=["a", "b", "c"])
    assert verdicts(table, "healthy", none, acted) == [False, False, True]


def test_later_parts_replace_what_earlier_ones_measured(measure: ModuleType, table: ModuleType, tmp_path: Path) -> None:
    balance = load("balance")

    def part(name: str, *rows: dict[str, Any], **changes: Any) -> Path:
        results = {**balance.header(["e8"], [0]), "runs": list(rows), "sign_rate": {"e8": 0.1}, **changes}
        balance.write(results, tmp_path / name)
        return tmp_path / name

    first = part("first", row("sign", valid_loss=2.0), row("none", valid_loss=1.0))
    second = part("second", row("none", valid_loss=9.0), row("none", seed=1), seeds=[1])
    balance.merge([first, second], tmp_path)
    merged = json.loads((tmp_path / "balance.json").read_text())
    assert [(r["arm"], r["seed"], r["valid_loss"]) for r in merged["runs"]] == [
        ("none", 0, 9.0),
        ("none", 1, 3.0),
        ("sign", 0, 2.0),
    ]
    assert merged["seeds"] == [0, 1]
    configs = {**merged["configs"], "balance": {}}
    with pytest.raises(SystemExit, match=r"configs of \['balance'\]"):
        balance.merge([first, part("other", configs=configs)], tmp_path)
    with pytest.raises(SystemExit, match="versions"):
        balance.merge([first, part("older", versions={})], tmp_path)
    assert json.loads((tmp_path / "balance.json").read_text()) == merged


def test_a_changed_part_stands_beside_protect_and_apart_from_the_arms(measure: ModuleType, table: ModuleType) -> None:
    results = load("balance").header(["e8"], [0, 1])
    losses = {"none": (3.0, 4.0), "protect": (3.01, 4.01), "no memory": (3.1, 4.0)}
    results["runs"] = [
        row(
            arm,
            seed=seed,
            valid_loss=loss,
            harmed=2,
            lens_spread=[0.7, 0.2],
            lens_scale=[0.0, 1.0],
            neff_tail=[0.7, 0.8],
            decisions={"acted": 5},
        )
        for arm, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    text = table.markdown(results)
    arms, _, rest = text.partition("## e8: protect with one thing changed, by seed")
    assert "no memory" not in arms
    changed, _, spreads = rest.partition("## Spread of the lens's reader")
    assert "| nothing | +0.0100 (+0.0100, +0.0100) | 0.70 0.70 | 0.80 0.80 | 0 0 | 5 5 | 2 2 |" in changed
    assert "| no memory | +0.0500 (+0.1000, +0.0000) | 0.70 0.70 | 0.80 0.80 | 0 0 | 5 5 | 2 2 |" in changed
    assert "original law" not in changed, "was not run"
    assert len({line.count("|") for line in changed.splitlines() if line.startswith("|")}) == 1, "a table of one width"
    assert "| e8 | protect | 0.70 0.70 | 0.20 0.20 |" in spreads


def test_spreads_are_medians_per_layer(measure: ModuleType) -> None:
    def decision(layer_id: int, lens: dict[str, Any] | None) -> SimpleNamespace:
        return SimpleNamespace(layer_id=layer_id, lens=lens)

    readings = [(1, 0.5), (0, 0.25), (0, 9.0), (0, 0.75), (1, None)]
    decisions = [decision(layer, {"spread": spread}) for layer, spread in readings]
    assert measure.lens_spreads([*decisions, decision(2, None)]) == [0.75, 0.5]
    assert measure.lens_spreads([decision(0, None)]) == []


@pytest.mark.slow
def test_quick_run_shows_that_balance_beats_none(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "balance.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "balance.json").read_text())
    assert {"versions", "machine", "seeds", "settings", "configs", "sweep", "runs", "claims"} <= set(results)
    runs = {run["arm"]: run for run in results["runs"]}
    assert set(runs) == {"none", "balance"}
    steps, interval = results["settings"]["quick"]["steps"], results["settings"]["quick"]["interval"]
    for run in runs.values():
        assert len(run["neff_windows"]) == steps // interval
        assert all(0.0 < value <= 1.0 for window in run["neff_windows"] for value in window)
    assert runs["balance"]["worst_neff_tail"] > max(0.9, runs["none"]["worst_neff_tail"])
    assert all(claim["holds"] for claim in results["claims"])
    merged = tmp_path / "merged"
    again = [sys.executable, str(BENCHMARKS / "balance.py"), "--merge", str(tmp_path), "--output", str(merged)]
    subprocess.run(again, capture_output=True, timeout=300, check=True)
    for name in ("balance.json", "balance.md"):
        assert (merged / name).read_text() == (tmp_path / name).read_text()
    text = (tmp_path / "balance.md").read_text()
    assert "| balance |" in text and results["versions"]["torch"] in text
