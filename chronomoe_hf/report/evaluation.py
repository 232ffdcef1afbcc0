"""Evaluation on the page: its loss, and how it routes beside training."""

from __future__ import annotations

import math
from typing import Any

from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure, series
from chronomoe_hf.report.judged import mean_neff
from chronomoe_hf.report.words import percent

MOST_NAMES = 6  # evaluations by name that are drawn


def evaluation(run: RunData) -> list[Figure]:
    """Loss and experts in use of every evaluation; nothing where the run had none."""
    if not run.eval_loss and not run.evaluations:
        return []
    names = list(dict.fromkeys(name for _, name in run.evaluations))
    panels = [panel for panel in (_loss(run), _neff(run, names[:MOST_NAMES])) if panel is not None]
    rows = []
    loss = dict(run.eval_loss)
    for step in sorted({*loss, *(step for step, _ in run.evaluations)}):
        own = {name: run.evaluations.get((step, name)) for name in names}
        means = [percent(_mean(layers)) for layers in own.values()]
        train = _training(run, step)
        rows.append([str(step), f"{loss[step]:.4f}" if step in loss else "-", percent(train), *means])
    head = ["step", "evaluation loss", "experts in use, training", *(f"experts in use, {name}" for name in names)]
    return [
        Figure(
            "evaluation",
            "Evaluation",
            _sentence(run, names),
            {"kind": "lines", "x": [], "panels": panels, "marks": []} if panels else None,
            head,
            rows,
            "Evaluation is recorded apart from training: its text is its own, dropout is off, and nothing of it enters "
            "the windows above.",
        )
    ]


def _loss(run: RunData) -> dict[str, Any] | None:
    if not run.eval_loss:
        return None
    steps = [step for step, _ in run.eval_loss]
    values = [loss for _, loss in run.eval_loss]
    low, high = min(values), max(values)
    own = [series("evaluation", values)]
    return {"title": "evaluation loss", "low": low, "high": max(high, low + 1e-3), "x": steps, "series": own}


def _neff(run: RunData, names: list[str]) -> dict[str, Any] | None:
    steps = sorted({step for step, _ in run.evaluations})
    if not steps:
        return None
    lines = [series("training", [_known(_training(run, step)) for step in steps])]
    lines += [series(name, [_known(_mean(run.evaluations.get((step, name)))) for step in steps]) for name in names]
    return {"title": "mean Neff / E", "low": 0.0, "high": 1.0, "x": steps, "series": lines}


def _training(run: RunData, step: int) -> float | None:
    """Mean Neff / E of the training window at or after `step`, the newest before where there is none."""
    window = next((w for w in run.windows if w.step >= step), run.windows[-1] if run.windows else None)
    return None if window is None else mean_neff(window.layers)


def _mean(layers: dict[int, float] | None) -> float | None:
    return sum(layers.values()) / len(layers) if layers else None


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _sentence(run: RunData, names: list[str]) -> str:
    parts = []
    if run.eval_loss:
        (first_step, first), (last_step, last) = run.eval_loss[0], run.eval_loss[-1]
        parts.append(
            f"The evaluation loss is {last:.3f} at step {last_step}"
            + (f", from {first:.3f} at step {first_step}" if last_step != first_step else "")
        )
    if run.evaluations:
        step, name = max(run.evaluations)
        used, train = _mean(run.evaluations[step, name]), _training(run, step)
        parts.append(f"{name} uses {percent(used)} of the experts, training {percent(train)} beside it")
    more = f" ({len(names)} evaluations)" if len(names) > 1 else ""
    return f"{'; '.join(parts)}{more}."
