"""Lens, fold and unwrap where weights are sharded: FSDP2 and ZeRO-3."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Job, result_path, rows
from support.models import tiny_model

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
GOVERN: dict[str, Any] = {
    "interval": 2,
    "alerts": {"min_window_tokens": 1},
    "beta": {"eta": 0.2},
    "control": {"integral_target": 1.0, "integral_gain": 5.0, "min_pressure": 0.0, "lens_spread_max": 1e6},
}


@pytest.fixture
def leave(tmp_path: Path, start_script: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    def run(engine: str, **arguments: Any) -> list[dict[str, Any]]:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        job = Job(
            output_dir=str(tmp_path / "run"), engine=engine, config=GOVERN, arguments={"max_steps": 4, **arguments}
        )
        path = tmp_path / "job.json"
        path.write_text(json.dumps(dataclasses.asdict(job)))
        returncode, output = start_script(HERE / "leaving.py", [str(path)], 2)
        assert returncode == 0, output[-6000:]
        return [torch.load(result_path(job.output_dir, rank), weights_only=True) for rank in range(2)]

    return run


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_leaving_a_sharded_model(engine: str, leave: Callable[..., Any]) -> None:
    ranks = leave(engine)
    plain = tiny_model("mixtral", train=False)
    plain.load_state_dict(ranks[0]["weights"])
    with torch.no_grad():
        expected = plain(**{name: value[None] for name, value in rows(1)[0].items()}).logits
    for rank in ranks:
        found = rank["found"]
        assert found["sharded"] and min(found["scales"]) > 0
        assert found["full_weight"] and found["weights_untouched"]
        assert "sharded over ranks" in found["fold"] and "in one process" in found["fold"]
        assert found["router"].startswith("Chrono") and found["router_after"] == "MixtralTopKRouter"
        assert found["unwrap"] == "" and found["steered"]
        assert torch.equal(torch.tensor(found["logits"]), expected)


def test_routers_that_are_units_of_their_own_are_refused(leave: Callable[..., Any]) -> None:
    classes = ["MixtralDecoderLayer", "ChronoMixtralTopKRouter"]
    for rank in leave("fsdp", fsdp_config={"transformer_layer_cls_to_wrap": classes}):
        found = rank["found"]
        assert found["router_is_fsdp"] and found["router"] == "FSDPChronoMixtralTopKRouter"
        assert "is sharded by FSDP" in found["unwrap"] and "from its checkpoint" in found["unwrap"]
        assert found["router_after"] == found["router"] and not found["steered"]
