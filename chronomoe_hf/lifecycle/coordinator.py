"""The dry-run lifecycle: which experts would be pruned, and on what evidence. Nothing here touches a model.

Two cases can be made against an expert, once per evaluation:

* ``low_observability``: fewer than `min_tokens` tokens in the whole run although `after_step` optimizer steps have
  passed, in a layer that is not starving;
* ``low_coherence``: Phi_slow below the prune threshold with more than `coherence_tokens` tokens seen.

A layer starves when its token-weighted mean Phi_slow is below the starvation threshold: then the layer as a whole lost
coherence, and an idle expert in it is spare capacity rather than dead weight.

A case is a *candidate* when it first holds, *confirmed* after `confirmations` consecutive evaluations, *withdrawn* when
it stops holding. Only these changes are logged. A window, or an expert, with too little evidence changes nothing: it
neither makes, nor confirms, nor withdraws a case.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateMismatchError
from chronomoe_hf.telemetry.snapshots import LayerSnapshot, SystemSnapshot

logger = logging.getLogger("chronomoe_hf")

Reason = Literal["low_observability", "low_coherence"]
REASONS: tuple[Reason, ...] = ("low_observability", "low_coherence")

AUTO_DEVIATIONS = 2.0  # prune threshold "auto": layer mean minus this many standard deviations
STARVING_FRACTION = 0.8  # starvation threshold "auto": this fraction of the layer's own baseline
BASELINE_EVALUATIONS = 3  # evaluations averaged into that baseline


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """A change in the case against one expert. Always a dry run.

    Attributes:
        step: optimizer step of the snapshot.
        layer_id: MoE layer.
        expert_id: expert of that layer.
        reason: ``"low_observability"`` or ``"low_coherence"``.
        state: ``"candidate"``, ``"confirmed"`` or ``"withdrawn"``.
        streak: consecutive evaluations for which the case has held; 0 when withdrawn.
        threshold: the number it was judged against (tokens or Phi_slow).
        evidence: phi_fast, phi_mid, phi_slow, phi_delta (fast - slow), total_tokens_seen, share (of the window),
            contribution (sum over its tokens of gate * \\|expert output\\|), saliency (its mean, REAP),
            contribution_rank (1 = contributes most), n_experts, layer_phi (token-weighted mean Phi_slow),
            layer_starving. What was not measured is None.
        run_id: of the run.
    """

    step: int
    layer_id: int
    expert_id: int
    reason: Reason
    state: Literal["candidate", "confirmed", "withdrawn"]
    streak: int
    threshold: float | None
    evidence: dict[str, Any]
    run_id: str = ""

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dictionary, the line written to ``lifecycle_decisions.jsonl``."""
        return {
            "run_id": self.run_id,
            "step": self.step,
            "layer_id": self.layer_id,
            "expert_id": self.expert_id,
            "reason": self.reason,
            "state": self.state,
            "streak": self.streak,
            "threshold": self.threshold,
            "evidence": dict(self.evidence),
            "dry_run": True,
        }


@dataclass
class _LayerCases:
    """Memory of one layer: streaks of open cases, and the coherence baseline."""

    streaks: dict[tuple[int, Reason], int] = field(default_factory=dict)
    baseline: list[float] = field(default_factory=list)
    insufficient: bool = False


class LifecycleCoordinator:
    """Collects evidence against experts and logs changes of mind. Reads snapshots, writes nothing but its own memory.

    Args:
        config: thresholds.
        n_layers: MoE layers, numbered from 0.
        run_id: stamped on every decision; by default the snapshot's.
    """

    def __init__(self, config: LifecycleConfig | None = None, n_layers: int = 1, *, run_id: str | None = None) -> None:
        if n_layers < 1:
            raise ConfigError(f"LifecycleCoordinator n_layers must be at least 1, got {n_layers}")
        self.config = LifecycleConfig() if config is None else config
        self.n_layers = n_layers
        self.run_id = run_id
        self._layers = [_LayerCases() for _ in range(n_layers)]

    def evaluate(self, snapshot: SystemSnapshot) -> list[PruneDecision]:
        """Judge every expert of a snapshot.

        Returns:
            The changes of state only, in order of layer, expert, reason; empty when the lifecycle is disabled.

        Raises:
            ConfigError: the snapshot has a layer this coordinator was not built for.
        """
        if not self.config.enabled:
            return []
        decisions: list[PruneDecision] = []
        for layer in snapshot.layers:
            if not 0 <= layer.layer_id < self.n_layers:
                raise ConfigError(
                    f"the snapshot has layer {layer.layer_id}, this lifecycle has layers 0 to {self.n_layers - 1}; "
                    "build it with the model's n_layers"
                )
            decisions += self._evaluate_layer(snapshot, layer)
        for decision in decisions:
            logger.info("%s", _line(decision))
        return decisions

    def _evaluate_layer(self, snapshot: SystemSnapshot, layer: LayerSnapshot) -> list[PruneDecision]:
        cases = self._layers[layer.layer_id]
        if not layer.sufficient:
            if not cases.insufficient:
                logger.info("[DRY-RUN] step %d layer %d: insufficient evidence", snapshot.step, layer.layer_id)
            cases.insufficient = True
            return []
        cases.insufficient = False
        layer_phi = layer_coherence(layer.phi_slow, layer.total_tokens_seen)
        starving = self._starving(cases, layer_phi)
        out: list[PruneDecision] = []
        thresholds: dict[Reason, float | None] = {
            "low_observability": float(self.config.min_tokens),
            "low_coherence": prune_threshold(layer.phi_slow, layer.total_tokens_seen, self.config),
        }
        for expert in range(layer.n_experts):
            for reason, threshold in thresholds.items():
                holds = self._holds(reason, threshold, layer, expert, snapshot.step, starving)
                for state, streak in self._advance(cases, (expert, reason), holds):
                    out.append(
                        PruneDecision(
                            step=snapshot.step,
                            layer_id=layer.layer_id,
                            expert_id=expert,
                            reason=reason,
                            state=state,
                            streak=streak,
                            threshold=threshold,
                            evidence=_evidence(layer, expert, layer_phi, starving),
                            run_id=snapshot.run_id if self.run_id is None else self.run_id,
                        )
                    )
        return out

    def _holds(
        self, reason: Reason, threshold: float | None, layer: LayerSnapshot, expert: int, step: int, starving: bool
    ) -> bool | None:
        """Whether the case holds now; None where there is not enough evidence to say."""
        tokens = _at(layer.total_tokens_seen, expert)
        if tokens is None:
            return None
        if reason == "low_observability":
            # A resume with a reset step must not judge before the clock says so.
            return tokens < self.config.min_tokens and not starving if step > self.config.after_step else None
        phi = _at(layer.phi_slow, expert)
        if phi is None or threshold is None or tokens <= self.config.coherence_tokens:
            return None
        return phi < threshold

    def _advance(
        self, cases: _LayerCases, key: tuple[int, Reason], holds: bool | None
    ) -> list[tuple[Literal["candidate", "confirmed", "withdrawn"], int]]:
        """Move one case; returns the states it newly entered with the streak."""
        streak = cases.streaks.get(key, 0)
        if holds is None:
            return []
        if not holds:
            return [("withdrawn", 0)] if cases.streaks.pop(key, 0) else []
        cases.streaks[key] = streak + 1
        entered: list[tuple[Literal["candidate", "confirmed", "withdrawn"], int]] = []
        if streak == 0:
            entered.append(("candidate", 1))
        if streak + 1 == self.config.confirmations:
            entered.append(("confirmed", streak + 1))
        return entered

    def _starving(self, cases: _LayerCases, layer_phi: float | None) -> bool:
        """Whether the layer starves; under "auto" the first evaluations only build the baseline."""
        if layer_phi is None:
            return False
        if isinstance(self.config.starvation_threshold, float):
            return layer_phi < self.config.starvation_threshold
        if len(cases.baseline) < BASELINE_EVALUATIONS:
            cases.baseline.append(layer_phi)
            return False
        baseline = math.fsum(cases.baseline) / BASELINE_EVALUATIONS
        # A fifth of its size below the baseline: 0.8 of it where it is positive, and still below it where it is not.
        return layer_phi < baseline - (1.0 - STARVING_FRACTION) * abs(baseline)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: per layer the open cases ``[expert, reason, streak]`` and the coherence baseline."""
        return {
            "layers": [
                {
                    "cases": [[expert, reason, streak] for (expert, reason), streak in sorted(cases.streaks.items())],
                    "baseline": list(cases.baseline),
                    "insufficient": cases.insufficient,
                }
                for cases in self._layers
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; all or nothing.

        Raises:
            StateCorruptError: entries are missing or malformed.
            StateMismatchError: another number of layers.
        """
        try:
            loaded = [_cases_from(entry) for entry in state["layers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StateCorruptError(f"lifecycle state is malformed ({error!r}); use an intact checkpoint") from None
        if len(loaded) != self.n_layers:
            raise StateMismatchError(
                f"lifecycle state has {len(loaded)} layers, this model has {self.n_layers}; "
                "load a checkpoint of this model"
            )
        self._layers = loaded


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

    ``"auto"``: mean - 2 population standard deviations over the experts that may be judged (more than
    `coherence_tokens` tokens), each counting once. One expert among n deviates by at most sqrt(n - 1) standard
    deviations, so with fewer than six judged experts "auto" accuses nobody; use a number there. None without two
    experts to compare.
    """
    if isinstance(config.prune_threshold, float):
        return config.prune_threshold
    values = [phi for phi, tokens in _known(phi_slow, total_tokens_seen) if tokens > config.coherence_tokens]
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean - AUTO_DEVIATIONS * math.sqrt(variance)


def _known(
    phi_slow: Sequence[float | None] | None, total_tokens_seen: Sequence[float | None] | None
) -> list[tuple[float, float]]:
    if phi_slow is None or total_tokens_seen is None:
        return []
    both = zip(phi_slow, total_tokens_seen, strict=True)
    return [(phi, tokens) for phi, tokens in both if phi is not None and tokens is not None]


def _at(values: Sequence[float | None] | None, expert: int) -> float | None:
    return None if values is None else values[expert]


def _evidence(layer: LayerSnapshot, expert: int, layer_phi: float | None, starving: bool) -> dict[str, Any]:
    fast, slow = _at(layer.phi_fast, expert), _at(layer.phi_slow, expert)
    own = _at(layer.contribution, expert)
    rank = None
    if own is not None and layer.contribution is not None:
        rank = 1 + sum(1 for other in layer.contribution if other is not None and other > own)
    return {
        "phi_fast": fast,
        "phi_mid": _at(layer.phi_mid, expert),
        "phi_slow": slow,
        "phi_delta": None if fast is None or slow is None else fast - slow,
        "total_tokens_seen": _at(layer.total_tokens_seen, expert),
        "share": _at(layer.shares, expert),
        "contribution": own,
        "saliency": _at(layer.saliency, expert),
        "contribution_rank": rank,
        "n_experts": layer.n_experts,
        "layer_phi": layer_phi,
        "layer_starving": starving,
    }


def _line(decision: PruneDecision) -> str:
    def show(value: Any) -> str:
        return "unknown" if value is None else f"{value:.4g}"

    seen = decision.evidence
    return (
        f"[DRY-RUN] step {decision.step} layer {decision.layer_id} expert {decision.expert_id}: "
        f"{decision.reason} {decision.state} (streak {decision.streak}, threshold {show(decision.threshold)}; "
        f"phi_slow {show(seen['phi_slow'])}, tokens {show(seen['total_tokens_seen'])}, share {show(seen['share'])}, "
        f"contribution rank {seen['contribution_rank'] or 'unknown'} of {seen['n_experts']}"
        f"{', layer starving' if seen['layer_starving'] else ''})"
    )


def _cases_from(entry: dict[str, Any]) -> _LayerCases:
    streaks: dict[tuple[int, Reason], int] = {}
    for expert, reason, streak in entry["cases"]:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        streaks[(int(expert), reason)] = int(streak)
    return _LayerCases(streaks, [float(value) for value in entry["baseline"]], bool(entry["insufficient"]))
