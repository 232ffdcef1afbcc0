"""Does a saved state belong to this model? Layer tables and weight fingerprints.

Shape suffixes: E experts, A and B the two dimensions of an expert's weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from chronomoe_hf.checkpoint.converted import ConvertedWeights
from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import StateError
from chronomoe_hf.wrapping.discovery import FoundLayer, clean_name
from chronomoe_hf.wrapping.layer import Layer

SLICE_ELEMENTS = 256  # read at each end of an expert's weight
WHOLE_BYTES = 32 * 2**20  # a router of 512 experts x 8192 in fp32 is 16 MiB
UNREADABLE = "sharded"
_EXPERTS = "experts"
_FLOATS = {_name: getattr(torch, _name) for _name in ("float64", "float32", "bfloat16", "float16")}
"""Dtypes between which a weight is only rounded."""


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
            lines[name] = line_of(tensor, whole)
    return lines


def line_of(tensor: Tensor, whole: bool, dtype: torch.dtype | None = None) -> str:
    """The line of a tensor, or of what it is when rounded to `dtype`."""
    if tensor.is_meta or is_sharded(tensor) or is_traceable_wrapper_subclass(tensor):
        return UNREADABLE  # a tensor that stands for several others (torchao) has no bytes of its own
    tensor = tensor.detach()
    digest = hashlib.sha256()
    fits = whole and tensor.ndim <= 2 and tensor.numel() * tensor.element_size() <= WHOLE_BYTES
    for part in [tensor] if fits or tensor.ndim < 2 else _ends(tensor):
        # .contiguous before .cpu: only what was selected crosses to the host.
        part = part if dtype is None else part.to(dtype)
        digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{_word(dtype or tensor.dtype)} {shape} {digest.hexdigest()}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    entries = entries_of(layers).items()
    return fingerprint(
        [(name, tensor) for name, (tensor, whole) in entries if whole],
        [(name, tensor) for name, (tensor, whole) in entries if not whole],
    )


def rounded_fingerprint(layers: Sequence[Layer]) -> dict[str, str]:
    """The lines that fp32 weights have once they are rounded to bf16, so that a bf16 reload can be told from others."""
    return {
        name: line_of(tensor, whole, torch.bfloat16)
        for name, (tensor, whole) in entries_of(layers).items()
        if tensor.dtype == torch.float32
    }


def foreign_weights(
    layers: Sequence[Layer], saved: Mapping[str, str], rounded: Mapping[str, str], held: Iterable[str] = ()
) -> list[str]:
    """Names of router and expert weights that are not those a state was saved with, sorted.

    A weight is the same if its bytes are, or if they are after the rounding that lies between two dtypes: an fp32
    checkpoint loaded in bf16, a bf16 one loaded in fp32. What cannot be compared (sharded, quantized, rounded to
    another dtype, or known on one side only, as an adapter's own weights are) is not named.

    Args:
        layers: of the live model.
        saved: what :func:`live_fingerprint` gave when the state was saved.
        rounded: what :func:`rounded_fingerprint` gave; empty for states before schema 3.
        held: names of the state's tensors. Where it holds the model's own correction biases (``bias.*``), which the
            balance law moved, it brings them, and the weights need not have them: those of an adapter do not.
    """
    brought = _own_biases(layers) if any(name.startswith("bias.") for name in held) else set()
    entries = entries_of(layers)
    names = {name: "" for name in entries}
    lines = {_own_path(name, names): line for name, line in saved.items()}
    bf16 = {_own_path(name, names): line for name, line in rounded.items()}
    return [
        name
        for name, (tensor, whole) in sorted(entries.items())
        if name in lines and id(tensor) not in brought and not _same_weight(lines[name], bf16.get(name), tensor, whole)
    ]


def _own_biases(layers: Sequence[Layer]) -> set[int]:
    """Identities of the parameters that are correction biases (ERNIE 4.5's; most families have buffers)."""
    places = (layer.adapter.native_bias_place(layer.router, layer.parent) for layer in layers)
    return {id(getattr(holder, name)) for holder, name in filter(None, places)}


def _same_weight(saved: str, rounded: str | None, tensor: Tensor, whole: bool) -> bool:
    own = line_of(tensor, whole)
    if saved == own or UNREADABLE in (saved, own):
        return True
    before = _FLOATS.get(saved.partition(" ")[0])
    if before is None or tensor.dtype not in _FLOATS.values():
        return saved.partition(" ")[0] != _word(tensor.dtype)  # quantized on one side: nothing to compare
    if torch.finfo(tensor.dtype).bits > torch.finfo(before).bits:
        return line_of(tensor, whole, before) == saved
    if rounded is None:
        return before != tensor.dtype
    # Loaded in bf16, and perhaps made wider again: every number of it is one of bf16.
    through_bf16 = tensor.dtype == torch.bfloat16 or line_of(tensor.bfloat16().to(tensor.dtype), whole) == own
    return line_of(tensor, whole, torch.bfloat16) == rounded if through_bf16 else False


def entries_of(layers: Sequence[Layer]) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (parameter, whether it is read whole) of routers and experts."""
    entries: dict[str, tuple[Tensor, bool]] = {}
    for layer in layers:
        for name, value in layer.router.named_parameters():
            entries[f"{layer.name}.{clean_name(name)}"] = value, True
        experts = layer.adapter.experts
        if experts is not None and experts in layer.parent._modules:
            path = f"{_parent_name(layer)}{experts}"
            for name, value in layer.parent.get_submodule(experts).named_parameters():
                entries[f"{path}.{clean_name(name)}"] = value, value.dim() == 3
    return entries


def _parent_name(layer: Layer) -> str:
    """Path of the module that holds router and experts, ending in a dot unless it is the root."""
    inside = next(name for name, module in layer.parent.named_modules() if module is layer.router)
    return layer.name.removesuffix(clean_name(inside))


def file_fingerprint(
    model: PreTrainedModel, layers: Sequence[FoundLayer], directory: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Lines of the router weights in `directory`, in fp32 and rounded to bf16, by the names of ``live_fingerprint``.

    Args:
        model: of the checkpoint, without storage.
        layers: its layers.
        directory: the checkpoint.

    Returns:
        As ``live_fingerprint`` and ``rounded_fingerprint``, of routers only; both empty where the files cannot be
        followed (quantized routers).
    """
    experts = {id(value) for layer in layers for value in _expert_parameters(layer)}
    wanted = {id(value): name for name, (value, _) in entries_of(cast(Any, layers)).items() if id(value) not in experts}
    live = model.state_dict(keep_vars=True)
    names = {name: wanted[id(value)] for name, value in live.items() if id(value) in wanted}
    fp32 = {name: torch.empty_like(value, dtype=torch.float32) for name, value in live.items() if name in names}
    lines: dict[str, str] = {}
    rounded: dict[str, str] = {}
    try:
        with ConvertedWeights(model, directory, {**live, **fp32}, only=names) as weights:
            for name, value in weights:
                lines[names[name]] = line_of(value, True)
                rounded[names[name]] = line_of(value, True, torch.bfloat16)
    except (StateError, SafetensorError, OSError):
        return {}, {}
    return lines, rounded


def _expert_parameters(layer: FoundLayer) -> list[torch.nn.Parameter]:
    name = layer.adapter.experts
    if name is None or name not in layer.parent._modules:
        return []
    return list(layer.parent.get_submodule(name).parameters())
