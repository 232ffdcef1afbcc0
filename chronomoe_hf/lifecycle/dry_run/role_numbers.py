"""What a layer's roles show: near-duplicates, experts with two roles, basins of routing, free energy. Numbers only.

Shape suffixes: E experts, M and P columns of ``recording.role_sums``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from chronomoe_hf.recording.role_sums import MOMENTS, RoleReading

MIN_ROWS = 100
"""Rows of an expert read in a window, below which its bimodality and its role say nothing."""
MIN_SHARED = 30
"""Tokens that two experts both served lately, below which their outputs are not compared token by token."""
GAUSSIAN = 2.0 / math.pi
"""Part of the variance that a cut at the mean explains where projections are normally distributed."""
SIZE, DUPLICATES, TWO_ROLES = 0.01, 0.1, 0.1
"""lambda, rho and kappa of the layer free energy, as in ChronoMoEv3's config."""
HISTORY = 50
"""Windows that a routing history holds, as in ChronoMoEv3."""
BASINS = 16
"""Basins that a layer remembers; the one that was left longest ago is forgotten first."""
NEAR = 0.1
"""Total variation, beyond what sampling explains, up to which two load vectors are of one basin."""


class Pair(NamedTuple):
    """Two experts of a layer, the one with more tokens first.

    Args:
        first, second: expert ids.
        score: how far they are duplicates, see :class:`Pairs`; None without evidence.
        cosine, centred: cos(r_i, r_j) of the role vectors, as they are and after centring over the layer.
        agreement: mean of cos(f_i(x), f_j(x)) over the tokens that both served lately; None below MIN_SHARED.
        shared: part of the second's tokens that the first served too.
    """

    first: int
    second: int
    score: float | None
    cosine: float
    centred: float
    agreement: float | None
    shared: float


class TwoRoles(NamedTuple):
    """How far an expert's outputs are of two kinds.

    Args:
        expert: id.
        score: separation * balance, in [0, 1]; None below MIN_ROWS rows.
        separation: 0 for normally distributed projections (or heavier tails), 1 for two points.
        balance: tokens of the smaller side over those of the larger.
    """

    expert: int
    score: float | None
    separation: float | None
    balance: float | None


class FreeEnergy(NamedTuple):
    """Free energy of a layer and its parts, all without unit: F = incoherence + size + duplicates + two_roles.

    Args:
        incoherence: 1 - Psi, with Psi the token-weighted mean Phi_slow.
        size: lambda N, with N the number of experts that were routed to in the window.
        duplicates: rho R, with R the number of near-duplicate pairs.
        two_roles: kappa I, with I the number of bimodal experts.
        total: their sum; None without Psi.

    Source: F_l = (1 - Psi_l) + lambda N_l + rho R_l + kappa I_l (ChronoMoEv3, projectdesign.md), with its lambda 0.01,
    rho 0.1, kappa 0.1. With 128 experts lambda N is 1.28 and outweighs 1 - Psi: compare differences, within a layer.
    """

    incoherence: float | None
    size: float
    duplicates: float
    two_roles: float
    total: float | None


def free_energy(psi: float | None, experts: int, duplicates: int, two_roles: int) -> FreeEnergy:
    """F of a layer; see :class:`FreeEnergy`."""
    parts = SIZE * experts, DUPLICATES * duplicates, TWO_ROLES * two_roles
    return FreeEnergy(
        None if psi is None else 1.0 - psi, *parts, None if psi is None else math.fsum((1.0 - psi, *parts))
    )


class Pairs:
    """Every pair of experts of one layer.

    The score is the agreement on the tokens that both served, where there are enough: two experts of equal weights have
    an agreement of 1 and, since their routers send them other tokens, role vectors that point elsewhere. Where a pair
    shares too few tokens, it is the smaller of the two cosines of role vectors: of the centred ones, since a direction
    that all experts of a layer share would make all of them duplicates, and of those as they are, since one expert far
    off moves the centre and would make all others duplicates. Without enough rows of both there is no score.

    Args:
        reading: of a closed window.

    Attributes:
        score_EE: NaN without evidence and on the diagonal.
    """

    def __init__(self, reading: RoleReading) -> None:
        self.reading = reading
        self.rows_E = np.rint(reading.moments_EM[:, MOMENTS.index("rows")])
        together_EE, cosine_EE = reading.pairs_PEE
        with np.errstate(divide="ignore", invalid="ignore"):
            self.agreement_EE = np.where(together_EE >= MIN_SHARED, cosine_EE / together_EE, np.nan)
        judged_E = (reading.updates_E > 0) & (self.rows_E >= MIN_ROWS)
        role_EE = np.minimum(reading.cosine_EE, reading.centred_EE)
        role_EE = np.where(judged_E[:, None] & judged_E[None, :], role_EE, np.nan)
        self.score_EE = np.where(np.isnan(self.agreement_EE), role_EE, self.agreement_EE)
        np.fill_diagonal(self.score_EE, np.nan)

    def get(self, one: int, other: int) -> Pair:
        """One pair, the expert with more rows first."""
        first, second = (one, other) if (-self.rows_E[one], one) <= (-self.rows_E[other], other) else (other, one)
        rows, together = (float(self.reading.pairs_PEE[0, second, at]) for at in (second, first))
        return Pair(
            first,
            second,
            _known(self.score_EE[one, other]),
            float(self.reading.cosine_EE[one, other]),
            float(self.reading.centred_EE[one, other]),
            _known(self.agreement_EE[one, other]),
            together / rows if rows else 0.0,
        )

    def top(self, most: int) -> list[Pair]:
        """The closest pairs with a score."""
        upper = np.triu(np.ones_like(self.score_EE, dtype=bool), 1) & ~np.isnan(self.score_EE)
        one, other = np.nonzero(upper)
        order = np.argsort(-self.score_EE[one, other], kind="stable")[:most]
        return [self.get(int(one[at]), int(other[at])) for at in order]

    def above(self, limit: float) -> list[Pair]:
        """The pairs whose score is above `limit`, the closest first."""
        return self.top(int(np.triu(self.score_EE > limit, 1).sum()))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def two_roles_of(reading: RoleReading) -> list[TwoRoles]:
    """Every expert of a layer, the most bimodal first.

    Each token is assigned to a side by the sign of t: the projection of its output on the expert's main direction, less
    that of the mean. With n tokens, n1 and n2 on either side and means m1, m2, the part of the variance of t that the
    sides explain is eta = n1 n2 (m1 - m2)^2 / (n^2 var t). It is 2/pi for a normal distribution and 1 for two points;
    separation = (eta - 2/pi) / (1 - 2/pi), not below 0. The score is separation * min(n1, n2) / max(n1, n2).

    Source: ChronoMoEv3's b = (1 - cos(c1, c2)) min(n1, n2) / max(n1, n2), with the separation of per-token assignments
    in place of the angle between two running centroids, which is large for any wide distribution.
    """
    found = [_two_roles(expert, *map(float, row)) for expert, row in enumerate(reading.moments_EM)]
    return sorted(found, key=lambda each: (each.score is None, -(each.score or 0.0), each.expert))


def _two_roles(
    expert: int, weight: float, upper: float, total: float, upper_total: float, square: float, rows: float
) -> TwoRoles:
    lower, lower_total = weight - upper, total - upper_total
    if rows < MIN_ROWS:
        return TwoRoles(expert, None, None, None)
    spread = square * weight - total * total
    if upper <= 0.0 or lower <= 0.0 or spread <= 0.0:
        return TwoRoles(expert, 0.0, 0.0, 0.0)
    eta = upper * lower * (upper_total / upper - lower_total / lower) ** 2 / spread
    separation = min(1.0, max(0.0, (eta - GAUSSIAN) / (1.0 - GAUSSIAN)))
    balance = min(upper, lower) / max(upper, lower)
    return TwoRoles(expert, separation * balance, separation, balance)


def load_distance(one: Sequence[float], other: Sequence[float], tokens: float, other_tokens: float) -> float:
    """Total variation of two load vectors beyond what sampling explains, in [0, 1].

    sum |p - q| / 2, less its expectation where both are samples of their common mean m:
    sum sqrt(2/pi) sqrt(m (1 - m) (1/n + 1/n')) / 2.

    Args:
        one: shares per expert.
        other: shares per expert.
        tokens: assignments that `one` was counted from.
        other_tokens: those of `other`.
    """
    total = tokens + other_tokens
    moved = expected = 0.0
    for p, q in zip(one, other, strict=True):
        mean = (p * tokens + q * other_tokens) / total
        moved += abs(p - q) / 2.0
        expected += math.sqrt(GAUSSIAN * max(0.0, mean * (1.0 - mean)) * (1.0 / tokens + 1.0 / other_tokens)) / 2.0
    return max(0.0, moved - expected)


@dataclass
class Basin:
    """Windows of one layer with similar load vectors.

    Args:
        basin_id: from 0 in the order in which they were entered first.
        shares: mean load vector of its windows, weighted by their assignments.
        tokens: assignments.
        windows: how many.
        last_step: step of the newest.
    """

    basin_id: int
    shares: list[float]
    tokens: float
    windows: int
    last_step: int


@dataclass
class RoutingHistory:
    """Which basin each of the last windows of a layer was in.

    Args:
        basins: known ones.
        visits: ``[step, basin id]`` of the last HISTORY windows, oldest first.
        next_id: of the next basin.
    """

    basins: list[Basin] = field(default_factory=list)
    visits: list[list[int]] = field(default_factory=list)
    next_id: int = 0

    def visit(self, step: int, shares: Sequence[float], tokens: float) -> tuple[Basin, int | None]:
        """Add a window: to the nearest basin within NEAR, else to a new one.

        Args:
            step: at its end.
            shares: load vector.
            tokens: assignments, positive.

        Returns:
            The window's basin, and the basin that it left with this window (None = stayed, or the first window).
        """
        near = [(load_distance(shares, basin.shares, tokens, basin.tokens), basin) for basin in self.basins]
        distance, basin = min(near, key=lambda each: (each[0], each[1].basin_id), default=(math.inf, None))
        if basin is None or distance > NEAR:
            basin = Basin(self.next_id, list(shares), tokens, 0, step)
            self.next_id += 1
            self.basins.append(basin)
        else:
            total = basin.tokens + tokens
            basin.shares = [(p * basin.tokens + q * tokens) / total for p, q in zip(basin.shares, shares, strict=True)]
            basin.tokens = total
        basin.windows, basin.last_step = basin.windows + 1, step
        left = self.visits[-1][1] if self.visits else None
        self.visits = [*self.visits, [step, basin.basin_id]][-HISTORY:]
        if len(self.basins) > BASINS:
            self.basins.remove(min(self.basins, key=lambda each: each.last_step))
        return basin, None if left == basin.basin_id else left

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        basins = [[b.basin_id, list(b.shares), b.tokens, b.windows, b.last_step] for b in self.basins]
        return {"basins": basins, "visits": [list(visit) for visit in self.visits], "next_id": self.next_id}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RoutingHistory:
        """Inverse of :meth:`state_dict`; raises TypeError, KeyError or ValueError where it is malformed."""
        basins = [
            Basin(int(own), [float(share) for share in shares], float(tokens), int(windows), int(step))
            for own, shares, tokens, windows, step in state["basins"]
        ]
        visits = [[int(step), int(own)] for step, own in state["visits"]]
        if not all(math.isfinite(basin.tokens) and basin.tokens > 0.0 for basin in basins):
            raise ValueError("a basin without tokens")
        return cls(basins, visits, int(state["next_id"]))
