"""The verdict: a level is no movement, one recommendation, the same for people and machines; n runs compared truly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import texts
from support.made_runs import random_run, train_into
from support.models import tiny_model
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf import metrics
from chronomoe_hf.cli.main import app
from chronomoe_hf.errors import TelemetryError
from chronomoe_hf.report import judge_directory
from chronomoe_hf.report.against import against, load_of, moved_share
from chronomoe_hf.report.compare import compare
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.page import data_block, render
from chronomoe_hf.report.verdict import judge
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot, TelemetryWriter, run_manifest


def made_run(directory: Path, windows: list[list[int]], *, top_k: int = 1, **manifest: Any) -> Path:
    """A run of one layer with these counts, written as the system writes one."""
    history = AlertHistory()
    config = manifest.pop("config", {})
    table = [{"layer_id": 0, "name": "gate", "num_experts": len(windows[0]), "top_k": top_k, "beta_folds": False}]
    with TelemetryWriter("run", directory) as writer:
        about = run_manifest(run_id="run", config=config, layers=table, model_class="Made")
        writer.write_manifest({**about, **manifest})
        for step, counts in enumerate(windows, 1):
            fields = manifest.get("fields", {})
            event = RoutingEvent.from_router_output(
                run_id="run",
                step=step,
                mode="TRAIN",
                layer_id=0,
                used_capacity=counts,
                n_experts=len(counts),
                top_k=top_k,
                **fields,
            )
            snapshot = SystemSnapshot.from_events(
                events=[event], step=step, run_id="run", model_name="m", n_layers=1, alert_history=history
            )
            writer.write("routing_events", event)
            writer.write("snapshots", snapshot)
            writer.write_many("alerts", snapshot.alerts)
    return directory


def draws(shares: list[float], windows: int, tokens: int = 4000, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.multinomial(tokens, np.array(shares) / sum(shares)).tolist() for _ in range(windows)]


NARROW = [50, 22, 8, 6, 4, 4, 3, 3]
NARROWER = [90, 4, 2, 1, 1, 1, 0.5, 0.5]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_level_that_training_did_not_change_is_healthy(tmp_path: Path) -> None:
    verdict = judge_directory(made_run(tmp_path, draws(NARROW, 20)))
    assert verdict.level == "fine" and "training has not changed that" in verdict.sentence
    keys = [finding.key for finding in verdict.findings]
    assert "AS_IT_CAME" in keys and "PRE_COLLAPSE" not in keys
    assert verdict.advice == ("Nothing needs doing.", "")
    assert verdict.measured["alerts"] == 1 and verdict.measured["alerts_urgent"] == 0


def test_a_layer_that_concentrates_is_red_within_five_windows(tmp_path: Path) -> None:
    made_run(tmp_path, draws(NARROW, 6) + draws(NARROWER, 5))
    verdict = judge_directory(tmp_path)
    assert verdict.level == "act" and "routing is concentrating" in verdict.sentence
    assert verdict.advice[1] == "ChronoConfig.balance()"
    assert render(load_run(tmp_path)).count("<b>Next:</b>") == 1, "one recommendation"


def test_old_records_that_do_not_say_since_are_judged_by_their_first_window(tmp_path: Path) -> None:
    for name, later, level in (("same", NARROW, "fine"), ("worse", NARROWER, "act")):
        directory = made_run(tmp_path / name, draws(NARROW, 4) + draws(later, 6))
        path = directory / "chronomoe" / "snapshots.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            for layer in record["layers"]:
                for field in ("change", "error", "died"):
                    layer.pop(field, None)
            for alert in record["active_alerts"]:
                alert.pop("since")
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert judge_directory(directory).level == level, name


def test_one_window_says_that_nothing_can_be_raised(tmp_path: Path) -> None:
    verdict = judge_directory(made_run(tmp_path, draws(NARROW, 1)))
    assert (
        "ONE_WINDOW" in [finding.key for finding in verdict.findings] and "no alert can be raised" in verdict.sentence
    )


def test_a_thin_last_window_does_not_decide(tmp_path: Path) -> None:
    made_run(tmp_path / "last", [*draws([1] * 8, 6), [1, 0, 0, 0, 0, 0, 0, 0]])
    assert judge_directory(tmp_path / "last").level == "fine"
    made_run(tmp_path / "all", draws([1] * 8, 6, tokens=20))
    assert "INSUFFICIENT" in [finding.key for finding in judge_directory(tmp_path / "all").findings]


@pytest.mark.parametrize(
    ("share", "rate", "level"),
    [(0.005, None, None), (0.05, 1e-4, "fine"), (0.3, None, "act"), (0.3, 1e-4, "act"), (0.3, 0.0, "fine")],
)
def test_what_a_plain_server_would_route_otherwise(
    share: float, rate: float | None, level: str | None, tmp_path: Path
) -> None:
    """It is red above a tenth, and the run is to be watched, unless no weight was trained under that routing."""
    made_run(tmp_path, draws([1] * 8, 4), fields={"topk_disagreement": share}, learning_rate=rate)
    found = [finding for finding in judge_directory(tmp_path).findings if finding.key == "UNFOLDED"]
    assert [finding.level for finding in found] == ([] if level is None else [level])
    verdict = judge_directory(tmp_path)
    assert verdict.level == ("watch" if level == "act" else "fine"), "a run is not stopped for where it is served"
    assert ("plain server" in verdict.sentence) == (level == "act")
    assert ("wrapped" in verdict.advice[0]) == (level == "act")
    assert run("report", tmp_path, "--check").exit_code == (4 if level == "act" else 0)


def test_a_logged_learning_rate_counts_more_than_a_configured_0(tmp_path: Path) -> None:
    """An optimizer of the user's own may have another rate than the arguments."""
    made_run(tmp_path, draws([1] * 8, 4), fields={"topk_disagreement": 0.3}, learning_rate=0.0)
    assert judge_directory(tmp_path).level == "fine"
    with (tmp_path / "chronomoe" / "logs.jsonl").open("a") as out:
        out.write(json.dumps({"schema": 1, "run_id": "run", "attempt": 0, "step": 2, "learning_rate": 1e-5}) + "\n")
    assert judge_directory(tmp_path).level == "watch"


def test_what_went_wrong_in_training_comes_before_where_it_is_served(tmp_path: Path) -> None:
    made_run(tmp_path, draws(NARROW, 6) + draws(NARROWER, 5), fields={"topk_disagreement": 0.3})
    verdict = judge_directory(tmp_path)
    assert verdict.level == "act" and verdict.advice[1] == "ChronoConfig.balance()"
    assert verdict.findings[0].key != "UNFOLDED" and "plain server" in verdict.sentence


def test_under_an_adapter_idle_experts_do_not_lead_to_revive(tmp_path: Path) -> None:
    for adapter, key, config in ((False, "IDLE", "revive"), (True, "IDLE_ADAPTER", "balance")):
        directory = made_run(tmp_path / key, draws([10, 10, 10, 10, 10, 10, 10, 1], 4), adapter=adapter)
        (found,) = [f for f in judge_directory(directory).findings if f.key.startswith("IDLE")]
        assert found.key == key and config in found.rule.config
        assert ("revive" in found.rule.advice) == (not adapter)


def test_the_verdict_for_machines(tmp_path: Path) -> None:
    made_run(tmp_path / "ill", draws(NARROW, 6) + draws(NARROWER, 5))
    made_run(tmp_path / "well", draws([1] * 8, 6))
    record = json.loads(run("report", tmp_path / "ill", "--json").output)
    assert set(record) >= {"schema", "level", "findings", "numbers", "advice", "report"}
    assert record["level"] == "act" and record["report"].endswith("report.html")
    (found,) = [finding for finding in record["findings"] if finding["code"] == "PRE_COLLAPSE"]
    assert found["layers"] == [0] and isinstance(found["since"], int)
    assert data_block(load_run(tmp_path / "ill"))["verdict"]["level"] == "act", "and it is in the page"
    assert run("report", tmp_path / "ill").exit_code == 0
    assert run("report", tmp_path / "ill", "--check").exit_code == 5
    assert run("report", tmp_path / "well", "--check").exit_code == 0
    assert json.loads(run("report", tmp_path / "well", "--json").output)["level"] == "healthy"


# ---- several runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compared")
    for name, steps in (("short", 4), ("long", 8)):
        train_into(
            directory / name,
            steps=steps,
            interval=1,
            preset="observe",
            arguments={"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant"},
        )
    for seed in (1, 2):
        train_into(directory / f"seed{seed}", steps=6, interval=1, preset="balance", seed=seed)
        train_into(directory / f"plain{seed}", steps=6, interval=1, preset="observe", seed=seed)
    return directory


def test_the_same_run_cut_at_another_step_compares_as_equal(trained: Path) -> None:
    compared = compare([load_run(trained / "short"), load_run(trained / "long")])
    assert "short has 4 steps and long has 8 steps" in compared.sentences[0]
    assert compared.differences[0].name == "evaluation loss" and compared.differences[1].name == "training loss"
    assert all(one.at_step == 4 for one in compared.differences if "loss" in one.name)
    assert all(one.difference == 0.0 for one in compared.differences), [one.to_record() for one in compared.differences]
    assert "are equal" in " ".join(compared.sentences)


def test_runs_of_one_config_are_seeds_and_their_scatter_is_the_error(trained: Path) -> None:
    names = ("plain1", "plain2", "seed1", "seed2")
    runs = [load_run(trained / name) for name in names]
    compared = compare(runs)
    assert compared.groups == {"observe": ["plain1", "plain2"], "balance": ["seed1", "seed2"]}
    (loss,) = [one for one in compared.differences if one.name == "training loss"]
    ends = np.array([run.loss[-1][1] for run in runs])
    assert loss.difference == pytest.approx(ends[2:].mean() - ends[:2].mean())
    error = math.hypot(*(pair.std(ddof=1) / math.sqrt(2) for pair in (ends[:2], ends[2:])))
    assert loss.error == pytest.approx(error) and loss.one == "balance (n = 2)"


def test_the_command_takes_many_runs_and_refuses_one_twice(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("report", trained / "short", trained / "long", trained / "seed1", "-o", page, "--json")
    record = json.loads(done.output)
    assert [one["name"] for one in record["runs"]] == ["short", "long", "seed1"]
    assert {"name", "difference", "error", "at_step"} <= set(record["differences"][0])
    assert "short" in page.read_text() and "seed1" in page.read_text()
    again = run("report", trained / "short", trained / "short")
    assert isinstance(again.exception, TelemetryError) and "twice" in str(again.exception)
    both = run("report", trained / "short", "--compare", trained / "long", "--compare", trained / "seed1", "-o", page)
    assert both.exit_code == 0 and "seed1" in page.read_text()


def test_evaluation_is_read(trained: Path) -> None:
    run_data = load_run(trained / "short")
    assert [step for step, _ in run_data.eval_loss] == [2, 4]
    assert set(run_data.evaluations) == {(2, "eval"), (4, "eval")}
    events = [json.loads(line) for line in (trained / "short" / "chronomoe" / "routing_events.jsonl").open()]
    (event,) = [e for e in events if e["mode"] == "EVAL" and e["step"] == 4 and e["layer_id"] == 1]
    neff = metrics.load_metrics(event["expert_token_counts"], 2).n_effective
    assert run_data.evaluations[4, "eval"][1] == pytest.approx(neff / 8)
    keys = [figure.key for figure in chronomoe_hf.report.page.sections(run_data)]  # type: ignore[attr-defined]
    assert "evaluation" in keys


# ---- before and after ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("profiles")
    docs = texts.documents(12)
    first, second = list(docs[:5]), list(docs[5:])
    for name, domains, seed in (
        ("one", {"prose": first, "code": second}, 0),
        ("other", {"code": second, "prose": first}, 0),
        ("tuned", {"prose": first, "code": second}, 3),
    ):
        model = tiny_model("mixtral", vocab_size=texts.VOCAB, seed=seed)
        chronomoe_hf.profile(model, texts.tokenizer(), domains, output_dir=place / name, progress=False)
    return place


def test_the_page_of_a_profile_is_the_profile_in_either_order_of_domains(profiles: Path) -> None:
    shown = []
    for name in ("one", "other"):
        record = json.loads((profiles / name / "chronomoe" / "profile.json").read_text())
        sums = np.sum([domain["counts"] for domain in record["domains"]], axis=0)
        verdict = judge(load_run(profiles / name))
        assert verdict.level == "fine" and verdict.measured["dead_experts"] == int((sums == 0).sum())
        used = [metrics.load_metrics(row, 2).n_effective / 8 for row in sums.tolist()]
        assert verdict.measured["neff_mean"] == pytest.approx(np.mean(used))
        assert data_block(load_run(profiles / name))["last_counts"] == {
            str(at): row for at, row in enumerate(sums.tolist())
        }
        shown.append((verdict.sentence, verdict.numbers))
        html = render(load_run(profiles / name))
        assert "ChronoConfig.balance" not in html and "Act now" not in html
        assert not any((profiles / name).rglob("alerts.jsonl"))
    assert shown[0] == shown[1]
    assert judge(load_run(profiles / "one" / "domains" / "code")).findings[0].key == "PROFILE"


def test_before_and_after_is_a_recount(profiles: Path) -> None:
    after, before = load_run(profiles / "tuned"), load_run(profiles / "one")
    figure = against(after, before)
    for layer, row in enumerate(figure.rows):
        p, q = (np.array(load_of(run)[layer], dtype=float) for run in (before, after))
        moved = 0.5 * np.abs(p / p.sum() - q / q.sum()).sum()
        assert row[5] == f"{100 * moved:.1f} %"
    assert "Loss, nats a token: prose" in figure.sentence
    same = against(load_run(profiles / "other"), before)
    assert [row[5] for row in same.rows] == ["0.0 %"] * 2
    page = run("report", profiles / "tuned", "--against", profiles / "one", "-o", profiles / "page.html")
    assert page.exit_code == 0 and "What changed since one" in (profiles / "page.html").read_text()


def test_two_samples_of_one_routing_move_by_what_is_said() -> None:
    generator = np.random.default_rng(0)
    shares = np.array(NARROW) / sum(NARROW)
    pairs = [generator.multinomial(2000, shares, size=2).tolist() for _ in range(400)]
    found = [moved_share(one, two, 1) for one, two in pairs]
    assert np.mean([moved for moved, _ in found]) == pytest.approx(np.mean([chance for _, chance in found]), rel=0.1)


def test_models_of_another_shape_have_no_before(profiles: Path, tmp_path: Path) -> None:
    random_run(tmp_path, layers=3)
    with pytest.raises(TelemetryError, match="other MoE layers"):
        against(load_run(profiles / "one"), load_run(tmp_path))


def test_dead_experts_are_named_and_all_of_them_are_in_the_record(tmp_path: Path) -> None:
    counts = [[500] * 4 + [0] * 12, [0, 700, 0, 500] + [0] * 12]
    for number, row in enumerate(counts):
        directory = made_run(tmp_path / str(number), [row] * 3)
        (dead,) = [finding for finding in judge_directory(directory).findings if finding.key == "DEAD"]
        silent = [expert for expert, count in enumerate(row) if count == 0]
        assert dead.experts == {"0": silent}
        assert f"layer 0 (experts {', '.join(map(str, silent[:8]))} and {len(silent) - 8} more)" in dead.seen
        record = json.loads(run("report", directory, "--json").output)
        assert {"0": silent} in [finding["experts"] for finding in record["findings"]]


def test_a_profile_names_the_experts_that_its_text_did_not_reach(profiles: Path, tmp_path: Path) -> None:
    directory = tmp_path / "profile"
    shutil.copytree(profiles / "one", directory)
    path = directory / "chronomoe" / "profile.json"
    record = json.loads(path.read_text())
    for domain in record["domains"]:
        domain["counts"][1][2] = domain["counts"][1][5] = 0
    record["domains"][0]["counts"][0][3] = 0  # the other domain still reaches this one
    path.write_text(json.dumps(record))
    (dead,) = [finding for finding in judge_directory(directory).findings if finding.key == "DEAD"]
    assert dead.experts == {"1": [2, 5]} and dead.layers == ("1",) and dead.level == "fine"
    assert dead.seen == "No token of this text reached layer 1 (experts 2 and 5)."
    assert "layer 1 (experts 2 and 5)" in render(load_run(directory))
    assert not [f for f in judge_directory(profiles / "one").findings if f.key == "DEAD"]


def test_records_of_a_newer_version_are_told_everywhere(tmp_path: Path) -> None:
    directory = made_run(tmp_path, draws([1] * 8, 4))
    path = directory / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[-1] |= {"schema": 7, "not_known_yet": [1]}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    verdict = judge_directory(directory)
    assert (
        verdict.level == "watch"
        and verdict.findings[0].seen == "1 window of record schema 7; this version knows up to 2."
    )
    assert "pip install -U chronomoe_hf" in verdict.advice[0]
    assert verdict.measured["windows"] == 4, "what is known is shown"
    assert "NEWER_RECORDS" in run("summary", directory, "--csv").output
    assert "schema 7 is newer than 2" in run("validate", directory).output
    assert "1 window is of a newer version" in run("tail", directory).output


# ---- summary ---------------------------------------------------------------------------------------------------------


def test_summary_is_a_line_a_run(tmp_path: Path) -> None:
    made_run(tmp_path / "a" / "ill", draws(NARROW, 6) + draws(NARROWER, 5))
    made_run(tmp_path / "a" / "well", draws([1] * 8, 6))
    broken = made_run(tmp_path / "b", draws([1] * 8, 3))
    (broken / "chronomoe" / "snapshots.jsonl").write_text("x\n")
    table = run("summary", tmp_path)
    assert table.exit_code == 0 and all(len(line) <= 100 for line in table.output.splitlines())
    lines = {line.split()[0]: line for line in table.output.splitlines()}
    assert " act " in lines["ill"] and " healthy " in lines["well"]
    rows = [line.split(",") for line in run("summary", tmp_path / "a", "--csv").output.splitlines()]
    assert rows[0][:4] == ["path", "run", "model", "level"] and [row[3] for row in rows[1:]] == ["act", "healthy"]
    record = json.loads(run("summary", tmp_path / "a", "--json").output)
    expected = metrics.load_metrics(draws([1] * 8, 6)[-1], 1).n_effective / 8
    assert record["runs"][1]["neff_mean"] == pytest.approx(expected, rel=1e-5)
    target = tmp_path / "runs.prom"
    assert run("summary", tmp_path / "a", "--prometheus", target).exit_code == 0
    text = target.read_text()
    assert f'chronomoe_level{{path="{tmp_path}/a/ill",run="run",model="Made"}} 2' in text
    for line in text.splitlines():
        assert line.startswith(("# HELP chronomoe_", "# TYPE chronomoe_")) or float(line.rsplit(" ", 1)[1]) is not None
    assert run("summary", tmp_path / "a", "--check").exit_code == 5
    assert run("summary", tmp_path / "a" / "well", "--check").exit_code == 0
    assert run("summary", tmp_path / "nowhere").exception is not None
