"""Every Python block of docs/checkpoints.md runs, in order, and does what the text says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import chronomoe_hf
from chronomoe_hf.errors import NotWrappedError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ids = torch.arange(32).reshape(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks[:2]:
            exec(compile(block, str(PAGE), "exec"), names)
        governed, loaded = names["model"].eval(), names["loaded"].eval()
        assert torch.equal(governed(input_ids=ids).logits, loaded(input_ids=ids).logits)
        for block in blocks[2:]:
            exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"\[0\.\d+, 0\.\d+\]", printed), printed
    assert "beta does not fold: the model has no bias" in printed
    assert "no chronomoe state in typo" in printed
    with pytest.raises(NotWrappedError):
        chronomoe_hf.system_of(loaded)
    assert not torch.equal(governed(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert sorted(path.name for path in (tmp_path / "final").iterdir() if path.is_dir()) == ["chronomoe"]
    assert not (tmp_path / "to-serve" / "chronomoe").exists()
