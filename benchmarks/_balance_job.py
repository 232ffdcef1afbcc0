"""One run of the balance benchmark: settings, arms, training loop, and the measures of what it left behind.

Legend: S steps, L layers, E experts, N blocks of text, T tokens, W windows.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from _text_job import SIZES, ModelSize, Training, load_domain, pretrain_base

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.config import ControlConfig, LensConfig, VetoConfig

VALID = 512  # held-out blocks
SIGN_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
BEYOND = (0.2, 0.3)  # swept too, for the reader; never chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One stress (or its absence).

    Args:
        name: key in the results.
        size: shape of the model; `size.top_k` is the k of pretraining.
        top_k: k of fine-tuning.
        domain: text of fine-tuning; pretraining reads prose.
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
    steps: int = 300
    pretrain_steps: int = 400
    batch: int = 16
    learning_rate: float = 1e-3
    interval: int = 10
    settle: int = 0
    chars: int = 2_000_000
    decay: bool = True


_TINY = ModelSize(layers=2, hidden=32, intermediate=32, heads=4, experts=8, top_k=2, vocab=512, length=64)
# The stress of `make demo`, text, sizes and schedule included; the same with 32 experts; both again over more steps and
# more text, so that no block is read much more than once.
SETTINGS = {
    "e8": Setting(name="e8", size=SIZES["e8k2"], top_k=1),
    "e32": Setting(name="e32", size=SIZES["e32k4"], top_k=4),
    "e8-long": Setting(name="e8-long", size=SIZES["e8k2"], top_k=1, steps=800, chars=8_000_000),
    "e32-long": Setting(name="e32-long", size=SIZES["e32k4"], top_k=4, steps=600, chars=8_000_000),
    "healthy": Setting(name="healthy", size=SIZES["e8k2"], top_k=2, domain="prose", steps=100, settle=100, decay=False),
    "quick": Setting(name="quick", size=_TINY, top_k=1, steps=60, pretrain_steps=60, batch=8),
}
# `protect` with one thing changed: what each default is there for.
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reader mean": ({"lens_spread_max": 1e6}, {"reader": "mean"}),
    "no spread limit": ({"lens_spread_max": 1e6}, {}),
    "no memory": ({}, {"memory": 0.0}),
    "train_router": ({}, {"train_router": True}),
    "reader mean, train_router": ({"lens_spread_max": 1e6}, {"reader": "mean", "train_router": True}),
    "basis least_squares": ({}, {"basis": "least_squares"}),
    "scale_max 0.5": ({"scale_max": 0.5}, {}),
    "harm_threshold 0.02": ({"harm__threshold": 0.02}, {}),
    "original law": (
        {
            "gate": "pressure",
            "scale_max": 0.5,
            "warmup_steps": 100,
            "harm__threshold": 0.02,
            "harm__restart": False,
            "harm__hold": 0,
            "lens_spread_max": 1e6,
        },
        {"basis": "least_squares", "reader": "mean", "memory": 0.0, "train_router": True},
    ),
}
ARMS = ("none", "aux", "sign", "proportional", "balance", "coherence", "protect", *CHANGED)
PLAN = {
    "e8": ARMS,
    "e32": ARMS,
    "e8-long": ("none", "aux", "balance", "protect"),
    "e32-long": ("none", "aux", "balance", "protect", "train_router"),
    "healthy": ("none", "protect"),
    "quick": ("none", "balance"),
}


# -------------------------------------------------------------------------------------------------------------- arms


def balance_config(**beta: Any) -> ChronoConfig:
    """The `balance` preset with another `rule` or `rate`."""
    return ChronoConfig.balance(beta=beta)


def arm_config(arm: str, sign_rate: float) -> ChronoConfig:
    """The configuration of an arm by name; ``none`` and ``aux`` only observe."""
    if arm.startswith("sign@"):
        return balance_config(rule="sign", rate=float(arm.removeprefix("sign@")))
    protect = ChronoConfig.protect()
    if arm in CHANGED:
        control, lens = CHANGED[arm]
        return protect.replace(control=control, lens=lens)
    return {
        "none": ChronoConfig.observe(),
        "aux": ChronoConfig.observe(),
        "sign": balance_config(rule="sign", rate=sign_rate),
        "proportional": balance_config(rule="proportional"),
        "balance": ChronoConfig.balance(),
        "coherence": ChronoConfig(
            veto=VetoConfig(enabled=False), control=ControlConfig(enabled=False), lens=LensConfig(enabled=False)
        ),
        "protect": protect,
    }[arm]


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
    base = pretrain_base("mixtral", setting.size, training)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = load_domain(setting.domain, tokenizer, setting.size, "mixtral", max_chars=setting.chars)
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


def fine_tune(setting: Setting, data: Data, arm: str, seed: int, config: ChronoConfig) -> Run:
    """Fine-tune the base under one arm with AdamW."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(
        data.base, num_experts_per_tok=setting.top_k, output_router_logits=arm == "aux", router_aux_loss_coef=0.02
    )
    model.train()
    if setting.settle:
        settle(model, setting, data.train_NS, seed)
    model = chronomoe_hf.wrap(model, dataclasses.replace(config, interval=setting.interval))
    system = chronomoe_hf.system_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.01)
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
