"""Fingerprint of the routers of a checkpoint that is not loaded, read from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from chronomoe_hf.checkpoint.converted import ConvertedWeights
from chronomoe_hf.checkpoint.fingerprint import entries_of, line_of
from chronomoe_hf.errors import StateError
from chronomoe_hf.wrapping.discovery import FoundLayer


def file_fingerprint(
    model: PreTrainedModel, layers: Sequence[FoundLayer], directory: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Lines of the router weights in `directory`, in fp32 and rounded to bf16, by the names of ``live_fingerprint``.

    Args:
        model: of the checkpoint, without storage.
        layers: its layers.
        directory: the checkpoint.

    Returns:
        As ``live_fingerprint`` and ``rounded_fingerprint``, of routers only; both empty where the files cannot be
        followed (quantized routers).
    """
    experts = {id(value) for layer in layers for value in _expert_parameters(layer)}
    wanted = {id(value): name for name, (value, _) in entries_of(cast(Any, layers)).items() if id(value) not in experts}
    live = model.state_dict(keep_vars=True)
    names = {name: wanted[id(value)] for name, value in live.items() if id(value) in wanted}
    fp32 = {name: torch.empty_like(value, dtype=torch.float32) for name, value in live.items() if name in names}
    lines: dict[str, str] = {}
    rounded: dict[str, str] = {}
    try:
        with ConvertedWeights(model, directory, {**live, **fp32}, only=names) as weights:
            for name, value in weights:
                lines[names[name]] = line_of(value, True)
                rounded[names[name]] = line_of(value, True, torch.bfloat16)
    except (StateError, SafetensorError, OSError):
        return {}, {}
    return lines, rounded


def _expert_parameters(layer: FoundLayer) -> list[torch.nn.Parameter]:
    name = layer.adapter.experts
    if name is None or name not in layer.parent._modules:
        return []
    return list(layer.parent.get_submodule(name).parameters())
