"""The Python of docs/pictures.md runs, in order, in an empty directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs.test_pages import ROOT, blocks_of
from support import models as tiny
from support import texts

import chronomoe_hf


def test_the_python_of_pictures_md_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"vocab_size": texts.VOCAB, "num_hidden_layers": 4, "train": False}
    known = {
        "chronomoe_hf": chronomoe_hf,
        "model": tiny.tiny_model("mixtral", **fields),
        "tuned": tiny.tiny_model("mixtral", seed=1, **fields),
        "wrapped": chronomoe_hf.wrap(tiny.tiny_model("mixtral")),
        "tokenizer": texts.tokenizer(),
    }
    blocks = [b.code for b in blocks_of((ROOT / "docs/pictures.md").read_text("utf-8")) if b.language == "python"]
    assert blocks
    for code in blocks:
        exec(code, known)
    assert (tmp_path / "load.svg").read_text().startswith("<svg")
    assert (tmp_path / "trace.html").stat().st_size > 10_000
