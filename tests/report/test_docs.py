"""The pages on the report, the alerts and the command line: their lines run, and say what the rule table says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.made_runs import train_into
from typer.testing import CliRunner

from chronomoe_hf.cli.main import app
from chronomoe_hf.report.rules import ALERTS, STATES

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGES = ("report.md", "alerts.md", "cli.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def rules_markdown() -> str:
    """The table as the sections of docs/alerts.md."""
    words = {"act": "act now", "watch": "watch", "fine": "nothing wrong"}
    parts = []
    for title, rules in (("Alerts", ALERTS), ("States that the report names", STATES)):
        parts.append(f"## {title}\n")
        for key, rule in rules.items():
            parts.append(f"### {key}: {rule.title} ({words[rule.level]})\n")
            parts.append(f"**Meaning.** {rule.meaning}\n\n**Cause.** {rule.cause}\n\n**What to do.** {rule.advice}\n")
            if rule.config:
                parts.append(f"Setting: `{rule.config}`\n")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `my-run` and `another-run`, as the pages name them."""
    directory = tmp_path_factory.mktemp("docs")
    for name, seed in (("my-run", 0), ("another-run", 1)):
        train_into(directory / name, steps=4, seed=seed, arguments={"save_strategy": "steps", "save_steps": 4})
    return directory


@pytest.mark.parametrize("page", PAGES)
def test_every_line_runs(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "chronomoe"
        if "--run" in words:  # the page shows the beginning of an id
            run = "my-run"
            words[words.index("--run") + 1] = first_id(place / run)[:1]
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code in (0, 3) if "--check" in words else done.exit_code == 0, (
            line,
            done.output,
            done.exception,
        )
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})


def first_id(run: Path) -> str:
    match = re.search(r'"run_id":"(\w+)"', (run / "chronomoe" / "snapshots.jsonl").read_text())
    assert match is not None
    return match[1]


def test_the_page_about_alerts_is_the_rule_table() -> None:
    text = (DOCS / "alerts.md").read_text(encoding="utf-8")
    inside = text.split("<!-- rules:start -->\n")[1].split("<!-- rules:end -->")[0]
    assert inside.strip() == rules_markdown().strip(), "put the output of rules_markdown() between the markers"


def test_every_command_is_on_the_page() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert f"`{name}" in text, name
