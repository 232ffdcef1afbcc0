"""What a weight is: packed or plain, and what a quantised router may be asked for.

The packed weights here are made with torch alone; real bitsandbytes and torchao models are in tests/tools.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import moe_zoo
from support.family_checks import assert_identical, build, output_and_grads
from torch import nn

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of
from chronomoe_hf.errors import LifecycleError, WrapError
from chronomoe_hf.lifecycle.live.weights import require_writable
from chronomoe_hf.wrapping.discovery import find_layers
from chronomoe_hf.wrapping.weights import packed_as

FAMILIES = ("hunyuan_v1_moe", "afmoe", "jetmoe", "dbrx", "nllb_moe")  # their routers hold an nn.Linear


class Packed(nn.Linear):
    """An 8-bit linear as quantisation libraries make them: codes in int8 and a scale, computed in floating point."""

    def __init__(self, plain: nn.Linear, flat: bool) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        scale = plain.weight.detach().abs().amax() / 127
        codes = (plain.weight.detach() / scale).round().to(torch.int8)
        self.shape, self.scale = codes.shape, scale
        # 4-bit weights keep nothing of their shape: (n, 1) bytes.
        stored = codes.view(torch.uint8).reshape(-1, 1) if flat else codes
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(torch.int8).view(self.shape).to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(family: str, flat: bool) -> Any:
    """The tiny model of a family with every nn.Linear of its routers packed."""
    model = build(family)
    assert pack_routers(model, flat), f"bad test setup: the routers of {family} hold no nn.Linear"
    return model


def pack_routers(model: Any, flat: bool) -> int:
    """Put a packed linear in the place of every nn.Linear of the routers; how many."""
    count = 0
    for _, router, _ in moe_zoo.routers_of(model):
        for holder in list(router.modules()):
            for name, child in list(holder._modules.items()):
                if isinstance(child, nn.Linear):
                    holder._modules[name] = Packed(child, flat)
                    count += 1
    return count


@pytest.mark.parametrize("flat", [False, True], ids=["8-bit", "4-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_router_is_observed_and_never_broken(family: str, flat: bool) -> None:
    model = quantised(family, flat)
    want = output_and_grads(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    assert_identical(output_and_grads(model), want)
    snapshot = system_of(model).step(1)
    assert snapshot is not None and all(layer.tokens > 0 for layer in snapshot.layers)
    assert not any(alert.kind == "RECORDING_FAILED" for alert in snapshot.alerts)


@pytest.mark.parametrize("flat", [False, True], ids=["8-bit", "4-bit"])
def test_a_quantised_router_gets_no_lens_and_says_so_once(flat: bool) -> None:
    model = quantised("afmoe", flat)
    with pytest.warns(
        UserWarning, match=r"get no lens.*the router's weight is quantised \(torch.u?int8\).*load it with"
    ):
        chronomoe_hf.wrap(model, ChronoConfig.protect(interval=1))
    system = system_of(model)
    assert system.lenses == {}
    for step in (1, 2, 3):  # windows close, the controller decides, beta moves: nothing computes with the codes
        output_and_grads(model)
        snapshot = system.step(step)
        assert snapshot is not None
        assert all("no lens: the router's weight is quantised" in " ".join(layer.notes) for layer in snapshot.layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning) as said:
        chronomoe_hf.unwrap(model, fold=True)
    sentences = [str(each.message) for each in said if "nothing folds" in str(each.message)]
    assert len(sentences) == 1
    assert re.match(
        r"nothing folds into the routers of 2 of 2 layers, and no lens was open there: the router's weight is "
        r"quantised \(torch\.u?int8\); load it with the routers left out of quantisation",
        sentences[0],
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("flat", [False, True], ids=["8-bit", "4-bit"])
@pytest.mark.parametrize("family", ["afmoe", "hunyuan_v1_moe", "jetmoe"])
def test_a_lens_over_a_router_that_is_quantised_later_is_not_lost(family: str, flat: bool) -> None:
    model = build(family)
    chronomoe_hf.wrap(model, ChronoConfig.protect(interval=1))
    system = system_of(model)
    output_and_grads(model)
    system.step(1)
    torch.manual_seed(0)
    for layer in system.layers:
        weight, lens = layer.adapter.weight(layer.router), layer.handle.lens
        share = torch.rand(weight.shape[0]) + 0.05
        assert lens is not None and lens.aim(torch.randn(weight.shape[1]), weight, share / share.sum(), 2.0) is None
        lens.set_scale(0.5)
    pack_routers(model, flat)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        WrapError, match=r"lens is open and cannot fold: the router's weight is quantised.*load it with"
    ):
        chronomoe_hf.unwrap(model, fold=True)
    assert system_of(model) is system and all(layer.handle.lens_open for layer in system.layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(
        WrapError, match=r"weight is torch\.u?int8 now: it was quantised after wrap.*fold the lens first"
    ):
        output_and_grads(model)


def test_state_of_a_quantised_model_saves_and_loads(tmp_path: Path) -> None:
    model = chronomoe_hf.wrap(quantised("afmoe", True), ChronoConfig.balance(interval=1, beta__native=False))
    for step in (1, 2):
        output_and_grads(model)
        system_of(model).step(step)
    system_of(model).save(tmp_path)
    again = chronomoe_hf.wrap(quantised("afmoe", True), ChronoConfig.balance(interval=1, beta__native=False))
    system_of(again).load(tmp_path)
    assert torch.equal(system_of(again).step_state.beta_LE, system_of(model).step_state.beta_LE)
    assert system_of(model).step_state.beta_LE.abs().max() > 0


def test_what_writes_weights_refuses_codes() -> None:
    layer = find_layers(quantised("afmoe", False))[0][0]
    with pytest.raises(LifecycleError, match="stored as torch.int8"):
        require_writable(layer, [layer.adapter.weight(layer.router)], "split")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Parameter(torch.zeros(2, 2)), None),
        (lambda: torch.zeros(2, 2, dtype=torch.bfloat16), None),
        (lambda: torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda: nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False), "torch.uint8"),
    ],
)
def test_packed_weights_are_told_apart(make: Callable[[], Any], said: str | None) -> None:
    assert packed_as(make()) == said
