"""Does a saved state belong to this model? Layer tables and weight fingerprints.

Shape suffixes: E experts, A and B the two dimensions of an expert's weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import StateMismatchError

SLICE_ELEMENTS = 256  # read at each end of an expert's weight
WHOLE_BYTES = 32 * 2**20  # a router of 512 experts x 8192 in fp32 is 16 MiB
MAX_ROWS_SHOWN = 20
UNREADABLE = "sharded"
_EXPERTS = "experts"

_LAYER_FIELDS = ("router_class", "num_experts", "top_k")


def check_layers(
    saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], allow_partial: bool = False
) -> list[tuple[int, int]]:
    """Pair the layers of a saved state with those of the live model, by name.

    Args:
        saved: The manifest's ``layers``: ``{"name", "router_class", "num_experts", "top_k"}`` each.
        live: The same table of the wrapped model.
        allow_partial: Return the layers that agree instead of raising when some do not.

    Returns:
        ``(index in saved, index in live)`` of every layer that agrees in all fields, in the order of `live`.

    Raises:
        StateMismatchError: With a table of the differences: any without `allow_partial`, or no layer agrees.
    """
    saved_index = {layer["name"]: index for index, layer in enumerate(saved)}
    live_names = {layer["name"] for layer in live}
    pairs, rows = [], []
    for index, layer in enumerate(live):
        position = saved_index.get(layer["name"])
        if position is None:
            rows.append((layer["name"], "(absent)", _describe(layer)))
        elif _describe(saved[position]) != _describe(layer):
            rows.append((layer["name"], _describe(saved[position]), _describe(layer)))
        else:
            pairs.append((position, index))
    rows += [(layer["name"], _describe(layer), "(absent)") for layer in saved if layer["name"] not in live_names]
    if rows and not (allow_partial and pairs):
        hint = "load it into the model it was saved from" + (
            "" if allow_partial else ", or set CheckpointConfig(allow_partial=True) to load only the layers that agree"
        )
        raise StateMismatchError(
            f"the saved state has {len(saved)} MoE layers, the model has {len(live)}, {len(pairs)} agree; {hint}\n"
            + _table([("layer", "saved", "model"), *rows[:MAX_ROWS_SHOWN]])
            + (f"\n... and {len(rows) - MAX_ROWS_SHOWN} more" if len(rows) > MAX_ROWS_SHOWN else "")
        )
    return pairs


def _describe(layer: Mapping[str, Any]) -> str:
    return "{} E={} k={}".format(*(layer[key] for key in _LAYER_FIELDS))


def _table(rows: list[tuple[str, str, str]]) -> str:
    # Names come from a file: escape them so that no control character reaches a terminal.
    clean = [[cell.encode("unicode_escape").decode("ascii")[:120] for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in clean) for column in range(3)]
    return "\n".join(
        "  " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in clean
    )


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
    if tensor.is_meta or is_sharded(tensor):
        return UNREADABLE
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
