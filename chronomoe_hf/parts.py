"""The stateful parts of a wrapped model, and where its run stands: what is saved and what loading writes into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.controller import Controller
from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.evidence.drift import RouterDrift
from chronomoe_hf.lifecycle.pruning.run_cut import RunCut
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import AlertHistory
from chronomoe_hf.wrapping.layer import Layer


@dataclass(frozen=True)
class Parts:
    """The stateful parts of a wrapped model; loading writes into them.

    Args:
        step_state: stacked device state.
        layers: the wrapped layers, with their lenses.
        controller, lifecycle, alerts: host state.
        cut: experts cut during the run.
        drift: the router rows that drift is measured from.
        config: settings in force.
    """

    step_state: StepState
    layers: Sequence[Layer]
    controller: Controller
    lifecycle: LifecycleCoordinator
    alerts: AlertHistory
    cut: RunCut
    drift: RouterDrift
    config: ChronoConfig


@dataclass(frozen=True)
class Position:
    """Where a run stands: what is saved besides tensors and the parts' own state.

    Args:
        step: optimizer steps done.
        window_steps: of these, in the open window.
        run_id: of the run.
        attempt: start or resume of the run.
        governed: something has acted on routing.
        beta_moved: a law has moved beta.
        interval: optimizer steps in a window; None in a state of a version that did not save it.
    """

    step: int
    window_steps: int
    run_id: str
    attempt: int
    governed: bool
    beta_moved: bool
    interval: int | None = None
