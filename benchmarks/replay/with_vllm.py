"""A real vLLM samples, TRL trains: k3 KL and mismatch without and with its routes replayed. ``make test-vllm``.

    python benchmarks/replay/with_vllm.py [--python VLLM_ENV/bin/python] [--families glm4_moe,qwen3_moe,olmoe]

Raises AssertionError where replay does not make the trainer use the engine's choices.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import grpo_replay as example

from replay import job

HERE = Path(__file__).resolve().parent


def rollouts(python: str, model: Any, directory: Path) -> dict[str, Any]:
    """What vLLM samples for every prompt, four times each, and chooses."""
    model.save_pretrained(directory / "model")
    words = example.build_tokenizer()
    ids = [words(prompt)["input_ids"] for prompt in example.prompts()[:8] for _ in range(4)]
    (directory / "prompts.json").write_text(json.dumps({"prompts": ids, "tokens": example.COMPLETION}))
    command = [python, str(HERE / "vllm_rollouts.py"), str(directory / "model"), str(directory / "prompts.json")]
    subprocess.run([*command, str(directory / "out.json")], check=True)
    answer: dict[str, Any] = json.loads((directory / "out.json").read_text())
    return answer


class Recorded:
    """A ``rollout_func`` that hands out the rollouts of vLLM, each once."""

    def __init__(self, rows: list[dict[str, Any]], routed: bool) -> None:
        self.rows = {}
        for row in rows:
            self.rows.setdefault(tuple(row["prompt"]), []).append(row)
        self.routed = routed

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's side."""
        words = example.build_tokenizer()
        picked = [self.rows[tuple(words(prompt)["input_ids"])].pop() for prompt in prompts]
        return {
            "prompt_ids": [row["prompt"] for row in picked],
            "completion_ids": [row["completion"] for row in picked],
            "logprobs": [row["logps"] for row in picked],
            "routed_experts": [torch.tensor(row["routes"]) for row in picked],
        }


def study(family: str, python: str) -> dict[str, Any]:
    """One family: the same rollouts, measured and replayed."""
    model = job.trained(family, seed=0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        answer = rollouts(python, model, directory)
        found: dict[str, Any] = {"vllm": answer["vllm"]}
        for mode in ("measure", "rollout"):
            rollout = Recorded(answer["rows"], mode == "rollout")
            record = job.run(
                copy.deepcopy(model),
                mode,
                rollout,
                directory / mode,
                seed=0,
                steps=2,
                per_device_train_batch_size=16,
                shuffle_dataset=False,
                learning_rate=1e-9,
            )
            pair, logps = record["pairs"]["rollout_old"], record["logps"]["rollout_old"]
            found[mode] = {"mismatch": pair["mean"], "coverage": record["coverage"], **logps}
    return found


def main() -> None:
    """Every family, and the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--families", default="glm4_moe,qwen3_moe,olmoe")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    results = {}
    for family in args.families.split(","):
        results[family] = found = study(family, args.python)
        before, after = found["measure"], found["rollout"]
        print(
            f"{family:10} vLLM {found['vllm']}  mismatch {before['mismatch']:.2%}  k3 {before['k3']:.2e} -> "
            f"{after['k3']:.2e}  largest |dlogp| {before['logp_diff_max']:.3f} -> {after['logp_diff_max']:.3f}"
        )
        assert before["coverage"] == after["coverage"] == 1.0
        assert before["mismatch"] < 0.5, "these routes are of other tokens or layers"
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    assert sum(found["rollout"]["k3"] for found in results.values()) < sum(
        found["measure"]["k3"] for found in results.values()
    ), "replay did not bring trainer and engine closer"


if __name__ == "__main__":
    main()
