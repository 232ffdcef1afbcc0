"""The GRPO job of this study: small models trained for a minute, with the rest of examples/grpo_replay.py."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo_replay import COMPLETION, WORDS, build_tokenizer, prompts, reward
from transformers import AutoModelForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore")

_SIZE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "olmoe": ("OlmoeConfig", {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 64}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}


def trained(family: str, seed: int, steps: int = 60) -> Any:
    """A small model after some steps on sequences that count on by a step of their own."""
    import transformers

    torch.manual_seed(seed)
    name, fields = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**_SIZE, **fields)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        start, stride = torch.randint(0, 90, (16, 1)), torch.randint(1, 8, (16, 1))
        ids = 3 + (start + stride * torch.arange(32)) % 90
        noise = torch.rand(ids.shape) < 0.1
        ids = torch.where(noise, torch.randint(3, WORDS, ids.shape), ids)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def run(
    model: Any, mode: str | None, rollout: Callable[..., Any], directory: Path, seed: int, steps: int, **fields: Any
) -> dict[str, Any]:
    """One GRPO run of `steps`: what its only window says of replay in `mode`, and processor seconds a step.

    ``mode="off"`` observes without replay; without a mode the trainer is left alone.
    """
    from trl import GRPOConfig, GRPOTrainer

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_iterations": 2,
        "learning_rate": 1e-4,
        **fields,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        rollout_func=rollout,
        args=GRPOConfig(
            output_dir=str(directory),
            max_steps=steps,
            max_completion_length=COMPLETION,
            router_aux_loss_coef=0.0,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=seed,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts()]),
        processing_class=build_tokenizer(),
    )
    callback = None
    if mode is not None:
        callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=steps, replay__mode=mode))
    started = time.process_time()
    trainer.train()
    took = {"seconds_per_step": (time.process_time() - started) / steps}
    if callback is None or mode == "off":
        return took
    assert callback.system is not None and callback.system.last_snapshot is not None
    record = callback.system.last_snapshot.replay
    assert record is not None
    return {**record, **took}
