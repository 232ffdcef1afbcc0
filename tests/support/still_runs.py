"""Runs in which nothing is learned, and one in which a collapse is planted: what a verdict is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import moe_zoo
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig

LENGTH = 24
# Three of the tokens make most of the text: some experts do most of the work.
NARROW = ([3, 4, 5] * 9, list(range(3, 60)))
TEN = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "qwen3_next",
)


def narrow_rows(count: int, *, labels: bool = True, seed: int = 5) -> list[dict[str, Tensor]]:
    """Rows of few different tokens, a few of any kind between them; row i has i % 4 tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    few, all_of_them = (torch.tensor(ids) for ids in NARROW)
    out = []
    for index in range(count):
        common = few[torch.randint(len(few), (LENGTH,), generator=generator)]
        rare = all_of_them[torch.randint(len(all_of_them), (LENGTH,), generator=generator)]
        ids = torch.where(torch.rand(LENGTH, generator=generator) < 0.15, rare, common)
        mask = torch.ones_like(ids)
        mask[LENGTH - index % 4 :] = 0
        row = {"input_ids": ids * mask, "attention_mask": mask}
        out.append({**row, "labels": ids.masked_fill(mask == 0, -100)} if labels else row)
    return out


def still_trainer(
    directory: Path,
    family: str,
    config: ChronoConfig,
    *,
    steps: int = 24,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """An attached Trainer whose learning rate is 0, on narrow text."""
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        learning_rate=0.0,
        weight_decay=0.0,
        per_device_train_batch_size=16,
        save_strategy="no",
        logging_steps=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=narrow_rows(16 * steps), callbacks=callbacks)
    chronomoe_hf.attach(trainer, config)
    return trainer


class Collapse(TrainerCallback):
    """After step `at`, the routers' rows are such that nearly all tokens of a layer go to the same experts."""

    def __init__(self, at: int) -> None:
        self.at = at

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            collapse(kwargs["model"])


@torch.no_grad()
def collapse(model: nn.Module) -> None:
    """Turn the rows of every router so that the first k experts win on the mean input of this text, by far."""
    found = moe_zoo.routers_of(model)
    means: dict[nn.Module, Tensor] = {}

    def remember(router: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().float()
        means[router] = rows.reshape(-1, rows.shape[-1]).mean(dim=0)

    handles = [router.register_forward_pre_hook(remember) for _, router, _ in found]
    training = model.training
    batch = narrow_rows(8, labels=False)
    model.eval()(**{name: torch.stack([row[name] for row in batch]) for name in batch[0]})
    model.train(training)
    for handle in handles:
        handle.remove()
    for adapter, router, _ in found:
        weight_ED = adapter.weight(router)
        toward_D = means[router] / means[router].norm() ** 2
        weight_ED.copy_(weight_ED * 0.05 - 8.0 * toward_D)
        for expert in range(adapter.top_k(router)):
            weight_ED[expert] += 16.0 * toward_D
