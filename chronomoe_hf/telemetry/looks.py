"""A window as a card, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from chronomoe_hf.pictures.loads import Load, load_picture
from chronomoe_hf.pictures.shown import Looks
from chronomoe_hf.telemetry.alerts import Alert
from chronomoe_hf.telemetry.layers import LayerSnapshot

_PER_EXPERT = ("phi_fast", "phi_mid", "phi_slow", "contribution", "saliency", "beta")


class Windowlike(Protocol):
    """What is shown of a SystemSnapshot."""

    step: int
    mode: Any
    model_name: str
    layers: list[LayerSnapshot]
    active_alerts: list[Alert]


def window_looks(window: Windowlike) -> Looks:
    """How a window shows itself."""
    used = [layer.n_effective / layer.num_choices for layer in window.layers if layer.n_effective is not None]
    dead = [layer.dead_experts for layer in window.layers if layer.dead_experts is not None]
    experts = sum(layer.num_choices for layer in window.layers)
    moved = [
        change / layer.num_choices for layer in window.layers if (change := layer.change.get("n_effective")) is not None
    ]
    numbers = [("experts in use", f"{100 * sum(used) / len(used):.0f} %" if used else "-")]
    if moved:
        numbers.append(("since the baseline", f"{100 * sum(moved) / len(moved):+.1f} points"))
    numbers += [("dead", f"{sum(dead)} of {experts}"), ("alerts", str(len(window.active_alerts)))]
    where = f"{window.model_name}, " if window.model_name else ""
    kinds = sorted({alert.kind for alert in window.active_alerts})
    said = f"In force: {', '.join(kinds)}." if kinds else "No alert is in force."
    return Looks(
        title=f"Routing at step {window.step}",
        sentence=f"{where}{len(window.layers)} MoE layers, {window.mode}. {said}",
        numbers=numbers,
        rows=lambda: _rows(window.step, window.layers),
        picture=lambda: load_picture(
            [Load(str(layer.layer_id), _counts(layer), layer.top_k) for layer in window.layers],
            f"Who does the work at step {window.step}",
        ),
        hint=".to_pandas() has a row for every expert; chronomoe report makes the page",
    )


def _counts(layer: LayerSnapshot) -> list[float | None]:
    cut = set(layer.cut)
    return [None if expert in cut else count for expert, count in enumerate(layer.expert_token_counts)]


def _rows(step: int, layers: Sequence[LayerSnapshot]) -> list[dict[str, Any]]:
    """A row for every expert of every layer."""
    rows = []
    for layer in layers:
        vectors = {name: getattr(layer, name) for name in _PER_EXPERT}
        for expert, count in enumerate(layer.expert_token_counts):
            rows.append(
                {
                    "step": step,
                    "layer": layer.layer_id,
                    "expert": expert,
                    "assignments": count,
                    "share": None if layer.shares is None else layer.shares[expert],
                    "cut": expert in layer.cut,
                    **{name: None if vector is None else vector[expert] for name, vector in vectors.items()},
                }
            )
    return rows
