"""Correction biases under the names of TRL's weight sync, taken by a real vLLM. ``make test-vllm``.

    python benchmarks/replay/bias_sync.py --python VLLM_ENV/bin/python

What is sent comes from TRL's own generator with the balance law attached; fails where vLLM refuses a name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.trainer.replay import ReplayHooks
from replay import job

DEEPSEEK = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "topk_method": "noaux_tc",  # vLLM makes no bias without it, and then refuses the checkpoint
}
FAMILIES = {"glm4_moe": job.FAMILIES["glm4_moe"], "deepseek_v3": ("DeepseekV3Config", DEEPSEEK)}


def sent_biases(model: Any) -> dict[str, list[float]]:
    """What the sync sends beyond parameters, after the biases have moved."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode, generation.accelerator = model, "server", None
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    trainer: Any = SimpleNamespace(
        vllm_generation=generation, args=SimpleNamespace(), accelerator=SimpleNamespace(), model=model, use_vllm=True
    )
    plain = dict(generation._iter_named_params())
    hooks = ReplayHooks(trainer, system_of(model))
    more = {name: bias for name, bias in generation._iter_named_params() if name not in plain}
    for bias in more.values():
        bias.copy_(torch.randn_like(bias))
    hooks.remove()
    return {name: bias.tolist() for name, bias in more.items()}


def main() -> None:
    """Every family in a process of vLLM's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    args = parser.parse_args()
    for family, (name, fields) in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**job._SIZE, **fields}))
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            chronomoe_hf.wrap(model, ChronoConfig.balance(interval=1))
            biases = sent_biases(model)
            path = Path(directory, "biases.json")
            path.write_text(json.dumps(biases))
            script = Path(__file__).resolve().parent / "vllm_biases.py"
            subprocess.run([args.python, str(script), directory, str(path)], check=True)
        print(f"{family:12} {len(biases)} correction biases arrived in vLLM")


if __name__ == "__main__":
    main()
