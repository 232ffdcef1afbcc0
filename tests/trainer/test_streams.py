"""What is read before the first step is trained on all the same, whether the data have an order or a position."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import models as tiny
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import TelemetryConfig
from chronomoe_hf.in_run.put_back import training_batches

ROWS = 48  # twelve batches of four


def row(number: int) -> dict[str, torch.Tensor]:
    ids = (torch.arange(12) * 5 + number) % 60 + 4
    return {"input_ids": ids, "labels": ids}


class Position(IterableDataset[Any]):
    """A stream that goes on where it was left, however often it is iterated."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < ROWS:
            self.at += 1
            yield row(self.at)


class Restarts(IterableDataset[Any]):
    """A stream that starts afresh, in an order that it draws when it does."""

    def __iter__(self) -> Iterator[Any]:
        order = list(range(1, ROWS + 1))
        random.shuffle(order)
        order = [order[at] for at in np.random.permutation(ROWS)]
        for number in order:
            yield row(number)


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, at: int) -> Any:
        return row(at + 1)


DATA = {"position": Position, "restarts": Restarts, "rows": Rows}


def trained(data: str, folder: Path, config: ChronoConfig | None, family: str, **more: Any) -> tuple[Any, list[Any]]:
    """Weights after a run, and the batches that it trained on."""
    model = tiny.tiny_model(family, attention_dropout=0.2)
    settings: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "seed": 3, **more,
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=DATA[data]())
    if config is not None:
        chronomoe_hf.attach(trainer, config)
    seen: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            seen.append(kwargs["input_ids"][:, 0].tolist())

    model.register_forward_pre_hook(look, with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return {name: value.clone() for name, value in model.state_dict().items()}, seen


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("data", DATA)
def test_a_baseline_that_reads_batches_changes_no_bit_of_a_run(data: str, family: str, tmp_path: Path) -> None:
    config = ChronoConfig.observe(interval=4, telemetry=TelemetryConfig(baseline="forward"))
    want, in_order = trained(data, tmp_path / "plain", None, family)
    got, seen = trained(data, tmp_path / "ours", config, family)
    assert len(in_order) == 12 and seen == in_order
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    "more", [{}, {"dataloader_num_workers": 1}, {"accelerator_config": {"dispatch_batches": False}}]
)
@pytest.mark.parametrize("data", DATA)
def test_a_split_at_the_start_leaves_training_every_batch(data: str, more: dict[str, Any], tmp_path: Path) -> None:
    _, in_order = trained(data, tmp_path / "plain", None, "mixtral", **more)
    _, seen = trained(data, tmp_path / "ours", ChronoConfig.revive(), "mixtral", **more)
    assert len(in_order) == 12 and seen == in_order


def test_a_second_epoch_is_the_data_loaders_own() -> None:
    loader: Any = DataLoader(Restarts(), batch_size=4)
    native = type(loader)
    states = random.getstate(), np.random.get_state()
    first = [batch["input_ids"][0, 0].item() for batch in loader]
    second = [batch["input_ids"][0, 0].item() for batch in loader]
    random.setstate(states[0])
    np.random.set_state(states[1])
    read = training_batches(loader, 3)
    random.setstate(states[0])
    np.random.set_state(states[1])
    assert [batch["input_ids"][0, 0].item() for batch in read] == first[:3]
    again = training_batches(loader, 2)  # read twice, put back twice
    assert [batch["input_ids"][0, 0].item() for batch in again] == first[:2]
    random.setstate(states[0])
    np.random.set_state(states[1])
    assert [batch["input_ids"][0, 0].item() for batch in loader] == first
    assert type(loader) is native
    assert [batch["input_ids"][0, 0].item() for batch in loader] == second


@pytest.mark.parametrize("count", [0, 2, 40])
def test_fewer_batches_than_asked_for_are_all_put_back(count: int) -> None:
    loader = DataLoader(Position(), batch_size=4)
    assert len(training_batches(loader, count)) == min(count, 12)
    assert [batch["input_ids"].shape[0] for batch in loader] == [4] * 12
