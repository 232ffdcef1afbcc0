"""Records as a reader may trust them: numbers that are numbers, text that is text, layers that say which they are.

Files can be torn, old, or written by someone else. A :class:`Window` holds only what passed; everything that a reader
shows comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chronomoe_hf.telemetry.layers import LAYER_NUMBERS

_TEXT_LIMIT = 2000
_LARGEST = 1e100  # what is larger is no measurement, and its differences and squares would not be finite


def number(value: Any) -> float | None:
    """A number of a record as float, finite and within +-1e100; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) <= _LARGEST else None  # False for NaN


def whole(value: Any, low: int = 0, high: int = 2**53) -> int | None:
    """A whole number of a record within [low, high]; None for anything else."""
    known = number(value)
    return int(known) if known is not None and known == int(known) and low <= known <= high else None


def plain_text(value: Any, limit: int = _TEXT_LIMIT) -> str:
    r"""`value` as printable text: control characters, line breaks and lone surrogates become ``\x1b``-like escapes."""
    text = value if isinstance(value, str) else str(value)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit])
    return shown + (" ..." if len(text) > limit else "")


@dataclass(frozen=True)
class LayerView:
    """One layer of a window.

    Attributes:
        layer_id: as recorded, as text that can be shown.
        index: layer_id as a number; the position in the record where it is none.
        name: path of the router.
        num_experts, top_k: E and k; None where the record does not say.
        numbers: name -> finite number; what is missing or no number is left out.
        observed, sufficient: as recorded.
        notes: remarks.
    """

    layer_id: str
    index: int
    name: str
    num_experts: int | None
    top_k: int | None
    numbers: dict[str, float]
    observed: bool
    sufficient: bool
    notes: list[str]
    num_cut: int = 0

    def get(self, name: str) -> float | None:
        """One number, None without evidence."""
        return self.numbers.get(name)

    @property
    def neff_fraction(self) -> float | None:
        """n_effective / E, or over the experts that are left where some were cut."""
        neff = self.get("n_effective")
        return None if neff is None or not self.num_choices else neff / self.num_choices

    @property
    def num_choices(self) -> int | None:
        """Experts that a token can be given to: all but those that were cut."""
        return None if self.num_experts is None else max(1, self.num_experts - self.num_cut)

    @property
    def violation_fraction(self) -> float | None:
        """max_violation as a fraction of its ceiling E/k - 1; None where the ceiling is 0."""
        violation, ceiling = self.get("max_violation"), self.get("max_violation_ceiling")
        return None if violation is None or not ceiling else number(violation / ceiling)


@dataclass(frozen=True)
class AlertView:
    """One alert as a reader shows it; `layer_id` None for the whole model."""

    kind: str
    layer_id: str | None
    state: str
    step: int | None
    detail: str

    @property
    def where(self) -> str:
        """``layer 3`` or ``run``."""
        return "run" if self.layer_id is None else f"layer {self.layer_id}"


@dataclass(frozen=True)
class Window:
    """One snapshot record.

    Attributes:
        step: optimizer step at its end.
        attempt: start or resume that wrote it.
        time: seconds since the epoch, None where not recorded.
        run_id, model_name: text that can be shown.
        layers: in order of their ids.
        alerts: edges of this window.
        active: alerts in force after it.
        scalars: finite numbers of the whole model.
        notes: remarks.
    """

    step: int
    attempt: int
    time: float | None
    run_id: str
    model_name: str
    layers: list[LayerView]
    alerts: list[AlertView]
    active: list[AlertView]
    scalars: dict[str, float]
    notes: list[str]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Window | None:
        """The window of one record of ``snapshots.jsonl``; None where it has no step or no list of layers."""
        step = whole(record.get("step"))
        layers = record.get("layers")
        if step is None or not isinstance(layers, list):
            return None
        views = [_layer(layer, at) for at, layer in enumerate(layers) if isinstance(layer, Mapping)]
        scalars = record.get("scalars")
        own = {**(scalars if isinstance(scalars, Mapping) else {}), **{n: record.get(n) for n in _LOSSES}}
        return cls(
            step=step,
            attempt=whole(record.get("attempt")) or 0,
            time=number(record.get("time")),
            run_id=plain_text(record.get("run_id")),
            model_name=plain_text(record.get("model_name") or ""),
            layers=sorted(views, key=lambda layer: layer.index),
            alerts=alert_views(record.get("alerts")),
            active=alert_views(record.get("active_alerts")),
            scalars={str(n): known for n, value in own.items() if (known := number(value)) is not None},
            notes=_texts(record.get("notes")),
        )


_LOSSES = ("train_loss", "val_loss")


def _layer(record: Mapping[str, Any], at: int) -> LayerView:
    numbers = {name: known for name in LAYER_NUMBERS if (known := number(record.get(name))) is not None}
    index = whole(record.get("layer_id"))
    return LayerView(
        layer_id=plain_text(record.get("layer_id"), 40),
        index=at if index is None else index,
        name=plain_text(record.get("layer_name") or ""),
        num_experts=whole(record.get("n_experts", record.get("num_experts")), 1),
        top_k=whole(record.get("top_k"), 1),
        numbers=numbers,
        observed=record.get("observed") is not False,
        sufficient=record.get("sufficient") is not False,
        notes=_texts(record.get("notes")),
        num_cut=whole(record.get("cut_experts")) or 0,
    )


def alert_views(records: Any) -> list[AlertView]:
    """The alerts of a list of records; what is no mapping is left out."""
    items: Iterable[Any] = records if isinstance(records, list) else ()
    return [
        AlertView(
            kind=plain_text(item.get("kind"), 80),
            layer_id=None if item.get("layer_id") is None else plain_text(item.get("layer_id"), 40),
            state=plain_text(item.get("state"), 40),
            step=whole(item.get("step")),
            detail=plain_text(item.get("detail") or ""),
        )
        for item in items
        if isinstance(item, Mapping)
    ]


def _texts(values: Any) -> list[str]:
    return [plain_text(value) for value in values] if isinstance(values, list) else []
