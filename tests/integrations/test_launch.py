"""``chronomoe run``, ``CHRONOMOE`` and ``report_to: chronomoe``: every Trainer of a process, without an edit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import jobs as training_job
from support import models as tiny
from support import tool_inputs
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.integrations import launch
from chronomoe_hf.integrations.launched import LaunchedCallback

TWO_TRAINERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
rows = [{"input_ids": (torch.arange(16) * 7 + i) % 64, "labels": (torch.arange(16) * 7 + i) % 64} for i in range(64)]
torch.manual_seed(0)
for name, model in (
    ("one", MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=8, **shape))),
    ("dense", LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))),
    ("two", MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **shape))),
):
    settings = dict(max_steps=4, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, save_strategy="no")
    Trainer(model, TrainingArguments(name, report_to="none", **settings), train_dataset=rows).train()
"""


def started(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CHRONOMOE")}
    env = {**clean, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def chronomoe(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from chronomoe_hf.cli.main import main; main()", *arguments]


# What ms-swift does when it is imported: its own list in the place of the one that every Trainer begins with.
OWN_LIST = "import transformers.trainer as t\nt.DEFAULT_CALLBACKS = [t.DefaultFlowCallback]\n"


@pytest.mark.parametrize("before", ["", OWN_LIST], ids=["plain", "a list of its own"])
def test_a_script_with_two_trainers_is_watched_without_an_edit(before: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(before + TWO_TRAINERS)
    done = started(chronomoe("run", "--preset", "balance", "--json", "--", sys.executable, "train.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stderr.strip().splitlines()[-1])
    assert said["exit_code"] == 0
    assert [(line["attached"], line.get("preset")) for line in said["trainers"]] == [
        (True, "balance"),
        (False, None),
        (True, "balance"),
    ]
    assert said["trainers"][1]["reason"] == "LlamaForCausalLM has no MoE layers"
    one, two = tool_inputs.recorded(tmp_path / "one"), tool_inputs.recorded(tmp_path / "two")
    assert [sum(layer) for layer in (*one, *two)] == [4 * 4 * 16 * 2] * 4
    assert not (tmp_path / "dense" / "chronomoe").exists()


def test_the_variable_alone_is_enough_where_the_package_is_imported(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import chronomoe_hf\n" + TWO_TRAINERS)
    done = started([sys.executable, "train.py"], tmp_path, CHRONOMOE="observe")
    assert done.returncode == 0, done.stderr
    assert [sum(layer) for layer in tool_inputs.recorded(tmp_path / "one")] == [4 * 4 * 16 * 2] * 2
    bad = started([sys.executable, "train.py"], tmp_path, CHRONOMOE="obzerve")
    assert bad.returncode == 1
    assert "the environment variable CHRONOMOE: 'obzerve' is neither a preset; did you mean 'observe'" in bad.stderr


def test_the_commands_own_exit_code_and_words_come_back(tmp_path: Path) -> None:
    code = "import sys; print('hello'); sys.exit(7)"
    done = started(chronomoe("run", "--", sys.executable, "-c", code), tmp_path)
    assert (done.returncode, done.stdout) == (7, "hello\n")
    killed = started(chronomoe("run", "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"), tmp_path)
    assert killed.returncode == 128 + 15
    nothing = started(chronomoe("run", "--", sys.executable, "-c", "pass"), tmp_path)
    assert nothing.returncode == 0 and "nothing was watched" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--preset", "balanse", "--", "true"], 1, "did you mean 'balance'"),
        (["--config", "nowhere.json", "--", "true"], 1, "--config"),
        (["--preset", "observe", "--config", "x.json", "--", "true"], 1, "exclude each other"),
        (["--", "no-such-command-at-all"], 1, "cannot start no-such-command-at-all: No such file"),
        ([], 2, "COMMAND"),
    ],
)
def test_a_wrong_word_starts_nothing(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = started(chronomoe("run", *arguments), tmp_path)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("print('theirs ran')")
    env = launch.environment("observe", base={"PYTHONPATH": str(tmp_path / "theirs")})
    env = launch.environment("balance", base=env)  # a launcher inside a launcher: named once
    assert env["PYTHONPATH"].split(os.pathsep) == [str(launch.AUTOSTART), str(tmp_path / "theirs")]
    code = "import sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["theirs ran", "[]"], done.stderr


# ---- in this process -------------------------------------------------------------------------------------------------


def trainer_for(
    folder: Path, callbacks: list[TrainerCallback] | None = None, model: Any = None, **more: Any
) -> Trainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, **more}
    return Trainer(
        tiny.tiny_model("mixtral") if model is None else model,
        TrainingArguments(str(folder), save_strategy="no", **settings),
        train_dataset=training_job.rows(32),
        callbacks=callbacks,
    )


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """``report_to`` knows us for the length of a test."""
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK", dict(INTEGRATION_TO_CALLBACK)
    )
    launch.register_report()


@pytest.mark.usefixtures("reported")
def test_report_to_is_enough_and_stands_before_every_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONOMOE", "balance")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = trainer_for(tmp_path, report_to=["tensorboard", "chronomoe"], logging_steps=1)
    first = trainer.callback_handler.callbacks[0]
    assert isinstance(first, LaunchedCallback) and first.system is not None
    assert first.system.config.contract == "balance"
    trainer.train()
    assert any("moe/neff_min" in entry for entry in trainer.state.log_history)
    assert all(sum(layer) > 0 for layer in tool_inputs.recorded(tmp_path))


@pytest.mark.usefixtures("reported")
def test_it_gives_way_to_what_the_script_makes_itself(tmp_path: Path) -> None:
    mine = ChronoCallback(ChronoConfig.balance(interval=3))
    trainer = trainer_for(tmp_path, [mine], report_to="chronomoe")
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, ChronoCallback)]
    assert ours == [mine] and trainer.callback_handler.callbacks[0] is mine
    assert mine.system is not None and mine.system.config.interval == 3

    later = trainer_for(tmp_path / "later", report_to="chronomoe")
    attached = chronomoe_hf.attach(later, ChronoConfig.balance(interval=5))
    ours = [each for each in later.callback_handler.callbacks if isinstance(each, ChronoCallback)]
    assert ours == [attached] and not isinstance(attached, LaunchedCallback)
    assert chronomoe_hf.system_of(later.model).config.interval == 5  # type: ignore[arg-type]

    wrapped = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), ChronoConfig.balance(interval=7))
    with_config = trainer_for(tmp_path / "wrapped", model=wrapped, report_to="chronomoe")
    assert with_config.callback_handler.callbacks[0].system.config.interval == 7  # type: ignore[attr-defined]


@pytest.mark.usefixtures("reported")
def test_a_dense_model_is_left_alone(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    trainer = trainer_for(tmp_path, model=dense, report_to="chronomoe")
    assert not any(isinstance(each, ChronoCallback) for each in trainer.callback_handler.callbacks)
    assert "save_model" not in vars(trainer), "a method of the Trainer stayed replaced"
    trainer.train()


@pytest.mark.usefixtures("reported")
def test_a_wrong_variable_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONOMOE", "obzerve")
    with pytest.raises(ConfigError, match="environment variable CHRONOMOE.*did you mean 'observe'"):
        trainer_for(tmp_path, report_to="chronomoe")


def test_a_callback_goes_to_the_front_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    mine = ChronoCallback(ChronoConfig.observe(interval=1))
    trainer = trainer_for(tmp_path, [mine], report_to="tensorboard", logging_steps=1)
    assert trainer.callback_handler.callbacks[0] is mine
    late = ChronoCallback(ChronoConfig.observe(interval=1))
    other = trainer_for(tmp_path / "late", report_to="none", logging_steps=1)
    other.add_callback(late)
    other.train()
    assert other.callback_handler.callbacks[0] is late
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events.out*")).parent))
    events.Reload()
    assert "train/moe/neff_min" in events.Tags()["scalars"]


# ---- the launchers people use -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "trl"])
def test_every_launcher_reaches_its_processes(launcher: str, tmp_path: Path) -> None:
    model, data = tool_inputs.tiny_checkpoint(tmp_path / "model"), tool_inputs.rows(tmp_path / "rows.jsonl")
    arguments = {
        "model_name_or_path": str(model), "dataset_name": str(tmp_path / "data"), "output_dir": "out",
        "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "bf16": False, "max_length": 64, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    data.rename(tmp_path / "data" / "train.jsonl")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(arguments))
    accelerate = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2,
                  "num_machines": 1, "machine_rank": 0, "use_cpu": True, "mixed_precision": "no"}  # fmt: skip
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(accelerate))
    script = "from trl.scripts.sft import main, make_parser\nmain(*make_parser().parse_args_and_config())\n"
    (tmp_path / "sft.py").write_text(script)
    command = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "sft.py"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "two.yaml", "sft.py"],
        "trl": [sys.executable, "-c", "from trl.cli import main; main()", "sft"],
    }[launcher]
    env = tool_inputs.recount_environment(tmp_path / "recount", {})
    done = started(chronomoe("run", "--preset", "balance", "--", *command, "--config", "sft.yaml"), tmp_path, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tool_inputs.recorded(tmp_path / "out") == tool_inputs.recounted(tmp_path / "recount")
