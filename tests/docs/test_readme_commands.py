"""README's shell lines and its block that downloads a model run for real, on stand-ins that are listed here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import texts
from support.made_runs import random_run
from support.models import tiny_model
from transformers import OlmoeConfig, OlmoeForCausalLM

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
# What a block names -> what stands in for it; {here} is the test's directory.
STAND_INS = {
    "path/to/output_dir": "{here}/run",
    "path/to/model": "{here}/small",
    "path/to/tuned": "{here}/tuned",
    "path/to/text.jsonl": "{here}/text.jsonl",
    " --follow": "",  # would watch the run for ever
    "allenai/OLMoE-1B-7B-0924": "{here}/model",
}
CHECKED = ("git", "cd", "pip", "make")  # not run, but taken apart
GIVEN = """
import torch
from transformers import TrainingArguments

args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2)
train = valid = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def stand_in(text: str, here: Path) -> str:
    for name, value in STAND_INS.items():
        text = text.replace(name, value.format(here=here))
    return text


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [part.split() for line in lines if line for part in line.split("&&")]


def test_what_installs_and_makes_names_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.M))
    made = [words[1] for words in commands() if words[0] == "make"]
    assert made and set(made) <= targets
    installs = [words for words in commands() if words[0] == "pip"]
    assert installs
    for words in installs:
        assert words[1] == "install" and words[2:-1] in ([], ["-e"]), words
        assert set(re.findall(r"\w+", words[-1].removeprefix("."))) <= extras, words


@pytest.mark.slow
def test_every_other_command_runs(tmp_path: Path) -> None:
    random_run(tmp_path / "run", windows=3)
    for name, seed in (("small", 0), ("tuned", 1)):
        tiny_model("mixtral", vocab_size=texts.VOCAB, seed=seed).save_pretrained(tmp_path / name)
        texts.tokenizer().save_pretrained(tmp_path / name)
    rows = [json.dumps({"text": text}) for text in texts.documents(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    ran = 0
    for words in commands():
        if words[0] in CHECKED:
            continue
        assert words[0] == "chronomoe", f"README has a command that this test does not know: {words}"
        given = stand_in(" ".join(words), tmp_path).split()[1:]
        code = "import sys; from chronomoe_hf.cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *given], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr[-2000:])
        ran += 1
    assert ran >= 6 and (tmp_path / "after" / "report.html").is_file() and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_block_that_downloads_a_model_runs_on_a_small_one_of_its_family(tmp_path: Path) -> None:
    (block,) = [each for each in blocks("python") if "from_pretrained" in each]
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = OlmoeConfig(
        vocab_size=64, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0, **sizes
    )
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "model")
    texts.tokenizer().save_pretrained(tmp_path / "model")
    script = GIVEN + stand_in(block, tmp_path)
    assert str(tmp_path / "model") in script, "the block names another model now"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "chronomoe" / "run_manifest.json").is_file()
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "tuned").iterdir()}
