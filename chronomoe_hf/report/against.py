"""What changed since a baseline: a run or a profile set against one from before, layer by layer.

Shape suffixes: E experts of the layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chronomoe_hf import metrics
from chronomoe_hf.errors import TelemetryError
from chronomoe_hf.report.data import RunData, profile_counts
from chronomoe_hf.report.figures import Figure
from chronomoe_hf.report.pictures import changed_picture
from chronomoe_hf.report.words import counted, percent, points
from chronomoe_hf.telemetry.baseline import ERRORS, sampling_errors, share_errors
from chronomoe_hf.telemetry.events import COUNTS
from chronomoe_hf.telemetry.views import number, plain_text, whole


def against(run: RunData, before: RunData) -> Figure:
    """A table of every layer before and after, with what it moved and what chance alone would move.

    Args:
        run: after: a run (its last window) or a profile (sums over all its text).
        before: the same from before.

    Raises:
        TelemetryError: the two are of models with other layers, or one of them holds no counts.
    """
    now, then = load_of(run), load_of(before)
    if [len(row) for row in now] != [len(row) for row in then]:
        raise TelemetryError(
            f"{run.directory} and {before.directory} are of models with other MoE layers "
            f"({_shape(now)} against {_shape(then)}), so there is no before and after"
        )
    top_k = _top_k(run) or _top_k(before)
    rows, moved, chance, fell = [], [], [], []
    for layer, (after_E, before_E) in enumerate(zip(now, then, strict=True)):
        k = top_k.get(layer, 1)
        share, error = moved_share(before_E, after_E, k)
        one, two = (metrics.load_metrics(counts, k) for counts in (before_E, after_E))
        moved.append(share)
        chance.append(error)
        change = math.nan
        if one.n_effective is not None and two.n_effective is not None:
            change = (two.n_effective - one.n_effective) / len(after_E)
        of = [sampling_errors(counts, k).n_effective or 0.0 for counts in (before_E, after_E)]
        wide = ERRORS * math.hypot(*of) / len(after_E)
        fell += [layer] if change < -wide else []
        rows.append(
            [
                str(layer),
                percent(None if one.n_effective is None else one.n_effective / len(before_E)),
                percent(None if two.n_effective is None else two.n_effective / len(after_E)),
                "-" if math.isnan(change) else points(change),
                f"{one.dead_experts or 0} to {two.dead_experts or 0}",
                f"{100 * share:.1f} %",
                f"{100 * error:.1f} %",
            ]
        )
    names = before.directory.resolve().name, run.directory.resolve().name
    mean, by_chance = _mean(moved), _mean(chance)
    text = (
        f"From {names[0]} to {names[1]}, {100 * mean:.1f} % of the assignments went to other experts (mean over "
        f"layers; two samples of the same routing would differ by about {100 * by_chance:.1f} %)."
    )
    text += f" {counted(len(fell), 'layer')} use fewer experts than before, beyond chance." if fell else ""
    text += _losses(run, before)
    head = ["layer", "experts in use before", "after", "change", "without a token", "assignments moved", "by chance"]
    note = "Of the same text, this is what training changed; of other text, it is that and the text. "
    note += "Assignments moved: half the sum of the differences of the shares."
    each_k = [top_k.get(layer, 1) for layer in range(len(now))]
    picture = changed_picture(then, now, each_k, names)
    return Figure("against", f"What changed since {names[0]}", text, None, head, rows, note, picture)


def moved_share(before: list[int], after: list[int], top_k: int) -> tuple[float, float]:
    """Total variation distance of two loads, and what two samples of the same routing would have of it.

    Args:
        before: assignments per expert, length E.
        after: the same later.
        top_k: experts per token.
    """
    shares = [np.asarray(counts, dtype=np.float64) / max(1, sum(counts)) for counts in (before, after)]
    errors = [np.asarray(share_errors(counts, top_k)) for counts in (before, after) if sum(counts)]
    if len(errors) < 2:
        return 0.0, 0.0
    # The mean of |x| of a normal x with standard deviation s is s sqrt(2 / pi).
    chance = 0.5 * math.sqrt(2.0 / math.pi) * float(np.hypot(*errors).sum())
    return 0.5 * float(np.abs(shares[0] - shares[1]).sum()), chance


def load_of(run: RunData) -> list[list[int]]:
    """Assignments per layer and expert: of a profile over all its text, of a run in its last window.

    Raises:
        TelemetryError: it holds none.
    """
    if run.profile:
        found = profile_counts(run)
    else:
        frame = run.frames[max(run.frames)] if run.frames else None
        found = [] if frame is None else [_row(frame.row(COUNTS, layer)) for layer in frame.layers]
    if not any(map(sum, found)):
        raise TelemetryError(f"{run.directory} holds no counts of experts, so nothing can be set against it")
    return found


def _row(values: Any) -> list[int]:
    return [whole(value) or 0 for value in values or []]


def _top_k(run: RunData) -> dict[int, int]:
    layers = run.windows[-1].layers if run.windows else []
    return {layer.index: layer.top_k for layer in layers if layer.top_k}


def _losses(run: RunData, before: RunData) -> str:
    """Loss by domain, where both are profiles of domains of the same names."""
    one, two = _by_domain(before), _by_domain(run)
    parts = [f"{name} {one[name]:.3f} to {two[name]:.3f}" for name in two if name in one]
    return f" Loss, nats a token: {', '.join(parts[:6])}." if parts else ""


def _by_domain(run: RunData) -> dict[str, float]:
    domains = run.profile.get("domains")
    entries = [d for d in domains if isinstance(d, dict)] if isinstance(domains, list) else []
    return {plain_text(d.get("name"), 60): loss for d in entries if (loss := number(d.get("loss"))) is not None}


def _shape(rows: list[list[int]]) -> str:
    return f"{len(rows)} of {max(map(len, rows), default=0)} experts"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
