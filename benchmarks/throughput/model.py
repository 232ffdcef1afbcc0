"""The model of a step's time on many ranks, and the recorded loads that it is fed with.

An expert-parallel layer is done when its busiest rank is. With `f` the share of a balanced step that experts take and I
the load of the busiest rank over the mean load, a step takes 1 + f (I - 1) times a balanced one.

Legend: S steps, W windows, L layers, E experts, R ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _text_job as job
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import chronomoe_hf
from chronomoe_hf import ChronoConfig

SIZE = job.ModelSize(layers=3, hidden=64, intermediate=32, heads=4, experts=128, top_k=8)
QUICK = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=4, experts=64, top_k=4, vocab=400, length=32)
WINDOW = 10  # steps whose counts are added up: a step on 64 ranks has many more tokens than one here
# What only observes; today's preset, which leaves shares in its dead zone alone; the law that evens out everything.
ARMS: dict[str, dict[str, Any]] = {
    "none": {"preset": "observe"},
    "balance": {"preset": "balance"},
    "full balance": {
        "preset": "balance",
        "beta__dead_zone": None,
        "beta__rate": 0.3,
        "beta__first_layer": "same",
    },
}


def arm_config(arm: str) -> ChronoConfig:
    """The configuration of an arm."""
    fields = {name: value for name, value in ARMS[arm].items() if name != "preset"}
    return ChronoConfig.preset(ARMS[arm]["preset"], interval=WINDOW, **fields)


def imbalance(count_WLE: Tensor, ranks: int) -> float:
    """Load of the busiest rank over the mean, averaged over windows and layers.

    Args:
        count_WLE: assignments; ranks own consecutive experts, as Transformers places them.
        ranks: R, a divisor of E.
    """
    load_WLR = count_WLE.double().unflatten(-1, (ranks, -1)).sum(-1)
    return float((load_WLR.amax(-1) / load_WLR.mean(-1)).mean())


def max_violation(count_WLE: Tensor) -> float:
    """Load of the busiest expert over the mean, less 1, averaged over windows and layers."""
    return imbalance(count_WLE, count_WLE.shape[-1]) - 1


def relative_step(load: float, share: float) -> float:
    """Time of a step over a balanced one."""
    return 1 + share * (load - 1)


def recorded_loads(quick: bool, seed: int = 0) -> dict[str, Any]:
    """Counts of a small Qwen3-MoE that is fine-tuned on another kind of text, per arm; the last windows of each run."""
    size, pretraining, steps = (QUICK, 20, 20) if quick else (SIZE, 200, 150)
    training = job.Training(steps=pretraining, batch=16, learning_rate=3e-3, seed=seed)
    base = job.pretrain_base("qwen3_moe", size, training)
    text = job.load_domain("code", AutoTokenizer.from_pretrained(base), size, "qwen3_moe", max_chars=1_000_000)
    tokens_NS = torch.tensor(text.train["input_ids"])
    found: dict[str, Any] = {"size": vars(size), "pretrain_steps": pretraining, "steps": steps, "counts": {}}
    for arm in ARMS:
        counts = _fine_tune(base, tokens_NS, arm_config(arm), steps, seed)
        windows = counts.unflatten(0, (-1, WINDOW)).sum(1)
        found["counts"][arm] = windows[-max(1, len(windows) // 3) :].tolist()
    return found


def _fine_tune(base: Path, tokens_NS: Tensor, config: ChronoConfig, steps: int, seed: int) -> Tensor:
    """Counts of every step, int64 (S, L, E)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, output_router_logits=False).train()
    chronomoe_hf.wrap(model, config)
    system = chronomoe_hf.system_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    order_N = torch.randperm(len(tokens_NS), generator=torch.Generator().manual_seed(seed))
    counts = []
    for step in range(1, steps + 1):
        block = tokens_NS[order_N[torch.arange(16 * step, 16 * step + 16) % len(order_N)]]
        model(input_ids=block, labels=block).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(system.sums.on("train", system.step_state.device)[:, : model.config.num_experts].long().clone())
        system.step(step)
    return torch.stack(counts)
