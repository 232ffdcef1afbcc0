"""Strict JSON, and files that are written whole or not at all; no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from chronomoe_hf.errors import ChronoError


def parse_json(text: str, what: str, error: type[ChronoError]) -> Any:
    """Strict JSON (no NaN, no infinities).

    Raises:
        ChronoError: (of the class `error`) the text is not JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON ({problem}); write it with save()") from None


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a whole file or nothing: temporary file beside it, fsync, rename. Raises OSError as the system does."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """:func:`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], data: Any, *, indent: int | None = 1, sort_keys: bool = False) -> Path:
    """:func:`write_text` of strict JSON with a newline at its end. Raises ValueError for NaN and infinities."""
    return write_text(path, json.dumps(data, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of the weight index of a sharded safetensors checkpoint.

    Raises:
        ValueError: it cannot be read, is no index, or names something that is no plain file name.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
            raise ValueError("file names must lie in the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return dict(names)
