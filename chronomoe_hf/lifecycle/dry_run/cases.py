"""PruneDecision: a change in the case against one expert, as a record and as a line of the log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from chronomoe_hf.coherence import CoherenceState
from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.metrics import expert_of
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.telemetry.snapshots import LayerSnapshot

Reason = Literal["low_observability", "low_coherence"]
State = Literal["candidate", "confirmed", "withdrawn"]
Key = TypeVar("Key", bound=Hashable)
REASONS: tuple[Reason, ...] = ("low_observability", "low_coherence")


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """A change in the case against one expert. Always a dry run.

    Attributes:
        expert_id: ``"L3_E7"``: expert 7 of MoE layer 3.
        reason: ``"low_observability"`` or ``"low_coherence"``.
        phi_slow: slow clock of the expert's phase coherence; None without evidence.
        total_tokens_seen: the expert's tokens since the run began; None where they were not counted.
        step: optimizer step of the evaluation.
        state: ``"candidate"``, ``"confirmed"`` or ``"withdrawn"``.
        streak: consecutive evaluations for which the case has held; 0 when withdrawn.
        threshold: the number it was judged against (tokens or Phi_slow).
        evidence: phi_fast, phi_mid, phi_slow, phi_delta (fast - slow), total_tokens_seen, share (of the window),
            contribution (sum over its tokens of gate * \\|expert output\\|), saliency (its mean, REAP),
            contribution_rank (1 = contributes most), n_experts, layer_phi (token-weighted mean Phi_slow),
            layer_starving. What was not measured is None.
        run_id: of the run.

    Raises:
        ConfigError: an `expert_id` of another form.
    """

    expert_id: str
    reason: Reason
    phi_slow: float | None
    total_tokens_seen: float | None
    step: int
    state: State = "candidate"
    streak: int = 1
    threshold: float | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    run_id: str = ""

    def __post_init__(self) -> None:
        expert_of(self.expert_id)

    @property
    def layer_id(self) -> int:
        """MoE layer of the expert."""
        return expert_of(self.expert_id)[0]

    @property
    def expert(self) -> int:
        """Index of the expert in its layer."""
        return expert_of(self.expert_id)[1]

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dictionary, the line written to ``lifecycle_decisions.jsonl``."""
        return {
            "run_id": self.run_id,
            "step": self.step,
            "layer_id": self.layer_id,
            "expert_id": self.expert_id,
            "expert": self.expert,
            "reason": self.reason,
            "phi_slow": self.phi_slow,
            "total_tokens_seen": self.total_tokens_seen,
            "state": self.state,
            "streak": self.streak,
            "threshold": self.threshold,
            "evidence": dict(self.evidence),
            "dry_run": True,
        }


def log_line(decision: PruneDecision) -> str:
    """The decision in one line of a log."""

    def show(value: Any) -> str:
        return "unknown" if value is None else f"{value:.4g}"

    seen = decision.evidence
    return (
        f"[DRY-RUN] step {decision.step} {decision.expert_id}: "
        f"{decision.reason} {decision.state} (streak {decision.streak}, threshold {show(decision.threshold)}; "
        f"phi_slow {show(seen['phi_slow'])}, tokens {show(seen['total_tokens_seen'])}, share {show(seen['share'])}, "
        f"contribution rank {seen['contribution_rank'] or 'unknown'} of {seen['n_experts']}"
        f"{', layer starving' if seen['layer_starving'] else ''})"
    )


# What one layer shows about its experts at one evaluation, and the thresholds that follow from it.

Known = Sequence[float | None] | None
# Prune threshold "auto": layer median minus this many deviations, each 1.4826 times the median absolute deviation (the
# standard deviation where values are normally distributed) but not below the floor.
AUTO_DEVIATIONS = 3.0
AUTO_FLOOR = 0.05
_MAD_TO_DEVIATION = 1.4826


class LayerEvaluation(NamedTuple):
    """What is known about one layer's experts at one evaluation; per-expert lists of length `n_experts` or None."""

    layer_id: int
    n_experts: int
    phi_fast: Known
    phi_mid: Known
    phi_slow: Known
    total_tokens_seen: Known
    shares: Known = None
    contribution: Known = None
    saliency: Known = None
    sufficient: bool = True
    cut: Sequence[int] = ()

    @classmethod
    def from_snapshot(cls, layer: LayerSnapshot) -> LayerEvaluation:
        """Of a closed window."""
        return cls(**{name: getattr(layer, name) for name in cls._fields})

    @classmethod
    def from_states(cls, states: Mapping[int, CoherenceState], router: RouterState) -> LayerEvaluation:
        """Of a layer's coherence alone; raises ConfigError where it does not fit the router."""
        if sorted(states) != list(range(router.num_experts)):
            raise ConfigError(
                f"the snapshot covers experts {sorted(states)}, the router of layer {router.layer_id} has "
                f"{router.num_experts}; pass CoherenceBuffer.snapshot(step) of the same layer"
            )
        ordered = [states[expert] for expert in range(router.num_experts)]
        if any(state.layer_id != router.layer_id for state in ordered):
            raise ConfigError(
                f"the snapshot is of layer {ordered[0].layer_id}, the router of layer {router.layer_id}; "
                "both must be of one layer"
            )
        return cls(
            layer_id=router.layer_id,
            n_experts=router.num_experts,
            phi_fast=[state.phi_fast for state in ordered],
            phi_mid=[state.phi_mid for state in ordered],
            phi_slow=[state.phi_slow for state in ordered],
            total_tokens_seen=[state.total_tokens_seen for state in ordered],
        )


def layer_coherence(
    phi_slow: Sequence[float | None] | None, total_tokens_seen: Sequence[float | None] | None
) -> float | None:
    """Token-weighted mean Phi_slow of a layer, over experts with evidence; None without any."""
    pairs = _known(phi_slow, total_tokens_seen)
    weight = math.fsum(tokens for _, tokens in pairs)
    return math.fsum(phi * tokens for phi, tokens in pairs) / weight if weight > 0.0 else None


def prune_threshold(
    phi_slow: Sequence[float | None] | None, total_tokens_seen: Sequence[float | None] | None, config: LifecycleConfig
) -> float | None:
    """Phi_slow below which an expert is incoherent.

    ``"auto"``: median - 3 deviations over the experts that may be judged (more than `coherence_tokens` tokens), each
    counting once. The deviation is 1.4826 times the median absolute deviation, at least 0.05: half of the experts may
    be incoherent without moving it, and experts that agree closely are not told apart by their noise. None without
    three experts to compare.
    """
    if isinstance(config.dry_run.prune_threshold, float):
        return config.dry_run.prune_threshold
    values = [phi for phi, tokens in _known(phi_slow, total_tokens_seen) if tokens > config.dry_run.coherence_tokens]
    if len(values) < 3:
        return None
    middle = statistics.median(values)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(value - middle) for value in values)
    return middle - AUTO_DEVIATIONS * max(deviation, AUTO_FLOOR)


def _known(
    phi_slow: Sequence[float | None] | None, total_tokens_seen: Sequence[float | None] | None
) -> list[tuple[float, float]]:
    if phi_slow is None or total_tokens_seen is None:
        return []
    both = zip(phi_slow, total_tokens_seen, strict=True)
    return [(phi, tokens) for phi, tokens in both if phi is not None and tokens is not None]


def at(values: Sequence[float | None] | None, expert: int) -> float | None:
    """An expert's value, None where it is unknown."""
    return None if values is None else values[expert]


def evidence_of(layer: LayerEvaluation, expert: int, layer_phi: float | None, starving: bool) -> dict[str, Any]:
    """What speaks for and against one expert; what was not measured is None."""
    fast, slow = at(layer.phi_fast, expert), at(layer.phi_slow, expert)
    own = at(layer.contribution, expert)
    rank = None
    if own is not None and layer.contribution is not None:
        rank = 1 + sum(1 for other in layer.contribution if other is not None and other > own)
    return {
        "phi_fast": fast,
        "phi_mid": at(layer.phi_mid, expert),
        "phi_slow": slow,
        "phi_delta": None if fast is None or slow is None else fast - slow,
        "total_tokens_seen": at(layer.total_tokens_seen, expert),
        "share": at(layer.shares, expert),
        "contribution": own,
        "saliency": at(layer.saliency, expert),
        "contribution_rank": rank,
        "n_experts": layer.n_experts,
        "layer_phi": layer_phi,
        "layer_starving": starving,
    }


def advance(streaks: dict[Key, int], key: Key, holds: bool | None, needed: int) -> list[tuple[State, int]]:
    """Move one case or proposal by one evaluation.

    Args:
        streaks: evaluations in a row in which each one held; changed in place.
        key: the one.
        holds: whether it holds now; None = not enough evidence, nothing changes.
        needed: evaluations in a row that confirm it.

    Returns:
        The states that it newly entered, with the streak.
    """
    if holds is None:
        return []
    if not holds:
        return [("withdrawn", 0)] if streaks.pop(key, 0) else []
    streak = streaks[key] = streaks.get(key, 0) + 1
    entered: list[tuple[State, int]] = [("candidate", 1)] if streak == 1 else []
    return [*entered, ("confirmed", streak)] if streak == needed else entered
