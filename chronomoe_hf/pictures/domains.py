"""Which expert works for which domain: lift of load and of contribution, with its error.

Shape suffixes: D domains, L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chronomoe_hf.pictures.charts import Cells, cells
from chronomoe_hf.pictures.drawing import Drawing
from chronomoe_hf.pictures.picture import Picture, View

ERRORS = 3.0  # standard errors beyond which a lift is called one
ONLY = 0.95  # of an expert's load on one domain (every domain weighing the same): it serves that one only
ONLY_TOKENS = 50  # assignments on that domain below which nothing is said
MOST_ROWS = 400  # of the table in a page


@dataclass(frozen=True)
class Lift:
    """One expert on one domain, against the other domains.

    Attributes:
        layer: label of the layer.
        expert: its number.
        domain: name.
        tokens: assignments on the domain.
        relative: load over the fair share on the domain.
        part: part of the expert's load that comes from this domain, every domain weighing the same.
        log2: logarithm of the share on the domain over the mean share on the others.
        error: standard error of `log2` from counting.
        contribution: share of the layer's contribution on the domain; None where outputs were not read.
        contribution_log2: logarithm of that over its mean on the others; None where it is not known.
    """

    layer: str
    expert: int
    domain: str
    tokens: int
    relative: float
    part: float
    log2: float
    error: float
    contribution: float | None
    contribution_log2: float | None

    @property
    def beyond(self) -> bool:
        """Whether the lift is larger than its errors."""
        return abs(self.log2) > ERRORS * self.error

    @property
    def only(self) -> bool:
        """Whether the expert serves this domain only."""
        return self.part >= ONLY and self.tokens >= ONLY_TOKENS and self.beyond and self.log2 > 0


@dataclass(frozen=True)
class DomainLoads:
    """The sums of a profile.

    Args:
        names: of the domains, length D.
        labels: of the layers, length L.
        top_k: experts per token, length L.
        counts: assignments, ``[D][L][E]``.
        contribution: sums of gate times output norm, ``[D][L][E]``; None where outputs were not read.
    """

    names: Sequence[str]
    labels: Sequence[str]
    top_k: Sequence[int]
    counts: Sequence[Sequence[Sequence[int]]]
    contribution: Sequence[Sequence[Sequence[float | None]]] | None = None

    def lifts(self) -> list[Lift]:
        """Every expert of every layer on every domain; an expert that no domain uses is left out."""
        return [
            self._lift(domain, layer, expert)
            for layer in range(len(self.labels))
            for expert in range(len(self.counts[0][layer]))
            if any(self.counts[d][layer][expert] for d in range(len(self.names)))
            for domain in range(len(self.names))
        ]

    def _lift(self, domain: int, layer: int, expert: int) -> Lift:
        size, k = len(self.counts[0][layer]), self.top_k[layer]
        totals = [sum(table[layer]) for table in self.counts]
        # Half an assignment more everywhere: the logarithm of a share of nothing stays finite.
        tables = list(zip(self.counts, totals, strict=True))
        shares = [(table[layer][expert] + 0.5) / (total + 0.5 * size) for table, total in tables]
        variances = [s * max(0.0, 1.0 - k * s) / max(1.0, float(t)) for s, t in zip(shares, totals, strict=True)]
        others = [at for at in range(len(shares)) if at != domain]
        mean = sum(shares[at] for at in others) / len(others) if others else shares[domain]
        spread = sum(variances[at] for at in others) / max(1, len(others)) ** 2
        error = math.sqrt(variances[domain] / shares[domain] ** 2 + spread / mean**2) / math.log(2.0)
        true = [table[layer][expert] / max(1, total) for table, total in tables]
        given, weight = self._given(domain, layer, expert, others)
        return Lift(
            layer=self.labels[layer],
            expert=expert,
            domain=self.names[domain],
            tokens=self.counts[domain][layer][expert],
            relative=true[domain] * size,
            part=true[domain] / sum(true),
            log2=math.log2(shares[domain] / mean),
            error=error,
            contribution=given,
            contribution_log2=weight,
        )

    def _given(self, domain: int, layer: int, expert: int, others: list[int]) -> tuple[float | None, float | None]:
        if self.contribution is None:
            return None, None
        shares = []
        for table in self.contribution:
            total = sum(value or 0.0 for value in table[layer])
            shares.append((table[layer][expert] or 0.0) / total if total > 0 else None)
        own = shares[domain]
        rest = [share for at in others if (share := shares[at]) is not None]
        mean = sum(rest) / len(rest) if rest else 0.0
        if own is None or own <= 0.0 or mean <= 0.0:
            return own, None
        return own, math.log2(own / mean)

    # ---- to look at ------------------------------------------------------------------------------------------------

    def picture(self) -> Picture:
        """Layers by experts, a block a domain: where an expert is used more than on the other domains."""
        lifts = self.lifts()
        views = [View("load", self._view(lifts, contribution=False))]
        if any(lift.contribution_log2 is not None for lift in lifts):
            views.append(View("contribution", self._view(lifts, contribution=True)))
        note = (
            "Orange: the expert has more of this domain than of the others, blue: less; sums over the whole profile. "
        )
        note += f"Pale: within {ERRORS:g} errors of counting so many tokens. The error of a contribution is not known."
        return Picture("expert-domain", "Which expert serves which domain", self.sentence(lifts), views, note)

    def sentence(self, lifts: Sequence[Lift]) -> str:
        """What is seen, in words."""
        only = [lift for lift in lifts if lift.only]
        text = f"{sum(lift.beyond for lift in lifts)} of {len(lifts)} pairs of an expert and a domain differ from the "
        text += f"other domains by more than {ERRORS:g} errors"
        if not only:
            return f"{text}; no expert serves one domain only."
        each = [(name, sum(lift.domain == name for lift in only)) for name in self.names]
        words = ", ".join(f"{count} only {name}" for name, count in each if count)
        return f"{text}. Experts that serve one domain only (at least {100 * ONLY:.0f} % of their load): {words}."

    def _view(self, lifts: Sequence[Lift], contribution: bool) -> Callable[[float], Drawing]:
        known = {(lift.domain, lift.layer, lift.expert): lift for lift in lifts}
        blocks = []
        for name in self.names:
            values, empty, unsure = [], [], []
            shown: dict[str, list[list[Any]]] = {name: [] for name in _TIP}
            for at, label in enumerate(self.labels):
                row = [known.get((name, label, expert)) for expert in range(len(self.counts[0][at]))]
                values.append([None if lift is None else _value(lift, contribution) for lift in row])
                for tip, table in zip(zip(*map(_tip, row), strict=True), shown.values(), strict=True):
                    table.append(list(tip))
                empty.append([lift is None for lift in row])
                unsure.append([lift is not None and not contribution and not lift.beyond for lift in row])
            blocks.append(Cells(name, list(self.labels), values, shown, empty, unsure))
        return lambda width: cells(blocks, width, "1/{} of the others or less", "{} times or more", _KEY)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, the surest lifts first, at most MOST_ROWS."""
        head = ["layer", "expert", "domain", "assignments", "x fair share", "lift", "lift, from", "to", "contribution"]
        lifts = sorted(self.lifts(), key=lambda lift: -abs(lift.log2) / max(lift.error, 1e-9))
        return head, [_row(lift) for lift in lifts[:MOST_ROWS]]

    def only_table(self) -> tuple[list[str], list[list[str]]]:
        """Experts that serve one domain only, the busiest first."""
        head = ["domain", "layer", "expert", "assignments", "x fair share", "of its load", "contribution there"]
        found = sorted((lift for lift in self.lifts() if lift.only), key=lambda lift: -lift.relative)
        return head, [
            [
                lift.domain,
                lift.layer,
                str(lift.expert),
                str(lift.tokens),
                f"{lift.relative:.2f}",
                f"{100 * lift.part:.1f} %",
                _percent(lift.contribution),
            ]
            for lift in found
        ]


def _value(lift: Lift, contribution: bool) -> float | None:
    return lift.contribution_log2 if contribution else lift.log2


_KEY = "grey: within its error;  x: no token of any domain"
_TIP = ("", "x the other domains", "in errors", "assignments", "% of the contribution")


def _tip(lift: Lift | None) -> tuple[Any, ...]:
    """Values of the tip, in the order of _TIP."""
    if lift is None:
        return ("no token of any domain", None, None, None, None)
    given = None if lift.contribution is None else 100 * lift.contribution
    return (None, 2**lift.log2, round(lift.log2 / lift.error, 1), lift.tokens, given)


def _row(lift: Lift) -> list[str]:
    ends = (lift.log2 - ERRORS * lift.error, lift.log2 + ERRORS * lift.error)
    return [
        lift.layer,
        str(lift.expert),
        lift.domain,
        str(lift.tokens),
        f"{lift.relative:.2f}",
        f"{2**lift.log2:.2f}",
        *(f"{2**end:.2f}" for end in ends),
        _percent(lift.contribution),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
