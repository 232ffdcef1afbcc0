"""Roles and proposals read back from records: printable names, finite numbers, and nothing that a reader must check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from chronomoe_hf.telemetry.views import number, plain_text, whole

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
