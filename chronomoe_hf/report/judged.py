"""Which windows and layers of a run a verdict is about, how far they moved since the baseline, and its numbers."""

from __future__ import annotations

from collections.abc import Iterable

from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.words import listed, percent, points
from chronomoe_hf.telemetry.baseline import ERRORS, MOVED
from chronomoe_hf.telemetry.events import COUNTS
from chronomoe_hf.telemetry.views import AlertView, LayerView

NAMED = 8  # experts of a layer that a sentence names


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


def silent_experts(run: RunData) -> dict[int, list[int]]:
    """Layer id -> ids of the experts without a token in the last window; only layers whose counts are kept."""
    frame = run.frames.get(run.windows[-1].step) if run.windows else None
    if frame is None or COUNTS not in frame.arrays:
        return {}
    counts = zip(frame.layers, frame.arrays[COUNTS], strict=True)
    return {layer: [expert for expert, count in enumerate(row) if count == 0] for layer, row in counts}


def named(layer: str | int, experts: list[int] | tuple[int, ...]) -> str:
    """``layer 3 (experts 1, 5 and 9)``; of many experts the first ones and how many more."""
    noun = "expert" if len(experts) == 1 else "experts"
    return f"layer {layer} ({noun} {listed([str(expert) for expert in experts], NAMED)})"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def measured(run: RunData) -> dict[str, float | int | None]:
    """The numbers of a run's verdict by name; what is not known is None."""
    layers = judged_layers(run)
    worst, high = lowest(layers), busiest(layers)
    change = None if worst is None else neff_change(run, worst)
    return {
        "step": run.windows[-1].step if run.windows else None,
        "windows": len(run.windows),
        "layers": len(layers),
        "experts": sum(layer.num_choices or 0 for layer in layers),
        "dead_experts": sum(int(layer.get("dead_experts") or 0) for layer in layers),
        "died_experts": sum(len(layer.died) for layer in layers),
        "neff_mean": mean_neff(layers),
        "neff_mean_change": mean_change(run),
        "neff_lowest": None if worst is None else worst.neff_fraction,
        "neff_lowest_change": change,
        "max_violation_fraction": None if high is None else high.violation_fraction,
        "alerts": len(run.windows[-1].active) if run.windows else 0,
        "alerts_urgent": sum(alert.urgent for alert in in_force(run)),
        "loss": run.loss[-1][1] if run.loss else None,
        "eval_loss": run.eval_loss[-1][1] if run.eval_loss else None,
    }


def in_force(run: RunData) -> list[AlertView]:
    """The alerts in force in the last window."""
    return list(run.windows[-1].active) if run.windows else []


def numbers_strip(run: RunData) -> list[tuple[str, str, str]]:
    """The same as ``(name, value, detail)``, the few that stand at the top of the page."""
    if not run.windows:
        return []
    layers, last = judged_layers(run), run.windows[-1]
    dead = sum(int(layer.get("dead_experts") or 0) for layer in layers)
    died = sum(len(layer.died) for layer in layers)
    experts = sum(layer.num_choices or 0 for layer in layers)
    used, change = mean_neff(layers), mean_change(run)
    worst, high = lowest(layers), busiest(layers)
    fell = None if worst is None else neff_change(run, worst)
    return [
        (
            "experts in effective use",
            percent(used),
            "mean over layers" + ("" if change is None else f", {points(change)} since the baseline"),
        ),
        (
            "fewest effective experts",
            percent(None if worst is None else worst.neff_fraction),
            ""
            if worst is None
            else f"layer {worst.layer_id}{'' if fell is None else f', {points(fell)} since the baseline'}",
        ),
        ("dead experts", str(dead), f"of {experts}, {died} died in this run"),
        (
            "imbalance of its maximum",
            percent(None if high is None else high.violation_fraction),
            "" if high is None else f"layer {high.layer_id}",
        ),
        ("alerts in force", str(len(last.active)), f"{sum(a.urgent for a in last.active)} urgent, step {last.step}"),
    ]
