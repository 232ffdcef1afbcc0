"""Observing is neutral, bit for bit, on every family with quantised and patched weights; counts are a hook's.

One process a way to quantise (`cases/neutral.py`), with its library in a folder of its own, as for the other tools.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import moe_zoo, scripts

HERE = Path(__file__).resolve().parent
LIBRARY = {
    "4-bit": "bnb",
    "8-bit": "bnb",
    "int8": "torchao",
    "liger": "liger",
    "fp8": None,
    "mxfp4": None,
    "experts4bit": "e4b",
}
OWN_TOOLS = {"e4b": ("experts4bit-qlora==0.58.1",)}

_NO_FIELDS = "FP8Experts asks the config for fields that it has under other names"
_CODES = "Transformers draws codes as if they were weights"
FAILS_WITHOUT_US: dict[str, dict[str, str]] = {
    "4-bit": {"longcat_flash": "it reads the shape of a packed weight", "switch_transformers": _CODES},
    "8-bit": {"dots3_note": _CODES, "hy_v4": _CODES},
    "int8": {"deepseek_v4": "Int8Tensor has no view"},
    "fp8": {
        **dict.fromkeys(("gpt_oss", "openai_privacy_filter"), "FP8Experts has no bias"),
        **dict.fromkeys(("jetmoe", "aria", "dbrx", "nemotron_h", "lfm2_moe", "ernie4_5_vl_moe"), _NO_FIELDS),
        **dict.fromkeys(("switch_transformers", "nllb_moe"), _NO_FIELDS),
        "jamba": "its Mamba layers multiply with the weight themselves",
        "muse_spark": "FP8Experts has another width",
        "longcat_flash": "it routes to experts that FP8Experts has not",
        "llama4": "its experts are called with rows alone",
    },
}
"""Families that the library itself cannot load or run, by way to quantise: the model fails without us."""
ONLY = {
    "liger": {"mixtral", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe"},
    "mxfp4": {"gpt_oss"},
    "experts4bit": set(
        "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe olmoe flex_olmo mellum jamba minimax hunyuan_v1_moe gemma4 "
        "granitemoe granitemoeshared cohere2_moe phimoe deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe "
        "glm4_moe_lite glm_moe_dsa mimo_v2_flash nemotron_h solar_open minimax_m2 lfm2_moe afmoe ernie4_5_moe".split()
    ),
}
"""Families that have experts of this kind at all, in that library."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIBRARY)
def test_observing_changes_no_bit_of_a_quantised_model(kind: str, tmp_path: Path) -> None:
    run = scripts.load(HERE / "run.py")
    tool = run.Tool(LIBRARY[kind] or "none", (), {})
    if LIBRARY[kind] is not None:
        own = [run.Tool(name, packages, {}, beside=("bnb",)) for name, packages in OWN_TOOLS.items()]
        tool = next(each for each in (*run.TOOLS, *own) if each.name == LIBRARY[kind])
        missing = run.build(tool, run.TOOLS)
        if missing is not None:
            pytest.skip(f"{tool.name} cannot be installed here: {missing}")
    families = sorted(ONLY.get(kind, moe_zoo.ROUTED))
    done = run.Run(tool, tmp_path).start(str(HERE / "cases" / "neutral.py"), kind, *families)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert len(lines) == len(families), done.stderr[-2000:]
    assert [line for line in lines if line["result"] == "FAILED"] == []
    failing = {line["case"].partition(",")[0] for line in lines if line["result"] == "native fails"}
    assert failing == set(FAILS_WITHOUT_US.get(kind, {})), [line for line in lines if line["result"] == "native fails"]
