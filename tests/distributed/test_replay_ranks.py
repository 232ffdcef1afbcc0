"""GRPO with replay on two ranks whose completions differ in length; and where one rank's engine hands out no routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replay.serving import serving

from chronomoe_hf.telemetry import read_jsonl

WORKER = Path(__file__).parent / "replay_worker.py"


def both(ranks: list[dict[str, Any]], name: str, kind: str) -> Any:
    """A count over both ranks; per layer where it is one."""
    values = [rank[name][kind] for rank in ranks]
    return [sum(pair) for pair in zip(*values, strict=True)] if isinstance(values[0], list) else sum(values)


def compared(windows: list[dict[str, Any]], pair: str) -> tuple[list[int], list[int]]:
    """(token, layer) of all windows that differ, and that were compared, per layer."""
    pairs = [window["pairs"][pair] for window in windows if pair in window["pairs"]]
    choices = [sum(column) for column in zip(*(each["choices"] for each in pairs), strict=True)]
    differs = [sum(round(each["mismatch"][at] * each["choices"][at]) for each in pairs) for at in range(len(choices))]
    return differs, choices


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_use_what_was_recorded_and_count_over_both(
    tmp_path: Path, start_script: Callable[..., tuple[int, str]]
) -> None:
    status, output = start_script(WORKER, [str(tmp_path)], 2)
    assert status == 0, output[-6000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name in ("rollout", "old", "silent"):
        ranks = [each[name] for each in found]
        assert ranks[0]["windows"] == ranks[1]["windows"] and ranks[0]["alerts"] == ranks[1]["alerts"]
        written, _ = read_jsonl(tmp_path / name / "0" / "chronomoe" / "replay.jsonl")
        assert [record["step"] for record in written] == [2, 4]
        assert not list((tmp_path / name / "1").rglob("*.jsonl")), "rank 1 wrote records too"
    for name in ("rollout", "old"):
        ranks = [each[name] for each in found]
        assert max(ranks[0]["lengths"]) > max(ranks[1]["lengths"]), "the lengths are alike: shows nothing"
        for rank in ranks:
            assert rank["choices"] > 0 and rank["flips"] == 0
            assert max(ratio for same, ratio in rank["ratios"] if same) <= 1e-5
            assert max(ratio for same, ratio in rank["ratios"] if not same) > 1e-4
        windows, last = ranks[0]["windows"], name == "rollout"
        kinds = {"rollout": {"rollout_old": "old", "rollout_gradient": "gradient"}, "old": {"old_gradient": "gradient"}}
        for pair, kind in kinds[name].items():
            differs, choices = compared(windows, pair)
            tokens = both(ranks, "tokens", kind) - (both(ranks, "rows", kind) if last else 0)
            assert choices == [tokens] * len(choices)
            assert differs == both(ranks, "differs", kind)
        assert sum(compared(windows, pair)[0]), "nothing differs: shows nothing"
        assert {window["coverage"] for window in windows} == {1.0}
        assert not [kind for kind in ranks[0]["alerts"] if kind.startswith("REPLAY_")]
    ranks = [each["silent"] for each in found]
    windows, routed = ranks[0]["windows"], ranks[0]
    needed = [sum(rank["tokens"][kind] - rank["rows"][kind] for kind in ("old", "gradient")) for rank in ranks]
    assert sum(window["tokens_wanted"] for window in windows) == sum(needed)
    assert sum(window["tokens_repeated"] for window in windows) == needed[0], "only rank 0 has routes"
    assert routed["flips"] == 0 and all(0.0 < window["coverage"] < 1.0 for window in windows)
    assert {"REPLAY_INVALID", "REPLAY_UNCOVERED"} <= set(routed["alerts"]), "rank 0 does not know of rank 1's engine"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_routes_of_a_server_reach_every_rank(tmp_path: Path, start_script: Callable[..., tuple[int, str]]) -> None:
    """The server's answer is on rank 0 alone; every rank repeats the choices of its own rows."""
    with serving(tmp_path) as url:
        status, output = start_script(WORKER.with_name("replay_server_worker.py"), [str(tmp_path), url], 2)
    assert status == 0, output[-6000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [rank["client"] for rank in ranks] == [True, False]
    assert set(ranks[0]["rows"]).isdisjoint(ranks[1]["rows"]), "the ranks had the same rows: shows nothing"
    for rank in ranks:
        assert rank["choices"] > 0 and rank["flips"] == 0
        assert rank["record"]["coverage"] == 1.0 and rank["record"]["unknown_rows"] == 0
        assert not [kind for kind in rank["alerts"] if kind.startswith("REPLAY_")]
    assert ranks[0]["record"] == ranks[1]["record"]
