"""What an engine makes of a model in a process of a torchrun job."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def on_ranks(model: Any, engine: str) -> nn.Module:
    """What to run: the model itself with every decoder block sharded (``"fsdp2"``), or it in DDP (``"ddp"``)."""
    if engine != "fsdp2":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model  # type: ignore[no-any-return]
