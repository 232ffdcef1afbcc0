"""State files: ``chronomoe.safetensors`` (tensors) and ``chronomoe.json`` (manifest). No other module opens them.

The manifest is the commit mark. It names its tensor file by content (sha256 and size) and ends in a sha256 of its
own bytes, so every altered byte of either file is noticed; safetensors alone has no checksum.

Overwriting a directory has to survive a crash between the two renames, where the old manifest would meet the new
tensor file. So the committed tensor file is first renamed to ``chronomoe.safetensors.prev``; a reader takes whichever
of the two has the manifest's sha256. The state thus changes at one instant, the rename of the manifest:

    1. both files are written in full as ``.chronomoe.*.tmp.<pid>`` and synced (a full disk stops here, nothing changed)
    2. chronomoe.safetensors -> chronomoe.safetensors.prev   (only if it is the one the manifest names)
    3. tmp -> chronomoe.safetensors
    4. tmp -> chronomoe.json                                 the commit
    5. chronomoe.safetensors.prev is removed

A copy of the manifest inside the tensor file would have saved a rename, but makes two sources of truth and loads a
state that was never committed. One process writes a directory at a time.

Reading never unpickles and trusts nothing before it is checked: size, sha256, header limits, tensors, shapes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from chronomoe_hf.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MAX_TENSOR_BYTES,
    SCHEMA_MINOR,
    STATE_SCHEMA,
    TENSOR_FILE,
    WAY_OUT,
    Meta,
    header_table,
    manifest_problem,
    parse_manifest,
    render_manifest,
    short,
)
from chronomoe_hf.errors import StateCorruptError, StateError, StateMissingError, StateSchemaError, StateWriteError

logger = logging.getLogger(__name__)

PREVIOUS_FILE = "chronomoe.safetensors.prev"
_STALE_TMP = re.compile(r"\.chronomoe\.(safetensors|json)\.tmp\.\d+")

Tensors = dict[str, Tensor]
Migration = Callable[[Tensors, Meta], tuple[Tensors, Meta]]

MIGRATIONS: dict[int, Migration] = {}
"""Schema version -> function that turns the (tensors, meta) of that version into those of the next."""


def write_state(
    directory: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, strict: bool = False
) -> bool:
    """Write the two state files into `directory` (created if missing), replacing a previous pair at one instant.

    Args:
        directory: Where the files go.
        tensors: Name -> tensor of any shape on any device; float64/32/16, bfloat16, signed integers, uint8 or bool.
        meta: JSON-ready mapping with string keys and without NaN. Required: ``step`` (int) and ``layers`` (list of
            ``{"name", "router_class", "num_experts", "top_k"}``). ``config``, ``controller``, ``fingerprint`` (dicts)
            and ``world_size`` (int) are type-checked; any other key is kept as given. ``schema_version``,
            ``schema_minor``, ``chronomoe_version``, ``versions``, ``files`` and ``tensors`` are filled in here.
        strict: Raise instead of warning when the state cannot be written.

    Returns:
        True once the new state is committed and synced. On False (a warning was logged) the directory holds the
        previous state, or the new one if only the last sync failed; never a mixture.

    Raises:
        StateWriteError: With `strict`, naming the directory and the cause.
    """
    try:
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
    return os.path.lexists(Path(directory) / MANIFEST_FILE)


def read_manifest(directory: str | Path) -> Meta:
    """The checked manifest of `directory`, as written (not migrated), without reading tensors.

    Raises:
        StateMissingError, StateCorruptError, StateSchemaError: As :func:`read_state`.
    """
    path = Path(directory) / MANIFEST_FILE
    return parse_manifest(_read_bytes(path, MAX_MANIFEST_BYTES), str(path))


def read_state(directory: str | Path) -> tuple[Tensors, Meta]:
    """Read and verify the state in `directory`, migrated to this version's schema.

    Returns:
        ``(tensors, meta)``: CPU tensors by name, and the manifest less its ``files`` and ``tensors`` tables.

    Raises:
        StateMissingError: There is no manifest: no state was ever committed here.
        StateCorruptError: A file is torn, altered, missing from the pair, too large, or a link out of the directory.
        StateSchemaError: Written by a newer schema, or by an older one that has no migration.
    """
    root = Path(directory)
    meta = read_manifest(root)
    path, data = _named_tensor_file(root, meta["files"][TENSOR_FILE])
    table = header_table(data, str(path))
    if table != meta["tensors"]:
        names = [name for name in sorted({*table, *meta["tensors"]}) if table.get(name) != meta["tensors"].get(name)]
        raise StateCorruptError(f"{path} holds other tensors than {MANIFEST_FILE} lists: {short(names)}; {WAY_OUT}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise StateCorruptError(f"{path} is not a safetensors file: {short(error)}; {WAY_OUT}") from None
    assert all(list(tensors[name].shape) == shape for name, (_, shape) in table.items())
    for key in ("files", "tensors", "manifest_sha256"):
        del meta[key]
    return _migrate(tensors, meta, root / MANIFEST_FILE)


def _migrate(tensors: Tensors, meta: Meta, path: Path) -> tuple[Tensors, Meta]:
    while (version := meta["schema_version"]) < STATE_SCHEMA:
        if version not in MIGRATIONS:
            raise StateSchemaError(
                f"{path} has schema version {version}, which cannot be migrated to this "
                f"version's {STATE_SCHEMA}; install chronomoe_hf {short(meta.get('chronomoe_version'))}"
            )
        tensors, meta = MIGRATIONS[version](tensors, meta)
        meta = {**meta, "schema_version": version + 1}
    return tensors, meta


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
        "files": {TENSOR_FILE: {"sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}},
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
    directory.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory)
    target, previous = directory / TENSOR_FILE, directory / PREVIOUS_FILE
    tmp_tensors, tmp_manifest = (directory / f".{name}.tmp.{os.getpid()}" for name in (TENSOR_FILE, MANIFEST_FILE))
    moved = committed = False
    try:
        _write_synced(tmp_tensors, payload)
        _write_synced(tmp_manifest, manifest)
        if _is_committed(target):
            os.replace(target, previous)
            moved = True
            _sync_directory(directory)  # the renames must reach the disk in this order
        os.replace(tmp_tensors, target)
        _sync_directory(directory)
        os.replace(tmp_manifest, directory / MANIFEST_FILE)
        committed = True
        _sync_directory(directory)
    except BaseException:
        if moved and not committed:
            with contextlib.suppress(OSError):  # if this fails too, readers still find the state in PREVIOUS_FILE
                os.replace(previous, target)
        raise
    finally:
        for leftover in (tmp_tensors, tmp_manifest):
            with contextlib.suppress(OSError):
                os.unlink(leftover)
    with contextlib.suppress(OSError):
        os.unlink(previous)


def _remove_stale(directory: Path) -> None:
    for name in os.listdir(directory):
        if _STALE_TMP.fullmatch(name):
            with contextlib.suppress(OSError):
                os.unlink(directory / name)


def _is_committed(target: Path) -> bool:
    """Whether `target` is the tensor file that the manifest beside it names (after a crash it may not be)."""
    try:
        record = read_manifest(target.parent)["files"][TENSOR_FILE]
        return _sha256(_read_bytes(target, MAX_TENSOR_BYTES)) == str(record["sha256"])
    except StateError:
        return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    # Mode 0666 less the umask, like the other files of a checkpoint (mkstemp would make it private).
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_BINARY"), 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flag(name: str) -> int:
    return getattr(os, name, 0)  # O_BINARY exists on Windows only, O_NOFOLLOW and O_NONBLOCK elsewhere


def _named_tensor_file(root: Path, record: Mapping[str, Any]) -> tuple[Path, bytes]:
    """The tensor file whose content the manifest names: the current one or, after a crash, the previous one."""
    problems = []
    for path in (root / TENSOR_FILE, root / PREVIOUS_FILE):
        try:
            data = _read_bytes(path, MAX_TENSOR_BYTES, size=record["size"])
        except StateError as error:
            problems.append(str(error))
            continue
        if _sha256(data) == record["sha256"]:
            return path, data
        problems.append(f"{path} has sha256 {_sha256(data)}, {MANIFEST_FILE} names {short(record['sha256'])}")
    raise StateCorruptError(f"{problems[0]}: torn or altered after it was saved; {WAY_OUT}")


def _roots(directory: Path) -> Iterator[Path]:
    """Where a file of `directory` may really lie: there, or in the blobs of the Hub cache it is a snapshot of."""
    yield directory
    for ancestor in directory.parents:
        if ancestor.name == "snapshots":
            yield ancestor.parent / "blobs"


def _read_bytes(path: Path, limit: int, size: int | None = None) -> bytes:
    """The content of a regular file, sized before it is read."""
    try:
        real = path.resolve(strict=True)
        if real.parent not in _roots(path.parent.resolve()):
            raise StateCorruptError(f"{path} is a link out of its directory, to {real}; copy the file there instead")
        # O_NONBLOCK: opening a FIFO must not hang.
        handle = os.open(real, os.O_RDONLY | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_BINARY"))
    except (FileNotFoundError, NotADirectoryError):
        raise StateMissingError(
            f"{path} does not exist; pass the directory of a checkpoint that was saved with chronomoe_hf"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise StateError(f"{path} cannot be read: {short(error)}; {WAY_OUT}") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise StateCorruptError(f"{path} is not a regular file; {WAY_OUT}")
        if size is not None and status.st_size != size:
            raise StateCorruptError(f"{path} has {status.st_size} bytes, {MANIFEST_FILE} names {size}; {WAY_OUT}")
        if status.st_size > limit:
            raise StateCorruptError(f"{path} has {status.st_size} bytes, at most {limit} are read; {WAY_OUT}")
        try:
            return file.read(status.st_size)
        except OSError as error:
            raise StateError(f"{path} cannot be read: {short(error)}; {WAY_OUT}") from error
