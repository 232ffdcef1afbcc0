"""The job from a run to a smaller checkpoint, end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import _text_job as job
import prune_and_heal
import pytest

SMALL = job.ModelSize(layers=2, hidden=32, intermediate=32, heads=2, experts=8, top_k=2, vocab=400, length=32)


def test_it_ends_in_a_small_model_that_is_the_healed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = prune_and_heal.Options(
        steps=30, heal_steps=10, pretrain_steps=30, blocks=32, output_dir=tmp_path / "out", size=SMALL
    )
    losses = prune_and_heal.run(options)
    assert losses["small, loaded again"] == pytest.approx(losses["healed"], abs=1e-5)
    assert losses["healed"] < losses["refitted"], "ten steps of training must show"
    assert len(set(losses.values())) >= 4
    config = json.loads((tmp_path / "out" / "small" / "config.json").read_text())
    assert config["num_local_experts"] == 4
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["num_kept"] == 4
    assert "random" in capsys.readouterr().out
