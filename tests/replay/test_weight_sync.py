"""TRL's weight sync to vLLM sends parameters alone: correction biases that are buffers are sent with them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import moe_zoo
from trl.generation.vllm_generation import VLLMGeneration

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.trainer.replay import SYNC, ReplayHooks


def syncing(family: str, config: ChronoConfig) -> tuple[Any, Any]:
    """A trainer as far as the hooks look at it, around TRL's own generator of what is sent (vLLM is not installed)."""
    model = moe_zoo.build(family)
    moe_zoo.randomise(model)
    chronomoe_hf.wrap(model, config)
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.mode, generation.accelerator = model, "server", None
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    trainer = SimpleNamespace(
        vllm_generation=generation, args=SimpleNamespace(), accelerator=SimpleNamespace(), model=model, use_vllm=True
    )
    return trainer, model


@pytest.mark.parametrize(
    ("family", "buffers"), [("deepseek_v3", 2), ("minimax_m2", 2), ("lfm2_moe", 2), ("mixtral", 0)]
)
def test_biases_are_sent_under_the_names_of_the_checkpoint(family: str, buffers: int) -> None:
    trainer, model = syncing(family, ChronoConfig.balance(interval=1))
    plain = dict(trainer.vllm_generation._iter_named_params())
    hooks = ReplayHooks(trainer, system_of(model))
    sent = dict(trainer.vllm_generation._iter_named_params())
    more = sent.keys() - plain.keys()
    assert len(more) == buffers
    state = model.state_dict()
    assert all(torch.equal(sent[name], state[name]) for name in more), "a name that no checkpoint has"
    with torch.no_grad():
        for name in more:
            state[name].add_(1.0)
    again = dict(trainer.vllm_generation._iter_named_params())
    assert all(torch.equal(again[name], state[name]) for name in more), "the bias of the time of attach is sent"
    hooks.remove()
    assert dict(trainer.vllm_generation._iter_named_params()).keys() == plain.keys()


def test_nothing_is_added_where_no_law_moves_a_bias() -> None:
    trainer, model = syncing("deepseek_v3", ChronoConfig.observe())
    ReplayHooks(trainer, system_of(model))
    assert SYNC not in vars(trainer.vllm_generation)


def test_a_trl_without_that_place_is_refused_by_name() -> None:
    trainer, model = syncing("deepseek_v3", ChronoConfig.balance(interval=1))
    trainer.vllm_generation = SimpleNamespace()
    with pytest.raises(ConfigError, match="would route by the old one"):
        ReplayHooks(trainer, system_of(model))
