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


def test_the_servers_answer_what_transformers_says_without_this_library() -> None:
    for client in ("http_vllm", "http_llama"):
        assert set(RESULTS[client]) == {"glm4_moe/governed", "mixtral/folded", "qwen3_moe/cut"}
        for name, row in RESULTS[client].items():
            assert row["difference"] < 1e-5 and row["same_text"] == row["prompts"] and not row["library"], (
                client,
                name,
            )


def test_quantizing_and_cutting_commute_and_a_quantized_model_is_not_refitted() -> None:
    for scheme in ("FP8_DYNAMIC", "W4A16"):
        row, asked = RESULTS["quantize"][scheme], RESULTS["compressor"][f"quantized/cut_of_{scheme}"]
        assert row["tensors"] > 100 and row["differ"] == 0 and asked["finite"] and asked["kl"] < 0.05, scheme
        refused = RESULTS["refit_quantized"][f"quantized/governed_{scheme}"]
        assert "is quantized, its weights cannot be refitted" in refused["refused"] and refused["unchanged"], scheme


def test_graphs_have_what_steers_and_a_merge_is_the_mean() -> None:
    assert RESULTS["onnx"].keys() == RESULTS["vllm_plugin"].keys()
    for name, row in RESULTS["onnx"].items():
        assert row["difference"] < 1e-4 < 0.1 < row["plain_to_wrapped"] and row["torch_export"] < 1e-5, name
    assert len(RESULTS["mergekit"]) >= 3 and all(row["difference"] == 0.0 for row in RESULTS["mergekit"].values())


def test_twelve_families_agree_in_each_engine_in_every_kind() -> None:
    """A refitted checkpoint is one: a family that refit gives nothing back has a reason in its place."""
    assert len(table.FAMILIES) >= 12
    for client, least in (("vllm", 11), ("llama", 10), ("transformers_4", 11)):
        rows = RESULTS[client]
        agree = [family for family in table.FAMILIES if _agrees(rows, family)]
        assert len(agree) >= least, (client, agree)


def _agrees(rows: dict[str, Any], family: str) -> bool:
    """Every kind within 1e-3, or no checkpoint of that kind where refit said why."""
    cells = [rows.get(f"{family}/{kind}", {}) for kind in table.KINDS]
    return all(row.get("difference", 1.0) < 1e-3 or row.get("error", "").startswith("refit refused") for row in cells)
