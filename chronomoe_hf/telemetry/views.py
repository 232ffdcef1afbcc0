"""Records as a reader may trust them: numbers that are numbers, text that is text, layers that say which they are.

Files can be torn, old, or written by someone else. A :class:`Window` holds only what passed; everything that a reader
shows comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
        change: name -> how much a number changed since the run's baseline; empty without one.
        error: name -> standard error of the change.
        died: experts that worked at the baseline and have had no token for too long to be chance.
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
    change: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    died: list[int] = field(default_factory=list)

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
    """One alert as a reader shows it; `layer_id` None for the whole model, `since` as in :class:`Alert`."""

    kind: str
    layer_id: str | None
    state: str
    step: int | None
    detail: str
    since: str | None = None

    @property
    def urgent(self) -> bool:
        """Whether it asks for action: everything in force but a level at which the model came."""
        return self.state != "cleared" and self.since != "as_it_came"

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
        change=_by_name(record.get("change")),
        error=_by_name(record.get("error")),
        died=_whole_numbers(record.get("died")),
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
            since=item.get("since") if item.get("since") in ("as_it_came", "got_worse") else None,
        )
        for item in items
        if isinstance(item, Mapping)
    ]


def _by_name(values: Any) -> dict[str, float]:
    items = values.items() if isinstance(values, Mapping) else ()
    return {plain_text(name, 40): known for name, value in items if (known := number(value)) is not None}


def _whole_numbers(values: Any) -> list[int]:
    return [known for value in values if (known := whole(value)) is not None] if isinstance(values, list) else []


def _texts(values: Any) -> list[str]:
    return [plain_text(value) for value in values] if isinstance(values, list) else []


# The dry-run lifecycle read back: per expert the latest state of each case against it.

EVIDENCE = ("total_tokens_seen", "share", "phi_slow", "contribution", "contribution_rank", "saliency")


def last_cases(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last state of every case, in order of layer and expert.

    Args:
        records: lines of ``lifecycle_decisions.jsonl``, oldest first.

    Returns:
        Per (layer, expert, reason): ``state``, ``step``, ``streak``, ``threshold``, :data:`EVIDENCE` and
        ``num_experts``; names are printable text, numbers finite or None.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in records:
        if record.get("expert") is None:
            continue
        evidence = record.get("evidence")
        evidence = evidence if isinstance(evidence, Mapping) else {}
        layer, expert, reason = (plain_text(record.get(part), 40) for part in ("layer_id", "expert", "reason"))
        found[layer, expert, reason] = {
            "layer_id": layer,
            "expert": expert,
            "reason": reason,
            "state": plain_text(record.get("state"), 40),
            "step": number(record.get("step")),
            "streak": number(record.get("streak")),
            "threshold": number(record.get("threshold")),
            **{part: number(evidence.get(part)) for part in EVIDENCE},
            "num_experts": number(evidence.get("n_experts", evidence.get("num_experts"))),
        }
    return [found[key] for key in sorted(found, key=lambda key: [(len(part), part) for part in key])]


# Roles and proposals read back from records: printable names, finite numbers, and nothing that a reader must check.

T = TypeVar("T")
PAIR = ("score", "cosine", "centred", "agreement", "shared")
TWO = ("score", "separation", "balance")
ENERGY = ("total", "incoherence", "size", "duplicates", "two_roles")


def last_proposals(
    records: Iterable[Mapping[str, Any]], effects: Iterable[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The last state of every merge, split and spawn, in order of layer and experts.

    Args:
        records: lines of ``lifecycle_decisions.jsonl``, oldest first.
        effects: lines of ``lifecycle_effects.jsonl``, oldest first.

    Returns:
        Per proposal: ``layer_id``, ``proposal``, ``experts`` (as text), ``state``, ``step``, ``streak``, ``score``
        (of a merge or a split; else None), ``competing`` (the edits as text, the proposal itself first),
        ``measured``: the newest rise of the loss under each edit that was measured, nats a token, by its text;
        ``loads``: by the text of a split or spawn that was measured, which experts shared the load and what it was
        before and after, in fair shares: ``(experts, before, after)``; and ``unmeasured``: why an edit was not.
    """
    newest = {_key(record): _edits(record.get("edits")) for record in effects if record.get("proposal") is not None}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in records:
        kind = record.get("proposal")
        if kind not in ("merge", "split", "spawn"):
            continue
        evidence = record.get("evidence")
        layer, _, experts = key = _key(record)
        found[key] = {
            "layer_id": layer,
            "proposal": str(kind),
            "experts": experts,
            "state": plain_text(record.get("state"), 40),
            "step": number(record.get("step")),
            "streak": number(record.get("streak")),
            "score": number(evidence.get("score")) if isinstance(evidence, Mapping) else None,
            "competing": list(_edits(record.get("competing"))),
            "measured": _rises(newest.get(key, {})),
            "loads": _loads(newest.get(key, {})),
            "unmeasured": _reasons(newest.get(key, {})),
        }
    return [found[key] for key in sorted(found, key=lambda key: [(len(part), part) for part in key])]


def _ids(value: Any) -> str:
    ids = value if isinstance(value, list) else []
    return " ".join(plain_text(each, 20) for each in ids[:8])


def _key(record: Mapping[str, Any]) -> tuple[str, str, str]:
    kind = plain_text(record.get("proposal"), 20)
    return plain_text(record.get("layer_id"), 40), kind, _ids(record.get("experts"))


def _edits(value: Any) -> dict[str, Mapping[str, Any]]:
    edits = [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
    return {f"{plain_text(each.get('edit'), 20)} {_ids(each.get('experts'))}".strip(): each for each in edits[:8]}


def _rises(edits: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    rises = {name: number(each.get("delta_loss")) for name, each in edits.items()}
    return {name: rise for name, rise in rises.items() if rise is not None}


def _loads(edits: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float], list[float]]]:
    found = {}
    for name, each in edits.items():
        experts = _known(whole(each.get(which)) for which in ("donor", "target"))
        before, after = (_pair(each.get(f"fair_shares_{when}")) for when in ("before", "after"))
        if len(experts) == len(before) == len(after) == 2:
            found[name] = experts, before, after
    return found


def _pair(value: Any) -> list[float]:
    return _known(map(number, value)) if isinstance(value, list) and len(value) == 2 else []


def _known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _reasons(edits: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    reasons = {name: each.get("reason") for name, each in edits.items()}
    return {name: plain_text(reason, 300) for name, reason in reasons.items() if isinstance(reason, str)}


def roles_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The roles in a snapshot record, layer by layer; layers without any are left out.

    Returns:
        Per layer: ``layer_id``, ``pairs`` (``first``, ``second`` and PAIR), ``two_roles`` (``expert`` and TWO),
        ``free_energy`` (ENERGY) and ``basin`` (its number, or None).
    """
    layers = record.get("layers")
    out = []
    for layer in layers if isinstance(layers, list) else []:
        roles = layer.get("roles") if isinstance(layer, Mapping) else None
        if not isinstance(roles, Mapping):
            continue
        history = roles.get("history")
        out.append(
            {
                "layer_id": plain_text(layer.get("layer_id"), 40),
                "pairs": _rows(roles.get("pairs"), ("first", "second"), PAIR),
                "two_roles": _rows(roles.get("two_roles"), ("expert",), TWO),
                "free_energy": _numbers(roles.get("free_energy"), ENERGY),
                "basin": whole(history.get("basin")) if isinstance(history, Mapping) else None,
            }
        )
    return out


def _rows(value: Any, ids: tuple[str, ...], names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []
    known = [row for row in rows if all(whole(row.get(name)) is not None for name in ids)]
    return [{**{name: whole(row.get(name)) for name in ids}, **_numbers(row, names)} for row in known]


def _numbers(value: Any, names: tuple[str, ...]) -> dict[str, float | None]:
    table = value if isinstance(value, Mapping) else {}
    return {name: number(table.get(name)) for name in names}
