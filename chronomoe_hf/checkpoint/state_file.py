"""State files: ``<directory>/chronomoe/state.tensors`` (tensors) and ``state.json`` (manifest).

No other module opens them. They have a folder of their own because serving engines take every ``*.safetensors``
beside a single-file model for weights, and the tensors, though in the safetensors format, another suffix because
quantizing tools also look into folders. States of schema 2 have them as ``state.safetensors``; they are read as they
are, and go with the next save. States of schema 1 lie as ``chronomoe.safetensors`` and ``chronomoe.json``
beside the weights: they are read where there is no new one, and removed once a new one is committed. In the output
directory of a run the folder also holds the run's records (``telemetry.writer``): the names do not meet, and neither
side touches the other's files.

The manifest is the commit mark. It names its tensor file by content (sha256 and size) and ends in a sha256 of its
own bytes, so every altered byte of either file is noticed; safetensors alone has no checksum.

Overwriting a state has to survive a crash between the two renames, where the old manifest would meet the new tensor
file. So the committed tensor file is first renamed to ``state.tensors.prev``; a reader takes whichever of the two
has the manifest's sha256. The state thus changes at one instant, the rename of the manifest:

    1. both files are written in full as ``.state.*.tmp.<pid>`` and synced (a full disk stops here, nothing changed)
    2. state.tensors -> state.tensors.prev   (only if it is the one the manifest names)
    3. tmp -> state.tensors
    4. tmp -> state.json                             the commit
    5. state.tensors.prev and a state of schema 1 beside the weights are removed

The manifest is not embedded in the tensor file: a reader could then load an uncommitted state. One process writes a
directory at a time.

Reading never unpickles and trusts nothing before it is checked: size, sha256, header limits, tensors, shapes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from chronomoe_hf.checkpoint.disk import read_bytes, sha256, sync_directory, write_synced
from chronomoe_hf.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MAX_TENSOR_BYTES,
    OLD_MANIFEST_FILE,
    OLD_TENSOR_FILE,
    SAFETENSORS_FILE,
    SCHEMA_MINOR,
    STATE_SCHEMA,
    TENSOR_FILE,
    WAY_OUT,
    Meta,
    Tensors,
    header_table,
    manifest_problem,
    migrate,
    parse_manifest,
    render_manifest,
    short,
)
from chronomoe_hf.errors import StateCorruptError, StateError, StateWriteError

logger = logging.getLogger(__name__)

STATE_FOLDER = "chronomoe"
PREVIOUS_SUFFIX = ".prev"
_STALE_TMP = re.compile(r"\.(state|chronomoe)\.(tensors|safetensors|json)\.tmp\.\d+")


@dataclass(frozen=True)
class _Pair:
    """The two files of one state."""

    folder: Path
    tensor_file: str
    manifest_file: str
    older_file: str | None = None  # name of the tensor file in an earlier schema, beside the same manifest

    @property
    def tensor_files(self) -> tuple[str, ...]:
        return (self.tensor_file,) if self.older_file is None else (self.tensor_file, self.older_file)

    def of(self, manifest: Meta) -> _Pair:
        """The pair with the tensor file that its manifest names."""
        return replace(self, tensor_file=next(iter(manifest["files"])), older_file=None)

    @property
    def manifest(self) -> Path:
        return self.folder / self.manifest_file

    @property
    def tensors(self) -> Path:
        return self.folder / self.tensor_file

    @property
    def previous(self) -> Path:
        return self.folder / (self.tensor_file + PREVIOUS_SUFFIX)


def _pair(directory: str | Path) -> _Pair:
    return _Pair(Path(directory) / STATE_FOLDER, TENSOR_FILE, MANIFEST_FILE, SAFETENSORS_FILE)


def _old_pair(directory: str | Path) -> _Pair:
    return _Pair(Path(directory), OLD_TENSOR_FILE, OLD_MANIFEST_FILE)


def _existing(directory: str | Path) -> _Pair:
    """The pair to read: the new one, or that of schema 1 where only that is there."""
    new, old = _pair(directory), _old_pair(directory)
    return old if os.path.lexists(old.manifest) and not os.path.lexists(new.manifest) else new


def write_state(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    fault: str | None = None,
    strict: bool = False,
) -> bool:
    """Write the two state files into ``directory/chronomoe`` (created if missing), replacing others at one instant.

    Args:
        directory: A checkpoint or output directory.
        tensors: Name -> tensor of any shape on any device; float64/32/16, bfloat16, signed integers, uint8 or bool.
        meta: JSON-ready mapping with string keys and without NaN. Required: ``step`` (int) and ``layers`` (list of
            ``{"name", "router_class", "num_experts", "top_k"}``). ``config``, ``controller``, ``fingerprint`` (dicts)
            and ``world_size`` (int) are type-checked; any other key is kept as given. ``schema_version``,
            ``schema_minor``, ``chronomoe_version``, ``versions``, ``files`` and ``tensors`` are filled in here.
        fault: Why the caller knows that this state could not be loaded again; it is then not written.
        strict: Raise instead of warning when the state cannot be written.

    Returns:
        True once the new state is committed and synced. On False (a warning was logged) the directory holds the
        previous state, or the new one if only the last sync failed; never a mixture.

    Raises:
        StateWriteError: With `strict`, naming the directory and the cause.
    """
    try:
        if fault is not None:
            raise ValueError(fault)
        payload = _tensor_payload(tensors)
        _commit(Path(directory), payload, render_manifest(_manifest(payload, meta)))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StateError) as error:
        message = f"chronomoe state could not be written to {directory}: {type(error).__name__}: {short(error)}"
        if strict:
            raise StateWriteError(
                f"{message}; free space or fix permissions and save again, a previous state there is intact"
            ) from error
        logger.warning("%s; training goes on, a previous state there is intact", message)
        return False
    return True


def has_state(directory: str | Path) -> bool:
    """Whether `directory` holds a manifest, the commit mark. Says nothing about whether it can be read."""
    return os.path.lexists(_existing(directory).manifest)


def read_manifest(directory: str | Path) -> Meta:
    """The checked manifest of `directory`, as written (not migrated), without reading tensors.

    Raises:
        StateMissingError, StateCorruptError, StateSchemaError: As :func:`read_state`.
    """
    return _parsed(_existing(directory))


def _parsed(pair: _Pair) -> Meta:
    return parse_manifest(read_bytes(pair.manifest, MAX_MANIFEST_BYTES), str(pair.manifest), pair.tensor_files)


def read_state(directory: str | Path) -> tuple[Tensors, Meta]:
    """Read and verify the state in `directory`, migrated to this version's schema.

    Returns:
        ``(tensors, meta)``: CPU tensors by name, and the manifest less its ``files`` and ``tensors`` tables.

    Raises:
        StateMissingError: There is no manifest: no state was ever committed here.
        StateCorruptError: A file is torn, altered, missing from the pair, too large, or a link out of the directory.
        StateSchemaError: Written by a newer schema, or by an older one that has no migration.
    """
    pair = _existing(directory)
    meta = _parsed(pair)
    pair = pair.of(meta)
    path, data = _named_tensor_file(pair, meta["files"][pair.tensor_file])
    table = header_table(data, str(path))
    if table != meta["tensors"]:
        names = [name for name in sorted({*table, *meta["tensors"]}) if table.get(name) != meta["tensors"].get(name)]
        raise StateCorruptError(
            f"{path} holds other tensors than {pair.manifest_file} lists: {short(names)}; {WAY_OUT}"
        )
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise StateCorruptError(f"{path} is not a safetensors file: {short(error)}; {WAY_OUT}") from None
    assert all(list(tensors[name].shape) == shape for name, (_, shape) in table.items())
    for key in ("files", "tensors", "manifest_sha256"):
        del meta[key]
    return migrate(tensors, meta, str(pair.manifest))


def _tensor_payload(tensors: Mapping[str, Tensor]) -> bytes:
    # clone: safetensors refuses tensors that share memory, and a view would carry its whole storage along.
    host = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    payload: bytes = safetensors.torch.save(host, metadata={"format": "pt"})
    return payload


def _manifest(payload: bytes, meta: Mapping[str, Any]) -> Meta:
    manifest = {
        **meta,
        "schema_version": STATE_SCHEMA,
        "schema_minor": SCHEMA_MINOR,
        "chronomoe_version": _version("chronomoe_hf"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
        },
        "files": {TENSOR_FILE: {"sha256": sha256(payload), "size": len(payload)}},
        "tensors": header_table(payload, TENSOR_FILE),
    }
    problem = manifest_problem(manifest)
    if problem:  # what could not be read back is never written
        raise ValueError(problem)
    return manifest


@functools.cache  # reading package metadata is slower than writing the state
def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit(directory: Path, payload: bytes, manifest: bytes) -> None:
    pair = _pair(directory)
    folder = pair.folder
    made = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    tmp_tensors, tmp_manifest = (folder / f".{name}.tmp.{os.getpid()}" for name in (TENSOR_FILE, MANIFEST_FILE))
    moved = committed = False
    try:
        write_synced(tmp_tensors, payload)
        write_synced(tmp_manifest, manifest)
        if _is_committed(pair):
            os.replace(pair.tensors, pair.previous)
            moved = True
            sync_directory(folder)  # the renames must reach the disk in this order
        os.replace(tmp_tensors, pair.tensors)
        sync_directory(folder)
        os.replace(tmp_manifest, pair.manifest)
        committed = True
        sync_directory(folder)
        if made:
            sync_directory(directory)
    except BaseException:
        if moved and not committed:
            with contextlib.suppress(OSError):  # if this fails too, readers still find the state in the previous file
                os.replace(pair.previous, pair.tensors)
        raise
    finally:
        for leftover in (tmp_tensors, tmp_manifest):
            _remove(leftover)
    _remove(pair.previous)
    _remove_earlier(pair)
    _remove_old(directory)


def remove_state(directory: str | Path) -> None:
    """Remove the state in `directory`, of any schema, its commit mark first. Records beside it stay."""
    pair = _pair(directory)
    for path in (pair.manifest, pair.tensors, pair.previous):
        _remove(path)
    _remove_earlier(pair)
    _remove_old(Path(directory))


def _remove_earlier(pair: _Pair) -> None:
    """The tensor file of schema 2, which the manifest no longer names."""
    earlier = _Pair(pair.folder, SAFETENSORS_FILE, pair.manifest_file)
    for path in (earlier.tensors, earlier.previous):
        _remove(path)


def _remove_old(directory: Path) -> None:
    """What a state of schema 1 left beside the weights, where a serving engine would take it for weights."""
    old = _old_pair(directory)
    found = [path for path in (old.manifest, old.tensors, old.previous) if os.path.lexists(path)]
    for path in found:
        _remove(path)
    if found:
        _remove_stale(directory)


def _remove_stale(directory: Path) -> None:
    for name in os.listdir(directory):
        if _STALE_TMP.fullmatch(name):
            _remove(directory / name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _is_committed(pair: _Pair) -> bool:
    """Whether the tensor file is the one that the manifest beside it names (after a crash it may not be)."""
    try:
        record = _parsed(pair)["files"].get(pair.tensor_file)
        if record is None:  # it names the file of schema 2, which stays until the new manifest is there
            return False
        return sha256(read_bytes(pair.tensors, MAX_TENSOR_BYTES)) == str(record["sha256"])
    except StateError:
        return False


def _named_tensor_file(pair: _Pair, record: Mapping[str, Any]) -> tuple[Path, bytes]:
    """The tensor file whose content the manifest names: the current one or, after a crash, the previous one."""
    problems = []
    for path in (pair.tensors, pair.previous):
        try:
            data = read_bytes(path, MAX_TENSOR_BYTES, size=record["size"])
        except StateError as error:
            problems.append(str(error))
            continue
        found = sha256(data)
        if found == record["sha256"]:
            return path, data
        problems.append(f"{path} has sha256 {found}, {pair.manifest_file} names {short(record['sha256'])}")
    raise StateCorruptError(f"{problems[0]}: torn or altered after it was saved; {WAY_OUT}")
