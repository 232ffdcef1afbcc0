"""Every Python block of docs/lifecycle.md, cut.md and roles.md runs, in order, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import digest
from transformers import MixtralForCausalLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lifecycle.md"


def test_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(PAGE.with_name(name).read_text(encoding="utf-8") for name in ("lifecycle.md", "cut.md", "roles.md"))
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks[:3]:
        exec(compile(block, str(PAGE), "exec"), names)
    bits = digest(names["model"])
    exec(compile(blocks[3], str(PAGE), "exec"), names)
    assert digest(names["model"]) == bits
    assert names["plan"].num_kept == 6 and len(names["plan"].layers[0].dropped) == 2
    assert names["evidence"].source.tokens == 20 * 8 * 32
    printed = capsys.readouterr().out
    assert re.search(r"contribution, 6 experts a layer: loss [+-]\d", printed) and "random" in printed
    assert torch.isfinite(names["logits"]).all()
    exec(compile(blocks[4], str(PAGE), "exec"), names)
    assert names["system"].cut.step == 6 and names["system"].cut.plan.num_kept == 6
    assert (tmp_path / "cut_run" / "chronomoe" / "prune_plan.json").is_file()
    assert MixtralForCausalLM.from_pretrained(tmp_path / "cut_small").config.num_local_experts == 6
    capsys.readouterr()
    exec(compile(blocks[5], str(PAGE), "exec"), names)
    pair, standing = capsys.readouterr().out.splitlines()
    assert "'score': " in pair and standing == "{}"


def test_the_page_on_splits_runs_and_gives_every_bit_back(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.with_name("split.md")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    before, after = blocks[1].split("done = lifecycle.apply", 1)
    exec(compile(blocks[0] + before, str(page), "exec"), names)
    bits = digest(names["model"])
    exec(compile("done = lifecycle.apply" + after, str(page), "exec"), names)
    assert digest(names["model"]) == bits and names["plan"].num_copies > 0
    assert "idle experts of 16 become copies" in capsys.readouterr().out
