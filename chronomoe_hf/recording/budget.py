"""How much memory recording may take while a forward runs, and how many layers share a chunk in it.

On a CPU small chunks are faster: buffers above 32 MB are mapped anew in every forward. On a device every chunk costs
launches, whatever its size, so chunks are as large as the bound of the documentation allows.
"""

from __future__ import annotations

import functools
import math

import torch

MB = 2**20
CPU = 16 * MB
FIXED, A_LAYER = 64 * MB, 3 * MB
"""Most bytes that recording holds on a device while a forward runs: fixed, and for each layer of the model."""
SHARE = 200  # of a device's memory, one part of so many; never less than FIXED
# Launches of a chunk, roughly: what the sizes are weighed by.
_OUTPUTS, _ROUTING = 24, 16


def limit_of(device: torch.device, num_layers: int, *, whole: bool = False) -> int:
    """Bytes that layers may take together.

    Args:
        device: of the routers.
        num_layers: of the model.
        whole: for one call that is too large by itself: a CPU cuts it up less finely.
    """
    if device.type == "cpu":
        return FIXED if whole else CPU
    bound = FIXED + A_LAYER * num_layers
    total = _memory(device)
    return bound if total is None else min(bound, max(FIXED, total // SHARE))


@functools.cache
def _memory(device: torch.device) -> int | None:
    """Bytes of a device; None where torch does not tell."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def sizes(limit: int, num_layers: int, outputs: tuple[int, int], routing: tuple[int, int]) -> int:
    """Layers whose expert rows share a chunk, so that rows and router calls together take the fewest launches.

    Args:
        limit: bytes for both.
        num_layers: of the model.
        outputs: bytes of one layer's rows, and of summing them beside that.
        routing: bytes of summing one router call, and those that it holds while it waits.
    """
    rows, working = outputs
    call, held = routing
    best, least = 1, math.inf
    for num in range(1, num_layers + 1):
        left = limit - num * rows
        calls = left // (call + held) if call + held else num_layers
        if held:
            calls = min(calls, (left - num * working) // held)
        if left < num * working or calls < 1:
            break
        launches = _OUTPUTS / num + _ROUTING / min(calls, num_layers)
        if launches < least:
            best, least = num, launches
    return best
