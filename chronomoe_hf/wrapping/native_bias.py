"""The dtype of a model's own correction bias: fp32 while the balance law moves it, its own again after unwrap.

Some families load their bias in bf16, where steps of a thousandth are rounded away.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.patches import Adapter
from chronomoe_hf.wrapping.layer import Layer


def bias_dtype(adapter: Adapter, router: nn.Module, parent: nn.Module) -> torch.dtype | None:
    """dtype of the router's native bias, or None where it has none."""
    bias_E = adapter.native_bias(router, parent)
    return None if bias_E is None else bias_E.dtype


def cast_bias(adapter: Adapter, router: nn.Module, parent: nn.Module, dtype: torch.dtype) -> None:
    """Give the native bias, and nothing else, another dtype, in place; weights may be on the meta device or empty."""
    place = adapter.native_bias_place(router, parent)
    if place is None:
        return
    holder, name = place
    value: Tensor = getattr(holder, name)
    if value.dtype == dtype:
        return
    if name in holder._buffers:
        holder._buffers[name] = value.to(dtype)
    else:
        value.data = value.data.to(dtype)


# The native correction bias that balance moves must stay in fp32: a later ``model.to(bfloat16)`` takes it along.

logger = logging.getLogger("chronomoe_hf")


def restore_fp32_bias(layers: Sequence[Layer]) -> list[str]:
    """Bring every native bias that is moved here, and was cast since the model was wrapped, back to fp32. No host read.

    The steps of the balance law are a thousandth of a score; in bf16, at a bias near 3, they round to nothing and
    experts never move. The digits that the cast took are lost; from here on none are.

    Args:
        layers: The wrapped layers.

    Returns:
        Names of the layers that were brought back; a warning names them too.
    """
    cast = {}
    for layer in layers:
        if not layer.native_bias or _is_sharded(layer):
            continue
        bias_E = layer.adapter.native_bias(layer.router, layer.parent)
        if bias_E is not None and bias_E.dtype != torch.float32:
            cast[layer.name] = bias_E.dtype
            cast_bias(layer.adapter, layer.router, layer.parent, torch.float32)
    if cast:
        logger.warning(
            "the correction bias of %s was cast to %s after the model was wrapped, where the balance law cannot move "
            "it: it is fp32 again. Cast the model before wrap, or train with bf16=True (autocast)",
            ", ".join(cast),
            ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in cast.values()})),
        )
    return list(cast)


def _is_sharded(layer: Layer) -> bool:
    """A bias that is a parameter is sharded with its router: it cannot be read here; the balance step refuses it."""
    return layer.bias_is_parameter and distributed.is_sharded(layer.adapter.weight(layer.router))
