"""The model, the arms and the steps of benchmarks/gpu/run.py.

Legend: L layers, E experts, k experts per token, D hidden size, T tokens of a batch.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost.arms import Hooks, RouterLogits, Untouched

PRESETS = ("observe", "protect", "balance")
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is measured, and where.

    Args:
        device: "cuda" or "cpu".
        tokens: of the batches of the timed part; the last one is used elsewhere too.
        pairs: timed steps of each of two models.
        interval: steps between windows.
        backend: of torch.compile.
    """

    device: str
    layers: int = 4
    hidden: int = 2048
    experts: int = 128
    top_k: int = 8
    width: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 4096
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = (1024, 8192)
    pairs: int = 40
    interval: int = 20
    backend: str = "inductor"


# The same path on a machine without a GPU; its figures mean nothing.
TINY = {
    "layers": 2,
    "hidden": 32,
    "experts": 8,
    "top_k": 2,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab": 64,
    "tokens": (32, 64),
    "pairs": 3,
    "interval": 2,
    "backend": "aot_eager",
}


def build(bench: Bench, layers: int | None = None) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of the layer shape, on the device, in training mode; the same weights every time."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=bench.vocab,
        hidden_size=bench.hidden,
        intermediate_size=bench.width,
        moe_intermediate_size=bench.width,
        num_hidden_layers=bench.layers if layers is None else layers,
        num_attention_heads=bench.heads,
        num_key_value_heads=bench.kv_heads,
        head_dim=bench.head_dim,
        num_experts=bench.experts,
        num_experts_per_tok=bench.top_k,
        use_cache=False,
    )
    with torch.device(bench.device):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=getattr(torch, bench.dtype))
    return model.to(bench.device).train()  # type: ignore[no-any-return]


def make_batch(bench: Bench, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens in sequences of at most 4,096, without padding and without a mask."""
    length = min(tokens, 4096)
    ids = torch.randint(2, bench.vocab, (tokens // length, length), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(bench.device)
    return {"input_ids": ids, "labels": ids}


def synchronise(bench: Bench) -> None:
    """Wait for the device."""
    if bench.device == "cuda":
        torch.cuda.synchronize()


def free(bench: Bench) -> None:
    """Give memory back between models."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


class Wrapped(Untouched):
    """A wrapped model."""

    def __init__(self, model: Any, preset: str, interval: int) -> None:
        super().__init__(chronomoe_hf.wrap(model, ChronoConfig.preset(preset, interval=interval)))
        self.system = chronomoe_hf.system_of(model)

    def after(self, step: int) -> None:
        """The step of the system."""
        self.system.step(step)


def make_arm(model: Any, name: str, bench: Bench) -> Untouched:
    """A model with what `name` says on it: a preset, or one of the recipes of benchmarks/cost/run.py."""
    if name in PRESETS:
        return Wrapped(model, name, bench.interval)
    recipes: dict[str, Callable[[Any], Untouched]] = {"hooks with .item()": Hooks, "router logits": RouterLogits}
    return recipes.get(name, Untouched)(model)


def one_step(arm: Untouched, optimizer: Any, batch: dict[str, Tensor], step: int) -> Tensor:
    """Forward, backward, SGD step, and what follows it; the loss."""
    loss = arm.forward(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    arm.after(step)
    return loss.detach()


def sgd(arm: Untouched) -> Any:
    """An optimizer without state, so that two models fit."""
    return torch.optim.SGD(arm.model.parameters(), lr=1e-4)


def paired(bench: Bench, arms: list[Untouched], batch: dict[str, Tensor], warm: int) -> list[list[float]]:
    """Seconds of `bench.pairs` steps of each arm, in turn."""
    optimizers = [sgd(arm) for arm in arms]
    seconds: list[list[float]] = [[] for _ in arms]
    for step in range(1, warm + bench.pairs + 1):
        for at in range(len(arms)) if step % 2 else reversed(range(len(arms))):
            synchronise(bench)
            start = time.perf_counter()
            one_step(arms[at], optimizers[at], batch, step)
            synchronise(bench)
            seconds[at].append(time.perf_counter() - start)
    return [each[warm:] for each in seconds]


def ratios(plain: list[float], other: list[float]) -> Row:
    """Median and quartiles of the other model's steps over the plain one's, pair by pair."""
    over = [a / b for a, b in zip(other, plain, strict=True)]
    added = [1000 * (a - b) for a, b in zip(other, plain, strict=True)]
    return {
        "untouched_ms": round(1000 * statistics.median(plain), 3),
        "ratio": [round(q, 4) for q in statistics.quantiles(over, n=4)],
        "added_ms": [round(q, 3) for q in statistics.quantiles(added, n=4)],
    }
