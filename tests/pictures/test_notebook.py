"""A notebook, executed: cards in its cells, three columns of ours in Trainer's table, a live card below it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support import models as tiny
from support import texts

pytestmark = pytest.mark.slow

CELLS = (
    """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
import chronomoe_hf
model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
text = open("text.txt").read()
ids = tokenizer(text)["input_ids"]
rows = [{"input_ids": ids[at : at + 32], "labels": ids[at : at + 32]} for at in range(0, 640, 32)]
""",
    "chronomoe_hf.profile(model, tokenizer, {'a': [text[:900]], 'b': [text[900:1800]]}, progress=False)",
    "chronomoe_hf.trace(model, tokenizer, text[:80])",
    """
arguments = TrainingArguments("out", max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2,
    report_to="none", use_cpu=True, save_strategy="no", per_device_train_batch_size=4)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
callback = chronomoe_hf.attach(trainer, chronomoe_hf.ChronoConfig.observe(interval=2))
trainer.train()
""",
    "callback.system",
    "callback.system.last_snapshot.figure()",
    "callback.system.last_snapshot.to_pandas().head(3)",
)


def test_a_notebook_shows_cards(tmp_path: Path) -> None:
    tiny.tiny_model("mixtral", vocab_size=texts.VOCAB).save_pretrained(tmp_path / "model")
    texts.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(texts.documents(12)))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    nbformat.write(book, tmp_path / "book.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", "book.ipynb"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=500)
    html = (tmp_path / "book.html").read_text()
    for title in (
        "Profile of MixtralForCausalLM",
        "Trace of MixtralForCausalLM",
        "Routing at step 4",
        "Who does the work",
    ):
        assert title in html
    assert "Routing at step 2" not in html, "the live card takes the place of the one before"
    heads = re.findall(r"<th>([^<]*)</th>", html)
    assert "Validation Loss" in heads
    assert {head for head in heads if head.lower().startswith("moe")} == {
        "Moe/neff Mean",
        "Moe/dead Experts",
        "Moe/maxvio Max",
    }
