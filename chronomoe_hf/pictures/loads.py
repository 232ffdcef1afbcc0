"""Pictures of load: one state of a model, and two states of it.

Shape suffixes: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from chronomoe_hf.pictures.charts import Cells, Row, before_after, cells
from chronomoe_hf.pictures.picture import Picture, View

Counts = Sequence[float | None]
"""Assignments per expert, length E; None for an expert that takes no part (it was cut)."""


@dataclass(frozen=True)
class Load:
    """The load of one layer.

    Args:
        label: of the layer.
        counts: assignments per expert.
        top_k: experts per token.
    """

    label: str
    counts: Counts
    top_k: int = 1

    @property
    def relative(self) -> list[float | None]:
        """Load over the fair share, length E; None where cut, or where the layer routed nothing."""
        known = [count for count in self.counts if count is not None]
        total = sum(known)
        return [None if c is None or total <= 0 else c * len(known) / total for c in self.counts]

    @property
    def variance(self) -> list[float]:
        """Variance of :attr:`relative` from counting so many assignments, length E; infinite without any.

        A token takes an expert at most once, so a count is binomial over tokens with probability k s of a share s,
        and the share has the variance s (1 - k s) / sum(counts).
        """
        total = sum(count for count in self.counts if count is not None)
        size = sum(count is not None for count in self.counts)
        if total <= 0:
            return [math.inf] * len(self.counts)
        shares = [(count or 0.0) / total for count in self.counts]
        return [size**2 * max(0.0, s * (1.0 - self.top_k * s)) / total for s in shares]


def load_picture(layers: Sequence[Load], title: str, key: str = "load") -> Picture:
    """Who does the work: every expert of every layer, over the fair share."""
    rows = [layer.relative for layer in layers]
    known = [(value, at, e) for at, row in enumerate(rows) for e, value in enumerate(row) if value is not None]
    dead = sum(value == 0.0 for value, _, _ in known)
    if not known:
        text = "No token was routed."
    else:
        most, at, expert = max(known)
        text = f"The busiest expert is number {expert} of layer {layers[at].label}, with {most:.1f} times its fair "
        text += f"share; {dead} of {len(known)} experts got no token."
    words = [["cut" if v is None else "no token" if v == 0 else None for v in row] for row in rows]
    block = Cells(
        "",
        [layer.label for layer in layers],
        [[math.log2(v) if v else None for v in row] for row in rows],
        {"": words, "x fair share": rows},
        [[value == 0.0 for value in row] for row in rows],
    )
    top = max((value for value, _, _ in known), default=2.0)
    reach = min(6.0, max(1.0, math.ceil(4.0 * math.log2(top)) / 4.0)) if top > 1.0 else 1.0
    ends = ("1/{} of the fair share or less", "{} times or more")
    view = View("load", lambda width: cells([block], width, *ends, reach=reach))
    return Picture(
        key,
        title,
        text,
        [view],
        "The fair share is 1/E. The scale fits the data; what lies beyond has the colour of its end.",
    )


@dataclass(frozen=True)
class Moved:
    """What moved in one layer.

    Attributes:
        row: for the picture.
        share: half the sum of the differences of the shares: the part of the assignments that went elsewhere.
        beyond: experts whose change is larger than three errors.
    """

    row: Row
    share: float
    beyond: list[int] = field(default_factory=list)


def moved(before: Load, after: Load) -> Moved:
    """One layer before and after, with the error of counting."""
    relative = before.relative, after.relative
    error = [math.sqrt(a + b) for a, b in zip(before.variance, after.variance, strict=True)]
    row = Row(after.label, *relative, [None if math.isinf(e) else e for e in error])
    pairs = [(a, b) for a, b in zip(*relative, strict=True) if a is not None and b is not None]
    share = 0.5 * sum(abs(b - a) for a, b in pairs) / max(1, len(pairs))
    return Moved(row, share, [e for e in range(len(row.before)) if row.moved(e)])


def before_after_picture(
    before: Sequence[Load], after: Sequence[Load], names: tuple[str, str] = ("before", "after"), same_text: bool = True
) -> Picture:
    """Every expert of every layer in two states.

    Args:
        before: of every layer.
        after: the same layers later.
        names: of the two states.
        same_text: both are of the same text, so that only the model changed.
    """
    found = [moved(one, two) for one, two in zip(before, after, strict=True)]
    beyond, experts = sum(len(each.beyond) for each in found), sum(len(each.row.before) for each in found)
    share = sum(each.share for each in found) / max(1, len(found))
    text = f"{beyond} of {experts} experts changed their share by more than three errors; "
    text += f"{100 * share:.1f} % of the assignments went to other experts (mean over layers)."
    if found and beyond:
        widest = max(found, key=lambda each: each.share)
        text += f" Layer {widest.row.label} moved most, {100 * widest.share:.1f} %."
    note = "A thick stem is a change beyond three errors of counting so many tokens; tokens of one text are alike, so "
    note += "the true error is larger. " + ("Both are of the same text." if same_text else "")
    rows = [each.row for each in found]
    view = View("experts", lambda width: before_after(rows, width, names))
    return Picture("before-after", f"Every expert, {names[0]} and {names[1]}", text, [view], note.strip())
