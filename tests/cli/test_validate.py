"""chronomoe validate finds each planted fault and names it; a sound run and a sound state have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import random_run, train_into
from typer.testing import CliRunner

from chronomoe_hf.cli.main import app
from chronomoe_hf.errors import ChronoError


def validate(path: Path) -> tuple[int, list[dict[str, Any]]]:
    done = CliRunner().invoke(app, ["validate", str(path), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.output)["faults"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    train_into(directory, steps=4, interval=2, arguments={"save_strategy": "steps", "save_steps": 2})
    return directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_sound_run_has_no_fault(run: Path) -> None:
    assert validate(run) == (0, [])
    looked_at = json.loads(CliRunner().invoke(app, ["validate", str(run), "--json"]).output)["looked_at"]
    assert len(looked_at) == 3 and "records" in looked_at[0]  # records and two checkpoints
    assert validate(run / "checkpoint-4") == (0, [])
    assert validate(run / "chronomoe") == (0, [])
    assert validate(tensor_file(run / "checkpoint-4").parent) == (0, [])
    assert "no fault found" in CliRunner().invoke(app, ["validate", str(run)]).output


def change(name: str, line: int, **fields: Any) -> Callable[[Path], None]:
    """Plant: set fields of one line of a record file (None takes a field away)."""

    def plant(run: Path) -> None:
        path = run / "chronomoe" / name
        lines = path.read_text().splitlines()
        record = {**json.loads(lines[line - 1]), **fields}
        lines[line - 1] = json.dumps({key: value for key, value in record.items() if value is not None})
        path.write_text("\n".join(lines) + "\n")

    return plant


def append(name: str, text: bytes) -> Callable[[Path], None]:
    def plant(run: Path) -> None:
        with (run / "chronomoe" / name).open("ab") as file:
            file.write(text)

    return plant


def link(run: Path) -> None:
    path = run / "chronomoe" / "alerts.jsonl"
    path.unlink(missing_ok=True)
    (run / "elsewhere").write_text("")
    path.symlink_to(run / "elsewhere")


@pytest.mark.parametrize(
    ("plant", "file", "line", "word"),
    [
        (append("snapshots.jsonl", b'{"step": 6, "lay'), "snapshots.jsonl", 3, "half written"),
        (append("alerts.jsonl", b"\xff\xfe garbage\n"), "alerts.jsonl", None, "garbage"),
        (append("snapshots.jsonl", b'{"step": NaN}\n'), "snapshots.jsonl", 3, "NaN"),
        (change("snapshots.jsonl", 2, schema=99), "snapshots.jsonl", 2, "newer"),
        (change("snapshots.jsonl", 2, schema=None), "snapshots.jsonl", 2, "schema"),
        (change("snapshots.jsonl", 1, run_id=None), "snapshots.jsonl", 1, "run_id"),
        (change("snapshots.jsonl", 1, step="2"), "snapshots.jsonl", 1, "step"),
        (change("snapshots.jsonl", 2, step=1), "snapshots.jsonl", 2, "comes after"),
        (change("snapshots.jsonl", 2, layers=None), "snapshots.jsonl", 2, "layers"),
        (change("snapshots.jsonl", 2, attempt=7), "snapshots.jsonl", 2, "attempts.jsonl"),
        (change("control_decisions.jsonl", 1, run_id="other"), "control_decisions.jsonl", 1, "attempts.jsonl"),
        (change("routing_events.jsonl", 1, layer_id=-1), "routing_events.jsonl", 1, "layer_id"),
        (link, "alerts.jsonl", None, "link"),
        (lambda run: (run / "chronomoe" / "run_manifest.json").write_text("{"), "run_manifest.json", None, "JSON"),
        (lambda run: (run / "chronomoe" / "run_manifest.json").unlink(), "run_manifest.json", None, "missing"),
    ],
)
def test_each_planted_fault_of_the_records_is_named(
    plant: Callable[[Path], Any], file: str, line: int | None, word: str, run: Path
) -> None:
    plant(run)
    code, faults = validate(run)
    assert code == 3
    named = [f for f in faults if Path(f["file"]).name == file and word in f["what"]]
    assert named, faults
    assert line is None or named[0]["line"] == line


def test_a_layer_whose_numbers_contradict_each_other(tmp_path: Path) -> None:
    random_run(tmp_path, windows=2)
    path = tmp_path / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["layers"][0]["n_effective"] = 5.0  # of 4 experts
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, faults = validate(tmp_path)
    assert code == 3 and faults[0]["line"] == 2 and "n_effective 5" in faults[0]["what"]


def test_many_faults_are_counted(run: Path) -> None:
    append("alerts.jsonl", b"x\n" * 200)(run)
    faults = validate(run)[1]
    assert len(faults) == 51 and "more faults" in faults[-1]["what"]


def tensor_file(directory: Path) -> Path:
    return next(path for path in directory.rglob("state.tensors") if "chronomoe" in str(path.relative_to(directory)))


def flip(directory: Path) -> None:
    path = tensor_file(directory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(directory: Path) -> None:
    path = tensor_file(directory)
    path.write_bytes(path.read_bytes()[:-1])


def drop_manifest(directory: Path) -> None:
    path = tensor_file(directory)
    (path.with_name("state.json") if path.parent != directory else path.with_name("chronomoe.json")).unlink()


@pytest.mark.parametrize("plant", [flip, cut, drop_manifest, lambda d: tensor_file(d).unlink()])
def test_each_planted_fault_of_a_state_is_found(plant: Callable[[Path], None], run: Path) -> None:
    plant(run / "checkpoint-4")
    code, faults = validate(run)
    assert code == 3 and len(faults) == 1 and faults[0]["file"].endswith("checkpoint-4")
    assert validate(run / "checkpoint-4")[0] == 3
    assert validate(run / "checkpoint-2")[0] == 0


def test_a_directory_without_anything_of_ours_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(tmp_path)])
    assert isinstance(done.exception, ChronoError)
