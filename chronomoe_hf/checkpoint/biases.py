"""Correction biases that a bf16 reload rounds: read again in fp32 from the files, and told when they are saved.

A checkpoint holds the bias that the balance law moved in fp32. Some families of Transformers load it in the dtype of
the model, and a rounded bias routes some tokens to other experts. Engines with readers of their own keep fp32.
Shape suffixes: E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronomoe_hf.checkpoint.converted import ConvertedWeights
from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import StateError
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")


def rounding_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Layers whose native bias moves in fp32 here, although the family loads it in a narrower dtype."""
    return [layer for layer in layers if layer.native_bias and layer.native_dtype not in (None, torch.float32)]


def rounded_biases(layers: Sequence[Layer]) -> list[str]:
    """Names of the layers whose bias, as it is now, a reload in the model's dtype would change. Reads the device."""
    return [layer.name for layer in rounding_layers(layers) if _is_rounded(layer)]


def _is_rounded(layer: Layer) -> bool:
    bias_E = layer.adapter.native_bias(layer.router, layer.parent)
    if bias_E is None or bias_E.is_meta or is_sharded(bias_E):
        return False
    return not torch.equal(bias_E.to(layer.native_dtype).to(bias_E.dtype), bias_E)


def warn_of_rounded_biases(layers: Sequence[Layer]) -> bool:
    """Say what a plain reload of what is saved does to correction biases; returns whether there was anything to say."""
    names = rounded_biases(layers)
    if not names:
        return False
    dtype = str(rounding_layers(layers)[0].native_dtype).removeprefix("torch.")
    logger.warning(
        "the correction bias of %d layers (first: %s) is saved in fp32, but Transformers loads it in %s for this "
        "family, which routes some tokens otherwise: load with wrap(model, state=directory), which reads it again in "
        "fp32, or with dtype=torch.float32. vLLM and llama.cpp read the fp32 values",
        len(names),
        names[0],
        dtype,
    )
    return True


def restore_biases(root: nn.Module, layers: Sequence[Layer], sources: Iterable[str | Path | None]) -> list[str]:
    """Give biases that were rounded when the model was loaded the fp32 values of its files, in place.

    A bias is touched only if it is the file's value rounded to the dtype that it was loaded in: one that was trained
    since, or that comes from elsewhere, stays.

    Args:
        root: the wrapped model; its biases are fp32 already.
        layers: its layers.
        sources: directories to look for weights in, the first that has any counts; None and Hub names are passed over.

    Returns:
        Names of the layers whose bias has other values now.
    """
    wanted = {id(bias): layer for layer in rounding_layers(layers) if (bias := _bias(layer)) is not None}
    if not wanted or not isinstance(root, PreTrainedModel):
        return []
    live = root.state_dict(keep_vars=True)
    names = {name: wanted[id(value)] for name, value in live.items() if id(value) in wanted}
    for source in sources:
        if source is None or not Path(source).is_dir():
            continue
        try:
            with ConvertedWeights(root, Path(source), live, only=names) as weights:
                return [names[name].name for name, value in weights if _restore(names[name], live[name], value)]
        except (StateError, SafetensorError, OSError):
            continue  # no weights, or not of this model: the next source
    return []


def _bias(layer: Layer) -> Tensor | None:
    bias_E = layer.adapter.native_bias(layer.router, layer.parent)
    return None if bias_E is None or bias_E.is_meta or is_sharded(bias_E) else bias_E


@torch.no_grad()
def _restore(layer: Layer, bias_E: Tensor, file_E: Tensor) -> bool:
    file_E = file_E.to(bias_E.device)
    if file_E.shape != bias_E.shape or torch.equal(file_E, bias_E):
        return False
    if not torch.equal(file_E.to(layer.native_dtype).to(bias_E.dtype), bias_E):
        return False
    bias_E.copy_(file_E)
    return True
