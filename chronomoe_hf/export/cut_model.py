"""The smaller model's config, its shapes, and what a plan needs to hold of the model that it cuts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from chronomoe_hf.errors import ExportError, PlanMismatchError
from chronomoe_hf.export.slicing import Shapes
from chronomoe_hf.lifecycle.live.model import layer_specs, match_layers
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.wrapping.discovery import FoundLayer, find_layers

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names under which configs keep the number of experts."""

REFUSED = {
    "dbrx": "its experts are one flat matrix, and its block chooses them itself",
    "deepseek_v4": "its hash layers choose experts by a table of token ids, which names dropped experts",
    "doge": "it routes by product keys",
    "inkling": "its router has a row for each shared expert too",
    "longcat_flash": "its router has rows for experts that compute nothing",
    "nllb_moe": "Transformers runs only its experts 0 and 1",
    "zaya": "its router has a row that stands for no expert",
}
"""Families that a stock checkpoint of fewer experts cannot hold, or not with this rule, and why."""


def check_plan(model: nn.Module, plan: PrunePlan) -> list[FoundLayer]:
    """The layers that `plan` cuts.

    Raises:
        PlanMismatchError: the plan is of another model.
        ExportError: the family cannot be cut, or a layer of the model is outside the plan.
    """
    for spec in plan.specs:
        if spec.family in REFUSED:
            raise ExportError(f"{spec.family} cannot be exported with fewer experts: {REFUSED[spec.family]}")
    layers = match_layers(model, plan.specs)
    _, refused = find_layers(model)
    if refused:
        raise ExportError(f"a layer with experts is outside the plan, so the model cannot be cut: {refused[0]}")
    return layers


def cut_config(config: PreTrainedConfig, layers: list[FoundLayer], plan: PrunePlan) -> PreTrainedConfig:
    """A copy of `config` that says how many experts stay.

    Raises:
        ExportError: no field of the config holds the number of experts.
    """
    before, after = plan.specs[0].num_experts, plan.num_kept
    if len({spec.num_experts for spec in plan.specs}) > 1:
        raise ExportError("the layers have different numbers of experts; one config field cannot hold them")
    out = copy.deepcopy(config)
    owners = [layer.owner.config for layer in layers if isinstance(layer.owner, PreTrainedModel)]
    for (_, old), (_, new) in zip(config_tree(config), config_tree(out), strict=True):
        if any(old is owner or type(old) is type(owner) for owner in owners):
            for name in COUNTS:
                value = vars(new).get(name)
                if value == before and not isinstance(value, bool):
                    setattr(new, name, after)
                elif isinstance(value, list) and value and set(value) == {before}:
                    setattr(new, name, [after] * len(value))
    return out


def config_tree(
    config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """A config and the configs in it, with their paths."""
    yield path, config
    for name in sorted(vars(config)):
        value = vars(config)[name]
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            yield from config_tree(value, (*path, name))


def small_on_meta(model: PreTrainedModel, config: PreTrainedConfig, plan: PrunePlan) -> PreTrainedModel:
    """The smaller model without storage, checked against the plan.

    Raises:
        ExportError: it does not have the planned number of experts in every layer, or routes by another rule.
    """
    with torch.device("meta"):
        small: PreTrainedModel = type(model)(config)
    for before, after in zip(plan.layers, layer_specs(small), strict=True):
        want = (before.spec.name, len(before.kept), before.spec.top_k, before.spec.num_groups, before.spec.groups_kept)
        got = (after.name, after.num_experts, after.top_k, after.num_groups, after.groups_kept)
        if want != got:
            raise ExportError(
                f"with {len(before.kept)} experts in its config, {type(model).__name__} would have (name, experts, k, "
                f"groups, groups kept) {got}, the plan says {want}; the family {before.spec.family} cannot be cut"
            )
    return small


def shapes_of(tensors: Mapping[str, Any]) -> Shapes:
    """Shapes by name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def owners_of(model: nn.Module, layers: list[FoundLayer], names: Mapping[str, Any]) -> dict[str, int]:
    """layer_id of every name that lies in a planned layer's block.

    Raises:
        PlanMismatchError: a block is not part of `model`.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    prefixes = []
    for at, layer in enumerate(layers):
        if id(layer.parent) not in paths:
            raise PlanMismatchError(f"{layer.name} is not part of {type(model).__name__}")
        path = paths[id(layer.parent)]
        prefixes.append((f"{path}." if path else "", at))
    out = {}
    for name in names:
        inside = [(len(prefix), at) for prefix, at in prefixes if name.startswith(prefix)]
        if inside:
            out[name] = max(inside)[1]
    return out
