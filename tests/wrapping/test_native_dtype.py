"""A model's own correction bias: in fp32 while balance moves it, nothing else is cast, its own dtype after unwrap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from support import moe_zoo

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import AlreadyWrappedError

WITH_BIAS = sorted(name for name, entry in moe_zoo.FAMILIES.items() if entry["native_bias"])
BALANCE = ChronoConfig.balance


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in tensors(model).items()}


def biases(model: Any) -> set[str]:
    """Names of the native biases, found by what they hold: `moe_zoo` knows where each family keeps its own."""
    found = set()
    for adapter, router, parent in moe_zoo.routers_of(model):
        bias = adapter.native_bias(router, parent)
        adapter.unbind(router)
        if bias is not None:
            found |= {name for name, value in tensors(model).items() if value is bias or value is bias._base}
    return found


def low_precision(family: str, device: str) -> Any:
    with torch.device(device):
        model = moe_zoo.build(family)
    if device == "cpu":
        moe_zoo.randomise(model)
    for value in tensors(model).values():
        if value.is_floating_point():
            value.data = value.data.to(torch.bfloat16)
    return model.train()


@pytest.mark.parametrize("family", WITH_BIAS)
def test_on_the_meta_device_nothing_but_the_bias_changes_its_dtype(family: str) -> None:
    """Every tensor there has the address 0; so have the empty weights of ZeRO-3."""
    model = low_precision(family, "meta")
    before, own = dtypes(model), biases(model)
    assert own, "bad test setup: no bias found"
    chronomoe_hf.wrap(model, BALANCE())
    after = dtypes(model)
    assert {name for name in before if after[name] != before[name]} == own
    assert {after[name] for name in own} == {torch.float32}
    chronomoe_hf.unwrap(model)
    assert dtypes(model) == before


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "laguna"])
def test_unwrap_gives_the_bias_its_dtype_back(family: str) -> None:
    model = low_precision(family, "cpu")
    before = {name: value.detach().clone() for name, value in tensors(model).items()}
    parameters = {name: value for name, value in model.named_parameters()}
    chronomoe_hf.wrap(model, BALANCE())
    assert {dtypes(model)[name] for name in biases(model)} == {torch.float32}
    chronomoe_hf.unwrap(model)
    after = tensors(model)
    assert all(after[n].dtype == v.dtype and torch.equal(after[n], v) for n, v in before.items()), "bit for bit"
    assert all(value is parameters[name] for name, value in model.named_parameters())

    chronomoe_hf.wrap(model, BALANCE())
    moved = {name: tensors(model)[name] for name in biases(model)}
    for value in moved.values():
        value.data.add_(torch.linspace(0.0, 0.003, value.numel()).view(value.shape))
    want = {name: value.detach().to(torch.bfloat16) for name, value in moved.items()}
    assert any(not torch.equal(v.float(), moved[n]) for n, v in want.items()), "bad test setup: nothing is rounded"
    chronomoe_hf.unwrap(model)
    after = tensors(model)
    assert all(torch.equal(after[n], v) and after[n].dtype == torch.bfloat16 for n, v in want.items()), "rounded"


def test_a_bias_that_the_user_cast_meanwhile_is_left_alone() -> None:
    model = low_precision("deepseek_v3", "cpu")
    chronomoe_hf.wrap(model, BALANCE())
    model.to(torch.float16)
    chronomoe_hf.unwrap(model)
    assert set(dtypes(model).values()) == {torch.float16}


def test_a_model_that_is_refused_is_left_as_it_was() -> None:
    model = low_precision("deepseek_v3", "cpu")
    chronomoe_hf.wrap(model, ChronoConfig.observe())
    before = copy.deepcopy(dtypes(model))
    with pytest.raises(AlreadyWrappedError):
        chronomoe_hf.wrap(model, BALANCE())
    with pytest.raises(AlreadyWrappedError):
        chronomoe_hf.wrap(model.model, BALANCE())
    assert dtypes(model) == before


def test_the_families_are_those_of_the_installed_release() -> None:
    assert len(WITH_BIAS) >= 30, transformers.__version__
