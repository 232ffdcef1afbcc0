"""What the page says is what the records hold: numbers against the metrics module, sentences, rules, comparisons."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import texts
from support.made_runs import random_run, train_into
from support.models import tiny_model

import chronomoe_hf
import chronomoe_hf.config as config
from chronomoe_hf import metrics
from chronomoe_hf.controller.policy import AbstainReason
from chronomoe_hf.errors import TelemetryError
from chronomoe_hf.report import write_report
from chronomoe_hf.report.compare import compare
from chronomoe_hf.report.data import load_run, pick
from chronomoe_hf.report.figures import DEAD, HIGH, LOW, NO_DATA, quantise, work
from chronomoe_hf.report.page import data_block, render, sections
from chronomoe_hf.report.rules import ALERTS, LEVELS, REASONS, STATES
from chronomoe_hf.report.verdict import judge
from chronomoe_hf.telemetry import alerts, read_jsonl
from chronomoe_hf.telemetry.arrays import pack


def block(html: str, name: str = "chronomoe-data") -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    train_into(directory, steps=6, interval=2, arguments={"save_strategy": "steps", "save_steps": 3})
    return directory


def test_the_data_block_equals_the_metrics_of_the_recorded_counts(trained: Path) -> None:
    data = block(render(load_run(trained)))
    events, _ = read_jsonl(trained / "chronomoe" / "routing_events.jsonl")
    assert data["steps"] == [2, 4, 6] and data["layers"] == ["0", "1"]
    for event in events:
        at, layer = data["steps"].index(event["step"]), event["layer_id"]
        counts = event["expert_token_counts"]
        expected = {
            "n_effective": metrics.effective_experts(counts),
            "top2_share": metrics.top2_share(counts),
            "max_violation": metrics.max_violation(counts),
            "gini": metrics.gini(counts),
            "load_cv": metrics.load_cv(counts),
            "dead_experts": sum(count == 0 for count in counts),
        }
        for name, value in expected.items():
            assert data["metrics"][name][layer][at] == pytest.approx(value, rel=1e-6), name
        if event["step"] == 6:
            assert data["last_counts"][str(layer)] == counts


def test_the_loss_is_the_one_trainer_logged(trained: Path) -> None:
    state = json.loads((trained / "checkpoint-6" / "trainer_state.json").read_text())
    logged = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert load_run(trained).loss == logged


def test_the_cells_are_the_shares(trained: Path) -> None:
    run = load_run(trained)
    spec = work(run).spec
    assert spec is not None and spec["frames"] == ["step 2", "step 4", "step 6"]
    code_FLE = np.frombuffer(base64.b64decode(spec["cells"]), dtype=np.uint8).reshape(3, 2, 8)
    events, _ = read_jsonl(trained / "chronomoe" / "routing_events.jsonl")
    for event in events:
        code_E = code_FLE[spec["frames"].index(f"step {event['step']}"), event["layer_id"]]
        fair_E = np.array(event["expert_token_counts"]) * 8 / sum(event["expert_token_counts"])
        assert ((code_E == DEAD) == (fair_E == 0)).all()
        shown_E = 2.0 ** (-3.0 + (code_E.astype(float) - LOW) / (HIGH - LOW) * 6.0)
        used = fair_E > 0
        assert np.allclose(shown_E[used], np.clip(fair_E[used], 1 / 8, 8), rtol=0.01)


def test_our_own_time_stands_beside_that_of_a_step(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "chronomoe", tmp_path / "chronomoe")
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["time"] = 100.0 + 0.25 * record["step"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert " ms of 250 ms a step in the last window" in render(load_run(tmp_path))
    path.write_text(json.dumps(records[-1]) + "\n")
    assert " ms a step in the last window" in render(load_run(tmp_path))


def test_quantise() -> None:
    value = np.array([0.0, 1.0, np.nan, 0.5, 7.0, -7.0])
    code = np.frombuffer(base64.b64decode(quantise(value, 0.0, 1.0)), dtype=np.uint8)
    assert code.tolist() == [LOW, HIGH, NO_DATA, 128, HIGH, LOW]


def test_long_runs_are_thinned_evenly(tmp_path: Path) -> None:
    random_run(tmp_path, windows=250)
    run = load_run(tmp_path)
    steps = [window.step for window in run.picked]
    assert len(run.windows) == 250 and len(steps) == 100 and steps[0] == 10 and steps[-1] == 2500
    assert max(b - a for a, b in pairwise(steps)) <= 30
    assert set(run.frames) == set(steps)
    assert pick(run.windows[:100]) == run.windows[:100]


def test_the_page_is_one_file_that_asks_for_nothing(trained: Path, tmp_path: Path) -> None:
    path = write_report(trained, tmp_path / "page.html")
    html = unescape(path.read_text())
    assert "default-src 'none'" in html and "unsafe" not in html
    assert not re.search(r'(src|href)="', html) and "http://" not in html and "https://" not in html
    assert write_report(trained) == trained / "report.html" and list(trained.glob(".report*")) == []


def test_runs_in_one_directory_get_a_page_each(tmp_path: Path) -> None:
    random_run(tmp_path, windows=3, run_id="first")
    random_run(tmp_path, windows=5, run_id="second")
    assert block(render(load_run(tmp_path)))["steps"] == [10, 20, 30, 40, 50]
    assert block(render(load_run(tmp_path, "first")))["steps"] == [10, 20, 30]
    with pytest.raises(TelemetryError, match="first, second"):
        load_run(tmp_path, "third")
    with pytest.raises(TelemetryError, match="there is no directory"):
        load_run(tmp_path / "nowhere")


# ---- verdict and rules -----------------------------------------------------------------------------------------------


def test_every_alert_and_every_reason_to_abstain_has_its_words() -> None:
    assert set(ALERTS) == set(alerts.KINDS)
    assert set(AbstainReason.__args__) <= set(REASONS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [*ALERTS, *STATES])
def test_every_rule_is_whole_and_its_config_line_runs(key: str) -> None:
    rule = {**ALERTS, **STATES}[key]
    assert rule.level in LEVELS and all((rule.title, rule.meaning, rule.cause, rule.advice))
    if rule.config:
        names = {name: getattr(config, name) for name in config.__all__}
        assert isinstance(eval(rule.config, {"__builtins__": {}}, names), config.ChronoConfig)


def test_the_verdict_of_a_healthy_run_and_of_one_with_dead_experts(tmp_path: Path) -> None:
    random_run(tmp_path / "well", windows=3, dying=False)
    well = judge(load_run(tmp_path / "well"))
    assert well.level == "fine" and well.findings[0].key == "HEALTHY"
    random_run(tmp_path / "dead", windows=9)
    ill = judge(load_run(tmp_path / "dead"))
    assert ill.level == "act", "it worked at the baseline and died in this run"
    (died,) = [finding for finding in ill.findings if finding.key == "DIED"]
    assert died.seen == "1 expert: layer 0 (expert 3)." and died.layers == ("0",)
    assert dict((name, value) for name, value, _ in ill.numbers)["dead experts"] == "1"


def test_experts_that_idle_at_both_ends_of_a_run_are_pointed_out(tmp_path: Path) -> None:
    random_run(tmp_path, windows=3, dying=False)
    path = tmp_path / "chronomoe" / "routing_events.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ends = {
        # Fair is 1000. Expert 3 of layer 0 idles at both ends; expert 2 starts exactly at half, which is not below.
        (10, 0): [1501, 1500, 500, 499],
        (30, 0): [1800, 1700, 400, 100],
        # In layer 1 one idles at the start and another at the end.
        (10, 1): [1000, 1500, 400, 1100],
        (30, 1): [100, 1900, 1000, 1000],
    }
    for record in records:
        key = (record["step"], record["layer_id"])
        record["expert_token_counts"] = ends.get(key, [1000] * 4)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run = load_run(tmp_path)
    (found,) = [finding for finding in judge(run).findings if finding.key == "IDLE"]
    assert found.experts == {"0": [3]} and found.layers == ("0",)
    assert found.seen == "1 expert: layer 0 (expert 3)." and found.rule.config == "ChronoConfig.revive()"
    assert judge(run).level == "fine", "a remark, no warning"
    for known in ({"splits": [(0, 1, 1)]}, {"profile": {"domains": 1}}, {"picked": run.picked[:1]}):
        findings = judge(dataclasses.replace(run, **known)).findings
        assert "IDLE" not in [finding.key for finding in findings], known


def test_an_alert_in_force_comes_first_with_its_advice(tmp_path: Path) -> None:
    random_run(tmp_path, windows=2)
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    raised = {"kind": "PRE_COLLAPSE", "layer_id": 1, "state": "raised", "step": 20, "detail": "why"}
    raised["since"] = "got_worse"
    records[-1]["active_alerts"] = [raised, {**raised, "kind": "FROM_THE_FUTURE"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    verdict = judge(load_run(tmp_path))
    assert verdict.level == "act"
    (found,) = [finding for finding in verdict.findings if finding.key == "PRE_COLLAPSE"]
    assert found.seen == "PRE_COLLAPSE is in force in layer 1 since step 20." and found.layers == ("1",)
    html = render(load_run(tmp_path))
    assert "ChronoConfig.balance()" in html and "FROM_THE_FUTURE" in html


# ---- comparing -------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_in_words_and_numbers(tmp_path: Path, trained: Path) -> None:
    train_into(
        tmp_path / "other", steps=6, interval=2, preset="balance", arguments={"save_strategy": "steps", "save_steps": 6}
    )
    one, two = load_run(trained), load_run(tmp_path / "other")
    compared = compare([one, two])
    assert compared.names == ("run", "other")
    table = {row[0]: row[2:] for row in compared.figure.rows}
    for name, form, value in (
        ("training loss", ".3f", lambda r: r.loss[-1][1]),
        ("mean Neff / E", ".3f", lambda r: np.mean([layer.neff_fraction for layer in r.windows[-1].layers])),
        ("dead experts", ".0f", lambda r: sum(layer.get("dead_experts") for layer in r.windows[-1].layers)),
    ):
        assert table[name][:2] == [f"{value(one):{form}}", f"{value(two):{form}}"], name
    assert all(name in " ".join(compared.sentences) for name in compared.names)
    html = render(one, two)
    assert "compare" in block(html, "chronomoe-figures")


# ---- odd runs --------------------------------------------------------------------------------------------------------


def test_a_run_without_a_window_says_so(tmp_path: Path) -> None:
    random_run(tmp_path, windows=0)
    run = load_run(tmp_path)
    verdict = judge(run)
    assert [finding.key for finding in verdict.findings] == ["EMPTY"]
    assert data_block(run)["steps"] == [] and len(sections(run)) == 1
    render(run)


NOTHING: dict[str, Any] = {
    "n_effective": None,
    "max_violation": None,
    "coherence_mean": None,
    "dead_experts": None,
    "gini": None,
}


@pytest.mark.parametrize(
    "fields", [NOTHING, {"n_effective": "x", "n_experts": 0, "top_k": None}, {"layer_id": "</script>"}]
)
def test_windows_without_evidence_still_give_a_page(fields: dict[str, Any], tmp_path: Path) -> None:
    random_run(tmp_path, windows=2, layers=1)
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["layers"][0].update(fields)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "chronomoe" / "routing_events.jsonl").unlink()
    html = render(load_run(tmp_path))
    assert html.count("</script>") == 4


@pytest.mark.parametrize("counts", [["x"] * 4, [None] * 4, [0, 0, 0, 0], [-1, 5, 2.5, 10**400], [], 5])
def test_counts_that_are_none_are_no_data(counts: Any, tmp_path: Path) -> None:
    random_run(tmp_path, windows=2, layers=1)
    path = tmp_path / "chronomoe" / "routing_events.jsonl"
    lines = [{**json.loads(line), "expert_token_counts": counts} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(tmp_path)
    render(run)
    assert {figure.key for figure in sections(run)} >= {"neff", "work"}


def test_arrays_without_counts_are_no_data(tmp_path: Path) -> None:
    random_run(tmp_path, windows=2, layers=9, experts=128)
    path = tmp_path / "chronomoe" / "arrays.bin"
    beta_LE = np.zeros((1, 4), dtype="<f4")
    path.write_bytes(b"".join(pack("run", 0, step, "TRAIN", [0], [4], {"beta": beta_LE}) for step in (10, 20)))
    (figure,) = [figure for figure in sections(load_run(tmp_path)) if figure.key == "work"]
    assert figure.spec is None and "No per-expert counts" in figure.sentence


def test_measured_effects_are_found(tmp_path: Path) -> None:
    random_run(tmp_path, windows=2)
    mask = {"delta_loss": 0.12, "delta_loss_error": 0.01, "kl": 0.1, "overlap": 0.9, "expert_overlap": 0.8}
    effect = {"rank": "contribution", "num_kept": 3, "loss": 2.0, "plan": mask, "random": [{**mask, "delta_loss": 0.5}]}
    (tmp_path / "effect.json").write_text(json.dumps(effect))
    (tmp_path / "other.json").write_text("[1")
    line = {**effect, "schema": 2, "run_id": "run", "attempt": 0, "step": 20, "num_kept": 2}
    (tmp_path / "chronomoe" / "lifecycle_effects.jsonl").write_text(json.dumps(line) + "\n")
    run = load_run(tmp_path)
    assert run.effects[0]["rise"] == 0.12 and run.effects[0]["random"] == 0.5 and run.effects[0]["worst"] is None
    assert run.effects[1]["where"] == "step 20" and run.effects[1]["kept"] == 2
    assert "changes the loss by +0.1200 nats, against +0.5000" in render(run)


# ---- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_is_shown_by_domain(tmp_path: Path) -> None:
    docs = texts.documents(12)
    domains = {"prose": list(docs[:4]), "code": list(docs[4:8]), "rest": list(docs[8:])}
    chronomoe_hf.profile(
        tiny_model("mixtral", vocab_size=texts.VOCAB),
        texts.tokenizer(),
        domains,
        output_dir=tmp_path,
        interval=1,
        batch_size=1,
    )
    run = load_run(tmp_path)
    assert len(run.windows) > 3, "windows that are no domains"
    keys = [figure.key for figure in sections(run)]
    assert keys[:4] == ["domains", "pairs", "work", "expert-domain"] and "flow" in keys and "neff" not in keys
    shown = {figure.key: figure for figure in sections(run)}
    assert [row[0] for row in shown["domains"].rows] == ["prose", "code", "rest"]
    record = json.loads((tmp_path / "chronomoe" / "profile.json").read_text())
    assert [row[2] for row in shown["domains"].rows] == [f"{d['loss']:.4f}" for d in record["domains"]]
    code_DD = np.frombuffer(base64.b64decode(shown["domains"].spec["cells"]), dtype=np.uint8).reshape(3, 3)  # type: ignore[index]
    assert code_DD[0, 1] == round(LOW + record["distance"]["mean"][0][1] * (HIGH - LOW))
    render(run)
