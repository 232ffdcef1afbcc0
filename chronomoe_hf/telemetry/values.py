"""Numbers on their way in (tensors to plain lists) and out (plain lists to strict JSON).

Shape suffixes: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chronomoe_hf.errors import ConfigError

_SIGNIFICANT = 7  # decimal digits kept in records: what a float32 carries


def finite(value: float | int | None) -> float | int | None:
    """`value` as a plain Python number rounded to 7 significant digits; None for None, NaN and infinities."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.{_SIGNIFICANT}g}") if math.isfinite(value) else None


def finite_list(values: Sequence[float | None] | None) -> list[float | int | None] | None:
    """:func:`finite` over a vector in one numpy pass (records of 48 layers x 128 experts are written per window)."""
    if values is None:
        return None
    if all(type(value) is int for value in values):
        return list(values)
    raw_E = np.array(values, dtype=np.float64)  # None becomes NaN
    ok_E = np.isfinite(raw_E)
    size_E = np.abs(np.where(ok_E, raw_E, 0.0))
    digits_E = _SIGNIFICANT - 1 - np.floor(np.log10(size_E, out=np.zeros_like(size_E), where=size_E > 0.0))
    digits_E = np.clip(digits_E, -300.0, 300.0)
    # Scale by a power of ten that is an exact float, on whichever side it is one, so that the result prints shortly.
    up_E, down_E = 10.0 ** np.maximum(digits_E, 0.0), 10.0 ** np.maximum(-digits_E, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded_E = np.rint(np.where(ok_E, raw_E, 0.0) * up_E / down_E) * down_E / up_E
    rounded_E = np.where(np.isfinite(rounded_E), rounded_E, raw_E)
    return [value if good else None for value, good in zip(rounded_E.tolist(), ok_E.tolist(), strict=True)]


def evidence_rows(value_LE: np.ndarray[Any, Any]) -> list[list[Any]]:
    """Rows ``[L, E]`` as lists of Python floats; None ("no evidence") for NaN and infinities."""
    rows: list[list[Any]] = value_LE.tolist()
    known_LE = np.isfinite(value_LE)
    for at in np.flatnonzero(~known_LE.all(-1)).tolist():
        rows[at] = [value if ok else None for value, ok in zip(rows[at], known_LE[at].tolist(), strict=True)]
    return rows


def plain_number(value: Any) -> Any:
    """A Python number from a tensor or a numpy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def plain_list(name: str, values: Any, n_experts: int) -> list[Any]:
    """A list of `n_experts` Python numbers from a tensor, array or sequence; raises ConfigError for another length."""
    if hasattr(values, "tolist"):  # a tensor or an array; torch itself is not imported for reading records
        shape = tuple(values.shape)
        out = values.tolist()
    else:
        out = [plain_number(value) for value in values]
        shape = (len(out),)
    if shape != (n_experts,):
        raise ConfigError(f"{name} must hold one value per expert, shape ({n_experts},), got {shape}")
    return out


def plain_counts(values: Any, n_experts: int) -> list[int]:
    """Assignments per expert as ints; raises ConfigError for anything that cannot be a count."""
    out = plain_list("used_capacity", values, n_experts)
    for value in out:
        if not (math.isfinite(value) and value >= 0 and value == int(value)):
            raise ConfigError(f"used_capacity counts assignments: whole numbers >= 0, got {value!r}")
    return [int(value) for value in out]


def known(value: float | int | None) -> float | int | None:
    """`value`, or None where it is NaN or infinite: both mean "no evidence"."""
    return value if value is None or math.isfinite(value) else None
