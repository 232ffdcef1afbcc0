"""GRPO on a small MoE model, with routing mismatch measured and then replayed; about a minute on two CPU cores.

The rollouts come from a copy of the model in bf16, which stands for an engine of its own: it chooses experts with other
rounding than the fp32 trainer. The first run only measures, the second repeats the engine's choices.

    python examples/grpo_replay.py

With vLLM instead (a GPU), the same line after the trainer is made:

    # server: vllm serve MODEL --enable-return-routed-experts --moe-backend triton
    trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="server"))
    chronomoe_hf.attach(trainer, ChronoConfig.observe(replay__mode="rollout"))

    # in the trainer's own process:
    with chronomoe_hf.replay.vllm_routes():
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate"))
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.telemetry import read_jsonl

WORDS, COMPLETION = 96, 24


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w95 and three special tokens."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts() -> list[str]:
    """64 prompts of four to eight words."""
    return [" ".join(f"w{3 + (11 * i + 5 * j) % 90}" for j in range(4 + i % 5)) for i in range(64)]


def build_model() -> Any:
    """A GLM4-MoE of four layers and 16 experts: sigmoid scores and a correction bias, where flips weigh most."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


class Engine:
    """Samples with a bf16 copy of the policy and hands out, beside the completions, what its routers chose."""

    def __init__(self, model: Any, tokenizer: Any, shortest: int = 0) -> None:
        self.model = copy.deepcopy(model).to(torch.bfloat16).eval()
        self.tokenizer, self.shortest = tokenizer, shortest
        chronomoe_hf.wrap(self.model, ChronoConfig.observe(replay__mode="measure"))
        self.replay = chronomoe_hf.system_of(self.model).replay

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``."""
        self.model.load_state_dict(trainer.model.state_dict())
        out: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "routed_experts": []}
        for prompt in prompts:
            ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
            with self.replay.rollout(pad_token_id=0) as tape, torch.no_grad():
                done = self.model.generate(
                    ids, min_new_tokens=self.shortest, max_new_tokens=COMPLETION, do_sample=True, pad_token_id=0
                )
                tape.end(done)
            (record,) = tape.records(self.replay.passes.dtype)
            num = ids.shape[1]
            out["prompt_ids"].append(ids[0].tolist())
            out["completion_ids"].append(record.tokens_N[num:].tolist())
            out["logprobs"].append(record.logps_N[num:].tolist())
            out["routed_experts"].append(record.routes_NLK)
        return out


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """More different words are better."""
    return [float(len(set(str(completion).split()))) for completion in completions]


def run(mode: str, steps: int, directory: Path) -> list[dict[str, Any]]:
    """One GRPO run; returns what its windows say of replay."""
    tokenizer, model = build_tokenizer(), build_model()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        rollout_func=Engine(model, tokenizer),
        args=GRPOConfig(
            output_dir=str(directory / mode),
            max_steps=steps,
            per_device_train_batch_size=8,
            num_generations=4,
            num_iterations=2,
            max_completion_length=COMPLETION,
            learning_rate=1e-4,
            router_aux_loss_coef=0.0,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts()]),
        processing_class=tokenizer,
    )
    # The one line. "measure" compares the choices of engine and trainer and changes no bit; "rollout" repeats them.
    # A window has two optimizer steps: one rollout, which num_iterations=2 uses twice.
    chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2, replay__mode=mode))
    trainer.train()
    records, _ = read_jsonl(directory / mode / "chronomoe" / "replay.jsonl")
    return [record for record in records if "rollout_old" in record["logps"]]


def main() -> None:
    """Both runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    directory = args.output or Path(tempfile.mkdtemp())
    for mode in ("measure", "rollout"):
        records = run(mode, args.steps, directory)
        mismatch = statistics.mean(record["pairs"]["rollout_old"]["mean"] for record in records)
        logps = [record["logps"]["rollout_old"] for record in records]
        print(
            f"{mode:8} choices differ {mismatch:.2%}, k3 {statistics.mean(each['k3'] for each in logps):.1e} nats, "
            f"largest |dlogp| {max(each['logp_diff_max'] for each in logps):.3f}"
        )
    for mode in ("measure", "rollout"):
        print(f"chronomoe report {directory / mode}")


if __name__ == "__main__":
    main()
