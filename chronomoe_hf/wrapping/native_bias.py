"""The dtype of a model's own correction bias: fp32 while the balance law moves it, its own again after unwrap.

Some families load their bias in bf16, where steps of a thousandth are rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chronomoe_hf.patches import Adapter


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
