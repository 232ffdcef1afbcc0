"""The dry-run lifecycle read back: per expert the last word on each case against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from chronomoe_hf.telemetry.views import number, plain_text

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
