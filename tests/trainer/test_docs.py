"""Every Python block of docs/integration.md runs, in order, and does what the text says."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import chronomoe_hf
from chronomoe_hf.wrapping.owner import find_system

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integration.md"


def run_ids(directory: Path) -> list[str]:
    lines = (directory / "chronomoe" / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line)["run_id"] for line in lines]


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(blocks):
            exec(compile(block, str(PAGE), "exec"), names)
            if number == 1:
                assert {"eval_near_moe/neff_min", "eval_far_moe/neff_min"} <= names["metrics"].keys()
                logged = [entry["step"] for entry in names["trainer"].state.log_history if "moe/neff_min" in entry]
                assert logged == [2, 4, 6]
            if number == 4:
                assert chronomoe_hf.system_of(names["adapted"]).last_snapshot.step == 6
    assert find_system(names["trainer"].model) is None
    assert len(set(run_ids(tmp_path / "search"))) == 2
    snapshots = (tmp_path / "loop" / "chronomoe" / "snapshots.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in snapshots] == [2, 4, 6, 8, 10, 12, 14, 16]
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert printed[-1] == "8" and 1.0 <= float(printed[-2]) <= 8.0
