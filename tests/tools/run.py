"""Run real tools that people train with, each in an environment of its own, and hold the records against a recount.

    python tests/tools/run.py [--page] [TOOL ...]

An environment is a folder of the tool's own packages (`pip install --no-deps --target`) in front of the environment
that runs this script, so that torch is there once. `--page` writes docs/tools.md. Everything runs on the CPU, on tiny
models, without a network. A tool that cannot be installed here is said to be so; it fails nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from support import tool_inputs

PLACE = Path(os.environ.get("TOOLS_DIR", ROOT / "build" / "tools"))
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
LIMIT = 900  # seconds a case may take
RUN = ["-c", "from chronomoe_hf.cli.main import main; main()", "run", "--preset", "balance", "--"]
Result = dict[str, Any]


@dataclass
class Run:
    """What a case is given: its tool's packages, an empty folder, and how to start a process there."""

    tool: Tool
    folder: Path

    def start(self, *command: str, recount: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python on `command` with the tool's packages; `recount` counts in it what its routers choose."""
        path = [str(PLACE / name) for name in (self.tool.name, *self.tool.beside)]
        paths = os.pathsep.join([*path, str(ROOT / "tests"), str(ROOT / "examples")])
        full = {**os.environ, **QUIET, "PYTHONPATH": paths, **env}
        if recount:
            full = tool_inputs.recount_environment(self.folder / "recount", full)
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=full, capture_output=True, text=True, timeout=LIMIT,
            check=False,
        )  # fmt: skip

    def equal(self, output: str) -> Result:
        """Whether the records of a run say what the process has counted."""
        ours, theirs = tool_inputs.recorded(self.folder / output), tool_inputs.recounted(self.folder / "recount")
        return {
            "result": "ok" if ours == theirs else "FAILED",
            "counts": "EQUAL" if ours == theirs else "DIFFERENT",
            "assignments": sum(map(sum, ours)),
        }


@dataclass
class Tool:
    """A tool, what is installed for it, and its cases: name -> function of a Run that returns a result or several."""

    name: str
    packages: tuple[str, ...]
    cases: dict[str, Callable[[Run], Result | list[Result]]]
    beside: tuple[str, ...] = ()
    notes: str = ""
    stubs: dict[str, str] = field(default_factory=dict)


def script(*arguments: str) -> Callable[[Run], list[Result]]:
    """A case that is a script of tests/tools/cases and prints a JSON line for each of its own cases."""

    def case(run: Run) -> list[Result]:
        given = [str(model(run)) if part == "MODEL" else part for part in arguments[1:]]
        done = run.start(str(HERE / "cases" / arguments[0]), *given)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
        if not lines or (done.returncode and all(line["result"] != "FAILED" for line in lines)):
            lines.append({"result": "FAILED", "error": done.stderr.strip()[-600:]})
        return lines

    return case


def model(run: Run) -> Path:
    """The tiny checkpoint of a case."""
    return tool_inputs.tiny_checkpoint(run.folder / "model")


def ended(run: Run, done: subprocess.CompletedProcess[str], output: str) -> Result:
    """The result of a tool's command line."""
    if done.returncode:
        return {"result": "FAILED", "error": (done.stderr or done.stdout).strip()[-600:]}
    return run.equal(output)


# ---- axolotl ---------------------------------------------------------------------------------------------------------


def axolotl(**more: Any) -> Callable[[Run], Result]:
    """axolotl's own command with our plugin, or under `chronomoe run` where the YAML names no plugin."""

    def case(run: Run) -> Result:
        tool_inputs.rows(run.folder / "rows.jsonl", "alpaca")
        launched = more.get("launched", False)
        settings = {
            "base_model": str(model(run)), "special_tokens": {"pad_token": "<pad>"},
            "datasets": [{"path": str(run.folder / "rows.jsonl"), "type": "alpaca", "ds_type": "json"}],
            "dataset_prepared_path": str(run.folder / "prepared"), "dataset_num_proc": 1, "output_dir": "out",
            "sequence_len": 256, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
            "save_steps": 3, "learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "constant",
            "bf16": False, "fp16": False, "tf32": False, "sdp_attention": True, "logging_steps": 1,
            **({} if launched else PLUGIN),
            **{key: value for key, value in more.items() if key != "launched"},
        }  # fmt: skip
        (run.folder / "train.yml").write_text(yaml.safe_dump(settings))
        command = ["-m", "axolotl.cli.main", "train", "train.yml", "--launcher", "python"]
        if launched:
            command = [*RUN, sys.executable, *command]
        return ended(run, run.start(*command, recount=True), "out")

    return case


PLUGIN = {
    "plugins": ["chronomoe_hf.integrations.axolotl.ChronoPlugin"],
    "chronomoe": {"preset": "balance", "interval": 2},
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


def axolotl_wrong_word(run: Run) -> Result:
    """A preset that does not exist is refused when the YAML is read."""
    tool_inputs.rows(run.folder / "rows.jsonl", "alpaca")
    wrong = {**PLUGIN, "chronomoe": {"preset": "balanse"}, "base_model": "nowhere", "output_dir": "out"}
    wrong |= {"datasets": [{"path": "rows.jsonl", "type": "alpaca", "ds_type": "json"}], "micro_batch_size": 1}
    wrong |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "num_epochs": 1}
    (run.folder / "train.yml").write_text(yaml.safe_dump(wrong))
    done = run.start("-m", "axolotl.cli.main", "train", "train.yml", "--launcher", "python")
    said = "did you mean 'balance'" in done.stdout + done.stderr
    return {"result": "ok" if done.returncode and said else "FAILED", "said": said}


# ---- LLaMA-Factory and ms-swift --------------------------------------------------------------------------------------


def llamafactory(launched: bool = False, **more: Any) -> Callable[[Run], Result]:
    """`python -m chronomoe_hf.integrations.llamafactory`, or its own entry under `chronomoe run`."""

    def case(run: Run) -> Result:
        data = run.folder / "data"
        data.mkdir()
        kind = "preference" if more.get("stage") == "dpo" else "alpaca"
        tool_inputs.rows(data / "rows.jsonl", kind)
        info: dict[str, Any] = {"file_name": "rows.jsonl"}
        if kind == "preference":
            columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
            info |= {"ranking": True, "columns": columns}
        (data / "dataset_info.json").write_text(json.dumps({"rows": info}))
        settings = {
            "model_name_or_path": str(model(run)), "stage": "sft", "do_train": True, "finetuning_type": "full",
            "dataset": "rows", "dataset_dir": str(data), "template": "default", "cutoff_len": 96, "output_dir": "out",
            "max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "bf16": False,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none",
            "preprocessing_num_workers": 1, "disable_gradient_checkpointing": True, **more,
        }  # fmt: skip
        (run.folder / "train.yaml").write_text(yaml.safe_dump(settings))
        command = ["-m", "chronomoe_hf.integrations.llamafactory", "train.yaml", "--chronomoe", "balance"]
        if launched:
            start = ["-c", "from llamafactory.train.tuner import run_exp; run_exp()", "train.yaml"]
            command = [*RUN, sys.executable, *start]
        return ended(run, run.start(*command, recount=True), "out")

    return case


def swift(launched: bool = False, **more: Any) -> Callable[[Run], Result]:
    """`swift sft` with our plugin file, or under `chronomoe run`."""

    def case(run: Run) -> Result:
        from chronomoe_hf.integrations.swift import PLUGIN as FILE

        rows = tool_inputs.rows(run.folder / "rows.jsonl", "messages")
        settings = {
            "model": str(model(run)), "model_type": "mixtral", "template": "chatml", "dataset": str(rows),
            "tuner_type": "full", "torch_dtype": "float32", "max_length": 96, "max_steps": 6, "save_steps": 3,
            "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3, "output_dir": "out", "add_version": False, "use_cpu": True, "report_to": "none",
            "dataloader_num_workers": 0,
            "dataset_num_proc": 1, "split_dataset_ratio": 0, "gradient_checkpointing": False, **more,
        }  # fmt: skip
        if not launched:
            settings |= {"external_plugins": str(FILE), "callbacks": "chronomoe"}
        (run.folder / "train.yaml").write_text(yaml.safe_dump(settings))
        command = ["-m", "swift.cli.main", "sft", "train.yaml"]
        if launched:
            command = [*RUN, sys.executable, *command]
        return ended(run, run.start(*command, recount=True, CHRONOMOE="" if launched else "balance"), "out")

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
            "full, plugin": axolotl(),
            "LoRA, plugin": axolotl(**LORA),
            "sample packing, plugin": axolotl(sample_packing=True, pad_to_sequence_len=True),
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
            "sft full": llamafactory(),
            "sft LoRA": llamafactory(finetuning_type="lora", lora_target="q_proj,v_proj"),
            "sft packing": llamafactory(packing=True),
            "dpo LoRA": llamafactory(stage="dpo", finetuning_type="lora", lora_target="q_proj,v_proj"),
            "sft full, chronomoe run": llamafactory(launched=True),
        },
        notes="its own pins; torchaudio, which no text needs, is an empty module",
        stubs={"torchaudio.py": '"""Stand-in: no audio is trained."""\n'},
    ),
    Tool(
        "swift",
        ("ms-swift==4.6.0", "transformers==5.19.0", "trl==0.29.0", "peft==0.20.0", "datasets==4.8.4", "modelscope",
         "modelscope_hub", "addict", "attrdict", "binpacking", "json-repair", "dacite", "einops", "sentencepiece",
         "tiktoken", "simplejson", "sortedcontainers", "oss2", "cpm-kernels", "transformers-stream-generator", "nltk",
         "rouge", "joblib", "importlib-metadata", "zipp", "zstandard", "fastapi", "uvicorn", "starlette", "openai",
         *HUB, "tokenizers", "cryptography", "cffi", "pycparser", "aiohttp", "aiosignal", "aiohappyeyeballs", "attrs",
         "frozenlist", "multidict", "yarl", "propcache"),
        {
            "sft full": swift(),
            "sft LoRA": swift(tuner_type="lora"),
            "sft full, chronomoe run": swift(launched=True),
        },
    ),
]  # fmt: skip


def build(tool: Tool) -> str | None:
    """Make (or reuse) the tool's folder; why that is not possible, or None."""
    for beside in tool.beside:
        build(next(each for each in TOOLS if each.name == beside))
    PLACE.mkdir(parents=True, exist_ok=True)
    with open(PLACE / f"{tool.name}.lock", "w") as lock:  # tests on several workers want the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _install(tool)


def _install(tool: Tool) -> str | None:
    home = PLACE / tool.name
    if not (home / ".installed").exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-compile",
        ]
        done = subprocess.run(
            [*pip, "--target", str(home), *tool.packages], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1][:200]
        for name, text in tool.stubs.items():
            (home / name).write_text(text)
        (home / ".installed").touch()
    return None


def versions(tool: Tool) -> dict[str, str]:
    """Versions that a tool's processes see, of what matters."""
    wanted = ["transformers", "trl", "peft", "accelerate", tool.packages[0].split("==")[0]]
    own = [str(PLACE / name) for name in (tool.name, *tool.beside)]
    found: dict[str, str] = {}
    for each in distributions(path=[*own, *sys.path]):
        found.setdefault(each.metadata["Name"].lower().replace("_", "-"), each.version)
    return {name: found[name] for name in wanted if name in found}


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
            missing = build(tool)
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
