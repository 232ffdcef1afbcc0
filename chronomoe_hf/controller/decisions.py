"""ControlDecision: one record per layer and evaluation, acting or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chronomoe_hf.controller.policy import AbstainReason, Debt, Quota


@dataclass(frozen=True, kw_only=True)
class ControlDecision:
    """What the controller saw, computed and did for one layer.

    Attributes:
        run_id: of the run.
        step: optimizer step of the snapshot.
        layer_id: MoE layer, counted from 0.
        observed: entropy (nats), n_effective, top2_share, top2_relative, dead_experts, n_experts, top_k as seen in the
            window.
        debt: parts and total, None without evidence.
        pressure, heat, forgetting: control signals, in [0, 1].
        beta_multiplier: what beta is multiplied with now: 1 - forgetting from `min_pressure` on; exactly 1 below it
            and where the window gave no evidence.
        gate: ``"integral"`` or ``"pressure"``.
        integral: leaky integral of the Neff shortfall.
        harmed: the last action was followed by a rise of the top-2 share.
        harm_backoff: factor on the scale, after this evaluation's verdict.
        scale_requested: what the gate asks for, before abstention; logit standard deviations.
        scale: what the lens was set to; 0 when abstaining.
        scale_cap: cap in force at this step.
        abstain_reason: None when acting.
        lens: rank, v_norm, u_norm (Frobenius norms of the basis in force), spread (of the reader at hand, see
            ``ControlConfig.lens_spread_max``) and the lens's own note; None without a lens.
        quota: recommended caps, never enforced; None when not called for.
        alerts: kinds of the layer's active alerts.
    """

    run_id: str
    step: int
    layer_id: int
    observed: dict[str, float | int | None]
    debt: Debt | None
    pressure: float
    heat: float
    forgetting: float
    beta_multiplier: float
    gate: str
    integral: float
    harmed: bool
    harm_backoff: float
    scale_requested: float
    scale: float
    scale_cap: float
    abstain_reason: AbstainReason | None
    lens: dict[str, float | int | str | None] | None
    quota: Quota | None
    alerts: tuple[str, ...] = ()

    @property
    def abstained(self) -> bool:
        """Whether the lens was deliberately left closed."""
        return self.abstain_reason is not None

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dictionary, the line written to ``control_decisions.jsonl``."""
        debt = self.debt
        return {
            "run_id": self.run_id,
            "step": self.step,
            "layer_id": self.layer_id,
            "observed": dict(self.observed),
            "debt": None if debt is None else debt.total,
            "debt_parts": None
            if debt is None
            else {"n_effective": debt.n_effective, "top2": debt.top2, "dead": debt.dead},
            "pressure": self.pressure,
            "heat": self.heat,
            "forgetting": self.forgetting,
            "beta_multiplier": self.beta_multiplier,
            "gate": self.gate,
            "integral": self.integral,
            "harmed": self.harmed,
            "harm_backoff": self.harm_backoff,
            "scale_requested": self.scale_requested,
            "scale": self.scale,
            "scale_cap": self.scale_cap,
            "abstain": self.abstained,
            "abstain_reason": self.abstain_reason,
            "lens": None if self.lens is None else dict(self.lens),
            "quota": None
            if self.quota is None
            else {"dominant": list(self.quota.dominant), "share": list(self.quota.share_E), "enforced": False},
            "alerts": list(self.alerts),
        }
