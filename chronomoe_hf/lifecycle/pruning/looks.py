"""A plan and its measured effect as cards, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from chronomoe_hf.pictures.charts import Bar, Cells, bars, cells
from chronomoe_hf.pictures.picture import Picture, View
from chronomoe_hf.pictures.shown import Looks


class Part(Protocol):
    """What is shown of one layer of a plan."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Experts that stay."""

    @property
    def dropped(self) -> tuple[int, ...]:
        """Experts that go."""

    @property
    def scores(self) -> Any:
        """What they were ranked by."""


class Change(Protocol):
    """What is shown of one measured mask."""

    @property
    def delta_loss(self) -> float:
        """Rise of the loss."""

    @property
    def delta_loss_error(self) -> float | None:
        """Its standard error."""

    @property
    def kl(self) -> float:
        """Mean KL divergence."""

    @property
    def overlap(self) -> float:
        """Overlap of the distributions."""


def plan_looks(rank: str, layers: Sequence[Part]) -> Looks:
    """How a plan shows itself."""
    experts = len(layers[0].kept) + len(layers[0].dropped)
    gone = sum(len(layer.dropped) for layer in layers)
    numbers = [("rank", rank), ("stay", f"{len(layers[0].kept)} of {experts} a layer"), ("go", str(gone))]
    return Looks(
        title="Plan: which experts stay",
        sentence=f"{len(layers)} MoE layers; {gone} experts would be left out.",
        numbers=numbers,
        rows=lambda: _plan_rows(layers),
        picture=lambda: _plan_picture(rank, layers),
        hint="lifecycle.measure(model, plan, batches) says what it costs before a byte is written",
    )


def _plan_rows(layers: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {
            "layer": at,
            "expert": expert,
            "kept": expert in layer.kept,
            "score": None if layer.scores is None else layer.scores[expert],
        }
        for at, layer in enumerate(layers)
        for expert in range(len(layer.kept) + len(layer.dropped))
    ]


def _plan_picture(rank: str, layers: Sequence[Part]) -> Picture:
    values, shown, gone, all_scores = [], [], [], []
    for layer in layers:
        size = len(layer.kept) + len(layer.dropped)
        scores = [None if layer.scores is None else layer.scores[expert] for expert in range(size)]
        known = [score for score in scores if score is not None and math.isfinite(score)]
        mean = sum(known) / len(known) if known else 0.0
        relative = [None if s is None or mean <= 0 or not math.isfinite(s) else s / mean for s in scores]
        values.append([0.0 if r is None else math.log2(r) if r > 0 else -6.0 for r in relative])
        gone.append([expert in layer.dropped for expert in range(size)])
        shown.append(["goes" if gone[-1][expert] else "stays" for expert in range(size)])
        all_scores.append(scores)
    block = Cells("", [str(at) for at in range(len(layers))], values, {"": shown, "score": all_scores}, gone)
    top = max((value for row in values for value in row), default=1.0)
    reach = min(6.0, max(1.0, math.ceil(4.0 * top) / 4.0))
    ends = ("1/{} of the mean score or less", "{} times or more", "x: is left out")
    view = View("plan", lambda width: cells([block], width, *ends, reach))
    dropped = sum(sum(row) for row in gone)
    text = f"The {dropped} experts with a cross go. Colours are the scores by {rank}, over the mean of their layer."
    return Picture("plan", "Which experts stay", text, [view], "Orange: scored above the layer's mean, blue: below.")


def effect_looks(
    name: str, loss: float, tokens: int, plan: Change, random: Sequence[Change], worst: Change | None
) -> Looks:
    """How a measured effect shows itself.

    Args:
        name: of the plan's rank and size.
        loss: of the full model.
        tokens: that it was measured on.
        plan: the plan's own effect.
        random: of random plans.
        worst: of the highest scores dropped, or None.
    """
    named = [("plan", plan), *((f"random {at + 1}", each) for at, each in enumerate(random))]
    named += [] if worst is None else [("worst", worst)]
    error = "" if plan.delta_loss_error is None else f" ({plan.delta_loss_error:.4f})"
    numbers = [("loss before", f"{loss:.4f}"), ("change, nats", f"{plan.delta_loss:+.4f}{error}")]
    if random:
        mean = sum(each.delta_loss for each in random) / len(random)
        numbers.append(("random plans", f"{mean:+.4f}"))
    numbers.append(("KL", f"{plan.kl:.4f}"))
    return Looks(
        title=f"What the plan costs: {name}",
        sentence=f"Measured on {tokens:,} tokens, in nats a token; the standard error is in brackets.",
        numbers=numbers,
        rows=lambda: [_effect_row(label, each) for label, each in named],
        picture=lambda: _effect_picture(named),
        hint="a plan is worth something where it costs clearly less than random ones",
    )


def _effect_row(label: str, each: Change) -> Mapping[str, Any]:
    return {
        "what": label,
        "delta_loss": each.delta_loss,
        "error": each.delta_loss_error,
        "kl": each.kl,
        "overlap": each.overlap,
    }


def _effect_picture(named: Sequence[tuple[str, Change]]) -> Picture:
    rows = [Bar(label, each.delta_loss, each.delta_loss_error, f"{each.delta_loss:+.4f}") for label, each in named]
    view = View("loss", lambda width: bars(rows, width, "rise of the loss, nats a token"))
    text = "How much the loss rises when experts are left out: those of the plan, and as many at random."
    return Picture(
        "effect", "What the plan costs", text, [view], "The line in a bar is one standard error to each side."
    )
