"""The native correction bias that balance moves must stay in fp32: a later ``model.to(bfloat16)`` takes it along."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from chronomoe_hf import distributed
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.native_bias import cast_bias

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
