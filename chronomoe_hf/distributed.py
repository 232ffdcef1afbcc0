"""The only module that talks to other ranks. Who calls it is in docs/architecture.md.

Every function with a collective says so; all ranks must call it, at the same places.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from chronomoe_hf.errors import ChronoError


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def all_reduce_sum_(flat: Tensor) -> Tensor:
    """Sum over ranks, in place. Collective."""
    if active():
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat


def all_reduce_max_(flat: Tensor) -> Tensor:
    """Largest value over ranks, in place. Collective."""
    if active():
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat


def batch_copies(model: nn.Module) -> int:
    """How many ranks see the same batch: the size of a tensor-parallel group that Transformers set up, else 1.

    A sum over all ranks counts every token that many times.
    """
    size = model.tp_size if isinstance(model, PreTrainedModel) else None
    return size if active() and size is not None else 1


def broadcast_(flat: Tensor) -> Tensor:
    """Rank 0's values on every rank, in place. Collective."""
    if active():
        dist.broadcast(flat, src=0)
    return flat


def require_agreement(checksum: Tensor, what: str) -> None:
    """Raise ChronoError on every rank if `checksum` (float64, any shape) is not identical on all. Collective.

    Raises:
        ChronoError: the ranks' states have drifted apart.
    """
    if not active():
        return
    # MAX of (x, -x) is max and -min in one collective.
    pair = torch.stack([checksum, -checksum])
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    if not torch.equal(pair[0], -pair[1]):
        raise ChronoError(
            f"{what} differs between ranks (checksum spread {float((pair[0] + pair[1]).abs().max()):.3g}); "
            "every rank must call system.step() at the same steps and load the same state"
        )


def broadcast_object(value: object) -> object:
    """Rank 0's JSON-like object on every rank. Collective; only at train begin, at a cut and in a dry run."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list[object]:
    """Every rank's JSON-like object, in order of ranks. Collective; only where a window closes."""
    if not active():
        return [value]
    found: list[object] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def is_sharded(weight: Tensor) -> bool:
    """Whether this process holds only a part of `weight`: DTensor (FSDP2, tensor parallel), ZeRO-3."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id") or hasattr(weight, "ds_shape")


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of `weight`: a DTensor's own part, else the tensor itself. No collective."""
    return weight._local_tensor if isinstance(weight, DTensor) else weight


def is_sharded_module(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) has made a unit of the module: its class is then mixed into the module's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and without it there is no such unit
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def whole_shape(weight: Tensor) -> torch.Size:
    """Shape of the whole weight, also where ZeRO-3 keeps only its shape (``ds_shape``) beside an empty tensor."""
    return torch.Size(weight.ds_shape) if hasattr(weight, "ds_shape") else weight.shape


def full_weight(weight: Tensor) -> Tensor:
    """The whole of a router weight, fp32, detached. Collective when the weight is sharded (DTensor, ZeRO-3)."""
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach().float()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().float().clone()
    return weight.detach().float()
