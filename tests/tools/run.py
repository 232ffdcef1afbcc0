"""Run real tools that people train with, each in an environment of its own, and hold the records against a recount.

    python tests/tools/run.py [--page] [TOOL ...]

`tool_environment` says what an environment is, `tool_commands` how a tool with a command line is driven. `--page`
writes docs/tools.md. Everything runs on the CPU, on tiny models, without a network. A tool that cannot be installed
here is said to be so; it fails nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]

from support import tool_inputs
from tool_commands import (
    LF_LORA,
    LORA,
    axolotl,
    axolotl_wrong_word,
    llamafactory,
    llamafactory_wrong_word,
    sharded,
    swift,
    swift_wrong_word,
    trl,
)
from tool_environment import Result, Run, Tool, build, versions


def script(*arguments: str) -> Callable[[Run], list[Result]]:
    """A case that is a script of tests/tools/cases and prints a JSON line for each of its own cases."""

    def case(run: Run) -> list[Result]:
        model = run.folder / "model"
        given = [str(tool_inputs.tiny_checkpoint(model)) if part == "MODEL" else part for part in arguments[1:]]
        done = run.start(str(HERE / "cases" / arguments[0]), *given)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
        if not lines or (done.returncode and all(line["result"] != "FAILED" for line in lines)):
            lines.append({"result": "FAILED", "error": done.stderr.strip()[-600:]})
        return lines

    return case


HUB = ("huggingface_hub==1.33.0",)
TOOLS = [
    Tool("bnb", ("bitsandbytes==0.50.2",), {"quantised": script("quantised.py", "bitsandbytes")}),
    Tool("torchao", ("torchao==0.18.0",), {"quantised": script("quantised.py", "torchao")}),
    Tool(
        "st",
        ("sentence-transformers==6.2.0", "scikit-learn", "scipy", "joblib", "threadpoolctl", "cloudpickle", "narwhals"),
        {"trainer": script("sentences.py", "MODEL")},
    ),
    Tool(
        "lightning",
        ("lightning==2.6.6", "pytorch-lightning==2.6.6", "lightning-utilities", "torchmetrics"),
        {"callback": script("lightning_run.py")},
    ),
    Tool(
        "liger",
        ("liger-kernel==0.8.5", "triton"),
        {"stand-ins": script("stand_ins.py", "liger", "fp8")},
        notes="its Triton function, and those of FP8, are replaced by torch arithmetic",
    ),
    Tool(
        "axolotl",
        ("axolotl==0.19.0", "transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "accelerate==1.13.0",
         "datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1", "pydantic==2.12.5",
         "pydantic-core==2.41.5",
         "annotated-types",
         "typing-inspection", "typing-extensions", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6",
         "addict", "fire", "python-dotenv==1.0.1", "einops", "colorama", "evaluate==0.4.1", "art",
         "schedulefree==1.4.1",
         "optimum==1.16.2", "langdetect==1.0.9", "posthog==6.7.11", "backoff", "distro", "termcolor", "sentencepiece",
         "hf-xet", "httpx", "httpcore", "h11", "anyio", "sniffio", "responses", "fsspec", "dill", "multiprocess",
         "psutil", "six", "numba", "llvmlite", "bitsandbytes==0.50.2", "fastcore"),
        {
            "full, plugin": axolotl(resume=True),
            "LoRA, plugin": axolotl(resume=True, **LORA),
            "QLoRA 4-bit, plugin": axolotl(**{**LORA, "adapter": "qlora", "load_in_4bit": True}),
            "sample packing, plugin": axolotl(sample_packing=True, pad_to_sequence_len=True),
            "DPO LoRA, plugin": axolotl(rows="preference", rl="dpo", **LORA),
            "full, chronomoe run": axolotl(launched=True),
            "a wrong preset": axolotl_wrong_word,
        },
        beside=("liger",),
        notes="triton comes from Liger's folder; xformers, flash-linear-attention and the cloud clients are left out",
    ),
    Tool(
        "lf",
        ("llamafactory==0.9.5", "transformers==5.6.0", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0",
         "datasets==4.0.0", *HUB, "tokenizers==0.22.2", "tyro==0.8.14", "omegaconf", "antlr4-python3-runtime==4.9.3",
         "einops", "fire", "termcolor", "modelscope", "modelscope_hub", "sentencepiece", "tiktoken", "sse-starlette",
         "docstring-parser", "shtab", "typeguard", "httpx", "httpcore", "h11", "anyio", "sniffio", "av==16.0.0"),
        {
            "sft full": llamafactory(resume=True),
            "sft LoRA": llamafactory(resume=True, **LF_LORA),
            "sft QLoRA 4-bit": llamafactory(quantization_bit=4, **LF_LORA),
            "sft packing": llamafactory(packing=True),
            "dpo LoRA": llamafactory(rows="preference", stage="dpo", **LF_LORA),
            "kto LoRA": llamafactory(rows="judged", stage="kto", **LF_LORA),
            "sft full, chronomoe run": llamafactory(launched=True),
            "a wrong preset": llamafactory_wrong_word,
        },
        beside=("bnb",),
        notes="its own pins; torchaudio, which no text needs, is an empty module",
        stubs={"torchaudio.py": '"""Stand-in: no audio is trained."""\n'},
    ),
    Tool(
        "swift",
        ("ms-swift==4.6.0", "transformers==5.19.0", "trl==0.29.0", "peft==0.20.0", "datasets==4.8.4", "modelscope",
         "modelscope_hub", "addict", "attrdict", "binpacking", "json-repair", "dacite", "einops", "sentencepiece",
         "tiktoken", "simplejson", "sortedcontainers", "oss2", "cpm-kernels", "transformers-stream-generator", "nltk",
         "rouge", "joblib", "cloudpickle", "importlib-metadata", "zipp", "zstandard", "fastapi", "uvicorn", "starlette",
         "openai", *HUB, "tokenizers", "cryptography", "cffi", "pycparser", "aiohttp", "aiosignal", "aiohappyeyeballs",
         "attrs", "frozenlist", "multidict", "yarl", "propcache"),
        {
            "sft full": swift(resume=True),
            "sft LoRA": swift(tuner_type="lora", resume=True),
            "sft QLoRA 4-bit": swift(
                tuner_type="lora", quant_method="bnb", quant_bits=4, bnb_4bit_compute_dtype="float32"
            ),
            "sft packing": swift(packing=True, fails="requires a flash attention implementation"),
            "dpo LoRA": swift(rows="rejected", tuner_type="lora", rlhf_type="dpo"),
            "sft full, chronomoe run": swift(launched=True),
            "a wrong preset": swift_wrong_word,
        },
        beside=("bnb",),
    ),
    Tool(
        "trl",
        (),
        {
            "sft full": trl(resume=True),
            "sft LoRA": trl(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], resume=True),
            "sft QLoRA 4-bit": trl(
                use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], load_in_4bit=True
            ),
            "sft packing": trl(packing=True, packing_strategy="wrapped"),
            "dpo LoRA": trl(
                rows="preference", method="dpo", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"]
            ),
            "kto LoRA": trl(
                rows="judged", method="kto", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"]
            ),
        },
        beside=("bnb",),
    ),
    Tool("fsdp2", (), {"accelerate launch, FSDP2, two processes": sharded}),
]  # fmt: skip


def run_tool(tool: Tool, only: str | None = None) -> list[Result]:
    """Every case of a tool."""
    lines: list[Result] = []
    for name, case in tool.cases.items():
        if only is not None and only not in name:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                given = case(Run(tool, Path(folder)))
            except (AssertionError, OSError, subprocess.TimeoutExpired, KeyError) as error:
                given = {"result": "FAILED", "error": f"{type(error).__name__}: {error}"[:400]}
        for line in given if isinstance(given, list) else [given]:
            seconds = round(time.monotonic() - started)
            lines.append({"tool": tool.name, **line, "case": line.get("case", name), "seconds": seconds})
            print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> int:
    """Run the tools asked for; the number of failed cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", help="names: " + ", ".join(tool.name for tool in TOOLS))
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--page", action="store_true", help="write docs/tools.md")
    options = parser.parse_args()
    results: list[tuple[Tool, str | None, list[Result]]] = []
    for tool in TOOLS:
        if not options.tools or tool.name in options.tools:
            missing = build(tool, TOOLS)
            if missing is not None:
                print(json.dumps({"tool": tool.name, "result": "not installed", "error": missing}), flush=True)
            results.append((tool, missing, [] if missing is not None else run_tool(tool, options.only)))
    record = [
        {"tool": tool.name, "versions": versions(tool), "notes": tool.notes, "missing": missing, "cases": lines}
        for tool, missing, lines in results
    ]
    if options.page:
        from page import write_page

        write_page(record)
    return sum(line["result"] == "FAILED" for _, _, lines in results for line in lines)


if __name__ == "__main__":
    sys.exit(main())
