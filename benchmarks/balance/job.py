"""One run of the balance benchmark: settings, arms, training loop, and the measures of what it left behind.

Legend: S steps, L layers, E experts, N blocks of text, T tokens, W windows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _text_job import SIZES, ModelSize, Training, load_domain, pretrain_base
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import chronomoe_hf
from balance.arms import AUX, CHANGED, COHERENCE, FRONT, REFERENCES, actor, aux_weight
from balance.fast_head import use_fast_head
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.in_run.split_at_start import split_at_start

VALID = 512  # held-out blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One stress (or its absence).

    Args:
        name: key in the results.
        size: shape of the model; `size.top_k` is the k of pretraining.
        top_k: k of fine-tuning.
        domain: text of fine-tuning.
        base_domain: text of pretraining.
        arch: family.
        steps: optimizer steps of fine-tuning.
        pretrain_steps: optimizer steps of pretraining.
        batch: blocks of `size.length` tokens a step.
        learning_rate: peak, of fine-tuning, after 20 steps of warm-up.
        interval: optimizer steps between control updates.
        settle: steps of a per-layer balance loss before fine-tuning, in every arm: makes a balanced base.
        chars: read at most this much text of the domain.
        decay: linear decay of the learning rate to zero, as in Trainer; else constant after the warm-up.
    """

    name: str
    size: ModelSize
    top_k: int
    domain: str = "code"
    base_domain: str = "prose"
    arch: str = "mixtral"
    steps: int = 300
    pretrain_steps: int = 400
    batch: int = 16
    learning_rate: float = 1e-3
    interval: int = 10
    settle: int = 0
    chars: int = 2_000_000
    decay: bool = True


_E32 = SIZES["e32k4"]
_TINY = ModelSize(layers=2, hidden=32, intermediate=32, heads=4, experts=8, top_k=2, vocab=512, length=64)
# The stress of `make demo`, text, sizes and schedule included; the same with 32 experts; both again over more steps and
# more text, so that no block is read much more than once. Then the shift the other way with k unchanged, and two other
# families, k unchanged too: Qwen3-MoE (weights sum to 1 over the chosen) and DeepSeek-V3 (its own correction bias). In
# `narrow` one kind of file out of the text of pretraining uses fewer experts from the start, and nothing is wrong. In
# `healthy` nothing shifts and no expert is idle: the base was balanced before.
SETTINGS = {
    "e8": Setting(name="e8", size=SIZES["e8k2"], top_k=1),
    "e32": Setting(name="e32", size=SIZES["e32k4"], top_k=4),
    "e8-long": Setting(name="e8-long", size=SIZES["e8k2"], top_k=1, steps=800, chars=8_000_000),
    "e32-long": Setting(name="e32-long", size=SIZES["e32k4"], top_k=4, steps=600, chars=8_000_000),
    "reverse": Setting(name="reverse", size=SIZES["e8k2"], top_k=2, domain="prose", base_domain="code"),
    "qwen3": Setting(name="qwen3", size=_E32, top_k=4, arch="qwen3_moe"),
    "deepseek": Setting(name="deepseek", size=_E32, top_k=4, arch="deepseek_v3"),
    "healthy": Setting(name="healthy", size=SIZES["e8k2"], top_k=2, domain="prose", steps=100, settle=100, decay=False),
    "narrow": Setting(name="narrow", size=SIZES["e8k2"], top_k=2, domain="tables", base_domain="code"),
    "quick": Setting(name="quick", size=_TINY, top_k=1, steps=60, pretrain_steps=60, batch=8),
}
PLAN = {
    **dict.fromkeys(("e8", "e32", "e8-long", "e32-long", "reverse", "qwen3"), FRONT),
    # The family has no auxiliary loss, and quantile balancing knows no choice within groups of experts.
    "deepseek": tuple(arm for arm in FRONT if arm not in (*AUX, "quantile")),
    "healthy": ("none", "balance", "revive"),
    "quick": ("none", "balance 0.2", "balance", "revive"),
}
COHERENCE_PLAN = {name: ("none", *COHERENCE, "sign", "balance 0.2", "balance") for name in ("e8", "e32")}
COHERENCE_STEPS = 150
# What the controller owes debt for, into results/protect_reference.*: on seeds that no default was tuned on.
REFERENCE_PLAN = {
    name: ("none", *REFERENCES)
    for name in ("narrow", "e8", "e32", "reverse", "qwen3", "deepseek", "e8-long", "e32-long")
}
# The ablations, into results/balance_changed.*; that `protect` leaves a balanced run alone is among them.
CHANGED_PLAN = {
    "e8": ("none", "protect", *CHANGED),
    "e32": ("none", "protect", *CHANGED),
    "e32-long": ("none", "protect", "train_router"),
    "healthy": ("none", "protect"),
}


# --------------------------------------------------------------------------------------------------------------- run


def batches(tokens_NS: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches; the same seed gives every arm the same order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(tokens_NS.shape[0], generator=generator)
        for start in range(0, len(order_N) - batch + 1, batch):
            yield tokens_NS[order_N[start : start + batch]]


def rate_factor(setting: Setting, step: int) -> float:
    """Factor on the learning rate of the 1-based `step`: linear warm-up, then constant or linear decay to zero."""
    warm = min(1.0, (step - 1) / 20)
    left = (setting.steps - (step - 1)) / (setting.steps - 20)
    return min(warm, left) if setting.decay else warm


def step_counts(system: ChronoSystem) -> Tensor:
    """Assignments per layer and expert since the last ``system.step``, int64 ``(L, E)``."""
    sums_LR = system.sums.on("train", system.step_state.device)
    return torch.stack([sums_LR[layer.layer_id, : layer.num_experts].long() for layer in system.layers])


@torch.no_grad()
def validation_loss(model: PreTrainedModel, tokens_NS: Tensor, batch: int) -> float:
    """Mean cross-entropy on held-out blocks, nats per token, without any auxiliary loss."""
    model.eval()
    losses = []
    for start in range(0, len(tokens_NS), batch):
        block = tokens_NS[start : start + batch]
        loss = model(input_ids=block, labels=block, output_router_logits=False).loss
        losses.append((float(loss), len(block)))
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def layer_balance_loss(logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch balance loss E sum_e f_e P_e, layer by layer (1 = balanced); Transformers' own pools all layers."""
    losses = []
    for logits_TE in logits:
        num = logits_TE.shape[-1]
        prob_TE = logits_TE.float().softmax(-1)
        chosen_TE = torch.zeros_like(prob_TE).scatter_(-1, logits_TE.topk(top_k, dim=-1).indices, 1.0 / top_k)
        losses.append(num * (chosen_TE.mean(0) * prob_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def settle(model: PreTrainedModel, setting: Setting, train_NS: Tensor, seed: int) -> None:
    """Train on under a per-layer balance loss of weight 0.1, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.01)
    stream = batches(train_NS, setting.batch, seed + 1000)
    for _ in range(setting.settle):
        block = next(stream)
        out = model(input_ids=block, labels=block, output_router_logits=True)
        # The pooled loss that the model adds by itself (weight 0.02) does no harm here.
        (out.loss + 0.1 * layer_balance_loss(out.router_logits, setting.top_k)).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclasses.dataclass
class Data:
    """Pretrained model directory and the token blocks of the fine-tuning text."""

    base: Path
    train_NS: Tensor
    valid_NS: Tensor


def prepare(setting: Setting, seed: int) -> Data:
    """Pretrain (or find) the base of a seed and cut the text."""
    training = Training(steps=setting.pretrain_steps, batch=setting.batch, learning_rate=3e-3, seed=seed)
    base = pretrain_base(setting.arch, setting.size, training, domain=setting.base_domain)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_domain(setting.domain, tokenizer, setting.size, setting.arch, max_chars=setting.chars)
    train, valid = (torch.tensor(part["input_ids"]) for part in (text.train, text.valid))
    # Evenly over all held-out documents: the first blocks alone would be one or two of them.
    return Data(base, train, valid[:: max(1, len(valid) // VALID)][:VALID])


@dataclasses.dataclass
class Run:
    """What one run left behind.

    Attributes:
        count_SLE: assignments per step, layer and expert.
        losses: training loss per step.
        valid_loss: cross-entropy on held-out text at the end.
        valid_violation: max violation per layer on held-out text at the end.
        decisions: every ControlDecision.
        alerts: every alert raised.
        first_action: step of the first beta update or open lens, None if there was none.
        seconds: wall time of training.
    """

    count_SLE: Tensor
    losses: list[float]
    valid_loss: float
    valid_violation: list[float]
    decisions: list[Any]
    alerts: list[Any]
    first_action: int | None
    seconds: float


def load_model(setting: Setting, data: Data, arm: str, seed: int) -> PreTrainedModel:
    """The base with the k, the auxiliary loss and the LM head of this benchmark, in training mode."""
    torch.manual_seed(seed)
    weight = aux_weight(arm)
    options = {"num_experts_per_tok": setting.top_k}
    if setting.arch != "deepseek_v3":  # it has no auxiliary loss
        options |= {"output_router_logits": weight > 0, "router_aux_loss_coef": weight or 0.02}
    model = AutoModelForCausalLM.from_pretrained(data.base, **options).train()
    if setting.settle:
        settle(model, setting, data.train_NS, seed)
    use_fast_head(model)
    return model


def split_idle_experts(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    config: ChronoConfig,
    setting: Setting,
    data: Data,
    seed: int,
) -> None:
    """What the trainer does at the start of a run under `ChronoConfig.revive()`; nothing for other configs."""
    if config.lifecycle.revive.at == "start":
        first = ({"input_ids": block} for block in batches(data.train_NS, setting.batch, seed))
        split_at_start(chronomoe_hf.system_of(model), model, optimizer, first)
        model.train()


def fine_tune(setting: Setting, data: Data, arm: str, seed: int, config: ChronoConfig) -> Run:
    """Fine-tune the base under one arm with AdamW."""
    model = load_model(setting, data, arm, seed)
    model = chronomoe_hf.wrap(model, dataclasses.replace(config, interval=setting.interval))
    system = chronomoe_hf.system_of(model)
    beside = actor(arm, system, setting.interval)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.01, fused=True)
    split_idle_experts(model, optimizer, config, setting, data, seed)
    stream = batches(data.train_NS, setting.batch, seed)
    counts, losses, decisions, alerts, first = [], [], [], [], None
    started = time.perf_counter()
    for step in range(1, setting.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * rate_factor(setting, step)
        block = next(stream)
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts.append(step_counts(system))
        losses.append(loss.item())
        if beside is not None:
            beside.update()
        snapshot = system.step(step)
        if snapshot is not None:
            decisions.extend(system.decisions)
            alerts.extend(alert for alert in snapshot.alerts if alert.state == "raised")
        if first is None and system.governed:
            first = step
    seconds = time.perf_counter() - started
    with system.recording_eval():
        valid_loss = validation_loss(model, data.valid_NS, setting.batch)
    seen = system.take_evaluation()
    assert seen is not None
    violation = [float(layer.max_violation or 0.0) for layer in seen.layers]
    return Run(torch.stack(counts), losses, valid_loss, violation, decisions, alerts, first, seconds)
