"""A model with one overloaded and one idle expert, and proposals as the roles of a run would have left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import jobs, models
from transformers import Trainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import CoherenceConfig, LifecycleConfig
from chronomoe_hf.lifecycle import Proposal
from chronomoe_hf.lifecycle.live.model import live_layers

ROLES = {"coherence": CoherenceConfig(roles=True)}
LAYER, DONOR, IDLE = 1, 3, 6
SEEDS = {("mixtral", 1): 4, ("mixtral", 2): 6, ("switch_transformers", 1): 116}
EDITS = [("split", [DONOR]), ("spawn", [IDLE, DONOR]), ("prune", [IDLE]), ("balance", [DONOR])]
"""What competes with a split of expert 3."""


def one_idle(family: str = "mixtral", k: int = 1, *, never: bool = False) -> Any:
    """Two kinds of tokens; in layer 1 expert 3 takes many of them and expert 6 hardly any."""
    fields = {"num_experts_per_tok": k} if family == "mixtral" else {"expert_capacity": 1000}
    model = models.tiny_model(family, train=False, **fields)
    layer = live_layers(model)[LAYER]
    with torch.no_grad():
        embedding_VD = model.get_input_embeddings().weight
        embedding_VD[:32, 0] += 2.0
        embedding_VD[32:, 0] -= 2.0
        weight_ED = layer.adapter.weight(layer.router)
        weight_ED.normal_(std=0.3, generator=torch.Generator().manual_seed(SEEDS[family, k]))
        weight_ED[DONOR] *= 1.5
        weight_ED[IDLE] *= 0.02
        if never:  # not one token chooses it: all have something in common that its row points away from
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj")):
                    weight *= 0.1
            embedding_VD[:, 1] += 3.0
            weight_ED[:, 1] = 0.0
            weight_ED[IDLE, 1] = -2.0
    return model


def held_out(family: str = "mixtral", count: int = 6) -> list[dict[str, Any]]:
    return [models.tiny_batch(family, seed=300 + i, batch=8, length=48, padded=True) for i in range(count)]


def watch(model: Any, **config: Any) -> Any:
    return chronomoe_hf.system_of(chronomoe_hf.wrap(model, ChronoConfig.observe(**ROLES, **config)))


def propose(system: Any, kind: Any, experts: tuple[int, ...], competing: list[tuple[str, list[int]]]) -> None:
    """A confirmed proposal, as the roles of a run would have left it."""
    listed = [{"edit": name, "experts": ids, "delta_free_energy": None} for name, ids in competing]
    proposal = Proposal(
        kind=kind, layer_id=LAYER, experts=experts, step=2, state="confirmed", streak=2, competing=tuple(listed)
    )
    system.lifecycle.roles.standing[LAYER, kind, experts] = proposal


def train_with_an_idle_expert(directory: Path, k: int = 1, *, measured: bool = True) -> Trainer:
    """Six steps of a Trainer with dropout, evaluated every two; roles, and what they propose, are measured or not."""
    arguments = jobs.evaluated_arguments(directory, per_device_train_batch_size=32, learning_rate=1e-4)
    model = one_idle(k=k, never=True)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    trainer = Trainer(model, arguments, train_dataset=jobs.rows(64), eval_dataset=jobs.rows(32, seed=1))
    lifecycle = LifecycleConfig(measure=measured, confirmations=2, keep=0.5, measure_batches=4, measure_controls=0)
    coherence = CoherenceConfig(roles=measured, max_tokens=None)
    chronomoe_hf.attach(trainer, ChronoConfig(interval=2, lifecycle=lifecycle, coherence=coherence))
    trainer.train()
    return trainer
