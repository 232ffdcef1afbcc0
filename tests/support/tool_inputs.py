"""What a tool trains: a tiny Mixtral on disk with a tokenizer, rows of data, and what its run is held against."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import _text_job as job
from transformers import MixtralConfig, MixtralForCausalLM

RECOUNT = Path(__file__).resolve().parents[1] / "tools" / "recount"
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = "the a router sends each token to some experts and one of them does most work".split()


def tiny_checkpoint(directory: Path, **overrides: Any) -> Path:
    """A Mixtral of two layers and eight experts with a tokenizer that has a chat template."""
    tokenizer = job.build_tokenizer([" ".join(WORDS), *job.load_text("prose", max_chars=40_000)["train"]["text"]], 400)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    fields = {**shape, **heads, **special, "vocab_size": 400, **overrides}
    MixtralForCausalLM(MixtralConfig(**fields)).save_pretrained(directory)
    return directory


def sentence(number: int) -> str:
    """A sentence of 4 to 14 words."""
    return " ".join(WORDS[(number * 5 + at * (number % 7 + 1)) % len(WORDS)] for at in range(4 + number % 11))


def rows(path: Path, kind: str = "text", num: int = 64) -> Path:
    """Rows as JSON lines: ``text``, ``messages``, ``alpaca`` (instruction, output), ``preference``,
    ``judged`` (completion, label) or ``rejected`` (messages, rejected_response)."""
    made: list[dict[str, Any]] = []
    for number in range(num):
        asked, answer, worse = sentence(number), sentence(number + 1), sentence(number + 3)
        user = {"role": "user", "content": asked}
        made.append(
            {
                "text": {"text": asked},
                "messages": {"messages": [user, {"role": "assistant", "content": answer}]},
                "alpaca": {"instruction": asked, "input": "", "output": answer},
                "preference": {"prompt": asked, "chosen": answer, "rejected": worse},
                "judged": {"prompt": asked, "completion": answer, "label": number % 2 == 0},
                "rejected": {"messages": [user, {"role": "assistant", "content": answer}], "rejected_response": worse},
            }[kind]
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def recount_environment(path: Path, base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that counts for itself what Mixtral's routers choose, into files ``path.*``."""
    env = dict(os.environ if base is None else base)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RECOUNT), env.get("PYTHONPATH", "")]))
    env["RECOUNT_TO"] = str(path)
    return env


def recounted(path: Path) -> list[list[int]]:
    """Counts ``[L][E]`` of all processes of a run."""
    files = sorted(path.parent.glob(f"{path.name}.*"))
    assert files, "no process has counted anything"
    counts: list[list[int]] = []
    for file in files:
        layers = json.loads(file.read_text(encoding="utf-8"))
        counts = (
            layers
            if not counts
            else [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(counts, layers, strict=True)]
        )
    return counts


def recorded(run: Path) -> list[list[int]]:
    """Counts ``[L][E]`` of all training windows in a run's records."""
    counts: dict[int, list[int]] = {}
    for line in (run / "chronomoe" / "routing_events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["mode"] == "TRAIN":
            before = counts.get(event["layer_id"], [0] * event["n_experts"])
            counts[event["layer_id"]] = [a + b for a, b in zip(before, event["expert_token_counts"], strict=True)]
    return [counts[layer] for layer in sorted(counts)]
