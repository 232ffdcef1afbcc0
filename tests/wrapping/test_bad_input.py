"""What is no model, no config or not one model gets a typed error that names it and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models as tiny
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoCallback, ChronoConfig
from chronomoe_hf.config import PRESETS
from chronomoe_hf.errors import ChronoError, ConfigError, NotWrappedError, WrapError


@pytest.mark.parametrize("model", [None, "mistralai/Mixtral-8x7B-v0.1", {"a": 1}, nn.Linear], ids=str)
@pytest.mark.parametrize("function", [chronomoe_hf.wrap, chronomoe_hf.unwrap, chronomoe_hf.system_of])
def test_what_is_no_model(function: Any, model: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        function(model)
    assert f"got a {type(model).__name__}; " in str(raised.value) and "from_pretrained" in str(raised.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("Balanced", r"no preset 'Balanced'.*did you mean 'balance'\?.*known: observe, .*revive"),
        ("x" * 5000, r"no preset .*; known: observe, protect, balance, revive, original"),
        ({"interval": 5}, r"config is a dict; .*ChronoConfig\.from_dict"),
        (ChronoConfig.revive, r"config is a method; .*call it: ChronoConfig\.revive\(\)"),
        (7, r"config is a int; .*the name of a preset \(observe, protect, balance, revive, original\)"),
    ],
    ids=["close name", "long", "dict", "not called", "number"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_config(config: Any, says: str, wrapped: bool) -> None:
    model = tiny.tiny_model("mixtral")
    if wrapped:
        chronomoe_hf.wrap(model)
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=says):
        chronomoe_hf.wrap(model, config)
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_of_a_preset_stands_for_the_preset(name: str) -> None:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), name)
    assert chronomoe_hf.system_of(model).config == ChronoConfig.preset(name)
    assert chronomoe_hf.wrap(model, name) is model and ChronoCallback(name).config == ChronoConfig.preset(name)


def test_a_router_is_not_a_model() -> None:
    model = tiny.tiny_model("mixtral")
    with pytest.raises(WrapError, match="MixtralTopKRouter is a router; wrap the model that holds it"):
        chronomoe_hf.wrap(model.model.layers[0].mlp.gate)
    chronomoe_hf.wrap(model)
    with pytest.raises(WrapError, match="is a router; wrap the model"):
        chronomoe_hf.wrap(model.model.layers[0].mlp.gate)
    chronomoe_hf.unwrap(model)
    block = chronomoe_hf.wrap(model.model.layers[0].mlp, ChronoConfig.observe())
    block.train()(torch.randn(2, 3, 32))
    system = chronomoe_hf.system_of(block)
    system.step(1)
    assert [layer.tokens for layer in system.snapshot().layers] == [6], "its block is enough"


def test_a_container_of_two_wrapped_models_has_no_one_system() -> None:
    pair = nn.ModuleDict({"student": tiny.tiny_model("mixtral"), "teacher": tiny.tiny_model("mixtral", seed=1)})
    for model in pair.values():
        chronomoe_hf.wrap(model)
    for function in (chronomoe_hf.system_of, chronomoe_hf.wrap, chronomoe_hf.unwrap):
        with pytest.raises(WrapError, match=r"2 wrapped models: student \(MixtralForCausalLM\), teacher.*one of them"):
            function(pair)
    assert chronomoe_hf.system_of(pair["student"]) is not chronomoe_hf.system_of(pair["teacher"])
    chronomoe_hf.unwrap(pair["student"])
    assert chronomoe_hf.system_of(pair) is chronomoe_hf.system_of(pair["teacher"])


def test_a_model_that_is_not_wrapped() -> None:
    with pytest.raises(NotWrappedError, match=r"MixtralForCausalLM is not wrapped; call chronomoe_hf\.wrap"):
        chronomoe_hf.unwrap(tiny.tiny_model("mixtral"))
    assert issubclass(NotWrappedError, ChronoError)
