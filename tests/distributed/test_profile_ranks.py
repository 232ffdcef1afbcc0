"""A profile in two processes counts what one process counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import models as tiny
from support import texts

import chronomoe_hf
from chronomoe_hf.telemetry import read_jsonl

WORKER = Path(__file__).with_name("profile_worker.py")


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path: Path, start_script: Callable[..., tuple[int, str]]) -> None:
    model = tiny.tiny_model("mixtral", vocab_size=texts.VOCAB)
    model.save_pretrained(tmp_path / "model")
    texts.tokenizer().save_pretrained(tmp_path / "model")
    docs = texts.documents(12)
    domains = {"first": list(docs[:5]), "second": list(docs[5:])}
    for name, rows in domains.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    returncode, output = start_script(WORKER, [str(tmp_path)], 2)
    assert returncode == 0, output[-4000:]
    options: dict[str, Any] = {"tokens": None, "length": 24, "batch_size": 3, "progress": False}
    alone = chronomoe_hf.profile(model, texts.tokenizer(), domains, **options)
    written = json.loads((tmp_path / "out" / "chronomoe" / "profile.json").read_text())
    for found in written["domains"]:
        want = alone.domains[found["name"]]
        assert found["counts"] == want.counts and found["tokens"] == want.tokens
        assert found["loss"] == pytest.approx(want.loss, rel=1e-6) and found["pairs"] == want.pairs
    assert written["distance"]["layers"][0][0][1] == pytest.approx(alone.distances[0][0][1])
    for name in domains:
        events, broken = read_jsonl(tmp_path / "out" / "domains" / name / "chronomoe" / "routing_events.jsonl")
        rows = [event["expert_token_counts"] for event in events if event["layer_id"] == 1]
        assert broken == 0 and [sum(c) for c in zip(*rows, strict=True)] == alone.domains[name].counts[1]
