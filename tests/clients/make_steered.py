"""Governed checkpoints whose steering no weight of a file can hold: for the vLLM plugin and for ONNX.

python tests/clients/make_steered.py OUT CHECKPOINTS
"""

from __future__ import annotations

import sys
from pathlib import Path

import make_checkpoints as base
import torch
from transformers import AutoModelForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of

STEERED = (("mixtral", "selection"), ("qwen3_moe", "routing"), ("olmoe", "selection"))


def main() -> None:
    home, checkpoints = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer, ids = base.corpus()
    prompts_NS = torch.stack([ids[at * 5000 : at * 5000 + base.PROMPT_TOKENS] for at in range(base.NUM_PROMPTS)])
    balance = {"law": "balance", "dead_zone": None, "first_layer": "same", "rate": 0.3}
    for family, scope in STEERED:
        model = AutoModelForCausalLM.from_pretrained(checkpoints / family / "plain")
        fields = {"interval": 2, "alerts": {"min_window_tokens": 1}, "beta": {**balance, "scope": scope}}
        fields |= {"control": base._LENS} if scope == "routing" else {"lens": {"enabled": False}}
        chronomoe_hf.wrap(model, ChronoConfig.from_dict(fields))
        base.train(model, ids, 1000, 16, system_of(model))
        out = home / f"{family}_{scope}"
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        plain = AutoModelForCausalLM.from_pretrained(out).eval()
        base.note(home / f"{out.name}.npz", model, prompts_NS, plain_logprobs=base.logprobs(plain, prompts_NS))
        print(out, "done", flush=True)


if __name__ == "__main__":
    main()
