"""The plots of a profile: what differs between its domains, and which experts work together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chronomoe_hf.metrics import effective_experts
from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure, percent, quantise
from chronomoe_hf.report.words import counted
from chronomoe_hf.telemetry.views import number, plain_text, whole

MOST_DOMAINS = 60
MOST_PAIRS = 40
_LONGEST = 24  # characters of a domain's name on an axis


def domain_names(run: RunData) -> list[str]:
    """Names of the domains in order; empty where the directory is no profile."""
    domains = run.profile.get("domains")
    entries = [entry for entry in domains if isinstance(entry, dict)] if isinstance(domains, list) else []
    return [plain_text(entry.get("name"), 80) for entry in entries]


def domains(run: RunData) -> list[Figure]:
    """A table of the domains with the distance of their loads, and the pairs of experts that work together."""
    names = domain_names(run)
    entries = [entry for entry in run.profile["domains"] if isinstance(entry, dict)]
    rows = [_row(name, entry) for name, entry in zip(names, entries, strict=True)]
    head = ["domain", "tokens", "loss, nats", "mean Neff / E", "experts without a token"]
    distance = _distance(run, len(names))
    spec = None
    if distance is not None and 2 < len(names) <= MOST_DOMAINS:  # of two there is one number: the sentence has it
        labels = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..." for name in names]
        spec = {
            "kind": "grid",
            "rows": labels,
            "columns": labels,
            "row_name": "domain",
            "column_name": "domain",
            "cells": quantise(distance, 0.0, 1.0),
            "low": 0.0,
            "high": 1.0,
            "unit": "distance",
            "scale": "sequential",
            "frames": [],
        }
    note = "Distance: Jensen-Shannon distance of the loads, mean over layers: 0 is the same, 1 is no expert shared."
    text = _sentence(names, distance)
    pairs = _pairs(names, entries)
    figures = [Figure("domains", "Domains", text, spec, head, rows, note if len(names) > 1 else "")]
    if pairs:
        figures.append(
            Figure(
                "pairs",
                "Experts that work together",
                f"Experts {pairs[0][2]} of layer {pairs[0][1]} are chosen together {pairs[0][4]} times as often on "
                f"{pairs[0][0]} as they would be by chance.",
                None,
                ["domain", "layer", "experts", "tokens", "times chance"],
                pairs,
            )
        )
    return figures


def _row(name: str, entry: dict[str, Any]) -> list[str]:
    counts = entry.get("counts")
    rows = [row for row in counts if isinstance(row, list)] if isinstance(counts, list) else []
    known = [[whole(count) or 0 for count in row] for row in rows if row]
    parts = [used / len(row) for row in known if (used := effective_experts(row)) is not None]
    dead = sum(count == 0 for row in known for count in row)
    loss, tokens = number(entry.get("loss")), whole(entry.get("tokens"))
    return [
        name,
        "-" if tokens is None else f"{tokens:,}",
        "-" if loss is None else f"{loss:.4f}",
        percent(sum(parts) / len(parts) if parts else None),
        str(dead),
    ]


def _distance(run: RunData, size: int) -> np.ndarray[Any, Any] | None:
    record = run.profile.get("distance")
    rows = record.get("mean") if isinstance(record, dict) else None
    if not isinstance(rows, list) or len(rows) != size or any(not isinstance(r, list) or len(r) != size for r in rows):
        return None
    known = [[number(value) for value in row] for row in rows]
    return np.array([[math.nan if value is None else value for value in row] for row in known])


def _sentence(names: list[str], distance: np.ndarray[Any, Any] | None) -> str:
    text = f"The text of {counted(len(names), 'domain')} went through the model"
    if distance is None or len(names) < 2:
        return f"{text}."
    apart = np.where(np.eye(len(names), dtype=bool), -1.0, np.nan_to_num(distance, nan=-1.0))
    one, other = np.unravel_index(int(np.argmax(apart)), apart.shape)
    far = f"{names[one]} and {names[other]} differ most in the experts they use"
    return f"{text}; {far} (distance {apart[one, other]:.2f})."


def _pairs(names: list[str], entries: list[dict[str, Any]]) -> list[list[str]]:
    found: list[tuple[float, list[str]]] = []
    for name, entry in zip(names, entries, strict=True):
        layers = entry.get("pairs")
        for layer, pairs in enumerate(layers if isinstance(layers, list) else []):
            for pair in pairs if isinstance(pairs, list) else []:
                lift = number(pair.get("lift")) if isinstance(pair, dict) else None
                experts = pair.get("experts") if isinstance(pair, dict) else None
                if lift is not None and isinstance(experts, list):
                    both = " and ".join(plain_text(expert, 20) for expert in experts[:2])
                    found.append((lift, [name, str(layer), both, plain_text(pair.get("tokens"), 20), f"{lift:.1f}"]))
    return [row for _, row in sorted(found, key=lambda item: -item[0])[:MOST_PAIRS]]
