"""Cases of tools with a command line and a YAML: axolotl, LLaMA-Factory, ms-swift and TRL, each by its own words.

A case writes the tool's file, starts its command with our line in it, and holds the records against a recount. With
`resume`, the last checkpoint of the finished run is taken away, the tool resumes from the one before by its own
option, and weights and our state must come out bit-equal; the checkpoint is then wrapped with its state and unwrapped
(`cases/unwrapped.py`). `fails` names words of an error of the tool itself: the same file is then run without a line of
ours too, and must end in the same words.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from support import tool_inputs
from tool_environment import HERE, Result, Run

from chronomoe_hf.checkpoint.state_file import read_state
from chronomoe_hf.config import ChronoConfig

RUN = ["-c", "from chronomoe_hf.cli.main import main; main()", "run"]
# A law that moves in the few steps of a case, so that a state which was not loaded would show.
MOVING = {"beta__rate": 0.3, "beta__dead_zone": None, "beta__first_layer": "same"}
YAML = {
    "preset": "balance",
    "interval": 2,
    "beta": {name.removeprefix("beta__"): value for name, value in MOVING.items()},
}
Case = Callable[[Run], Result]


def case_of(
    write: Callable[[Run, dict[str, Any]], None],
    start: Callable[[Run, str, bool], subprocess.CompletedProcess[str]],
    *,
    rows: str,
    resume: bool = False,
    fails: str = "",
    **settings: Any,
) -> Case:
    """A case of a tool.

    Args:
        write: writes the tool's file for a Run and more settings.
        start: starts the tool's command: the files to recount into, and whether a line of ours is in it.
        rows: kind of the rows, as `tool_inputs.rows` takes it.
        resume: also resume from step 3 and unwrap.
        fails: words of the tool's own error, with us and without.
        settings: of the tool's file.
    """

    def case(run: Run) -> Result:
        tool_inputs.tiny_checkpoint(run.folder / "model")
        ChronoConfig.balance(interval=2, **MOVING).save_pretrained(run.folder / "settings")
        tool_inputs.rows(run.folder / "rows.jsonl", rows)
        write(run, settings)
        done = start(run, "recount", True)
        if fails:
            return _own_error(fails, done, lambda: start(run, "", False))
        if done.returncode:
            return _failed(done)
        line = run.equal("out")
        return {**line, **_resumed(run, write, start, settings)} if resume and line["result"] == "ok" else line

    return case


def _failed(done: subprocess.CompletedProcess[str]) -> Result:
    return {"result": "FAILED", "error": (done.stderr or done.stdout).strip()[-900:]}


def _own_error(
    fails: str, done: subprocess.CompletedProcess[str], control: Callable[[], subprocess.CompletedProcess[str]]
) -> Result:
    """The result of a case that the tool itself cannot run here: the same words without us."""
    if done.returncode == 0 or fails not in done.stderr + done.stdout:
        return {**_failed(done), "result": "FAILED", "expected": fails}
    alone = control()
    same = bool(alone.returncode) and fails in alone.stderr + alone.stdout
    return {"result": "native fails" if same else "FAILED", "error, without us too": fails}


def _resumed(run: Run, write: Any, start: Any, settings: dict[str, Any]) -> Result:
    """Resume from checkpoint-3 and compare checkpoint-6 with that of the run that was not broken off; then unwrap."""
    last = run.folder / "out" / "checkpoint-6"
    want, state = _weights(last), read_state(last)[0]
    shutil.rmtree(last)
    write(run, {**settings, "resume_from_checkpoint": str(run.folder / "out" / "checkpoint-3")})
    done = start(run, "again", True)
    if done.returncode:
        return _failed(done)
    got, again = _weights(last), read_state(last)[0]
    weights, same = _equal(got, want), _equal(again, state)
    moved = bool(state["beta_LE"].any())
    unwrapped = run.start(str(HERE / "cases" / "unwrapped.py"), str(run.folder / "model"), str(last), "settings")
    plain = unwrapped.returncode == 0 and json.loads(unwrapped.stdout.splitlines()[-1])["plain"]
    line = {"resume: weights bit-equal": weights, "state bit-equal": same, "beta moved": moved, "unwrapped": plain}
    if not plain:
        line["error"] = unwrapped.stderr.strip()[-600:]
    return {**line, "result": "ok" if weights and same and moved and plain else "FAILED"}


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*model*.safetensors"))
    assert files, f"no weights in {checkpoint}"
    return {name: value for file in files for name, value in load_file(file).items()}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return bool(one) and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- axolotl ---------------------------------------------------------------------------------------------------------

PLUGIN = {"plugins": ["chronomoe_hf.integrations.axolotl.ChronoPlugin"], "chronomoe": YAML}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


def axolotl(launched: bool = False, rows: str = "alpaca", resume: bool = False, fails: str = "", **more: Any) -> Case:
    """axolotl's own command with our plugin, or under `chronomoe run` where the YAML names no plugin."""

    def write(run: Run, settings: dict[str, Any]) -> None:
        kind = {"path": str(run.folder / "rows.jsonl"), "type": "alpaca", "ds_type": "json"}
        if rows == "preference":
            kind |= {"type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}}
            kind |= {"split": "train"}
        whole = {
            "base_model": str(run.folder / "model"), "special_tokens": {"pad_token": "<pad>"}, "datasets": [kind],
            "dataset_prepared_path": str(run.folder / "prepared"), "dataset_num_proc": 1, "output_dir": "out",
            "sequence_len": 256, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6,
            "save_steps": 3, "learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "constant",
            "bf16": False, "fp16": False, "tf32": False, "sdp_attention": True, "logging_steps": 1, "seed": 1,
            **settings,
        }  # fmt: skip
        (run.folder / "plain.yml").write_text(yaml.safe_dump(whole))
        (run.folder / "train.yml").write_text(yaml.safe_dump(whole if launched else {**whole, **PLUGIN}))

    def start(run: Run, recount: str, ours: bool) -> subprocess.CompletedProcess[str]:
        run.scripts("axolotl")
        command = ["axolotl", "train", "train.yml" if ours else "plain.yml", "--launcher", "python"]
        if launched and ours:
            command = [sys.executable, *RUN, "--config", "settings", "--", *command]
        return run.command(*command, recount=recount)

    return case_of(write, start, rows=rows, resume=resume, fails=fails, **more)


def axolotl_wrong_word(run: Run) -> Result:
    """A preset that does not exist is refused when the YAML is read."""
    tool_inputs.rows(run.folder / "rows.jsonl", "alpaca")
    wrong = {**PLUGIN, "chronomoe": {"preset": "balanse"}, "base_model": "nowhere", "output_dir": "out"}
    wrong |= {"datasets": [{"path": "rows.jsonl", "type": "alpaca", "ds_type": "json"}], "micro_batch_size": 1}
    wrong |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "num_epochs": 1}
    (run.folder / "train.yml").write_text(yaml.safe_dump(wrong))
    return _refused(run, run.start("-m", "axolotl.cli.main", "train", "train.yml", "--launcher", "python"))


def _refused(run: Run, done: subprocess.CompletedProcess[str]) -> Result:
    said = "did you mean 'balance'" in done.stdout + done.stderr
    nothing = not (run.folder / "out").exists() or not any((run.folder / "out").rglob("*.safetensors"))
    return {"result": "ok" if done.returncode and said and nothing else "FAILED", "said": said, "nothing made": nothing}


# ---- LLaMA-Factory ---------------------------------------------------------------------------------------------------

LF_LORA = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"}
LF_COLUMNS = {
    "alpaca": {},
    "preference": {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    "judged": {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
}


def llamafactory(
    launched: bool = False, rows: str = "alpaca", resume: bool = False, fails: str = "", **more: Any
) -> Case:
    """`python -m chronomoe_hf.integrations.llamafactory`, or its own `llamafactory-cli` under `chronomoe run`."""

    def write(run: Run, settings: dict[str, Any]) -> None:
        data = run.folder / "data"
        data.mkdir(exist_ok=True)
        shutil.copy(run.folder / "rows.jsonl", data)
        info = {"rows": {"file_name": "rows.jsonl", **LF_COLUMNS[rows]}}
        (data / "dataset_info.json").write_text(json.dumps(info))
        whole = {
            "model_name_or_path": str(run.folder / "model"), "stage": "sft", "do_train": True, "dataset": "rows",
            "finetuning_type": "full", "dataset_dir": str(data), "template": "default", "cutoff_len": 96,
            "max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "bf16": False,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none",
            "preprocessing_num_workers": 1, "disable_gradient_checkpointing": True, "output_dir": "out", **settings,
        }  # fmt: skip
        (run.folder / "train.yaml").write_text(yaml.safe_dump(whole))

    def start(run: Run, recount: str, ours: bool) -> subprocess.CompletedProcess[str]:
        run.scripts("llamafactory-cli")
        command = ["llamafactory-cli", "train", "train.yaml"]
        if launched and ours:
            command = [sys.executable, *RUN, "--config", "settings", "--", *command]
        elif ours:
            entry = ["-m", "chronomoe_hf.integrations.llamafactory", "train.yaml", "--chronomoe", "settings"]
            command = [sys.executable, *entry]
        return run.command(*command, recount=recount)

    return case_of(write, start, rows=rows, resume=resume, fails=fails, **more)


def llamafactory_wrong_word(run: Run) -> Result:
    """A preset that does not exist is refused before a model is looked for."""
    (run.folder / "train.yaml").write_text("model_name_or_path: nowhere\noutput_dir: out\n")
    words = ["train.yaml", "--chronomoe", "balanse"]
    return _refused(run, run.start("-m", "chronomoe_hf.integrations.llamafactory", *words))


# ---- ms-swift --------------------------------------------------------------------------------------------------------


def swift(launched: bool = False, rows: str = "messages", resume: bool = False, fails: str = "", **more: Any) -> Case:
    """`swift sft` (`swift rlhf` where `more` names a method) with our plugin file, or under `chronomoe run`."""

    def write(run: Run, settings: dict[str, Any]) -> None:
        from chronomoe_hf.integrations.swift import PLUGIN as FILE

        whole = {
            "model": str(run.folder / "model"), "model_type": "mixtral", "template": "chatml",
            "dataset": str(run.folder / "rows.jsonl"), "tuner_type": "full", "torch_dtype": "float32",
            "max_length": 96, "max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "output_dir": "out", "add_version": False,
            "use_cpu": True, "report_to": "none", "dataloader_num_workers": 0, "dataset_num_proc": 1,
            "split_dataset_ratio": 0, "gradient_checkpointing": False, **settings,
        }  # fmt: skip
        plugin = {} if launched else {"external_plugins": str(FILE), "callbacks": "chronomoe"}
        (run.folder / "plain.yaml").write_text(yaml.safe_dump(whole))
        (run.folder / "train.yaml").write_text(yaml.safe_dump({**whole, **plugin}))

    def start(run: Run, recount: str, ours: bool) -> subprocess.CompletedProcess[str]:
        run.scripts("swift")
        command = ["swift", "rlhf" if "rlhf_type" in more else "sft", "train.yaml" if ours else "plain.yaml"]
        if launched and ours:
            command = [sys.executable, *RUN, "--config", "settings", "--", *command]
        settings = str(run.folder / "settings") if ours and not launched else ""
        return run.command(*command, recount=recount, CHRONOMOE=settings)

    return case_of(write, start, rows=rows, resume=resume, fails=fails, **more)


def swift_wrong_word(run: Run) -> Result:
    """A preset that does not exist is refused before a step is taken."""
    from chronomoe_hf.integrations.swift import PLUGIN as FILE

    tool_inputs.tiny_checkpoint(run.folder / "model")
    tool_inputs.rows(run.folder / "rows.jsonl", "messages")
    words = {
        "model": str(run.folder / "model"), "model_type": "mixtral", "template": "chatml", "dataset": "rows.jsonl",
        "tuner_type": "full", "torch_dtype": "float32", "max_steps": 1, "output_dir": "out", "use_cpu": True,
        "external_plugins": str(FILE), "callbacks": "chronomoe", "report_to": "none",
    }  # fmt: skip
    (run.folder / "train.yaml").write_text(yaml.safe_dump(words))
    return _refused(run, run.start("-m", "swift.cli.main", "sft", "train.yaml", CHRONOMOE="balanse"))


# ---- TRL -------------------------------------------------------------------------------------------------------------


def trl(rows: str = "text", method: str = "sft", resume: bool = False, fails: str = "", **more: Any) -> Case:
    """`chronomoe run -- trl sft --config sft.yaml`, or another of its methods."""

    def write(run: Run, settings: dict[str, Any]) -> None:
        (run.folder / "data").mkdir(exist_ok=True)
        shutil.copy(run.folder / "rows.jsonl", run.folder / "data" / "train.jsonl")
        whole = {
            "model_name_or_path": str(run.folder / "model"), "dataset_name": str(run.folder / "data"),
            "output_dir": "out", "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True,
            "gradient_accumulation_steps": 2, "report_to": "none", "bf16": False, "max_length": 64,
            "dtype": "float32", "learning_rate": 1e-3, "logging_steps": 1, **settings,
        }  # fmt: skip
        (run.folder / "trl.yaml").write_text(yaml.safe_dump(whole))

    def start(run: Run, recount: str, ours: bool) -> subprocess.CompletedProcess[str]:
        run.scripts("trl")
        command = ["trl", method, "--config", "trl.yaml"]
        if ours:
            command = [sys.executable, *RUN, "--config", "settings", "--", *command]
        return run.command(*command, recount=recount)

    return case_of(write, start, rows=rows, resume=resume, fails=fails, **more)


def sharded(run: Run) -> Result:
    """`chronomoe run -- accelerate launch` with FSDP2 on two gloo processes, as the slow tests run it."""
    file = HERE.parent / "integrations" / "test_launch_sharded.py"
    done = run.start("-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", str(file))
    said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return {"result": "ok" if done.returncode == 0 and "passed" in said else "FAILED", "tests": said.split(" in ")[0]}
