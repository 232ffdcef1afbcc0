"""Does a saved state belong to this model? Layer tables and weight fingerprints.

Shape suffixes: E experts, A and B the two dimensions of an expert's weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.wrapping.discovery import clean_name
from chronomoe_hf.wrapping.layer import Layer

SLICE_ELEMENTS = 256  # read at each end of an expert's weight
WHOLE_BYTES = 32 * 2**20  # a router of 512 experts x 8192 in fp32 is 16 MiB
UNREADABLE = "sharded"
_EXPERTS = "experts"


def fingerprint(entries: Iterable[tuple[str, Tensor]], sampled: Iterable[tuple[str, Tensor]] = ()) -> dict[str, str]:
    """One line per weight, ``"<dtype> <shape> <sha256>"``: equal lines mean equal values where they were read.

    Args:
        entries: ``(name, parameter)``; pass parameters, a detached copy does not show ZeRO-3's partitioning. Up to
            two dimensions and 32 MiB (router weights, biases) are read whole; stacked expert weights ``[E, A, B]``
            and anything larger are sliced.
        sampled: ``(name, parameter)`` that are always sliced (experts kept as one module each, ``[A, B]``).

    Returns:
        Name -> line. A slice is the first 256 elements (at least one row, capped columns) and the last 256 of every
        expert. The bytes are those of the tensor's own dtype, on any device. A weight that this rank does not hold
        in full (DTensor, gathered on demand, meta) gets the word ``"sharded"``, which compares equal to anything:
        the engines that shard restore their weights themselves, and gathering here would be a collective.
    """
    lines: dict[str, str] = {}
    for whole, group in ((True, entries), (False, sampled)):
        for name, tensor in group:
            lines[name] = _line(tensor, whole)
    return lines


def _line(tensor: Tensor, whole: bool) -> str:
    if tensor.is_meta or is_sharded(tensor) or is_traceable_wrapper_subclass(tensor):
        return UNREADABLE  # a tensor that stands for several others (torchao) has no bytes of its own
    tensor = tensor.detach()
    digest = hashlib.sha256()
    fits = whole and tensor.ndim <= 2 and tensor.numel() * tensor.element_size() <= WHOLE_BYTES
    for part in [tensor] if fits or tensor.ndim < 2 else _ends(tensor):
        # .contiguous before .cpu: only what was selected crosses to the host.
        digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {digest.hexdigest()}"


def _ends(tensor: Tensor) -> list[Tensor]:
    weight_EAB = tensor if tensor.ndim > 2 else tensor.unsqueeze(0)
    weight_EAB = weight_EAB.flatten(1, -2)
    columns = min(weight_EAB.shape[-1], SLICE_ELEMENTS)
    rows = min(weight_EAB.shape[1], max(1, SLICE_ELEMENTS // max(columns, 1)))
    last = weight_EAB.shape[1] - rows, weight_EAB.shape[-1] - columns
    return [weight_EAB[:, :rows, :columns], weight_EAB[:, last[0] :, last[1] :]]


def compare_fingerprints(saved: Mapping[str, str], live: Mapping[str, str]) -> list[str]:
    """Names whose lines differ, or that only one side has, sorted; weights that are sharded on a side are skipped.

    States of schema 1 named the experts' tensors below the router (``mlp.gate.experts.down_proj``); such a name stands
    for the live tensor that it means (``mlp.experts.down_proj``).
    """
    saved = {_own_path(name, live): line for name, line in saved.items()}
    return [
        name
        for name in sorted({*saved, *live})
        if saved.get(name) != live.get(name) and UNREADABLE not in (saved.get(name), live.get(name))
    ]


def _own_path(name: str, live: Mapping[str, str]) -> str:
    """`name` itself, or without the parts before ``experts`` that belong to the router, if that is a live name."""
    parts = name.split(".")
    if name in live or _EXPERTS not in parts:
        return name
    at = len(parts) - 1 - parts[::-1].index(_EXPERTS)
    shorter = (".".join(parts[:end] + parts[at:]) for end in range(at - 1, 0, -1))
    return next((path for path in shorter if path in live), name)


def live_fingerprint(layers: Sequence[Layer]) -> dict[str, str]:
    """Fingerprint of every router parameter and of a slice of every expert tensor, by name; see ``fingerprint``."""
    whole: list[tuple[str, Tensor]] = []
    sampled: list[tuple[str, Tensor]] = []
    for layer in layers:
        for name, value in layer.router.named_parameters():
            whole.append((f"{layer.name}.{clean_name(name)}", value))
        experts = layer.adapter.experts
        if experts is not None and experts in layer.parent._modules:
            path = f"{_parent_name(layer)}{experts}"
            for name, value in layer.parent.get_submodule(experts).named_parameters():
                target = whole if value.dim() == 3 else sampled
                target.append((f"{path}.{clean_name(name)}", value))
    return fingerprint(whole, sampled)


def _parent_name(layer: Layer) -> str:
    """Path of the module that holds router and experts, ending in a dot unless it is the root."""
    inside = next(name for name, module in layer.parent.named_modules() if module is layer.router)
    return layer.name.removesuffix(clean_name(inside))
