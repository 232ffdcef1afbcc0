"""The balance benchmark: its measures against their definitions, its targets on made-up runs, and a quick real run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import tiny_model

from chronomoe_hf import ChronoConfig

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return import_module("balance.table")


@pytest.fixture(scope="module")
def job() -> ModuleType:
    pytest.importorskip("tokenizers")
    return import_module("balance.job")


@pytest.fixture(scope="module")
def arms(job: ModuleType) -> ModuleType:
    return import_module("balance.arms")


@pytest.fixture(scope="module")
def front(job: ModuleType) -> ModuleType:
    return import_module("balance.front")


@pytest.fixture(scope="module")
def measure(job: ModuleType) -> ModuleType:
    return import_module("balance.measure")


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


def test_every_arm_has_its_rule(arms: ModuleType) -> None:
    of = arms.arm_config
    assert (of("sign").beta.rule, of("sign").beta.rate, of("sign").beta.dead_zone) == ("sign", 0.1, None)
    assert (of("sign 0.001").beta.rate, of("sign@0.03").beta.rate) == (0.001, 0.03)
    old = of("balance 0.2").beta
    assert (old.rule, old.rate, old.dead_zone, old.first_layer) == ("quadratic", 0.3, None, "same")
    assert of("balance") == ChronoConfig.balance() != of("balance 0.2")
    zone = of("zone@0.5,1.5,0.1,off").beta
    assert (zone.dead_zone, zone.rate, zone.first_layer) == ((0.5, 1.5), 0.1, "off")
    assert all(of(arm).beta.law == "none" for arm in ("none", *arms.AUX))
    assert [arms.aux_weight(arm) for arm in ("none", "balance", *arms.AUX)] == [0.0, 0.0, 0.001, 0.01, 0.02]
    coherence = of("coherence")
    assert coherence.beta.law == "coherence"
    assert not (coherence.lens.enabled or coherence.veto.enabled or coherence.control.enabled)
    assert of("no memory").lens.memory == 0.0


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (32, 4)])
def test_quantile_bias_evens_out_a_skewed_batch_in_a_few_rounds(arms: ModuleType, num_experts: int, top_k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, num_experts, generator=draw) + torch.linspace(-1.5, 1.5, num_experts)

    def loads(bias: torch.Tensor) -> torch.Tensor:
        chosen = (logits + bias).topk(top_k, dim=-1).indices
        return torch.bincount(chosen.flatten(), minlength=num_experts) / (4096 * top_k / num_experts)

    bias = torch.zeros(num_experts)
    assert float((loads(bias) - 1).abs().max()) > 1.0, "bad test setup"
    for _ in range(12):
        bias = arms.quantile_bias(logits, bias, top_k)
        assert abs(float(bias.sum())) < 1e-4
    assert float((loads(bias) - 1).abs().max()) < 0.1


def test_one_round_of_quantiles_on_numbers_worked_out_by_hand(arms: ModuleType) -> None:
    """Two experts, k = 1: the threshold is the mean of both logits, and half of the tokens must exceed it."""
    gaps = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])  # of expert 0 over expert 1, whose median is 2
    logits = torch.stack([gaps, torch.zeros(5)], dim=-1)
    assert arms.quantile_bias(logits, torch.zeros(2), 1).tolist() == pytest.approx([-1.0, 1.0])


def test_the_fast_head_has_the_loss_and_the_gradients_of_the_model_it_is_put_in(job: ModuleType) -> None:
    fast = import_module("balance.fast_head")
    model = tiny_model("mixtral")
    ids = torch.randint(3, 60, (3, 300))
    labels = ids.masked_fill(torch.rand(3, 300) < 0.2, -100)

    def run() -> tuple[float, list[torch.Tensor], float]:
        model.zero_grad()
        loss = model.train()(input_ids=ids, labels=labels).loss
        loss.backward()
        evaluated = float(model.eval()(input_ids=ids, labels=labels).loss)
        return float(loss), [p.grad.clone() for p in model.parameters() if p.grad is not None], evaluated

    plain = run()
    fast.use_fast_head(model)
    for low in (False, True):
        model.lm_head.low = low
        got = run()
        assert got[0] == pytest.approx(plain[0], abs=1e-3 if low else 1e-5)
        assert got[2] == pytest.approx(plain[2], abs=1e-5), "validation is never rounded"
        for mine, theirs in zip(got[1], plain[1], strict=True):
            assert float((mine - theirs).abs().max()) <= (0.03 if low else 1e-4) * float(theirs.abs().max())


def row(arm: str, **changes: Any) -> dict[str, Any]:
    base = {
        "setting": "e8",
        "arm": arm,
        "seed": 0,
        "valid_loss": 3.0,
        "neff_tail": [0.7, 0.9],
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


def test_later_parts_replace_what_earlier_ones_measured(
    measure: ModuleType, front: ModuleType, table: ModuleType, tmp_path: Path
) -> None:
    balance = import_module("balance.run")

    def part(name: str, *rows: dict[str, Any], **changes: Any) -> Path:
        results = {**balance.header(["e8"], [0], ["none", "balance", "sign"]), "runs": list(rows), **changes}
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


def test_a_changed_part_stands_beside_protect_and_apart_from_the_arms(
    measure: ModuleType, front: ModuleType, table: ModuleType
) -> None:
    results = import_module("balance.run").header(["e8"], [0, 1], ["none", "protect", "no memory"])
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


def made_up(**arms: list[tuple[float, list[float], int]]) -> dict[str, Any]:
    """Results of e8 on the fresh seeds: per arm and seed, the loss, Neff/E of two layers, dead experts."""
    runs = [
        row(arm.replace("_", " "), seed=3 + at, valid_loss=loss, neff_tail=neff, dead_tail=dead)
        for arm, each in arms.items()
        for at, (loss, neff, dead) in enumerate(each)
    ]
    return {"settings": {"e8": {}}, "runs": runs, "sign_rate": {"e8": 0.1}, "claims": []}


EVEN, UNEVEN = [0.95, 0.93], [0.5, 0.6]
NONE = [(3.0, UNEVEN, 1), (4.0, UNEVEN, 0), (5.0, UNEVEN, 2)]
BELOW = [(2.99, EVEN, 0), (3.98, EVEN, 0), (4.985, EVEN, 0)]


def test_differences_are_paired_by_seed_and_tuning_seeds_do_not_count(front: ModuleType) -> None:
    results = made_up(none=NONE, balance=BELOW)
    results["runs"] += [row("balance", seed=0, valid_loss=9.0), row("none", seed=0)]
    here = front.point(results, "e8", "balance")
    # -0.01, -0.02, -0.015: mean -0.015, standard deviation 0.005.
    assert (here.seeds, here.loss, here.error) == (3, pytest.approx(-0.015), pytest.approx(0.005 / 3**0.5))
    assert (here.worst, here.first, here.later, here.dead) == (pytest.approx(0.93), pytest.approx(0.95), 0.93, 0)
    assert front.point(results, "e8", "none").dead == 3 and front.point(results, "e8", "revive") is None


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"balance": [(2.99, EVEN, 0), (3.98, EVEN, 1), (4.985, EVEN, 0)]}, False),  # one dead expert
        ({"balance": [(2.99, EVEN, 0), (3.98, [0.95, 0.5], 0), (4.985, EVEN, 0)]}, False),  # an uneven layer
        ({"balance": [(2.99, EVEN, 0), (4.02, EVEN, 0), (4.985, EVEN, 0)]}, False),  # not by two standard errors
        ({"aux_0.01": [(2.98, UNEVEN, 0), (3.98, UNEVEN, 0), (4.98, UNEVEN, 0)]}, False),  # a rival is as good
        ({"sign": [(3.1, EVEN, 0), (4.1, EVEN, 0), (5.1, EVEN, 0)]}, True),
    ],
)
def test_the_target_asks_for_loss_rivals_life_and_evenness(
    front: ModuleType, changes: dict[str, Any], holds: bool
) -> None:
    rivals = {"aux_0.02": NONE, "sign": NONE}
    (claim,) = front.targets(made_up(**{"none": NONE, **rivals, "balance": BELOW, **changes}))
    assert claim["holds"] is holds and claim["open"] == [], claim
    (claim,) = front.targets(made_up(**{"none": NONE, "balance": BELOW, **changes, "sign": NONE}))
    assert claim["open"] == ["aux 0.02"], "without that rival the target cannot be met"


def test_with_k_unchanged_one_standard_error_above_none_is_allowed(front: ModuleType) -> None:
    for losses, holds in (((3.01, 3.99, 5.003), True), ((3.01, 4.01, 5.01), False), ((2.9, 3.9, 4.9), True)):
        results = made_up(none=NONE, balance=[(loss, EVEN, 0) for loss in losses])
        results = {**results, "settings": {"qwen3": {}}, "runs": [{**r, "setting": "qwen3"} for r in results["runs"]]}
        (claim,) = front.targets(results)
        assert claim["holds"] is holds, claim


def test_further_seeds_are_told_apart_and_change_no_target(front: ModuleType) -> None:
    seeds = import_module("balance.seeds")
    results = made_up(none=NONE, aux=NONE, sign=NONE, revive=[(2.99, EVEN, 0), (4.01, EVEN, 0), (4.985, EVEN, 0)])
    assert seeds.more_seeds(results) == [], "there is none yet"
    judged = front.targets(results)
    for seed, loss in ((6, 2.98), (7, 2.97), (8, 2.99)):
        results["runs"] += [row("none", seed=seed), row("revive", seed=seed, valid_loss=loss, dead_tail=seed == 8)]
    results["runs"].append(row("aux", seed=6, valid_loss=2.9))
    assert front.targets(results) == judged
    none, aux = seeds.against_revive(results)
    # -0.01, +0.01, -0.015 and then -0.02, -0.03, -0.01.
    assert none["first"]["loss"] == pytest.approx(-0.005) and none["more"]["loss"] == pytest.approx(-0.02)
    assert none["all"]["loss"] == pytest.approx(-0.0125)
    # The squares of the six deviations (in thousandths) add up to 887.5.
    assert none["all"]["error"] == pytest.approx((887.5e-6 / 5 / 6) ** 0.5)
    assert none["below"] and none["dead"] == 1
    assert (aux["arm"], aux["more"]["by_seed"], aux["below"]) == ("aux", [pytest.approx(0.08)], False)
    table = "\n".join(seeds.more_seeds(results))
    assert "| e8 | none | -0.0050 (0.0076) | -0.0200 (0.0058) | -0.0200 -0.0300 -0.0100 |" in table
    assert "sign" not in table, "was not run on them"


def test_the_front_holds_what_no_other_arm_beats_in_both(front: ModuleType) -> None:
    def at(arm: str, loss: float, worst: float) -> Any:
        return front.Point(arm, 3, loss, 0.0, [], worst, worst, worst, 0, 0.0)

    arms = [at("none", 0.0, 0.5), at("aux", 0.01, 0.6), at("worse", 0.02, 0.6), at("full", 0.03, 0.98)]
    assert front.front(arms) == ["none", "aux", "full"]
    assert front.front([*arms, at("best", -0.01, 0.99)]) == ["best"]


@pytest.mark.slow
def test_quick_run_shows_that_balance_beats_none(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "balance" / "run.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "balance.json").read_text())
    assert {"versions", "machine", "seeds", "settings", "configs", "sweep", "runs", "claims"} <= set(results)
    runs = {run["arm"]: run for run in results["runs"]}
    assert set(runs) == {"none", "balance 0.2", "balance", "revive"}
    steps, interval = results["settings"]["quick"]["steps"], results["settings"]["quick"]["interval"]
    for run in runs.values():
        assert len(run["neff_windows"]) == steps // interval
        assert all(0.0 < value <= 1.0 for window in run["neff_windows"] for value in window)
    assert runs["balance 0.2"]["worst_neff_tail"] > max(0.9, runs["none"]["worst_neff_tail"])
    assert runs["balance"]["worst_neff_tail"] > runs["none"]["worst_neff_tail"]
    merged = tmp_path / "merged"
    again = [sys.executable, str(BENCHMARKS / "balance" / "run.py"), "--merge", str(tmp_path), "--output", str(merged)]
    subprocess.run(again, capture_output=True, timeout=300, check=True)
    for name in ("balance.json", "balance.md"):
        assert (merged / name).read_text() == (tmp_path / name).read_text()
    text = (tmp_path / "balance.md").read_text()
    assert "| quick | balance | 0 |" in text and results["versions"]["torch"] in text
