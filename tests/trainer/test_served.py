"""What a Trainer leaves for an engine: folded and saved over itself it steers once, and no state looks like weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support import jobs as training_job
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import BetaConfig
from chronomoe_hf.errors import StateMissingError

ROUTING = ChronoConfig(beta=BetaConfig(law="balance", scope="routing", dead_zone=None, first_layer="same", rate=0.3))
IDS = torch.arange(1, 33).reshape(2, 16)


def gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
        pad_token_id=0,
    )  # fmt: skip
    return GptOssForCausalLM(config)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits
    return out


def test_a_final_save_after_a_fold_into_the_same_directory_steers_once(tmp_path: Path) -> None:
    """Saved with its state, folded, saved again: as the warning at a save advises."""
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=2, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(gpt_oss(), arguments, train_dataset=training_job.rows(64))
    chronomoe_hf.attach(trainer, ROUTING)
    trainer.train()
    out = tmp_path / "out"
    trainer.save_model(str(out))
    want = logits(trainer.model)
    plain = logits(GptOssForCausalLM.from_pretrained(out))
    assert float((plain - want).abs().max()) > 0.1, "bad test setup: nothing steers"
    assert [path.name for path in out.rglob("*.safetensors")] == ["model.safetensors"]
    chronomoe_hf.unwrap(trainer.model, fold=True)
    trainer.save_model(str(out))
    again = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(again), want, atol=2e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chronomoe_hf.wrap(again, ChronoConfig.observe())
    chronomoe_hf.unwrap(again)
    for config in (ROUTING, None):
        with pytest.raises(StateMissingError, match="was folded into the weights there"):
            chronomoe_hf.wrap(again, config, state=out)
    torch.testing.assert_close(logits(again), want, atol=2e-5, rtol=0)
