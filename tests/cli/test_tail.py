"""chronomoe tail: the newest windows always, plain text whatever a record holds, runs apart, live while one writes."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import random_run, train_into
from support.moe_zoo import build
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf.cli.main import app
from chronomoe_hf.cli.output import bars, sparkline
from chronomoe_hf.cli.tail import lines, read, summary
from chronomoe_hf.errors import TelemetryError
from chronomoe_hf.telemetry import reader
from chronomoe_hf.telemetry.runs import this_process

COMMAND = [sys.executable, "-c", "from chronomoe_hf.cli.main import main; main()"]


def run(*arguments: str, width: int = 80) -> Any:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(app, list(arguments))


def snapshots(directory: Path) -> Path:
    return directory / "chronomoe" / "snapshots.jsonl"


def rows(output: str) -> dict[str, str]:
    """First word of a line -> the line."""
    return {line.split()[0]: line for line in output.splitlines() if line.strip()}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_line_fits_and_the_newest_window_is_never_dropped(width: int, tmp_path: Path) -> None:
    random_run(tmp_path, windows=70)
    path = snapshots(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:  # a ramp: every window but the newest shows the lowest bar
        newest = record["step"] == 700
        record["layers"][0]["n_effective"] = 4.0 if newest else 0.1
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run("tail", str(tmp_path), "-n", "70", width=width)
    assert done.exit_code == 0, done.exception
    assert max(len(line) for line in done.output.splitlines()) <= max(width, 54)
    row = rows(done.output)["0"]
    shown = re.search(r" (▁*█) ", row)
    assert shown is not None, row
    assert len(shown[1]) == {40: 3, 80: 29, 200: 70}[width]
    assert f"steps {700 - 10 * (len(shown[1]) - 1)} to 700" in done.output


def test_the_numbers_are_those_of_the_last_window(tmp_path: Path) -> None:
    random_run(tmp_path, windows=9)
    last = json.loads(snapshots(tmp_path).read_text().splitlines()[-1])["layers"][0]
    for directory in (tmp_path, tmp_path / "chronomoe"):
        done = run("tail", str(directory), "-n", "4")
        assert "steps 60 to 90, 4 windows" in done.output
        row = rows(done.output)["0"]
        for value in (last["n_effective"] / 4, last["max_violation"], last["coherence_mean"]):
            assert f"{value:.2f}" in row
        assert "1/4" in row
    with snapshots(tmp_path).open("a") as file:
        file.write('{"torn": ')
    assert "1 broken line" in run("tail", str(tmp_path)).output


def test_piped_output_is_plain(tmp_path: Path) -> None:
    random_run(tmp_path)
    done = subprocess.run([*COMMAND, "tail", str(tmp_path)], capture_output=True, check=True)
    assert b"\x1b" not in done.stdout and "█".encode() in done.stdout
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "tail", str(tmp_path)], capture_output=True, check=True, env=ascii_only)
    assert done.stdout.isascii() and b"maxvio" in done.stdout


def test_only_the_end_of_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_run(tmp_path, windows=100)
    parsed: list[bytes] = []
    parse = reader.parse_line
    monkeypatch.setattr(reader, "parse_line", lambda raw: (parsed.append(raw), parse(raw))[1])
    assert [window.step for window in read(tmp_path, 5, None, None).windows] == list(range(960, 1001, 10))
    assert len(parsed) == 5 + 2  # and the one attempt, for the runs and for how it ended


def test_a_table_reads_no_more_windows_than_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_run(tmp_path, windows=100)
    parsed: list[bytes] = []
    parse = reader.parse_line
    monkeypatch.setattr(reader, "parse_line", lambda raw: (parsed.append(raw), parse(raw))[1])
    many = run("tail", str(tmp_path), "-n", "10000")
    assert many.exit_code == 0 and len(parsed) < 60, "a table of 80 columns has room for some forty"
    assert many.output.splitlines()[2:] == run("tail", str(tmp_path), "-n", "60").output.splitlines()[2:]
    assert len(json.loads(run("tail", str(tmp_path), "-n", "10000", "--json").output)["windows"]) == 100


def test_two_trainings_in_one_directory_are_two_runs(tmp_path: Path) -> None:
    first = train_into(tmp_path, steps=6, interval=2)
    second = train_into(tmp_path, steps=4, interval=2, seed=1)
    ids = [t.callback_handler.callbacks[0].system.run_id for t in (first, second)]
    assert ids[0] != ids[1]
    newest = json.loads(run("tail", str(tmp_path), "--json").output)
    assert newest["run"] == ids[1] and newest["other_runs"] == [ids[0]]
    assert [window["step"] for window in newest["windows"]] == [2, 4]
    older = json.loads(run("tail", str(tmp_path), "--json", "--run", ids[0][:6]).output)
    assert [window["step"] for window in older["windows"]] == [2, 4, 6]
    text = run("tail", str(tmp_path)).output
    assert "steps 2 to 4, 2 windows" in text and ids[0] in text
    unknown = run("tail", str(tmp_path), "--run", "nope")
    assert isinstance(unknown.exception, TelemetryError) and ids[0] in str(unknown.exception)


def test_runs_of_unlike_models_are_shown(tmp_path: Path) -> None:
    random_run(tmp_path, layers=1, run_id="small")
    random_run(tmp_path, layers=3, run_id="large")
    assert set("012") <= set(rows(run("tail", str(tmp_path)).output))
    assert "1" not in rows(run("tail", str(tmp_path), "--run", "small").output)


def test_one_layer(tmp_path: Path) -> None:
    random_run(tmp_path, layers=12)
    shown = rows(run("tail", str(tmp_path), "--layer", "3", "--layer", "11").output)
    assert {"3", "11"} <= set(shown) and "4" not in shown
    assert isinstance(run("tail", str(tmp_path), "--layer", "12").exception, TelemetryError)


def test_check_exits_with_three_while_an_alert_is_in_force(tmp_path: Path) -> None:
    random_run(tmp_path, dying=False)
    assert run("tail", str(tmp_path), "--check").exit_code == 0
    record = json.loads(snapshots(tmp_path).read_text().splitlines()[-1])
    record["active_alerts"] = [{"kind": "DRIFT", "layer_id": 1, "state": "raised", "step": 30, "detail": "why"}]
    with snapshots(tmp_path).open("a") as file:
        file.write(json.dumps({**record, "step": 100}) + "\n")
    done = run("tail", str(tmp_path), "--check")
    assert done.exit_code == 3 and "! DRIFT in layer 1 since step 30" in done.output
    assert run("tail", str(tmp_path), "--check", "--layer", "0").exit_code == 0
    assert run("tail", str(tmp_path)).exit_code == 0
    assert run("tail", str(tmp_path), "--check", "--follow").exit_code == 2


HOSTILE = [
    {"step": 1, "run_id": "\x1b[31mred\x1b]0;title\x07", "layers": [{"layer_id": "[/nope]"}]},
    {"step": 1, "run_id": "<script>alert(1)</script>", "layers": [{"layer_id": 0, "n_effective": "1", "n_experts": 0}]},
    {
        "step": 1,
        "run_id": "a\nb",
        "layers": [{"layer_id": 0, "n_effective": 10**400, "n_experts": 4, "max_violation": 1e308}],
    },
    {"step": 1, "run_id": "[bold]x", "layers": [5, None, {"layer_id": 0, "notes": 3, "top_k": "2"}]},
    {"step": 1, "run_id": None, "layers": [], "active_alerts": [{"kind": "\x1b[2J", "detail": "\x9b2J", "step": "x"}]},
    {
        "step": 1,
        "run_id": "\ud800",
        "layers": [{"layer_id": {"a": 1}, "max_violation_ceiling": -1, "max_violation": 3}],
    },
]


@pytest.mark.parametrize("record", HOSTILE)
def test_whatever_a_record_holds_stays_text(record: dict[str, Any], tmp_path: Path) -> None:
    path = snapshots(tmp_path)
    path.parent.mkdir()
    path.write_text(json.dumps(record) + "\n")
    done = subprocess.run([*COMMAND, "tail", str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert not any(not c.isprintable() and c != "\n" for c in text)
    if isinstance(record["run_id"], str) and record["run_id"].isprintable():
        assert record["run_id"] in text
    assert json.loads(run("tail", str(tmp_path), "--json").output)["windows"][0]["step"] == 1


@pytest.mark.parametrize(
    "record", [{"step": 1}, {"layers": []}, {"step": "1", "layers": []}, {"step": 1.5, "layers": 5}]
)
def test_what_is_no_window_is_counted(record: dict[str, Any], tmp_path: Path) -> None:
    random_run(tmp_path, windows=2)
    with snapshots(tmp_path).open("a") as file:
        file.write(json.dumps({**record, "run_id": "run"}) + "\n")
    assert "1 broken line" in run("tail", str(tmp_path)).output


def test_nothing_to_show_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for directory, word in ((tmp_path, "snapshots.jsonl"), (tmp_path / "no", "no directory")):
        done = subprocess.run([*COMMAND, "tail", str(directory)], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert subprocess.run([*COMMAND, "tail"], capture_output=True, check=False).returncode == 2


# ---- following -----------------------------------------------------------------------------------------------------


def test_follow_prints_a_line_for_every_window_while_training_runs(tmp_path: Path) -> None:
    follow = subprocess.Popen(
        [*COMMAND, "tail", str(tmp_path), "--follow", "--every", "0.1"], stdout=subprocess.PIPE, text=True
    )
    try:
        train_into(tmp_path, steps=5)
        assert follow.stdout is not None
        seen = [follow.stdout.readline() for _ in range(5)]
        assert follow.stdout.readline() == "the run ended\n"
        assert follow.wait(20) == 0, "it ends with the run"
    finally:
        follow.kill()
    assert [line.split(":")[0] for line in seen] == [f"step {step}" for step in range(1, 6)]
    assert seen[-1].strip() == summary(read(tmp_path, 1, None, None).windows[-1])


def test_follow_on_a_terminal_redraws_the_table(tmp_path: Path) -> None:
    random_run(tmp_path, layers=40, windows=3)
    master, slave = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    follow = subprocess.Popen([*COMMAND, "tail", str(tmp_path), "-f"], stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    seen = b""
    try:
        while b"layers; --layer N" not in seen:
            seen += os.read(master, 65536)
        follow.send_signal(signal.SIGINT)
        assert follow.wait(20) == 0
    finally:
        follow.kill()
        os.close(master)
    assert b"that lost most, of 40 layers" in seen and b"\x1b[?1049" not in seen, "the last table stays on the screen"


@pytest.mark.parametrize("killed", [True, False])
def test_follow_ends_with_a_run_that_never_closed_a_window(killed: bool, tmp_path: Path) -> None:
    code = (
        "import os, sys, chronomoe_hf\n"
        "from support.moe_zoo import build\n"
        "system = chronomoe_hf.system_of(chronomoe_hf.wrap(build('mixtral'), 'observe'))\n"
        "system.open_telemetry(sys.argv[1])\n"
        + ("os.kill(os.getpid(), 9)" if killed else "system.close_telemetry(completed=False)")
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode == -9) is killed, done.stderr
    follow = subprocess.run(
        [*COMMAND, "tail", str(tmp_path), "--follow", "--every", "0.1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert follow.returncode == 3 and follow.stdout.startswith("the run ")
    assert ("is gone" if killed else "broke off") in follow.stdout
    once = subprocess.run([*COMMAND, "tail", str(tmp_path)], capture_output=True, text=True, check=False)
    assert once.returncode == 1 and "first window" in once.stderr and not once.stdout
    wrong = [*COMMAND, "tail", str(tmp_path), "--follow", "--run", "nosuch"]
    told = subprocess.run(wrong, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1 and "no run 'nosuch'" in told.stderr


def test_follow_waits_for_a_run_that_has_begun_after_one_that_ended(tmp_path: Path) -> None:
    train_into(tmp_path, steps=2)
    system = chronomoe_hf.system_of(chronomoe_hf.wrap(build("mixtral"), "observe"))
    system.open_telemetry(tmp_path)
    once = run("tail", str(tmp_path))
    assert once.exit_code == 0 and "has begun since and closed no window yet" in once.output
    assert len(read(tmp_path, 9, None, None).windows) == 2 and not read(tmp_path, 9, None, None, follow=True).windows
    follow = subprocess.Popen(
        [*COMMAND, "tail", str(tmp_path), "--follow", "--every", "0.1"], stdout=subprocess.PIPE, text=True
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            follow.wait(6)
        system.close_telemetry(completed=True)
        assert follow.communicate(timeout=20)[0] == "the run ended\n", "nothing of the run before"
    finally:
        follow.kill()


def test_a_small_screen_shows_the_worst_layers(tmp_path: Path) -> None:
    random_run(tmp_path, layers=40, windows=3)
    view = read(tmp_path, 3, None, None)
    drawn = lines(view, 80, bars("utf-8"), height=23)
    assert len(drawn) <= 23
    changes = {layer.layer_id: layer.change["n_effective"] for layer in view.windows[-1].layers}
    shown = [line.split()[0] for line in drawn if line.split() and line.split()[0] in changes]
    assert shown == sorted(sorted(changes, key=lambda name: changes[name])[: len(shown)], key=int)
    assert 10 <= len(shown) < 40


def test_how_a_run_ended_is_whole_on_a_small_screen(tmp_path: Path) -> None:
    random_run(tmp_path, layers=40, windows=3)
    view = read(tmp_path, 3, None, None)
    gone = dataclasses.replace(view, process={**this_process(), "pid": 2**22 + 1})
    assert gone.over is not None
    drawn = lines(gone, 80, bars("utf-8"), height=23)
    assert f"the run {gone.over}" in drawn and len(drawn) <= 23


def test_the_first_window_is_nothing_that_was_lost(tmp_path: Path) -> None:
    random_run(tmp_path, layers=40, windows=1)
    view = read(tmp_path, 3, None, None)
    drawn = lines(view, 80, bars("utf-8"), height=23)
    assert "step 10, 1 window" in drawn[0] and not any("lost" in line for line in drawn)
    used = {layer.layer_id: layer.neff_fraction or 0.0 for layer in view.windows[-1].layers}
    shown = [line.split()[0] for line in drawn if line.split() and line.split()[0] in used]
    assert any("with the fewest experts in use, of 40 layers" in line for line in drawn)
    assert set(shown) == set(sorted(used, key=lambda name: used[name])[: len(shown)])


def test_bars() -> None:
    assert sparkline([0.0, None, 0.5, 1.0, 7.0], 0.0, 1.0) == "▁ ▅██"
    assert sparkline([0.0, 1.0], 0.0, 1.0, bars("ascii")) == "_#" and bars("utf-8") != bars("latin-1")


# ---- a monitor to be trusted -----------------------------------------------------------------------------------------


def test_follow_refuses_what_does_not_exist(tmp_path: Path) -> None:
    wrong = run("tail", str(tmp_path / "typo"), "--follow")
    assert isinstance(wrong.exception, TelemetryError) and "typo" in str(wrong.exception)
    random_run(tmp_path)
    unknown = run("tail", str(tmp_path), "--follow", "--run", "zzz")
    assert isinstance(unknown.exception, TelemetryError) and "zzz" in str(unknown.exception)


@pytest.mark.parametrize("completed", [True, False])
def test_follow_ends_when_the_run_does(completed: bool, tmp_path: Path) -> None:
    random_run(tmp_path, windows=3)
    end = {"schema": 2, "run_id": "run", "attempt": 0, "step": 30, "completed": completed}
    (tmp_path / "chronomoe" / "ends.jsonl").write_text(json.dumps(end) + "\n")
    done = run("tail", str(tmp_path), "--follow")
    assert done.exit_code == (0 if completed else 3)
    assert done.output.splitlines()[-1] == ("the run ended" if completed else "the run broke off")
    assert f"the run {'ended' if completed else 'broke off'}" in run("tail", str(tmp_path)).output


def test_follow_sees_that_the_process_is_gone(tmp_path: Path) -> None:
    random_run(tmp_path, windows=3)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "chronomoe" / "attempts.jsonl"
    record = json.loads(path.read_text())
    record["manifest"]["process"] = {**this_process(), "pid": ended.pid}
    path.write_text(json.dumps(record) + "\n")
    done = run("tail", str(tmp_path), "--follow")
    assert done.exit_code == 3 and "is gone" in done.output
    record["manifest"]["process"] = this_process()
    path.write_text(json.dumps(record) + "\n")
    assert read(tmp_path, 1, None, None).over is None


def test_many_layers_of_one_alert_are_one_line(tmp_path: Path) -> None:
    random_run(tmp_path, layers=48, windows=3, dying=False)
    path = snapshots(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    alert = {"kind": "PRE_COLLAPSE", "state": "raised", "detail": "why"}
    worse = [{**alert, "layer_id": at, "step": 20 + at % 2, "since": "got_worse"} for at in range(40)]
    came = [{**alert, "layer_id": at, "step": 30, "since": "as_it_came"} for at in range(40, 47)]
    records[-1]["active_alerts"] = worse + came
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = lines(read(tmp_path, 3, None, None), 80, bars("utf-8"), height=23)
    assert len(drawn) <= 23 and max(map(len, drawn)) <= 80
    assert "! PRE_COLLAPSE in 40 of 48 layers since step 20, got worse" in drawn
    assert "= PRE_COLLAPSE in 7 of 48 layers since step 30, as the model came" in drawn
    assert run("tail", str(tmp_path), "--check").exit_code == 3
    assert run("tail", str(tmp_path), "--check", "--layer", "45").exit_code == 0, "a level alone asks for nothing"


def test_json_has_one_shape_and_whole_numbers(tmp_path: Path) -> None:
    train_into(tmp_path, steps=3)
    whole = json.loads(run("tail", str(tmp_path), "--json").output)
    followed = [json.loads(line) for line in run("tail", str(tmp_path), "--json", "--follow").output.splitlines()]
    assert [len(each["windows"]) for each in followed] == [1, 1, 1] and whole["schema"] == 1
    assert [each["windows"][0] for each in followed] == whole["windows"]
    assert all(each.keys() == whole.keys() for each in followed) and whole["over"] == "ended"
    layer = whole["windows"][-1]["layers"][0]
    assert layer["layer_id"] == 0 and isinstance(layer["numbers"]["token_count"], int)
    assert isinstance(layer["numbers"]["dead_experts"], int) and isinstance(layer["numbers"]["n_effective"], float)


def test_a_profile_and_unreadable_lines_are_told(tmp_path: Path) -> None:
    random_run(tmp_path / "run", windows=1)
    snapshots(tmp_path / "run").write_text("garbage\n" * 30)
    assert "none of the 30 lines" in str(run("tail", str(tmp_path / "run")).exception)
    random_run(tmp_path / "newer", windows=2)
    path = snapshots(tmp_path / "newer")
    path.write_text(path.read_text().replace('"schema":2,"run_id"', '"schema":9,"run_id"'))
    assert "2 windows are of a newer version" in run("tail", str(tmp_path / "newer")).output
    (path.parent / "profile.json").write_text("{}")
    assert "is a profile" in str(run("tail", str(tmp_path / "newer")).exception)
