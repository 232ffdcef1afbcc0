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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from chronomoe_hf.coherence import CoherenceState
from chronomoe_hf.config import ChronoConfig, LifecycleConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateMismatchError
from chronomoe_hf.lifecycle.dry_run.cases import (
    REASONS,
    LayerEvaluation,
    PruneDecision,
    Reason,
    advance,
    at,
    evidence_of,
    layer_coherence,
    log_line,
    prune_threshold,
)
from chronomoe_hf.lifecycle.dry_run.proposals import RoleObserver
from chronomoe_hf.metrics import expert_name
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.telemetry.snapshots import SystemSnapshot

__all__ = ["LifecycleCoordinator", "PruneDecision"]

logger = logging.getLogger("chronomoe_hf")

STARVING_FRACTION = 0.8  # starvation threshold "auto": this fraction of the layer's own baseline
NO_ROLES: dict[str, Any] = {"layers": {}, "standing": []}  # of a state that was saved without them
BASELINE_EVALUATIONS = 3  # evaluations averaged into that baseline


@dataclass
class _LayerCases:
    """Memory of one layer: streaks of open cases, and the coherence baseline."""

    streaks: dict[tuple[int, Reason], int] = field(default_factory=dict)
    baseline: list[float] = field(default_factory=list)
    insufficient: bool = False


class LifecycleCoordinator:
    """Collects evidence against experts and logs changes of state. Reads numbers, writes nothing but its own memory.

    Args:
        config: thresholds; of a whole ChronoConfig its ``lifecycle`` part.
        n_layers: MoE layers, numbered from 0; None takes layers as they come.
        run_id: stamped on every decision; by default the snapshot's.

    Attributes:
        decisions: every decision so far, oldest first.
        roles: proposes merges, splits and spawns, with ``coherence.roles`` of a whole ChronoConfig; else None.
    """

    def __init__(
        self,
        config: LifecycleConfig | ChronoConfig | None = None,
        n_layers: int | None = None,
        *,
        run_id: str | None = None,
    ) -> None:
        if n_layers is not None and n_layers < 1:
            raise ConfigError(f"LifecycleCoordinator n_layers must be at least 1, got {n_layers}")
        self.roles: RoleObserver | None = None
        if isinstance(config, ChronoConfig):
            self.roles = RoleObserver(config.lifecycle) if config.coherence.roles else None
            config = config.lifecycle
        self.config = LifecycleConfig() if config is None else config
        self.n_layers = n_layers
        self.run_id = run_id
        self.decisions: list[PruneDecision] = []
        self._layers = [_LayerCases() for _ in range(n_layers or 0)]

    @overload
    def evaluate(self, snapshot: SystemSnapshot, /) -> list[PruneDecision]: ...

    @overload
    def evaluate(
        self, snapshot: Mapping[int, CoherenceState], router_state: RouterState, step: int | None = None, /
    ) -> list[PruneDecision]: ...

    def evaluate(
        self,
        snapshot: SystemSnapshot | Mapping[int, CoherenceState],
        router_state: RouterState | None = None,
        step: int | None = None,
    ) -> list[PruneDecision]:
        """Judge every expert of a system snapshot, or of one layer.

        Args:
            snapshot: a closed window of all layers; or one layer's ``CoherenceBuffer.snapshot(step)``.
            router_state: with one layer's snapshot, the state of its router (which layer, how many experts).
            step: with one layer's snapshot, the optimizer step; by default that of the snapshot.

        Returns:
            The changes of state only, in order of layer, expert, reason; empty when the lifecycle is disabled.

        Raises:
            ConfigError: the snapshot has a layer this coordinator was not built for, or its parts do not agree.
        """
        if isinstance(snapshot, Mapping):
            if router_state is None:
                raise ConfigError("one layer is judged by evaluate(coherence_snapshot, router_state, step)")
            layers, run_id = [LayerEvaluation.from_states(snapshot, router_state)], ""
            step = snapshot[0].step if step is None else step
            if step is None:
                raise ConfigError("evaluate(coherence_snapshot, router_state, step) needs the step")
        else:
            layers, run_id, step = (
                [LayerEvaluation.from_snapshot(each) for each in snapshot.layers],
                snapshot.run_id,
                snapshot.step,
            )
        if not self.config.dry_run.enabled:
            return []
        run_id = run_id if self.run_id is None else self.run_id
        for layer in layers:
            self._make_room(layer.layer_id)
        decisions = [decision for layer in layers for decision in self._evaluate_layer(layer, step, run_id)]
        for decision in decisions:
            logger.info("%s", log_line(decision))
        self.decisions += decisions
        return decisions

    def _make_room(self, layer_id: int) -> None:
        if layer_id < 0 or (self.n_layers is not None and layer_id >= self.n_layers):
            raise ConfigError(
                f"the snapshot has layer {layer_id}, this lifecycle has layers 0 to {(self.n_layers or 0) - 1}; "
                "build it with the model's n_layers"
            )
        while len(self._layers) <= layer_id:
            self._layers.append(_LayerCases())

    def _evaluate_layer(self, layer: LayerEvaluation, step: int, run_id: str) -> list[PruneDecision]:
        cases = self._layers[layer.layer_id]
        if not layer.sufficient:
            if not cases.insufficient:
                logger.info("[DRY-RUN] step %d layer %d: insufficient evidence", step, layer.layer_id)
            cases.insufficient = True
            return []
        cases.insufficient = False
        layer_phi = layer_coherence(layer.phi_slow, layer.total_tokens_seen)
        starving = self._starving(cases, layer_phi)
        out: list[PruneDecision] = []
        thresholds: dict[Reason, float | None] = {
            "low_observability": float(self.config.dry_run.min_tokens),
            "low_coherence": prune_threshold(layer.phi_slow, layer.total_tokens_seen, self.config),
        }
        for key in [key for key in cases.streaks if key[0] in layer.cut]:
            del cases.streaks[key]  # settled: there is no case against what is gone
        for expert in sorted(set(range(layer.n_experts)) - set(layer.cut)):
            for reason, threshold in thresholds.items():
                holds = self._holds(reason, threshold, layer, expert, step, starving)
                for state, streak in advance(cases.streaks, (expert, reason), holds, self.config.dry_run.confirmations):
                    out.append(
                        PruneDecision(
                            expert_id=expert_name(layer.layer_id, expert),
                            reason=reason,
                            phi_slow=at(layer.phi_slow, expert),
                            total_tokens_seen=at(layer.total_tokens_seen, expert),
                            step=step,
                            state=state,
                            streak=streak,
                            threshold=threshold,
                            evidence=evidence_of(layer, expert, layer_phi, starving),
                            run_id=run_id,
                        )
                    )
        return out

    def _holds(
        self, reason: Reason, threshold: float | None, layer: LayerEvaluation, expert: int, step: int, starving: bool
    ) -> bool | None:
        """Whether the case holds now; None where there is not enough evidence to say."""
        tokens, limits = at(layer.total_tokens_seen, expert), self.config.dry_run
        if tokens is None:
            return None
        if reason == "low_observability":
            # A resume with a reset step must not judge before the clock says so.
            return tokens < limits.min_tokens and not starving if step > limits.after_step else None
        phi = at(layer.phi_slow, expert)
        if phi is None or threshold is None or tokens <= limits.coherence_tokens:
            return None
        return phi < threshold

    def _starving(self, cases: _LayerCases, layer_phi: float | None) -> bool:
        """Whether the layer starves; under "auto" the first evaluations only build the baseline."""
        if layer_phi is None:
            return False
        if isinstance(self.config.dry_run.starvation_threshold, float):
            return layer_phi < self.config.dry_run.starvation_threshold
        if len(cases.baseline) < BASELINE_EVALUATIONS:
            cases.baseline.append(layer_phi)
            return False
        baseline = math.fsum(cases.baseline) / BASELINE_EVALUATIONS
        # A fifth of its size below the baseline: 0.8 of it where it is positive, and still below it where it is not.
        return layer_phi < baseline - (1.0 - STARVING_FRACTION) * abs(baseline)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: per layer the open cases ``[expert, reason, streak]`` and the coherence baseline; and roles."""
        return {
            **({} if self.roles is None else {"roles": self.roles.state_dict()}),
            "layers": [
                {
                    "cases": [[expert, reason, streak] for (expert, reason), streak in sorted(cases.streaks.items())],
                    "baseline": list(cases.baseline),
                    "insufficient": cases.insufficient,
                }
                for cases in self._layers
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; all or nothing.

        Raises:
            StateCorruptError: entries are missing or malformed.
            StateMismatchError: another number of layers.
        """
        try:
            loaded = [_cases_from(entry) for entry in state["layers"]]
            roles = None if self.roles is None else RoleObserver.from_state(self.config, state.get("roles") or NO_ROLES)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateCorruptError(f"lifecycle state is malformed ({error!r}); use an intact checkpoint") from None
        if self.n_layers is not None and len(loaded) != self.n_layers:
            raise StateMismatchError(
                f"lifecycle state has {len(loaded)} layers, this model has {self.n_layers}; "
                "load a checkpoint of this model"
            )
        self._layers, self.roles = loaded, roles


def _cases_from(entry: dict[str, Any]) -> _LayerCases:
    streaks: dict[tuple[int, Reason], int] = {}
    for expert, reason, streak in entry["cases"]:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        streaks[(int(expert), reason)] = int(streak)
    return _LayerCases(streaks, [float(value) for value in entry["baseline"]], bool(entry["insufficient"]))
