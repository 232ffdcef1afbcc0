"""`make bench`: what it runs, where it writes, and what it says of a table that differs."""

from __future__ import annotations

import json
import subprocess
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_module("bench")


def test_every_part_is_a_script_that_knows_its_options(bench: ModuleType, tmp_path: Path) -> None:
    for part in bench.PARTS:
        words = bench.command(part, tmp_path)
        assert str(tmp_path) in words and "OUTPUT" not in words
        script = next(word for word in words if word.endswith(".py"))
        text = Path(script).read_text("utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text, f"{part.name}: {option}"


def test_quick_forms_stay_out_of_the_results(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, build = tmp_path / "results", tmp_path / "build"
    monkeypatch.setattr(bench, "BUILD", build)
    code = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'made').write_text('x')"
    for quick in (False, True):
        assert bench.run(bench.Part("one", ("-c", code, "OUTPUT"), quick), results)
    assert [path.name for path in results.iterdir()] == ["made"]
    assert (build / "quick" / "one" / "made").is_file()
    assert not bench.run(bench.Part("two", ("-c", "raise SystemExit('went wrong')"), False), results)
    said = capsys.readouterr().out
    assert "one: done in" in said and "two: FAILED (1)" in said and "went wrong" in said


def test_differences_are_named(bench: ModuleType, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for place, value, label in ((old, 1.0, "before"), (new, 1.5, "now")):
        place.mkdir()
        rows = [{"case": "b", "n": value, "same": 3}, {"case": "a", "n": 2, "same": [4, 5], "right": value == 1.0}]
        if place is new:
            rows.reverse()
        runs = {"oldest": {"rows": []}, label: {"rows": rows}}
        (place / "t.json").write_text(json.dumps({"runs": runs}))
        (place / "m.md").write_text(f"| a | {value} |\n| b | 2 |\n")
    lines = bench.differences(new / "t.json", old / "t.json")
    assert lines == ["t: 5 numbers in both, 1 differ; 0 new", "  runs.rows[case=b].n: 1 -> 1.5"]
    assert bench.differences(old / "t.json", old / "t.json") == ["t: 5 numbers in both, 0 differ; 0 new"]
    assert bench.differences(new / "m.md", old / "m.md") == ["m: 2 lines differ", "-| a | 1.0 |", "+| a | 1.5 |"]
    assert bench.differences(old / "m.md", old / "m.md") == ["m: as committed"]


def test_the_makefile_keeps_the_committed_tables() -> None:
    done = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--results build/bench" in done.stdout
