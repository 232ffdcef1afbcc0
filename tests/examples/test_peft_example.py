"""examples/peft_sft.py: LoRA, TRL and attach on real text, end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import _text_job as job
import pytest

TINY = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=4, top_k=2, vocab=400, length=32)


def test_the_command_line_fills_the_options() -> None:
    import peft_sft

    options = peft_sft.parse_arguments(["--preset", "balance", "--steps", "5", "--rank", "2"])
    assert (options.preset, options.steps, options.rank) == ("balance", 5, 2)
    assert peft_sft.parse_arguments([]) == peft_sft.Options()


def test_passages_are_real_code_of_different_lengths() -> None:
    import peft_sft

    texts = peft_sft.passages("train", 200)["text"]
    assert len(texts) == 200
    lengths = sorted(len(text) for text in texts)
    assert lengths[0] > 80 and lengths[-1] > 4 * lengths[0]
    assert sum("def " in text for text in texts) > 20


def check(directory: Path, preset: str, layers: int) -> None:
    (arm,) = json.loads((directory / "verdict.json").read_text())
    assert math.isfinite(arm["loss_before"]) and arm["loss_after"] < arm["loss_before"]
    assert len(arm["layers"]) == layers
    assert all(1 / row["n_experts"] <= row["neff_fraction"] <= 1 for row in arm["layers"])
    assert all(row["phi_min"] is not None for row in arm["layers"])
    final = directory / preset / "final"
    files = {str(path.relative_to(final)) for path in final.rglob("*")}
    assert {"adapter_model.safetensors", "chronomoe/state.json", "chronomoe/state.tensors"} <= files
    assert "model.safetensors" not in files
    assert len((directory / preset / "chronomoe" / "snapshots.jsonl").read_text().splitlines()) > 1


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import peft_sft
    from _verdict import print_verdict, save_verdict

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = peft_sft.Options(steps=6, pretrain_steps=3, interval=2, rank=4, size=TINY, output_dir=tmp_path / "run")
    arm = peft_sft.run(options)
    print_verdict([arm], save_verdict([arm]))
    check(tmp_path / "run", "protect", 2)
    printed = capsys.readouterr().out
    assert "Neff/E" in printed and "adapter_model.safetensors" in printed


@pytest.mark.slow
def test_the_example_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_sft

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    peft_sft.main(["--output-dir", str(tmp_path / "run")])
    check(tmp_path / "run", "protect", 2)
