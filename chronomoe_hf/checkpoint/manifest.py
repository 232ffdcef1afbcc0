"""The two state files as bytes: rendering and checking the manifest, checking a safetensors header. Opens no file.

Bytes from a file are data from a stranger: every check is made before anything is built from the value checked,
and whatever is wrong ends in StateCorruptError or StateSchemaError, never in another exception.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.errors import StateCorruptError, StateSchemaError
from chronomoe_hf.recording.columns import Row

logger = logging.getLogger(__name__)

TENSOR_FILE = "state.tensors"  # a safetensors file; other tools take any *.safetensors below a model for weights
SAFETENSORS_FILE = "state.safetensors"  # its name in schema 2
MANIFEST_FILE = "state.json"
OLD_TENSOR_FILE = "chronomoe.safetensors"  # of schema 1, beside the weights
OLD_MANIFEST_FILE = "chronomoe.json"
STATE_SCHEMA = 3  # raised when older readers would misread the files
SCHEMA_MINOR = 0  # raised when older readers may ignore what was added

# Far above any real state (tensors are O(layers x experts), a lens O(layers x hidden size)), far below harm.
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_TENSOR_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 4 * 2**20
MAX_HEADER_ENTRIES = 20_000
MAX_DIMENSIONS = 16

WAY_OUT = "restore the directory from a copy, or load an older checkpoint"
LAYER_FIELDS = {"name": str, "router_class": str, "num_experts": int, "top_k": int}

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SEAL_HEAD, _SEAL_TAIL = b',\n  "manifest_sha256": "', b'"\n}\n'
_SEAL_BYTES = len(_SEAL_HEAD) + 64 + len(_SEAL_TAIL)
_OPTIONAL_FIELDS = {
    "config": dict,
    "controller": dict,
    "fingerprint": dict,
    "fingerprint_bfloat16": dict,
    "world_size": int,
    "versions": dict,
}

Meta = dict[str, Any]
HeaderTable = dict[str, list[Any]]
"""Tensor name -> [safetensors dtype, shape]."""


def render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Strict, sorted JSON whose last entry, ``manifest_sha256``, is the sha256 of every byte before that entry.

    Raises:
        TypeError: A key is not a string or a value is not JSON.
        ValueError: NaN or infinity, or more bytes than can be read back.
    """
    _require_string_keys(manifest)
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
    body = text.removesuffix("\n}").encode("ascii")
    data = body + _SEAL_HEAD + hashlib.sha256(body).hexdigest().encode("ascii") + _SEAL_TAIL
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES} can be read back")
    return data


def parse_manifest(data: bytes, source: str, tensor_files: Collection[str] = (TENSOR_FILE,)) -> Meta:
    """Inverse of :func:`render_manifest`, for bytes that may be damaged or hostile.

    Args:
        data: Content of the manifest file.
        source: Path shown in messages.
        tensor_files: Names that the one file that it lists may have.

    Raises:
        StateCorruptError: The bytes are not what was written, or not a manifest.
        StateSchemaError: A schema version that is newer than this library's.
    """
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _SEAL_HEAD + hashlib.sha256(body).hexdigest().encode("ascii") + _SEAL_TAIL:
        raise StateCorruptError(
            f"{source} ({len(data)} bytes) does not end in the sha256 of its content: truncated, edited, or not a "
            f"chronomoe manifest; {WAY_OUT}"
        )
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StateCorruptError(f"{source} is not JSON: {short(error)}; {WAY_OUT}") from None
    _check_schema(manifest, source)
    problem = manifest_problem(manifest, tensor_files)
    if problem:
        raise StateCorruptError(f"{source} is not a chronomoe manifest: {problem}; {WAY_OUT}")
    assert isinstance(manifest, dict)
    return manifest


def _check_schema(manifest: Any, source: str) -> None:
    """Before anything else: a newer schema may mean anything by the other keys."""
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version is None or not is_count(version) or version < 1:
        raise StateCorruptError(f"{source} has no schema_version (a positive integer), got {short(version)}; {WAY_OUT}")
    if version > STATE_SCHEMA:
        raise StateSchemaError(
            f"{source} has schema version {version}, this chronomoe_hf reads up to {STATE_SCHEMA}; "
            f"install chronomoe_hf {short(manifest.get('chronomoe_version'))} or newer"
        )
    minor = manifest.get("schema_minor", 0)
    if not is_count(minor):
        raise StateCorruptError(f"{source} has schema_minor {short(minor)}, not an integer; {WAY_OUT}")
    if version == STATE_SCHEMA and minor > SCHEMA_MINOR:
        logger.warning("%s has schema %d.%d, newer than %d.%d: what was added is ignored",
                       source, version, minor, STATE_SCHEMA, SCHEMA_MINOR)  # fmt: skip


def manifest_problem(manifest: Mapping[str, Any], tensor_files: Collection[str] = (TENSOR_FILE,)) -> str | None:
    """What makes `manifest` unusable, or None. File names come from an allow-list, so no path can be smuggled in."""
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) != 1 or not set(files) <= set(tensor_files):
        found = short(list(files) if isinstance(files, dict) else files)
        return f"files must list exactly {' or '.join(tensor_files)}, got {found}"
    tensor_file, record = next(iter(files.items()))
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str) or not is_count(record.get("size")):
        return f"files[{tensor_file!r}] must give sha256 and size, got {short(record)}"
    if not 8 <= record["size"] <= MAX_TENSOR_BYTES:
        return f"{tensor_file} of {record['size']} bytes, at most {MAX_TENSOR_BYTES} are read"
    if not isinstance(manifest.get("tensors"), dict):
        return f"tensors must be a table, got {short(manifest.get('tensors'))}"
    if not is_count(manifest.get("step")):
        return f"step must be a non-negative integer, got {short(manifest.get('step'))}"
    for key, kind in _OPTIONAL_FIELDS.items():
        if key in manifest and (not isinstance(manifest[key], kind) or isinstance(manifest[key], bool)):
            return f"{key} must be {kind.__name__}, got {short(manifest[key])}"
    for key in ("fingerprint", "fingerprint_bfloat16"):
        if not all(isinstance(value, str) for value in manifest.get(key, {}).values()):
            return f"{key} values must be strings"
    return _layers_problem(manifest.get("layers"))


def _layers_problem(layers: Any) -> str | None:
    if not isinstance(layers, list):
        return f"layers must be a list, got {short(layers)}"
    for position, layer in enumerate(layers):
        for key, kind in LAYER_FIELDS.items():
            value = layer.get(key) if isinstance(layer, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"layers[{position}] must give {key} ({kind.__name__}), got {short(layer)}"
    names = [layer["name"] for layer in layers]
    if len(set(names)) != len(names):
        return "two layers have the same name"
    return None


def header_table(data: bytes, source: str) -> HeaderTable:
    """Check the header of a whole safetensors file against its size and return its tensor table.

    safetensors itself accepts duplicate names and 100,000 empty entries (2 s); both are refused here, as are
    dtypes that no state uses, and any gap, overlap or claim beyond the end of the data.

    Raises:
        StateCorruptError: The header does not describe exactly the bytes that follow it.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise StateCorruptError(
            f"{source} ({len(data)} bytes) claims a header of {length} bytes (at most {MAX_HEADER_BYTES}, and no more "
            f"than the file): not a safetensors file of chronomoe; {WAY_OUT}"
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("not a table")
        header.pop("__metadata__", None)
        if len(header) > MAX_HEADER_ENTRIES:
            raise ValueError(f"{len(header)} entries, at most {MAX_HEADER_ENTRIES} are read")
        spans = sorted(_span(name, entry) for name, entry in header.items())
        end = 0
        for begin, stop, name in spans:
            if begin != end:
                raise ValueError(f"{name!r} begins at byte {begin}, expected {end}")
            end = stop
        if end != len(data) - 8 - length:
            raise ValueError(f"entries cover {end} bytes, {len(data) - 8 - length} follow the header")
    except (ValueError, RecursionError) as error:
        raise StateCorruptError(f"{source} has a bad safetensors header: {short(error)}; {WAY_OUT}") from None
    return {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must give dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{name!r} has dtype {dtype!r}; known: {', '.join(_ITEM_BYTES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{name!r} has {offsets[1] - offsets[0]} bytes for {dtype} {shape!r}")
    return offsets[0], offsets[1], name


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(is_count(value) for value in values)


def is_count(value: Any) -> bool:
    """Whether `value` is a non-negative integer that fits in 63 bits (and not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def short(value: object) -> str:
    """`value` for a message: escaped (no control characters reach a terminal) and at most 200 characters."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 200 else text[:200] + "..."


def _require_string_keys(value: Any) -> None:
    """json turns the key 3 into "3" without a word: a layer id used as a key would not come back."""
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"state keys must be strings, got {wrong[0]!r}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _require_string_keys(item)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not strict JSON")


# States of older schemas, brought to today's. Pure: tensors and manifest entries in, the same out.

Tensors = dict[str, Tensor]
Migration = Callable[[Tensors, Meta], tuple[Tensors, Meta]]


def _from_1(tensors: Tensors, meta: Meta) -> tuple[Tensors, Meta]:
    """1.0 had no gains: they start afresh. What else changed is where the files lie."""
    if "beta_LE" in tensors and "gain_LE" not in tensors:
        tensors = {**tensors, "gain_LE": torch.zeros_like(tensors["beta_LE"])}
    return tensors, meta


def _without_loss(tensors: Tensors) -> Tensors:
    """Before 2.1 no loss tokens were counted: those of an open window are unknown."""
    if "window_LR" in tensors and "loss_N" not in tensors:
        tensors = {**tensors, "loss_N": torch.zeros(2, dtype=torch.float64)}
    return tensors


def _with_new_sums(tensors: Tensors, outputs: bool) -> Tensors:
    """Before 2.4 a row had no first choices, and before 2.3 no sums of gates and of norms either.

    So that sums and the number of outputs that they are over agree, what the open window of the older ones has read of
    expert outputs starts afresh; its counts and probabilities stay.

    Args:
        tensors: by name.
        outputs: the row has every sum of expert outputs.
    """
    window_LR, beta_LE = tensors.get("window_LR"), tensors.get("beta_LE")
    if window_LR is None or beta_LE is None or not window_LR.dim() == beta_LE.dim() == 2:
        return tensors  # what it is will be said when it is checked
    row = Row(beta_LE.shape[-1])
    missing = 1 if outputs else 3
    if window_LR.shape[-1] != row.size - missing * row.width:
        return tensors
    new_LR = window_LR.new_zeros(window_LR.shape[0], row.size)
    head = row.head.stop - row.width
    new_LR[:, :head] = window_LR[:, :head]
    if outputs:
        new_LR[:, row.outputs] = window_LR[:, head : head + row.outputs.stop - row.outputs.start]
    new_LR[:, row.tail] = window_LR[:, row.tail.start - row.size :]
    return {**tensors, "window_LR": new_LR}


def _from_2(tensors: Tensors, meta: Meta) -> tuple[Tensors, Meta]:
    """2 had the tensors under another file name, and no line of a weight rounded to bf16."""
    return tensors, meta


MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2}
"""Schema version -> function that turns the (tensors, meta) of that version into those of the next."""


def migrate(tensors: Tensors, meta: Meta, source: str) -> tuple[Tensors, Meta]:
    """Apply every migration between the schema of `meta` and today's.

    Args:
        tensors: By name.
        meta: The manifest, with its ``schema_version``.
        source: Path shown in messages.

    Raises:
        StateSchemaError: There is no way from that schema to this one.
    """
    saved = meta["schema_version"], meta.get("schema_minor", 0)
    while (version := meta["schema_version"]) < STATE_SCHEMA:
        if version not in MIGRATIONS:
            raise StateSchemaError(
                f"{source} has schema version {version}, which cannot be migrated to this "
                f"version's {STATE_SCHEMA}; install chronomoe_hf {short(meta.get('chronomoe_version'))}"
            )
        tensors, meta = MIGRATIONS[version](tensors, meta)
        meta = {**meta, "schema_version": version + 1, "schema_minor": 0}
    tensors = _without_loss(tensors) if saved < (2, 1) else tensors
    return _with_new_sums(tensors, outputs=saved >= (2, 3)) if saved < (2, 4) else tensors, meta
