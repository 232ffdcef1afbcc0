"""The ``config.json`` of a smaller checkpoint: that of the larger one, with another count, for readers old and new.

Transformers 5 renames entries when it writes a config (``rope_theta`` becomes part of ``rope_parameters``,
``torch_dtype`` becomes ``dtype``); Transformers 4 and other readers know the old names only, and take a default where
one is missing. So the file of the source is kept, the count is changed under every name it has, and the old names are
put beside the new ones where Transformers 5 has written the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.cut_model import COUNTS, config_tree
from chronomoe_hf.jsonfiles import write_json

CONFIG_FILE = "config.json"
NEXT_TOKEN_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""Names under which configs keep the number of next-token heads (MTP)."""
_OLD_TOP_LEVEL = ("rope_theta", "partial_rotary_factor")  # in Transformers 4 beside, not in, the rope table


def write_cut_config(
    source: Path, folder: Path, before: PreTrainedConfig, after: PreTrainedConfig, *, heads_dropped: bool
) -> None:
    """Write the config of `source` into `folder` with the count of `after`; nothing else changes.

    Args:
        source: the larger checkpoint.
        folder: the smaller one.
        before: config of the larger one, as Transformers reads it.
        after: of the smaller one.
        heads_dropped: tensors of next-token heads were left out: the config may not promise them.

    Raises:
        ExportError: the file is no JSON object.
    """
    path = source / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object")
    for (where, old), (_, new) in zip(config_tree(before), config_tree(after), strict=True):
        changed = [name for name in COUNTS if vars(old).get(name) != vars(new).get(name)]
        if changed:
            _set_counts(_node(data, where), old, new, changed)
    if heads_dropped:
        for node in _dictionaries(data):
            node.update({name: 0 for name in NEXT_TOKEN_COUNTS if isinstance(node.get(name), int)})
            if isinstance(node.get("use_mtp"), bool):
                node["use_mtp"] = False
    _write(folder, data, after)


def complete_config(folder: Path, config: PreTrainedConfig) -> None:
    """Give a ``config.json`` that Transformers has just written the other names of what it holds."""
    _write(folder, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), config)


def _set_counts(target: dict[str, Any], old: PreTrainedConfig, new: PreTrainedConfig, changed: list[str]) -> None:
    for name in changed:
        was, value = vars(old)[name], vars(new)[name]
        target[name] = value
        target.update({other: value for other in COUNTS if other in target and target[other] == was})


def _node(data: dict[str, Any], where: tuple[str, ...]) -> dict[str, Any]:
    for part in where:
        found = data.get(part)
        if not isinstance(found, dict):
            found = data[part] = {}  # the file leaves this part at its defaults
        data = found
    return data


def _dictionaries(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        yield data
        for value in data.values():
            yield from _dictionaries(value)


def _write(folder: Path, data: dict[str, Any], config: PreTrainedConfig) -> None:
    """Every name of the count, and the names of Transformers 4 beside those of 5 where only those are there."""
    for where, node in config_tree(config):
        target: Any = data
        for part in where:
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            continue
        for alias, name in (getattr(type(node), "attribute_map", None) or {}).items():
            if name in COUNTS and name in target:
                target[alias] = target[name]
        _add_old_names(target)
    write_json(folder / CONFIG_FILE, data, indent=2, sort_keys=True)


def _add_old_names(target: dict[str, Any]) -> None:
    if isinstance(target.get("dtype"), str):
        target.setdefault("torch_dtype", target["dtype"])
    rope = target.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return  # none, or a table for each kind of layer, which Transformers 4 had no form for
    for name in _OLD_TOP_LEVEL:
        if name in rope:
            target.setdefault(name, rope[name])
    scaling = {name: value for name, value in rope.items() if name not in _OLD_TOP_LEVEL}
    if scaling.get("rope_type", "default") != "default":
        target.setdefault("rope_scaling", scaling)
