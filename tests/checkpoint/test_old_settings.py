"""A state whose settings were saved by an older schema is compared with the live ones under today's names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from support.models import tiny_model

import chronomoe_hf
from chronomoe_hf.checkpoint.state_file import read_state, write_state
from chronomoe_hf.config import ChronoConfig

GOLDEN_1 = Path(__file__).parents[1] / "data" / "config_v1"


def test_only_settings_that_differ_are_named(tmp_path: Path) -> None:
    old = ChronoConfig.from_pretrained(GOLDEN_1)
    model = chronomoe_hf.wrap(tiny_model("mixtral"), old)
    system = chronomoe_hf.system_of(model)
    model(input_ids=torch.randint(4, 60, (2, 8)))
    system.step(1)
    assert system.save(tmp_path / "new")
    tensors, meta = read_state(tmp_path / "new")
    meta["config"] = json.loads((GOLDEN_1 / "chronomoe_config.json").read_text())
    assert "harm_hold" in meta["config"]["control"], "bad test setup"
    assert write_state(tmp_path / "old", tensors, meta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system.load(tmp_path / "old")
    chronomoe_hf.unwrap(model)
    other = chronomoe_hf.wrap(model, old.replace(control__harm__hold=5, alerts__pre_after=9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chronomoe_hf.system_of(other).load(tmp_path / "old")
    (message,) = [str(each.message) for each in caught if "other chronomoe settings" in str(each.message)]
    assert message.endswith("alerts.pre_after, control.harm.hold")
