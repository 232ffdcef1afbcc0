"""What the controller remembers about one layer between evaluations."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from chronomoe_hf.errors import StateCorruptError


@dataclass
class ControlState:
    """Control memory of one MoE layer.

    Every number is a Python float or int, so that JSON (shortest-repr floats) restores it bit for bit.

    Attributes:
        pressure: moving average of the topology debt, in [0, 1].
        integral: leaky integral of the shortfall, in [0, scale_max].
        harm_backoff: factor on the lens scale, in [harm.floor, 1].
        harm_hold: evaluations left in which harm_backoff does not recover.
        last_scale: lens scale set at the last evaluation, logit standard deviations.
        last_top2: relative top-2 share at the last evaluation with evidence, None before the first and after harm.
        last_step: optimizer step of the last evaluation, None before the first.
        num_evaluations, num_abstained, num_harms: counts since the start of the run.
    """

    pressure: float = 0.0
    integral: float = 0.0
    harm_backoff: float = 1.0
    harm_hold: int = 0
    last_scale: float = 0.0
    last_top2: float | None = None
    last_step: int | None = None
    num_evaluations: int = 0
    num_abstained: int = 0
    num_harms: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary of every field."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, data: Any) -> Self:
        """Inverse of :meth:`state_dict`.

        Raises:
            StateCorruptError: fields are missing, unknown, or not finite numbers.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        found = set(data) if isinstance(data, dict) else set()
        if found != names:
            raise StateCorruptError(
                f"controller state has fields {sorted(found)}, expected {sorted(names)}; "
                "load an intact checkpoint or start the controller fresh"
            )
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            values[item.name] = _number(item.name, data[item.name], str(item.type))
        return cls(**values)


def _number(name: str, value: Any, kind: str) -> float | int | None:
    """`value` checked against a field's annotation ("float", "int", or either with "| None")."""
    if value is None and kind.endswith("None"):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (kind.startswith("int") and not isinstance(value, int)):
        raise StateCorruptError(
            f"controller state: {name} must be a finite {kind}, got {value!r}; use an intact checkpoint"
        )
    return int(value) if kind.startswith("int") else float(value)
