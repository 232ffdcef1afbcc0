"""lm-eval's perplexity of checkpoints on a text of our own. Runs without this library.

LM_EVAL_ENV/bin/python tests/clients/lmeval_client.py OUT.json TEXT.jsonl DIRECTORY ...
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from asking import ask_each
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: word_perplexity
metadata:
  version: 1.0
"""


def ask(directory: str, manager: TaskManager) -> dict[str, Any]:
    said = evaluator.simple_evaluate(
        model="hf",
        model_args=f"pretrained={directory},dtype=float32",
        tasks=["local_text"],
        device="cpu",
        batch_size=1,
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]["local_text"]
    return {"byte_perplexity": said["byte_perplexity,none"]}


def main() -> None:
    out, text, *directories = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "local_text.yaml").write_text(TASK.format(path=Path(text).resolve()))
        manager = TaskManager(include_path=folder)
        ask_each(out, directories, lambda directory: ask(directory, manager))


if __name__ == "__main__":
    main()
