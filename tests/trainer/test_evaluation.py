"""Evaluations are kept apart: from training, from one another, and from passes that are not the policy's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs as training_job
from support import models as tiny
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import chronomoe_hf
from chronomoe_hf import ChronoConfig

ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def trainer_for(output_dir: Path, eval_dataset: Any, kind: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    return kind(
        overrides.pop("model", None) or tiny.tiny_model("mixtral"),
        TrainingArguments(str(output_dir), **{**ARGUMENTS, **overrides}),
        train_dataset=training_job.rows(16),
        eval_dataset=eval_dataset,
    )


def real(rows: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(row["attention_mask"].sum()) for row in rows)


def evaluations(output_dir: Path) -> dict[tuple[str, int], int]:
    """Tokens of the first layer by name of the evaluation and step."""
    out: dict[tuple[str, int], int] = {}
    for line in (output_dir / "chronomoe" / "routing_events.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["mode"] == "EVAL" and record["layer_id"] == 0:
            key = record["evaluation"], record["step"]
            assert key not in out
            out[key] = record["tokens"]
    return out


def test_every_data_set_has_its_own_numbers(tmp_path: Path) -> None:
    sets = {"a": training_job.rows(8, seed=1), "b": training_job.rows(4, seed=2)}
    trainer = trainer_for(tmp_path, sets, eval_strategy="steps", eval_steps=1)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1))
    metrics = trainer.evaluate()
    assert {"eval_a_moe/neff_min", "eval_b_moe/neff_min"} <= metrics.keys()
    assert not any(key.startswith("eval_moe/") for key in metrics)
    assert metrics["eval_a_moe/neff_mean"] != metrics["eval_b_moe/neff_mean"]
    alone = trainer_for(tmp_path / "alone", sets["b"])
    chronomoe_hf.attach(alone, ChronoConfig.observe())
    assert alone.evaluate()["eval_moe/neff_mean"] == metrics["eval_b_moe/neff_mean"]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_a_moe/neff_mean" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert not any("eval_b_moe/neff_mean" in entry for entry in entries)
    expected = {(f"eval_{name}", step): real(rows) for name, rows in sets.items() for step in (1, 2)}
    assert evaluations(tmp_path) == expected
    assert callback.system is not None


def test_a_prediction_is_under_its_own_prefix(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, training_job.rows(8, seed=1))
    chronomoe_hf.attach(trainer, ChronoConfig.observe())
    metrics = trainer.predict(training_job.rows(6, seed=3)).metrics
    assert "test_moe/neff_mean" in metrics and not any(key.startswith("eval_") for key in metrics)
    named = trainer.predict(training_job.rows(6, seed=3), metric_key_prefix="held_out").metrics
    assert named["held_out_moe/neff_mean"] == metrics["test_moe/neff_mean"]
    assert trainer.evaluate(metric_key_prefix="dev")["dev_moe/neff_mean"] > 0


class WithReference(Trainer):
    """Before the policy's pass, one with the adapters off and one with another adapter: TRL's references under PEFT."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        model.set_adapter("ref")
        with torch.no_grad():
            model(**inputs)
        model.set_adapter("default")
        return super().prediction_step(model, inputs, *args, **kwargs)


def test_passes_of_a_reference_are_left_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    model = peft.get_peft_model(tiny.tiny_model("mixtral"), adapters)
    model.add_adapter("ref", adapters)
    rows = training_job.rows(8, seed=1)
    trainer = trainer_for(tmp_path, rows, WithReference, model=model)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe())
    trainer.evaluate()
    assert callback.system is not None and callback.system.last_evaluation is not None
    assert [layer.tokens for layer in callback.system.last_evaluation.layers] == [real(rows)] * 2
    assert not {"generate", "disable_adapter", "set_adapter"} & set(vars(model)), "replaced methods are put back"
    assert "_prepare_inputs" not in vars(trainer)
    with torch.no_grad():
        model.eval()(input_ids=rows[0]["input_ids"][None])
    assert callback.system.take_evaluation() is None, "outside an evaluation nothing is recorded"


class WithMismatch(Trainer):
    """As KTO: the batch brings mismatched sequences, and the model sees them under no_grad before the real ones."""

    first = True

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if "KL_input_ids" not in prepared:
            prepared["KL_input_ids"] = prepared["input_ids"].flip(0)
        return prepared

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        other = inputs.pop("KL_input_ids")
        with torch.no_grad():
            model(input_ids=other, attention_mask=inputs["attention_mask"])
            loss = model(**inputs).loss
        return loss, None, None


def test_the_mismatched_pass_of_kto_is_left_out(tmp_path: Path) -> None:
    rows = training_job.rows(8, seed=1)
    trainer = trainer_for(tmp_path, rows, WithMismatch, remove_unused_columns=False)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe())
    for _ in range(2):
        trainer.evaluate()
        assert callback.system is not None and callback.system.last_evaluation is not None
        assert [layer.tokens for layer in callback.system.last_evaluation.layers] == [real(rows)] * 2
    assert not trainer.model.model._forward_pre_hooks, "no hook stays behind"


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows that the first layer's router sees, forward by forward."""
    seen: list[int] = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    yield seen
    handle.remove()


def test_generation_is_no_evaluation_of_the_policy(tmp_path: Path) -> None:
    rows = [dict(row, labels=row["input_ids"]) for row in training_job.rows(4, seed=1)]
    model = tiny.tiny_model("mixtral")
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path), **{**ARGUMENTS, "predict_with_generate": True, "generation_max_length": 20}
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"shape": float(prediction.predictions.shape[-1])},
    )
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe())
    with counted(model) as seen:
        metrics = trainer.evaluate()
    assert metrics["eval_shape"] > training_job.LENGTH and len(seen) > 2, "bad test setup: nothing was generated"
    assert callback.system is not None and callback.system.last_evaluation is not None
    assert [layer.tokens for layer in callback.system.last_evaluation.layers] == [real(rows)] * 2
    assert [layer.calls for layer in callback.system.last_evaluation.layers] == [1, 1]
