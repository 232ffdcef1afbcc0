"""Which windows and layers of a run a verdict is about, and how far they moved since the baseline."""

from __future__ import annotations

from collections.abc import Iterable

from chronomoe_hf.report.data import RunData
from chronomoe_hf.telemetry.baseline import ERRORS, MOVED
from chronomoe_hf.telemetry.views import LayerView


def judged_layers(run: RunData) -> list[LayerView]:
    """Every layer as its newest window with enough evidence shows it; as the newest window at all where none has."""
    found: dict[int, LayerView] = {}
    for window in reversed(run.windows):
        for layer in window.layers:
            if layer.index not in found or (layer.sufficient and not found[layer.index].sufficient):
                found[layer.index] = layer
        if len(found) == len(window.layers) and all(layer.sufficient for layer in found.values()):
            break
    return [found[index] for index in sorted(found)]


def mean_neff(layers: Iterable[LayerView]) -> float | None:
    """Mean over layers of the fraction of the experts in effective use."""
    known = [fraction for layer in layers if (fraction := layer.neff_fraction) is not None]
    return sum(known) / len(known) if known else None


def neff_change(run: RunData, layer: LayerView) -> float | None:
    """How much the fraction of experts in effective use changed in a layer since the baseline.

    Records of older versions hold no baseline: their first window with evidence stands for it.
    """
    if "n_effective" in layer.change and layer.num_choices:
        return layer.change["n_effective"] / layer.num_choices
    first = _first(run, layer)
    if first is None or first.neff_fraction is None or layer.neff_fraction is None:
        return None
    return layer.neff_fraction - first.neff_fraction


def _first(run: RunData, layer: LayerView) -> LayerView | None:
    for window in run.windows:
        for seen in window.layers:
            if seen.index == layer.index and seen.sufficient and seen.neff_fraction is not None:
                return seen
    return None


def mean_change(run: RunData) -> float | None:
    """Mean over layers of :func:`neff_change`."""
    known = [change for layer in judged_layers(run) if (change := neff_change(run, layer)) is not None]
    return sum(known) / len(known) if known else None


def busier(run: RunData, layer: LayerView) -> bool:
    """Whether the busiest expert of a layer got busier than at the baseline, beyond the error of that."""
    change, error = layer.change.get("max_violation"), layer.error.get("max_violation")
    if change is None:
        first, now = _first(run, layer), layer.violation_fraction
        return first is not None and now is not None and now - (first.violation_fraction or 0.0) > MOVED
    ceiling = layer.get("max_violation_ceiling") or 0.0
    return change > max(ERRORS * (error or 0.0), MOVED * ceiling)


def lowest(layers: list[LayerView]) -> LayerView | None:
    """The layer with the smallest Neff/E."""
    known = [layer for layer in layers if layer.neff_fraction is not None]
    return min(known, key=lambda layer: layer.neff_fraction or 0.0, default=None)


def busiest(layers: list[LayerView]) -> LayerView | None:
    """The layer with the largest violation relative to its ceiling."""
    known = [layer for layer in layers if layer.violation_fraction is not None]
    return max(known, key=lambda layer: layer.violation_fraction or 0.0, default=None)
