"""PruneDecision: a change in the case against one expert, as a record and as a line of the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from chronomoe_hf.metrics import expert_of

Reason = Literal["low_observability", "low_coherence"]
State = Literal["candidate", "confirmed", "withdrawn"]
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
