"""Shares that the balance law leaves alone: a zone around the fair share, and an easier one in the first layer.

All bounds are in units of the fair share 1/E. Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

FirstLayer = Literal["same", "floor", "off", "auto"]
NO_EDGE = 1e9  # no share is this many times its fair one


def zone_bounds(
    num_experts: Sequence[int],
    top_k: Sequence[int] | None,
    dead_zone: tuple[float, float | None] | None,
    first_layer: FirstLayer,
    first_floor: float,
) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of every layer's zone.

    With k experts a token no share exceeds 1/k, which is E/k times the fair one. An upper edge near that would never
    act, so it is brought down to the middle between the fair share and that ceiling, ``(1 + E/k) / 2``, where the
    setting lies above it (E = 8, k = 4: 1.5 instead of 2).

    Args:
        num_experts: E of each layer.
        top_k: k of each layer; None = not known, the upper edge is taken as it is.
        dead_zone: (low, high); (low, None) = no upper edge; None = the fair share itself, so that every other share is
            pushed.
        first_layer: ``"same"``, ``"floor"`` (in the first of several layers only experts below `first_floor` are
            pushed up, none is pushed down), ``"off"`` (no force there) or ``"auto"`` (``"floor"``, but ``"same"`` at
            k = 1).
        first_floor: lower edge of the first layer with ``"floor"``.

    Returns:
        Two float64 tensors ``(L, 1)`` on the host.
    """
    low, high = dead_zone or (1.0, 1.0)
    lows, highs = [low] * len(num_experts), [NO_EDGE if high is None else high] * len(num_experts)
    if high is not None and top_k is not None:
        highs = [min(high, 0.5 * (1.0 + num / k)) for num, k in zip(num_experts, top_k, strict=True)]
    if first_layer == "auto":
        first_layer = "same" if top_k is not None and top_k[0] == 1 else "floor"
    if first_layer != "same" and len(num_experts) > 1:
        lows[0], highs[0] = (first_floor if first_layer == "floor" else 0.0), NO_EDGE
    low_L1, high_L1 = (torch.tensor(edges, dtype=torch.float64)[:, None] for edges in (lows, highs))
    return low_L1, high_L1


def zone_error(count_LE: Tensor, num_experts_L1: Tensor | int, low_L1: Tensor, high_L1: Tensor) -> Tensor:
    """How far each expert's share is outside its zone, in units of the fair share, within [-1, 1].

    Args:
        count_LE: assignments of the step, shape ``(..., E)``.
        num_experts_L1: E of each layer, broadcastable to ``(..., 1)``.
        low_L1: lower edges, from :func:`zone_bounds`.
        high_L1: upper edges.

    Returns:
        float64, shape of `count_LE`: low - share below the zone, high - share above it, exactly 0 inside and in a layer
        without a count.
    """
    count_LE = count_LE.double()
    relative_LE = count_LE / (count_LE.sum(-1, keepdim=True) / num_experts_L1)
    # 0 / 0, of a layer without a count, stays NaN up to here.
    return torch.clamp(relative_LE, low_L1, high_L1).sub_(relative_LE).clamp_(-1.0, 1.0).nan_to_num_(0.0)
