"""Passes of another policy under PEFT, and runs that begin anew: what is recorded, repeated and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import models, moe_zoo

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import ConfigError, UnsupportedArchitectureError

from .grpo_job import make

pytestmark = pytest.mark.filterwarnings("ignore")


def with_adapters() -> Any:
    """Two LoRA adapters that differ; the first one is in training."""
    model = peft.get_peft_model(models.tiny_model("qwen3_moe"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.set_adapter("default")
    return model.train()


def test_adapters_that_are_off_or_others_are_neither_recorded_nor_repeated() -> None:
    model = with_adapters()
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1, replay__mode="old"))
    system, data = system_of(model), models.tiny_batch("qwen3_moe", batch=3, length=8)
    model(**data).loss.backward()
    with torch.no_grad():
        with model.disable_adapter():
            model(**data)
        assert system.replay.store.count("old") == 0, "the reference was taken for the policy"
        model.set_adapter("other")
        model(**data)
        assert system.replay.store.count("old") == 0, "another adapter was taken for the policy"
        model.set_adapter("default")
        model(**data)
    assert system.replay.store.count("old") == 3
    record = system.step(1).replay  # type: ignore[union-attr]
    assert record is not None and record["passes"]["old"] == 1 and record["passes"]["gradient"] == 1


def test_a_resumed_run_begins_with_an_empty_store_and_is_covered(tmp_path: Path) -> None:
    """The process ended between the two uses of a batch: TRL samples anew, and so nothing is looked up in vain."""
    fields = {"num_iterations": 2, "beta": 0.0, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    config = ChronoConfig.observe(interval=1, replay__mode="rollout")
    torch.manual_seed(0)
    first = make("GRPO", models.tiny_model("qwen3_moe"), tmp_path, **fields)
    system = chronomoe_hf.attach(first, config).system
    first.train()
    assert system is not None and system.replay.store.count("rollout") > 0
    saved = tmp_path / "checkpoint-3"
    for path in saved.rglob("*"):
        assert "routes_NLK" not in path.name and b"routes_NLK" not in (path.read_bytes() if path.is_file() else b"")
    again = make("GRPO", models.tiny_model("qwen3_moe"), tmp_path, **{**fields, "max_steps": 5})
    resumed = chronomoe_hf.attach(again, config).system
    assert resumed is not None and len(resumed.replay.store) == 0
    again.train(resume_from_checkpoint=str(saved))
    record = resumed.last_snapshot.replay  # type: ignore[union-attr]
    assert record is not None and record["coverage"] == 1.0 and record["tokens_repeated"] > 0
    assert not {"REPLAY_UNCOVERED", "REPLAY_IDLE", "REPLAY_INVALID"} & {a.kind for a in resumed.alerts.active}


def phimoe(**fields: Any) -> Any:
    model = moe_zoo.build("phimoe").train()
    moe_zoo.randomise(model)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1, **fields))
    return model


def test_phimoe_is_exact_where_the_rollout_is_repeated_and_refused_where_the_old_pass_would_be() -> None:
    with pytest.raises(ConfigError, match=r"draws its experts at random in training.*use mode='rollout'"):
        phimoe(replay__mode="old")
    data = {"input_ids": torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))}
    found = []
    for mode in ("measure", "rollout"):
        model = phimoe(replay__mode=mode, replay__max_mismatch=1.0)
        replay = system_of(model).replay
        for layer in system_of(model).layers:
            layer.router.router_jitter_noise = 0.5  # how near a tie is decided by a draw
        for row in data["input_ids"]:
            noise = torch.rand(len(row) - 1, len(system_of(model).layers), layer.num_experts)
            replay.add(row, noise.argsort(-1)[..., : layer.top_k])
        with torch.no_grad():
            old = model(**data).logits[:, :-1]
        found.append(torch.equal(old, model(**data).logits[:, :-1].detach()))
    assert found == [False, True], "what is sampled anew differs; what is repeated is the same to the last bit"


@pytest.mark.parametrize("family", ["dbrx", "nllb_moe"])
def test_families_that_cannot_be_told_are_refused_at_wrap(family: str) -> None:
    with pytest.raises((UnsupportedArchitectureError, ConfigError), match="cannot be repeated"):
        chronomoe_hf.wrap(moe_zoo.build(family), ChronoConfig.observe(replay__mode="measure"))
