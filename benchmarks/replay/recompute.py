"""What counting and pinning the choices of a recompute cost: a training step with activation checkpointing.

One process, one set of weights, the arms in turns; processor time of one thread, as in ``shapes/timing.py``.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch
import transformers

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from shapes.timing import twin

ARMS = ("untouched", "observe", "count", "pin")
SHAPES = {
    "qwen3_moe, 4 layers, D 512, E 32, k 4": ("Qwen3MoeConfig", {"num_experts": 32, "num_experts_per_tok": 4}),
    "mixtral, 4 layers, D 512, E 8, k 2": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}
_SIZE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TOKENS = (4, 256)


def build(name: str) -> Any:
    """The model of a shape, with activation checkpointing, in training mode."""
    torch.manual_seed(0)
    config, fields = SHAPES[name]
    made = getattr(transformers, config)(**_SIZE, **fields, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(made).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every arm but the first: its step over the untouched model's of the same round."""
    model = build(name)
    ids = torch.randint(0, 512, TOKENS, generator=torch.Generator().manual_seed(1))
    models = {"untouched": model, **{arm: twin(model) for arm in ARMS[1:]}}
    for arm in ARMS[1:]:
        models[arm].gradient_checkpointing_enable({"use_reentrant": False})
        fields = {} if arm == "observe" else {"replay__recompute": arm}
        chronomoe_hf.wrap(models[arm], ChronoConfig.observe(interval=rounds + 2, **fields))
    took: dict[str, list[float]] = {arm: [] for arm in ARMS}
    flips = dict.fromkeys(ARMS, 0)
    for number in range(rounds + 2):
        for arm in random.Random(number).sample(ARMS, len(ARMS)):
            start = time.process_time()
            models[arm](input_ids=ids, labels=ids).loss.backward()
            if arm != "untouched":
                snapshot = chronomoe_hf.system_of(models[arm]).step(number + 1)
                if snapshot is not None and snapshot.replay is not None:
                    counted = snapshot.replay["recompute"]
                    pairs = zip(counted["flips"], counted["tokens"], strict=True)
                    flips[arm] = round(sum(share * tokens for share, tokens in pairs))
            took[arm].append(time.process_time() - start)
            for parameter in model.parameters():
                parameter.grad = None
    rows = []
    for arm in ARMS[1:]:
        pairs = zip(took[arm][2:-1], took["untouched"][2:-1], strict=True)  # the last round closes a window
        ratios = [own / plain for own, plain in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"shape": name, "arm": arm, "ratio": middle, "low": low, "high": high, "rounds": rounds}
        rows.append({**row, "flips": flips[arm]})
    return rows
