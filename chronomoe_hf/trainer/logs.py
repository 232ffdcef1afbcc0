"""How the scalars of a window reach the logs: in Trainer's own entry of that step, else in an entry of their own."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot

logger = logging.getLogger("chronomoe_hf")


class WindowLog:
    """Holds a closed window until its scalars are in a log entry, and says what a window brings to attention."""

    def __init__(self) -> None:
        self.pending: SystemSnapshot | None = None
        self._unfit: set[int] = set()  # layers already named

    def closed(self, system: ChronoSystem, snapshot: SystemSnapshot) -> None:
        """Take a window that has just been closed; its alerts go to the log of the process."""
        self.pending = snapshot
        for alert in snapshot.alerts:
            log = logger.warning if alert.state == "raised" else logger.info
            log("step %d: %s", snapshot.step, alert)
        unfit = {d.layer_id for d in system.decisions if d.abstain_reason == "lens_unfit"} - self._unfit
        if unfit:
            self._unfit |= unfit
            logger.warning(
                "step %d: layers %s call for support, but a lens would scatter their tokens (spread above "
                "lens_spread_max = %g), so they are only watched; ChronoConfig.balance() needs no lens",
                snapshot.step,
                ", ".join(map(str, sorted(unfit))),
                system.config.control.lens_spread_max,
            )

    def take(self, system: ChronoSystem) -> dict[str, float]:
        """The scalars of the window that waits; empty where none waits or none are wanted."""
        snapshot, self.pending = self.pending, None
        if snapshot is None or not system.config.telemetry.scalars:
            return {}
        scalars = snapshot.scalars()
        return scalars | snapshot.layer_scalars() if system.config.telemetry.per_layer_scalars else scalars

    def merge(self, system: ChronoSystem, logs: dict[str, Any], state: TrainerState) -> None:
        """Put the waiting window into an entry that Trainer is logging, and into its history."""
        scalars = self.take(system)
        logs.update(scalars)
        if scalars and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars)

    def log_alone(self, system: ChronoSystem, trainer: Trainer, control: TrainerControl) -> None:
        """Give the waiting window an entry of its own."""
        scalars = self.take(system)
        if scalars:
            # Logging clears should_log, and Trainer would then leave its own entry out. Not trainer.log: TRL's adds,
            # and then clears, the averages that belong into the next entry with a loss.
            before = control.should_log
            Trainer.log(trainer, dict(scalars))
            control.should_log = before


def logs_now(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether Trainer is going to log at the end of this step, by its own rule."""
    if args.logging_first_step and state.global_step == 1:
        return True
    by_steps = args.logging_strategy == IntervalStrategy.STEPS and state.logging_steps
    return bool(by_steps) and state.global_step % state.logging_steps == 0
