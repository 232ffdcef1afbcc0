"""Tiny models of every family, and the calls that their routers receive."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from chronomoe_hf import patches
from chronomoe_hf.patches.registry import Adapter

DATA = Path(__file__).resolve().parent.parent / "data" / "moe_families.json"
FAMILIES: dict[str, dict[str, Any]] = {entry["family"]: entry for entry in json.loads(DATA.read_text())}
ROUTED = [name for name, entry in FAMILIES.items() if entry["router_class"]]
BATCH, LENGTH = 2, 12


@dataclass
class Call:
    """One call that a router received inside its model."""

    adapter: Adapter
    router: nn.Module
    parent: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Call the native router on copies (some routers write into their input); return output and the copies."""
        args, kwargs = copied(self.args), copied(self.kwargs)
        return self.router(*args, **kwargs), args, kwargs


def copied(value: Any) -> Any:
    """Copy every tensor of nested tuples and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return tuple(copied(item) for item in value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


def build(family: str, **overrides: Any) -> nn.Module:
    """Build the tiny model of a family in fp32; `overrides` replace fields of its configuration."""
    entry = FAMILIES[family]
    torch.manual_seed(0)
    fields = {**copy.deepcopy(entry["tiny_config_kwargs"]), **overrides}
    config = getattr(transformers, entry["config_class"])(**fields)
    model: nn.Module = getattr(transformers, entry["causal_lm_class"])(config)
    return model


def routers_of(model: nn.Module) -> list[tuple[Adapter, nn.Module, nn.Module]]:
    """Return ``(adapter, router, parent)`` of every router of a model."""
    found = []
    for name, module in model.named_modules():
        adapter = patches.match(module)
        if adapter is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            adapter.bind(module, parent)
            found.append((adapter, module, parent))
    return found


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give routers logits of order one and native biases that matter; fresh ones are nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter, router, parent in routers_of(model):
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        bias = adapter.native_bias(router, parent)
        if bias is not None:
            bias.copy_(torch.rand(bias.shape, generator=generator) * 0.4 - 0.2)


def calls_of(model: nn.Module) -> list[Call]:
    """Run the model once without gradients and return what its routers were called with."""
    calls: list[Call] = []
    handles = []
    for adapter, router, parent in routers_of(model):

        def hook(module: nn.Module, args: Any, kwargs: Any, adapter: Adapter = adapter, parent: Any = parent) -> None:
            calls.append(Call(adapter, module, parent, copied(args), copied(kwargs)))

        handles.append(router.register_forward_pre_hook(hook, with_kwargs=True))
    generator = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(3, 60, (BATCH, LENGTH), generator=generator)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    with torch.no_grad():
        model.eval()(**inputs)
    for handle in handles:
        handle.remove()
    return calls
