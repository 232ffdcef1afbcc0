"""The model that owns the routers: seen however its forward is called, and called what it was called."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models as tiny
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM, MixtralModel

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
TOKENS = [36, 36]


def counted(model: Any, step: int = 1) -> list[int]:
    snapshot = system_of(model).step(step)
    assert snapshot is not None
    return [sum(layer.expert_token_counts) for layer in snapshot.layers]


def observed(model: nn.Module | None = None) -> Any:
    made = tiny.tiny_model("mixtral").train() if model is None else model
    return chronomoe_hf.wrap(made, ChronoConfig.observe(interval=1))


class Encoder(nn.Module):
    """As sentence-transformers holds its backbone: it calls ``forward``, which runs no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = tiny.tiny_model("mixtral").model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden: torch.Tensor = self.auto_model.forward(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.mean(1)


def test_a_forward_that_is_called_directly_is_observed() -> None:
    model = observed(Encoder().train())
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    model(IDS, mask).sum().backward()
    assert counted(model) == [28, 28], "padding is left out"
    model = observed()
    model.model.forward(input_ids=IDS)
    model.forward(input_ids=IDS)
    model(input_ids=IDS)
    assert counted(model) == [3 * 36] * 2, "each way of calling it counts once"


def test_the_class_keeps_its_name_and_what_hangs_on_it(tmp_path: Path) -> None:
    plain = tiny.tiny_model("mixtral")
    native = plain.model
    described = (str(type(native)), inspect.signature(native.forward), type(native).__name__)
    recorded = plain(input_ids=IDS, output_router_logits=True).router_logits
    model = observed(plain)
    owner = model.model
    assert (str(type(owner)), inspect.signature(owner.forward), type(owner).__name__) == described
    assert isinstance(owner, MixtralModel)
    again = model(input_ids=IDS, output_router_logits=True).router_logits
    assert len(again) == len(recorded) == 2 and all(torch.equal(a, b) for a, b in zip(again, recorded, strict=True))
    model.save_pretrained(tmp_path / "whole")
    owner.save_pretrained(tmp_path / "backbone")
    assert '"MixtralModel"' in (tmp_path / "backbone" / "config.json").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")) is MixtralForCausalLM
    chronomoe_hf.unwrap(model)
    assert type(owner) is MixtralModel and "_chrono_scope" not in vars(owner)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_records_into_its_own_system(way: Any) -> None:
    model = observed()
    twin = way(model)
    twin.model.forward(input_ids=IDS)
    assert counted(twin) == TOKENS and counted(model) == [0, 0]
    chronomoe_hf.unwrap(twin)
    assert type(twin.model) is MixtralModel and type(model.model) is not MixtralModel


def test_a_forward_replaced_on_the_instance_is_still_seen() -> None:
    """Before wrap the class is bypassed, so hooks stand in; afterwards libraries call what was there."""
    model = tiny.tiny_model("mixtral").train()
    native = model.model.forward
    model.model.forward = lambda *args, **kwargs: native(*args, **kwargs)
    observed(model)
    model(input_ids=IDS)
    assert counted(model) == TOKENS
    chronomoe_hf.unwrap(model)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks

    model = observed()
    inner = model.model.forward
    model.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    model(input_ids=IDS)
    assert counted(model) == TOKENS


def test_a_failed_forward_is_in_no_sum_and_the_next_one_is() -> None:
    model = observed()
    with pytest.raises(IndexError):
        model.model.forward(input_ids=IDS + 1000)
    model.model.forward(input_ids=IDS)
    assert counted(model) == TOKENS


def test_an_instance_made_of_the_class_is_a_plain_model() -> None:
    model = observed()
    other = type(model.model)(model.config).train()
    other(input_ids=IDS)
    assert counted(model) == [0, 0]


def test_a_part_that_is_called_by_itself_is_named() -> None:
    model = observed()
    hidden = torch.randn(1, 5, 32)
    model.model.layers[0].mlp(hidden)
    model.model.layers[0].mlp(hidden)
    snapshot = system_of(model).step(1)
    assert snapshot is not None
    (first, second) = [alert.detail for alert in snapshot.alerts if alert.kind == "NOT_OBSERVED"]
    assert "its router ran 2 times in training, but outside any forward of the model that owns it" in first
    assert "no training forward of this model ran" in second
    with torch.no_grad():
        model.model.layers[0].mlp(hidden)
    snapshot = system_of(model).step(2)
    assert snapshot is not None and "outside" not in " ".join(snapshot.layers[0].notes), "the window's own calls only"
