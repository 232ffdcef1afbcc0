"""Records of older schemas under today's names. Plain dictionaries in and out; imports no torch.

Schema 1 had other names for five fields (see ``_NAMES_1``); a lifecycle decision named its expert by number, and had
Phi_slow and tokens among its evidence only.
"""

from __future__ import annotations

from typing import Any

from chronomoe_hf.metrics import expert_name
from chronomoe_hf.telemetry.events import RECORD_SCHEMA

_NAMES_1 = {
    "counts": "expert_token_counts",
    "assignments": "token_count",
    "dead": "dead_experts",
    "nearly_dead": "nearly_dead_count",
    "tokens_seen": "total_tokens_seen",
}
# Parts of a record in which these names occurred, beside its own fields.
_PARTS_1 = ("observed", "evidence")


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with today's names; one of today, or of no known schema, as it is."""
    return _from_1(record) if record.get("schema") == 1 else record


def _from_1(record: dict[str, Any]) -> dict[str, Any]:
    out = {**_renamed(record), "schema": RECORD_SCHEMA}
    if isinstance(layers := out.get("layers"), list):
        out["layers"] = [_renamed(layer) for layer in layers]
    for name in _PARTS_1:
        if name in out:
            out[name] = _renamed(out[name])
    evidence, layer_id, expert = out.get("evidence"), out.get("layer_id"), out.get("expert_id")
    if isinstance(evidence, dict) and isinstance(layer_id, int) and isinstance(expert, int):
        out |= {"expert_id": expert_name(layer_id, expert), "expert": expert}
        out |= {name: evidence.get(name) for name in ("phi_slow", "total_tokens_seen")}
    return out


def _renamed(part: Any) -> Any:
    """A dictionary with today's keys, in its order; anything else as it is. A key of today is never overwritten."""
    if not isinstance(part, dict):
        return part
    return {(new if (new := _NAMES_1.get(key, key)) == key or new not in part else key): part[key] for key in part}
