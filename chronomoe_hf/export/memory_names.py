"""Checkpoints whose files have the names that a model of Transformers 5 has in memory: experts as one tensor.

``Accelerator.save_model``, ``torch.save(model.state_dict())`` and some merging tools write them so. Transformers loads
both forms; engines read the published one, with a name for every expert. Such files are cut by their own names and then
written as ``save_pretrained`` writes a new model, a layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from chronomoe_hf.export.cut_model import owners_of, shapes_of
from chronomoe_hf.export.disk_names import checked, conversion, on_disk, require_unknown_dropped, tied_names
from chronomoe_hf.export.slicing import Piece, cut_table
from chronomoe_hf.export.tensor_files import INDEX, WEIGHTS, Stored, measure_pieces, read_tables
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.wrapping.discovery import FoundLayer, find_layers


def has_memory_names(model: PreTrainedModel, stored: Mapping[str, Stored]) -> bool:
    """Whether the files hold the model's tensors by the names that they have in memory, and not by those on disk."""
    names = set(model.state_dict()) - tied_names(model)
    return any(name not in stored for name in on_disk(model)) and names <= stored.keys()


def memory_pieces(
    big: PreTrainedModel,
    small: PreTrainedModel,
    layers: list[FoundLayer],
    plan: PrunePlan,
    stored: Mapping[str, Stored],
    *,
    drop_unknown: bool,
) -> tuple[dict[str, Piece], list[str]]:
    """As ``disk_names.disk_pieces``, by the names in memory; returns the pieces and the names that are left out.

    Raises:
        ExportError: the files hold other tensors than the model.
    """
    old, new = shapes_of(big.state_dict()), shapes_of(small.state_dict())
    owners = owners_of(big, layers, {**old, **new})
    table = cut_table(old, new, owners, plan)
    unknown = [name for name in stored if name not in old]
    require_unknown_dropped(unknown, drop_unknown)
    pieces = {
        name: checked(name, piece, stored[piece.source], plan)
        for name, piece in table.items()
        if piece.source in stored
    }
    return pieces, unknown


def write_published_names(folder: Path, small: PreTrainedModel, metadata: Mapping[str, str]) -> None:
    """Rewrite the weight files of `folder` with the names that ``save_pretrained`` writes; holds a layer at a time."""
    table, _ = read_tables(folder)
    owners = owners_of(small, find_layers(small)[0], table)
    groups: dict[str, list[str]] = {}
    for name, entry in table.items():
        groups.setdefault(f"layer {owners[name]}" if name in owners else entry.file.name, []).append(name)
    parts: list[list[str]] = []
    for number, names in enumerate(groups.values()):
        tensors = conversion("core_model_loading.revert_weight_conversion")(
            small, {name: _read(table[name].file, name) for name in names}
        )
        # Experts of one fused tensor are views of it: each gets memory of its own.
        own = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(own, folder / f"part-{number}", metadata=dict(metadata))
        parts.append(list(own))
    for path in {entry.file for entry in table.values()} | {folder / INDEX}:
        path.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        single = len(parts) == 1
        file = WEIGHTS if single else f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        _write_index(folder, weight_map)


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    table = read_tables(folder)[0]
    numbers, size = measure_pieces(table, {name: Piece(name) for name in table})
    index = {"metadata": {"total_parameters": numbers, "total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
