"""The host's part of a window: from one transfer of the state to events, a snapshot, decisions and records.

No collective in here, so a rank on which it fails still takes part in every one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from chronomoe_hf import distributed
from chronomoe_hf.controller import ControlDecision
from chronomoe_hf.errors import ChronoError
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.lifecycle.dry_run.cases import PruneDecision
from chronomoe_hf.lifecycle.dry_run.proposals import Proposal
from chronomoe_hf.parts import Parts
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot
from chronomoe_hf.telemetry.replay import replay_alerts
from chronomoe_hf.window.events import layer_events
from chronomoe_hf.window.records import RunRecords

logger = logging.getLogger("chronomoe_hf")


class Moment(NamedTuple):
    """When a window is looked at.

    Args:
        run_id: of the run.
        step: optimizer steps done.
        window_steps: of these, in the window; 0 for an evaluation.
        governed: something has acted on routing.
        step_ms: mean host time of ``system.step`` in the window, milliseconds; None without a step.
    """

    run_id: str
    step: int
    window_steps: int
    governed: bool
    step_ms: float | None


class Evaluated(NamedTuple):
    """What the host made of a closed window."""

    snapshot: SystemSnapshot
    decisions: list[ControlDecision]
    pruned: list[PruneDecision]


class WindowHost:
    """Reads windows, decides on them and records them.

    Args:
        parts: the system's; the controller decides, the lifecycle is the dry run, the alerts are the run's.
        records: where everything is written.
        model_name: for snapshots.
    """

    def __init__(self, parts: Parts, records: RunRecords, model_name: str) -> None:
        self.layers, self.config = parts.layers, parts.config
        self.row = parts.step_state.row
        self.controller, self.lifecycle, self.alerts = parts.controller, parts.lifecycle, parts.alerts
        self.records = records
        self.model_name = model_name
        self._logged = self._told = False

    def events(
        self, at: Moment, host: Mapping[str, Any], mode: str = "TRAIN", spread: Mapping[int, float] | None = None
    ) -> list[RoutingEvent]:
        """One event per layer; `host` from ``StepState.host()``, or only its ``"window"`` for an evaluation."""
        return layer_events(
            self.layers,
            self.row,
            host,
            run_id=at.run_id,
            attempt=self.records.attempt,
            step=at.step,
            mode=mode,
            window_steps=at.window_steps,
            config=self.config,
            lens_spread=spread,
        )

    def summarise(
        self, at: Moment, events: list[RoutingEvent], host: Mapping[str, Any], history: AlertHistory
    ) -> SystemSnapshot:
        """The snapshot of all layers; moves the alerts of `history`. Of `host`, its ``"loss"`` is read."""
        loss_tokens, forwards = host["loss"].tolist()
        return SystemSnapshot.from_events(
            events=events,
            step=at.step,
            run_id=at.run_id,
            model_name=self.model_name,
            n_layers=len(self.layers),
            alert_history=history,
            config=self.config.alerts,
            governed=at.governed,
            step_ms=at.step_ms,
            loss_tokens=round(loss_tokens) if forwards > 0.0 else None,
        )

    def evaluate(
        self, at: Moment, host: Mapping[str, Any], spread: Mapping[int, float], lenses: Mapping[int, ChronoLens]
    ) -> Evaluated | None:
        """Snapshot, controller, lifecycle and records of a closed window; None if that failed.

        A mistake of ours in it must not end a training run (``telemetry.on_error``): the window is then lost, the
        lenses stay as they are, and the error is logged once with its traceback.
        """
        try:
            events = self.events(at, host, spread=spread)
            snapshot = self.summarise(at, events, host, self.alerts)
            snapshot = self.with_replay(snapshot, host.get("replay"))
            verdict = self.controller.decide(snapshot, lenses)
            self.controller.accept(verdict)
            pruned = self.lifecycle.evaluate(snapshot) if self.config.lifecycle.dry_run.enabled else []
            proposals: list[Proposal] = []
            if self.lifecycle.roles is not None:
                found = self.lifecycle.roles.evaluate(snapshot, host.get("roles", {}))
                snapshot, proposals = snapshot.with_roles(found.records, found.unread), found.proposals
            self.records.window(events, snapshot, verdict.decisions, [*pruned, *proposals], self.alerts.reference)
        except Exception:
            if self.config.telemetry.on_error == "raise" and not distributed.active():
                raise
            if not self._logged:
                logger.exception("step %d: chronomoe_hf failed to evaluate a window; training goes on", at.step)
            self._logged = True
            return None
        return Evaluated(snapshot, verdict.decisions, pruned)

    def with_replay(self, snapshot: SystemSnapshot, record: dict[str, Any] | None) -> SystemSnapshot:
        """The window beside what replay has to say of it, and its alerts; `record` from ``Replay.window``."""
        if record is None:
            return snapshot
        edges = replay_alerts(record, self.alerts, snapshot.step, self.config.replay)
        return snapshot.with_replay(record, edges, self.alerts.active)

    def report_failures(self, step: int, failures: int) -> None:
        """Tell every rank of a failed evaluation on any of them, after the last collective of the window.

        Raises:
            ChronoError: with ``telemetry.on_error="raise"``, on all ranks.
        """
        if failures == 0 or not distributed.active():
            return
        words = f"step {step}: chronomoe_hf failed to evaluate a window on {failures} of {distributed.world_size()} "
        words += "processes; see the traceback in that process's log"
        if self.config.telemetry.on_error == "raise":
            raise ChronoError(f"{words}, and telemetry.on_error is 'raise'")
        if not self._told:
            logger.error("%s; training goes on", words)
        self._told = True

    def set_alert(self, kind: str, step: int, holds: bool, detail: str = "") -> None:
        """Raise or clear a whole-run alert, and record it where that is a change."""
        edge = self.alerts.observe(kind, None, step, holds=holds, detail=detail)
        if edge is not None:
            logger.warning("step %d: %s", step, edge)
            self.records.alert(edge)
