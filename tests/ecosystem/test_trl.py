"""TRL's SFTTrainer: every way in which it feeds tokens is counted once, padding never."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import _text_job as job
import datasets
import pytest
import torch
from trl import SFTConfig, SFTTrainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter

SMALL = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=4, top_k=2, vocab=400, length=64)
LENGTHS = (7, 30, 3, 64, 12, 50, 21, 9)
STEPS, ACCUMULATION, BATCH = 3, 2, 2
MODES: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "no activation checkpointing": {"gradient_checkpointing": False},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "packing": {"packing": True, "packing_strategy": "bfd"},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding free": {"padding_free": True, "max_length": None},
    "padding free to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return job.build_tokenizer(job.load_text("prose")["train"]["text"], SMALL.vocab)


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> datasets.Dataset:
    """Real sentences of very different lengths, in tokens as in LENGTHS."""
    documents = job.load_text("prose")["train"]["text"]
    ids = [tokenizer(text)["input_ids"] for text in documents if len(text) > 400]
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(48)]
    return datasets.Dataset.from_dict(
        {"text": [tokenizer.decode(row[:n]) for row, n in zip(ids, lengths, strict=False)]}
    )


class Recount:
    """Counts what the routers chose for the real tokens of each training forward, known from the collator's input."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.real: list[list[bool]] = []
        self.labels: list[int] = []
        self.forward = -1
        self.counts = [[0] * SMALL.experts for _ in range(SMALL.layers)]
        self.padding = 0
        self.collate = trainer.data_collator
        trainer.data_collator = self._collate
        model = trainer.model
        model.model.register_forward_pre_hook(self._begin)
        for position, router in enumerate(m for m in model.modules() if isinstance(m, ChronoRouter)):
            router.register_forward_hook(self._hook(position))

    def _collate(self, features: list[dict[str, Any]]) -> Any:
        batch = self.collate(features)
        rows, width = batch["input_ids"].shape
        lengths = [len(feature["input_ids"]) for feature in features]
        if rows == len(features) and (rows > 1 or width >= sum(lengths)) and "position_ids" not in batch:
            flags = [position < length for length in lengths for position in range(width)]
        else:
            flags = [position < sum(lengths) for position in range(rows * width)]
        self.real.append(flags)
        self.labels.append(sum(label != -100 for row in batch["labels"].tolist() for label in row[1:]))
        return batch

    def _begin(self, module: Any, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.forward += 1

    def _hook(self, position: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            # A second forward without gradient (label smoothing) and the recompute of a checkpoint are not training.
            if not module.training or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return
            flags = self.real[self.forward]
            assert len(flags) == output[2].shape[0]
            for chosen, real in zip(output[2].tolist(), flags, strict=True):
                self.padding += not real
                for expert in chosen if real else []:
                    self.counts[position][expert] += 1

        return hook


def sft(tokenizer: Any, texts: datasets.Dataset, directory: Path, **overrides: Any) -> SFTTrainer:
    fields: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_length": SMALL.length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL advises flash attention for packed batches
        return SFTTrainer(
            job.build_model("mixtral", SMALL),
            SFTConfig(**{**fields, **overrides}),
            train_dataset=texts,
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("mode", list(MODES))
def test_counts_equal_a_recount_of_real_tokens(mode: str, tokenizer: Any, texts: Any, tmp_path: Path) -> None:
    trainer = sft(tokenizer, texts, tmp_path, **MODES[mode])
    assert trainer.args.gradient_checkpointing is (mode != "no activation checkpointing")
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=STEPS))
    recount = Recount(trainer)
    trainer.train()
    snapshot = callback.system.last_snapshot
    assert recount.forward + 1 == STEPS * ACCUMULATION
    assert [layer.expert_token_counts for layer in snapshot.layers] == recount.counts
    real = sum(sum(flags) for flags in recount.real[: STEPS * ACCUMULATION])
    assert [layer.tokens for layer in snapshot.layers] == [real] * SMALL.layers
    kept = "label smoothing" in mode  # Trainer keeps the labels to itself
    assert snapshot.loss_tokens == (None if kept else sum(recount.labels[: STEPS * ACCUMULATION]))
    assert [layer.calls for layer in snapshot.layers] == [STEPS * ACCUMULATION] * SMALL.layers
    padded = not mode.startswith("packing") and mode != "padding free"
    assert (recount.padding > 0) is padded, "bad test setup"
    logged = [entry for entry in trainer.state.log_history if "moe/neff_mean" in entry]
    assert len(logged) == 1 and "entropy" in logged[0] and "aux_loss" in logged[0]


def test_the_default_preset_governs_under_sft(tokenizer: Any, texts: Any, tmp_path: Path) -> None:
    trainer = sft(tokenizer, texts, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    callback = chronomoe_hf.attach(trainer, ChronoConfig(interval=1))
    trainer.train()
    assert float(callback.system.step_state.beta_LE.abs().max()) > 0
    assert (tmp_path / "checkpoint-4" / "chronomoe" / "state.json").is_file()
    assert (tmp_path / "chronomoe" / "snapshots.jsonl").is_file()
