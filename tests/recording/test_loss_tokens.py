"""Loss tokens equal a plain recount of the labels that were given."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from torch import nn
from transformers import Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem


def recount(batch: dict[str, Any], shifted: bool = True) -> int:
    rows = batch["labels"].tolist()
    return sum(label != -100 for row in rows for label in (row[1:] if shifted else row))


def wrapped(family: str = "mixtral", interval: int = 100) -> tuple[nn.Module, ChronoSystem]:
    model = chronomoe_hf.wrap(tiny.tiny_model(family), ChronoConfig.observe(interval=interval))
    return model, chronomoe_hf.system_of(model)


def completions(family: str = "mixtral", *, seed: int = 0) -> dict[str, Any]:
    """Padded rows of which only what follows a prompt has labels."""
    batch = tiny.tiny_batch(family, seed=seed, padded=True)
    for row in range(len(batch["labels"])):
        batch["labels"][row, : 3 + row] = -100
    return batch


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "ac", "ac-reentrant"])
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_equal_a_recount(family: str, checkpointing: bool | None) -> None:
    """Padding, prompts, accumulation 2, activation checkpointing; evaluation apart; no-grad forwards not at all."""
    model, system = wrapped(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    shifted, expected, evaluated = family != "switch_transformers", 0, 0
    for step in (1, 2):
        for micro in range(2):
            batch = completions(family, seed=10 * step + micro)
            model(**batch).loss.backward()
            expected += recount(batch, shifted)
        with torch.no_grad():
            model(**batch)
            model.eval()
            model(**batch)
            with system.recording_eval():
                other = tiny.tiny_batch(family, seed=step)
                model(**other)
                evaluated += recount(other, shifted)
            model.train()
        assert system.step(step) is None
    snapshot, evaluation = system.snapshot(), system.take_evaluation()
    assert evaluation is not None
    assert (snapshot.loss_tokens, evaluation.loss_tokens) == (expected, evaluated)
    assert snapshot.to_record()["loss_tokens"] == expected < snapshot.layers[-1].tokens
    assert system.close_window().loss_tokens == expected
    assert system.snapshot().loss_tokens is None, "a new window starts at nothing"


def test_positional_shifted_and_absent_labels() -> None:
    model, system = wrapped(interval=1)
    batch = completions()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model(**inputs).logits.sum().backward()
    assert system.step(1).loss_tokens is None, "a loss outside the model says nothing"
    names = chronomoe_hf.recording.scope.forward_parameters(model)
    before = [inputs.get(name) for name in names[: names.index("labels")]]
    model(*before, batch["labels"]).loss.backward()
    assert system.step(2).loss_tokens == recount(batch)
    ready = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    ready[:, ::2] = -100
    model(**batch, shift_labels=ready).loss.backward()
    assert system.step(3).loss_tokens == recount({"labels": ready}, shifted=False) < recount(batch)
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, labels=batch["labels"])
    model(**inputs).logits.sum().backward()
    assert system.step(4).loss_tokens is None, "labels of a forward that failed"
    model(**{**batch, "labels": batch["labels"] * 0 - 100}).logits.sum().backward()
    assert system.step(5).loss_tokens == 0


@pytest.mark.parametrize("first", ["wrap", "peft"])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_labels_given_to_peft(first: str, task: str | None) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.tiny_model("mixtral")
    if first == "wrap":
        chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type=task))
    chronomoe_hf.wrap(adapted, ChronoConfig.observe(interval=1))
    batch = completions()
    adapted(**batch).loss.backward()
    assert chronomoe_hf.system_of(adapted).step(1).loss_tokens == recount(batch)
    chronomoe_hf.unwrap(adapted)
    assert not any("_chrono_labels" in module.__dict__ for module in adapted.modules())
    assert not adapted._forward_pre_hooks and not model._forward_hooks


def test_copies_and_pickles_count_on_their_own() -> None:
    model, system = wrapped(interval=1)
    batch = completions()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**batch).loss.backward()
        assert chronomoe_hf.system_of(other).step(1).loss_tokens == recount(batch)
    assert system.step(1).loss_tokens is None


def test_an_open_window_that_is_resumed_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    model, system = wrapped(interval=4)
    for step in range(1, 5):
        model(**completions(seed=step)).loss.backward()
        snapshot = system.step(step)
        if step == 2:
            system.save(tmp_path)
    other, resumed = wrapped(interval=4)
    resumed.load(tmp_path)
    for step in (3, 4):
        other(**completions(seed=step)).loss.backward()
        again = resumed.step(step)
    assert again.loss_tokens == snapshot.loss_tokens == sum(recount(completions(seed=step)) for step in range(1, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_trainer(smoothing: float, tmp_path: Path) -> None:
    """With label smoothing Trainer keeps the labels to itself."""
    rows = training_job.rows(8, seed=1)
    for at, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 1 + at % 4] = -100
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        label_smoothing_factor=smoothing,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(tiny.tiny_model("mixtral"), arguments, train_dataset=rows, eval_dataset=rows[:3])
    system = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2)).system
    trainer.train()
    assert system is not None and system.last_evaluation is not None
    found = system.last_snapshot.loss_tokens, system.last_evaluation.loss_tokens
    each = [recount({"labels": row["labels"][None]}) for row in rows]
    assert found == ((None, None) if smoothing else (sum(each), sum(each[:3])))
