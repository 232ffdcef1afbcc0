"""Every number that is known of an expert and a window: what it is made of, and how windows are put together.

One table, read by the columns of a forward's sums, by events, snapshots, records and evidence. One more number is an
entry here, its sum in ``recording.reduce``, and its field in ``RoutingEvent`` and ``LayerSnapshot``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Merge = Literal["sum", "token mean", "count mean", "newest"]
Needs = Literal["tokens", "outputs", "beta", "state", "drift"]

# Sums of a forward, per expert, in the order in which a row holds them: of every router call, of every reading of
# expert outputs. A state on disk holds the open window in this order: new ones go to the end of their line.
ROUTING_SUMS = ("prob", "first")
OUTPUT_SUMS = (
    "phi_weighted",
    "phi_weight",
    "phi_rows",
    "contribution",
    "gate_sum",
    "norm_sum",
    "contribution_weight",
)


class ExpertNumber(NamedTuple):
    """One number of an expert.

    Args:
        merge: how those of several windows become one: their sum, their mean weighted by the layer's tokens or by the
            expert's assignments, or the newest.
        needs: what has to be there for it to be known: a token, a reading of outputs, a law on beta, nothing but the
            state, the router rows of the start.
        column: one of the sums above that it is made of; None = it is read from the state.
        over: what that sum is divided by: ``"tokens"`` of the layer, or another sum; None = the sum itself.
        whole: a whole number.
        evidence: a plan may read it.
    """

    merge: Merge
    needs: Needs
    column: str | None = None
    over: str | None = None
    whole: bool = False
    evidence: bool = True


PER_EXPERT: dict[str, ExpertNumber] = {
    "prob_mean": ExpertNumber("token mean", "tokens", "prob", over="tokens", evidence=False),
    "first_choices": ExpertNumber("sum", "tokens", "first", whole=True, evidence=False),
    "phi_fast": ExpertNumber("newest", "outputs"),
    "phi_mid": ExpertNumber("newest", "outputs"),
    "phi_slow": ExpertNumber("newest", "outputs"),
    "phi_rows": ExpertNumber("sum", "outputs", "phi_rows", whole=True),
    "contribution": ExpertNumber("sum", "outputs", "contribution"),
    "saliency": ExpertNumber("count mean", "outputs", "contribution", over="contribution_weight"),
    "gate_sum": ExpertNumber("sum", "outputs", "gate_sum"),
    "mean_norm": ExpertNumber("count mean", "outputs", "norm_sum", over="contribution_weight"),
    "total_tokens_seen": ExpertNumber("newest", "state", whole=True),
    "beta": ExpertNumber("newest", "beta", evidence=False),
    "router_drift": ExpertNumber("newest", "drift"),
}
"""Name in events, snapshots and records -> what it is. What each means is said at ``RoutingEvent``."""


def merged_by(merge: Merge) -> tuple[str, ...]:
    """Names of the numbers whose windows are put together in this way."""
    return tuple(name for name, number in PER_EXPERT.items() if number.merge == merge)
