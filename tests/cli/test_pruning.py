"""profile, plan, measure, export: from a checkpoint and text to a smaller checkpoint, by command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from support import models as tiny
from support import texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chronomoe_hf import lifecycle
from chronomoe_hf.cli.main import app
from chronomoe_hf.errors import (
    DataError,
    EvidenceError,
    ExportError,
    PlanError,
    PlanMismatchError,
    TelemetryError,
    WrapError,
)
from chronomoe_hf.telemetry import TelemetryWriter


def run(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` with its tokenizer, two texts, a profile, and a plan."""
    root = tmp_path_factory.mktemp("pruning")
    torch.manual_seed(0)
    tiny.tiny_model("qwen3_moe", vocab_size=texts.VOCAB).save_pretrained(root / "model")
    texts.tokenizer().save_pretrained(root / "model")
    docs = texts.documents(24, 800)
    (root / "early.txt").write_text("\n\n".join(docs[:12]))
    (root / "late.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs[12:]))
    data = ("--data", root / "early.txt", "--domain", f"other={root / 'late.jsonl'}")
    done = run("profile", root / "model", *data, "--length", 64, "-o", root / "profile", "--no-progress")
    (root / "profile.out").write_text(done.output)
    done = run("plan", root / "profile", "--keep", "0.5", "-o", root / "plan.json")
    (root / "plan.out").write_text(done.output)
    return root


def test_profile_says_what_it_found(workplace: Path) -> None:
    text = (workplace / "profile.out").read_text()
    assert "early" in text and "other" in text and "distance of loads, early and other" in text
    assert f"chronomoe plan {workplace / 'profile'}" in text
    record = json.loads((workplace / "profile" / "chronomoe" / "profile.json").read_text())
    assert [domain["name"] for domain in record["domains"]] == ["early", "other"]
    assert all(len(line) <= 80 for line in text.splitlines() if str(workplace) not in line)


def test_plan_reads_a_profile_and_tail_sends_it_to_the_report(workplace: Path) -> None:
    assert "is a profile" in str(run("tail", workplace / "profile", code=1).exception)
    run("report", workplace / "profile", "-o", workplace / "report.html")
    assert "profile-" in (workplace / "report.html").read_text()  # the name of the run
    assert "Neff/E" in run("tail", workplace / "profile" / "domains" / "other").output
    text = (workplace / "plan.out").read_text()
    assert "4 of 8 experts stay in each of 2 layers, by contribution" in text and "layer   1 drops" in text
    assert all(len(line) <= 80 for line in text.splitlines() if str(workplace) not in line)
    plan = lifecycle.PrunePlan.load(workplace / "plan.json")
    record = json.loads((workplace / "profile" / "chronomoe" / "profile.json").read_text())
    assert plan.source.mode == "INFER" and plan.source.tokens == record["tokens"]
    # The ranking is that of the summed contributions over the whole profile.
    events = [json.loads(line) for line in (workplace / "profile/chronomoe/routing_events.jsonl").open()]
    for layer in plan.layers:
        rows = [e["contribution"] for e in events if e["layer_id"] == layer.spec.layer_id]
        total = [sum(row[expert] or 0.0 for row in rows) for expert in range(8)]
        assert list(layer.kept) == sorted(sorted(range(8), key=lambda e: -total[e])[:4])


def test_plan_options(workplace: Path, tmp_path: Path) -> None:
    gone = lifecycle.PrunePlan.load(workplace / "plan.json").layers[0].dropped[0]
    made = json.loads(run("plan", workplace / "profile", "--keep", 3, "--protect", f"0:{gone}", "--json").output)
    assert gone in made["layers"][0]["kept"] and made["num_kept"] == 3
    made = json.loads(run("plan", workplace / "profile", "--keep", 0.3, "--multiple-of", 4, "--json").output)
    assert made["num_kept"] == 4
    made = json.loads(run("plan", workplace / "profile", "--keep", 4, "--rank", "random", "--json").output)
    assert made["rank"] == "random"
    made = json.loads(run("plan", workplace / "profile", "--keep", 4, "--rank", "mean_norm", "--json").output)
    known = lifecycle.Evidence.from_directory(workplace / "profile", windows=10**6)
    assert [layer["scores"] for layer in made["layers"]] == [list(layer.mean_norm) for layer in known.layers]
    assert "--rank" in run("plan", workplace / "profile", "--keep", 4, "--rank", "best", code=2).output
    run("plan", workplace / "profile", "--keep", 4, "--protect", "x", code=2)
    run("plan", workplace / "profile", code=2)
    assert isinstance(run("plan", tmp_path, "--keep", 4, code=1).exception, EvidenceError)
    done = run("plan", workplace / "profile", "--keep", 0.5, "-o", workplace / "plan.json", code=1)
    assert isinstance(done.exception, PlanError) and "exists already" in str(done.exception)


def test_measure_compares_with_chance(workplace: Path) -> None:
    arguments = ("measure", workplace / "model", "--plan", workplace / "plan.json", "--data", workplace / "late.jsonl")
    options = ("--controls", 2, "--leave-one-out", "1:3", "--tokens", 600, "--length", 64, "--no-progress")
    done = run(*arguments, *options)
    for word in ("plan (contribution)", "random 2", "worst", "expert 1:3", "than chance"):
        assert word in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    record = json.loads(run(*arguments, *options, "--json").output)
    assert record["tokens"] <= 600 and len(record["random"]) == 2 and record["leave_one_out"][0]["expert_id"] == 3


def test_export_cuts_files_and_stock_transformers_loads_them(workplace: Path, tmp_path: Path) -> None:
    done = run(
        "export", workplace / "model", "--plan", workplace / "plan.json", "-o", tmp_path / "out", "--no-progress"
    )
    assert "8 -> 4 experts a layer" in done.output and "logits are those of the masked model" in done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts == 4 and (tmp_path / "out" / "tokenizer.json").is_file()
    done = run(
        *("export", workplace / "model", "--plan", workplace / "plan.json", "-o", tmp_path / "shapes"),
        *("--check", "shapes", "--json"),
    )
    record = json.loads(done.output)
    assert record["checked"] == "shapes" and record["max_difference"] is None and record["refit"] is None


def test_export_with_refit_is_nearer_to_the_full_model(workplace: Path, tmp_path: Path) -> None:
    plan = workplace / "plan.json"
    done = run(
        *("export", workplace / "model", "--plan", plan, "-o", tmp_path / "out", "--refit", workplace / "early.txt"),
        *("--length", 64, "--json"),
    )
    record = json.loads(done.output)
    assert record["refit"]["applied"] and record["refit"]["kl_after"] < record["refit"]["kl_before"]
    assert record["checked"] == "logits" and (tmp_path / "out" / "tokenizer.json").is_file()
    stored = json.loads((tmp_path / "out" / "prune_plan.json").read_text())
    assert stored["refit"]["applied"] and "refitted" in (tmp_path / "out" / "README.md").read_text()
    run("export", workplace / "model", "--plan", plan, "-o", tmp_path / "plain", "--check", "shapes")
    plain, refitted = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "out"))
    changed = {name for name, value in plain.items() if not torch.equal(value, refitted[name])}
    assert changed and all("experts.down_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("profile", "MODEL", "--data", "no.txt", "-o", "new"), DataError, "no file no.txt"),
        (("profile", "nowhere/at-all", "--data", "early.txt", "-o", "new"), WrapError, "no config can be read"),
        (("measure", "MODEL", "--plan", "no.json", "--data", "early.txt"), PlanError, "no plan can be read"),
        (("export", "MODEL", "--plan", "plan.json", "-o", "profile"), ExportError, "exists already"),
        (("export", "OTHER", "--plan", "plan.json", "-o", "new"), PlanMismatchError, "the plan is for a model"),
        (("export", "MODEL", "--plan", "plan.json", "-o", "new", "--refit", "no.txt"), DataError, "no file no.txt"),
    ],
)
def test_mistakes_are_one_message_and_write_nothing(
    arguments: tuple[str, ...], error: type[Exception], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    if "OTHER" in arguments:
        tiny.tiny_model("qwen3_moe", vocab_size=texts.VOCAB, num_hidden_layers=3).save_pretrained(workplace / "other")
    names = {"MODEL": "model", "OTHER": "other"}
    before = sorted(path.name for path in workplace.iterdir())
    done = run(*(names.get(argument, argument) for argument in arguments), code=1)
    assert isinstance(done.exception, error) and message in str(done.exception)
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "model", "-o", "new"),
        ("profile", "model", "--domain", "x", "-o", "new"),
        ("profile", "model", "--data", "a.txt", "--data", "b/a.txt", "-o", "new"),
        ("profile", "model", "--data", "early.txt", "-o", "new", "--dtype", "int4"),
        ("measure", "model", "--plan", "plan.json", "--data", "early.txt", "--leave-one-out", "3"),
        ("export", "model", "--plan", "plan.json", "-o", "new", "--check", "maybe"),
    ],
)
def test_wrong_usage_is_code_two(arguments: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    run(*arguments, code=2)
    assert not (workplace / "new").exists()


def test_records_without_a_window_are_named(tmp_path: Path) -> None:
    TelemetryWriter("run", tmp_path).close()
    assert isinstance(run("tail", tmp_path, code=1).exception, TelemetryError)
