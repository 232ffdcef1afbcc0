"""Copies of a wrapped model, and a package that was imported anew: taken out whole, and put in again."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support import models as tiny

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import NotWrappedError

FAMILIES = ("mixtral", "qwen3_moe")


def traces(model: Any) -> list[str]:
    """Everything of ours that is left on a model: attributes, hooks, classes."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{key}" for key in module.__dict__ if "chrono" in key or key == "save_pretrained"]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [f"{name}: {hook}" for hook in hooks if hook.__module__.startswith("chronomoe_hf")]
        found += [f"{name}: {type(module)}"] if type(module).__module__.startswith("chronomoe_hf") else []
        found += [f"{name}: {base}" for base in type(module).__mro__ if base.__module__.startswith("chronomoe_hf")]
    return found


def made(family: str, bare: bool) -> Any:
    model = tiny.tiny_model(family).train()
    return model.model if bare else model


def logits(model: Any, family: str, bare: bool) -> torch.Tensor:
    batch = tiny.tiny_batch(family)
    if bare:
        batch.pop("labels")
    value: torch.Tensor = model(**batch)[0 if bare else "logits"]
    return value.detach()


@pytest.mark.parametrize("bare", [False, True], ids=["causal", "backbone"])
@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_copy_shares_its_parts_and_either_takes_all_out(family: str, first: str, bare: bool) -> None:
    original = made(family, bare)
    want = logits(original, family, bare)
    chronomoe_hf.wrap(original, ChronoConfig.observe(interval=1))
    shared = copy.copy(original)
    assert system_of(shared) is system_of(original)
    one, other = (shared, original) if first == "copy" else (original, shared)
    chronomoe_hf.unwrap(one)
    assert traces(one) == []
    with pytest.raises(NotWrappedError):
        system_of(other)
    assert torch.equal(logits(other, family, bare), want)
    if first == "original":
        chronomoe_hf.unwrap(other)  # what it holds of its own goes
    assert traces(other) == []

    chronomoe_hf.wrap(other, ChronoConfig.balance(interval=1))
    assert torch.equal(logits(other, family, bare), want)
    snapshot = system_of(other).step(1)
    assert snapshot is not None and [layer.tokens for layer in snapshot.layers] == [64, 64]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_copy_of_an_unwrapped_model_is_wrapped_anew(family: str) -> None:
    original = made(family, False)
    chronomoe_hf.wrap(original, ChronoConfig.observe(interval=1))
    shared = copy.copy(original)
    chronomoe_hf.unwrap(original)
    chronomoe_hf.wrap(shared, ChronoConfig.observe(interval=1))
    logits(shared, family, False)
    snapshot = system_of(shared).step(1)
    assert snapshot is not None and snapshot.loss_tokens and [layer.tokens for layer in snapshot.layers] == [64, 64]
    assert shared.save_pretrained.__self__ is shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_a_model_of_its_own(family: str) -> None:
    original = made(family, False)
    chronomoe_hf.wrap(original, ChronoConfig.observe(interval=1))
    own = copy.deepcopy(original)
    chronomoe_hf.unwrap(own)
    assert traces(own) == []
    logits(own, family, False)
    logits(original, family, False)
    snapshot = system_of(original).step(1)
    assert snapshot is not None and [layer.tokens for layer in snapshot.layers] == [64, 64]


# ---- imported anew ---------------------------------------------------------------------------------------------------


def again_from_scratch() -> ModuleType:
    for name in [name for name in sys.modules if name.partition(".")[0] == "chronomoe_hf"]:
        del sys.modules[name]
    return importlib.import_module("chronomoe_hf")


@pytest.fixture
def anew() -> Iterator[Callable[[], ModuleType]]:
    """Import the package anew, as notebooks do; the modules of before come back after the test."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "chronomoe_hf"}
    yield again_from_scratch
    for name in [name for name in sys.modules if name.partition(".")[0] == "chronomoe_hf"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize("bare", [False, True], ids=["causal", "backbone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_earlier_import_has_wrapped_is_taken_out_whole(
    family: str, bare: bool, anew: Callable[[], ModuleType]
) -> None:
    model = made(family, bare)
    want = logits(model, family, bare)
    chronomoe_hf.wrap(model, ChronoConfig.balance(interval=1))
    before = type(system_of(model))
    new = anew()
    assert new.ChronoSystem is not before, "bad test setup: nothing was imported anew"
    with pytest.raises(new.errors.AlreadyWrappedError, match="before chronomoe_hf was imported anew"):
        new.wrap(model, new.ChronoConfig.observe(interval=1))
    assert torch.equal(logits(model, family, bare), want), "a refusal changed something"
    new.unwrap(model)
    assert traces(model) == []
    assert torch.equal(logits(model, family, bare), want)
    new.wrap(model, new.ChronoConfig.observe(interval=1))
    logits(model, family, bare)
    assert [layer.tokens for layer in new.system_of(model).step(1).layers] == [64, 64]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reload_changes_nothing(family: str, anew: Callable[[], ModuleType]) -> None:
    model = made(family, False)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    new = importlib.reload(sys.modules["chronomoe_hf"])
    logits(model, family, False)
    assert [layer.tokens for layer in new.system_of(model).step(1).layers] == [64, 64]
    new.unwrap(model)
    assert traces(model) == []
