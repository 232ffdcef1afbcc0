"""The tables of `docs/serving.md` are those of `benchmarks/results/serving.json`, and say what the page claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "clients"))
import table

RESULTS: dict[str, Any] = json.loads(table.RESULTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_committed_results() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    shown = page.partition(table.START)[2].partition(table.END)[0].strip()
    assert shown == table.render(RESULTS)


def test_what_was_promised_is_what_was_measured() -> None:
    """Governed GLM-4-MoE, folded Mixtral and cut Qwen3-MoE, in vLLM and llama.cpp, against what was made."""
    for client in ("vllm", "llama"):
        for checkpoint in ("glm4_moe/governed", "mixtral/folded", "qwen3_moe/cut"):
            row = RESULTS[client][checkpoint]
            assert row["to_wrapped"] < 1e-5 and row["same_tokens"] == row["tokens"], (client, checkpoint)


def test_lm_eval_says_what_measure_says() -> None:
    pairs = [(RESULTS["lm_eval"][name], RESULTS["measured"][name]) for name in RESULTS["lm_eval"]]
    assert len(pairs) >= 4
    for said, measured in pairs:
        assert abs(said["byte_perplexity"] / measured["byte_perplexity"] - 1.0) < 1e-6


def test_the_plugin_gives_the_wrapped_model_and_without_it_the_plain_one_is_served() -> None:
    assert len(RESULTS["vllm_plugin"]) >= 2
    for name, row in RESULTS["vllm_plugin"].items():
        off = RESULTS["vllm_plugin_off"][name]
        assert row["to_wrapped"] < 1e-5 < 0.1 < off["to_wrapped"] and off["difference"] < 1e-5
