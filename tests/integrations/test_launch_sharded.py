"""``chronomoe run`` around ``accelerate launch`` with FSDP2: the records say what the processes have routed; resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import tool_inputs

from chronomoe_hf.checkpoint.state_file import read_state

CPU_ENGINES = Path(__file__).resolve().parents[1] / "distributed"
SHARDED = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "use_cpu": True,
    "mixed_precision": "no",
    "main_process_port": 0,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_reshard_after_forward": True,
    },
}
# accelerate takes DDP for CPU processes whatever the YAML says; `cpu_engines` lets it take what was asked for.
HEAD = "import cpu_engines; cpu_engines.allow_fsdp()\n"
SFT = HEAD + "from trl.scripts.sft import main, make_parser\nmain(*make_parser().parse_args_and_config())\n"
PLAIN = (
    HEAD
    + """
import sys, yaml, torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
given = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
model = AutoModelForCausalLM.from_pretrained(given.pop("model_name_or_path"), dtype="float32")
for name in ("dataset_name", "max_length", "dtype"):
    given.pop(name)
ids = [(torch.arange(16) * 7 + at * 3) % 390 + 5 for at in range(64)]
masks = [(torch.arange(16) < 10 + at % 6).long() for at in range(64)]
rows = [{"input_ids": row, "labels": row, "attention_mask": mask} for row, mask in zip(ids, masks)]
resumed = given.pop("resume_from_checkpoint", None)
trainer = Trainer(model, TrainingArguments(**given), train_dataset=rows)
trainer.train(resume_from_checkpoint=resumed)
assert isinstance(trainer.model_wrapped, FSDPModule), type(trainer.model_wrapped)
"""
)


def launched(folder: Path, script: str, recount: str, **more: object) -> None:
    arguments = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data"), "output_dir": "out",
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none",
        "bf16": False, "max_length": 64, "dtype": "float32", "gradient_checkpointing": False, "logging_steps": 1,
        "learning_rate": 1e-3, "gradient_accumulation_steps": 2, **more,
    }  # fmt: skip
    (folder / "job.yaml").write_text(yaml.safe_dump(arguments))
    (folder / "fsdp.yaml").write_text(yaml.safe_dump(SHARDED))
    (folder / "job.py").write_text(script)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CHRONOMOE")}
    env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CPU_ENGINES)}
    env = tool_inputs.recount_environment(folder / recount, env)
    us = [sys.executable, "-c", "from chronomoe_hf.cli.main import main; main()", "run", "--preset", "balance", "--"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "job.py"]
    done = subprocess.run(
        [*us, *accelerate, "--config", "job.yaml"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = read_state(checkpoint)[0]
    assert tensors, f"no state in {checkpoint}"
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("script", [PLAIN, SFT], ids=["Trainer", "TRL SFT"])
def test_sharded_runs_are_recorded_whole_and_resumed(script: str, tmp_path: Path) -> None:
    tool_inputs.tiny_checkpoint(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tool_inputs.rows(tmp_path / "rows.jsonl").rename(tmp_path / "data" / "train.jsonl")
    launched(tmp_path, script, "recount")
    counted = tool_inputs.recounted(tmp_path / "recount")
    assert tool_inputs.recorded(tmp_path / "out") == counted
    assert len(list(tmp_path.glob("recount.*"))) == 2 and all(sum(layer) > 0 for layer in counted)

    last = tmp_path / "out" / "checkpoint-6"
    weights, state = load_file(last / "model.safetensors"), state_of(last)
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 6
    shutil.rmtree(last)
    launched(tmp_path, script, "again", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    again = load_file(last / "model.safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    resumed = state_of(last)
    assert state.keys() == resumed.keys() and all(torch.equal(resumed[name], state[name]) for name in state)
    lines = (tmp_path / "out" / "chronomoe" / "routing_events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    windows = {(event["layer_id"], event["step"]): event["expert_token_counts"] for event in events}
    assert len(windows) < len(events), "bad test setup: nothing was recorded a second time"
    for layer, want in enumerate(counted):  # the later attempt says of a window what the first one did
        assert [sum(each) for each in zip(*(c for (at, _), c in windows.items() if at == layer), strict=True)] == want
