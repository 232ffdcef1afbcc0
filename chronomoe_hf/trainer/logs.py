"""How the scalars of a window reach the logs: in Trainer's own entry of that step, else in an entry of their own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import Alert, SystemSnapshot
from chronomoe_hf.trainer.printed import live_card

logger = logging.getLogger("chronomoe_hf")


class WindowLog:
    """Holds a closed window until its scalars are in a log entry, and says what a window brings to attention."""

    def __init__(self) -> None:
        self.pending: SystemSnapshot | None = None
        self._unfit: set[int] = set()  # layers already named
        self._failed: set[str] = set()  # trackers that failed in this run

    def publish(self, callbacks: Iterable[TrainerCallback], system: ChronoSystem, snapshot: SystemSnapshot) -> None:
        """Show a closed window in every tracker of a Trainer; one that fails is logged once a run, never raised.

        Args:
            callbacks: of the Trainer (``trainer.callback_handler.callbacks``).
            system: whose window it is; ``telemetry.scalars=False`` shows nothing.
            snapshot: the window.
        """
        if not system.config.telemetry.scalars:
            return
        for callback in callbacks:
            name = type(callback).__name__
            show = _SHOW.get(name)
            if show is None or name in self._failed:
                continue
            try:
                show(callback, snapshot)
            except Exception:
                self._failed.add(name)
                logger.exception("%s takes no pictures of the routing; training goes on", name)

    def closed(self, system: ChronoSystem, snapshot: SystemSnapshot) -> None:
        """Take a window that has just been closed; its alerts go to the log of the process."""
        self.pending = snapshot
        for alert in snapshot.alerts:
            log = logger.warning if alert.urgent else logger.info
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


# A window as pictures and alerts in the trackers that Trainer reports to: TensorBoard, Weights & Biases, trackio.
#
# Numbers reach every tracker through Trainer's own log entries; what those cannot carry goes here: a heatmap of who
# does the work, a histogram of the load, and alerts when they are raised or cleared.
#
# Shape suffixes: L layers, E experts (the largest layer).


HEATMAP, HISTOGRAM, ALERTS = "moe/load_heatmap", "moe/load_histogram", "moe/alerts"
CAPTION = "load of every expert (column) in every layer (row): blue below, red above the fair share; black: no token"
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm")
_STOPS = ((5, 48, 97), (33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43), (103, 0, 31))
_TITLE = 63  # W&B takes alert titles of fewer than 64 characters

Array = np.ndarray[Any, Any]


def record_log(system: ChronoSystem, state: TrainerState, logs: dict[str, Any]) -> None:
    """Keep the losses of a log entry beside the routing records (``logs.jsonl``), for the report."""
    kept = {name: logs[name] for name in LOGGED if isinstance(logs.get(name), int | float)}
    if kept:
        system.records.log(state.global_step, kept)


# ---- what is shown -------------------------------------------------------------------------------------------------


def relative_load(snapshot: SystemSnapshot) -> Array:
    """``share * E`` of every expert, ``[L, E]`` float64; NaN beyond a layer's experts, where cut, without a token."""
    size = max((layer.n_experts for layer in snapshot.layers), default=0)
    load_LE = np.full((len(snapshot.layers), size), math.nan)
    for at, layer in enumerate(snapshot.layers):
        if layer.shares is not None:
            load_LE[at, : layer.n_experts] = np.array(layer.shares) * layer.num_choices
            load_LE[at, layer.cut] = math.nan
    return load_LE


def heatmap(snapshot: SystemSnapshot, least: int = 240) -> Array:
    """The load as a picture, ``[height, width, 3]`` uint8, on a scale from 1/8 to 8 times the fair share."""
    load_LE = relative_load(snapshot)
    with np.errstate(divide="ignore", invalid="ignore"):
        part_LE = np.clip((np.log2(load_LE) + 3.0) / 6.0, 0.0, 1.0)
    stops = np.array(_STOPS, dtype=np.float64)
    at = np.linspace(0.0, 1.0, len(_STOPS))
    known_LE = np.where(np.isnan(part_LE), 0.0, part_LE)
    rgb_LE = np.stack([np.interp(known_LE, at, stops[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)
    rgb_LE[np.isnan(load_LE)] = 225
    rgb_LE[load_LE == 0] = 0
    cell = max(4, math.ceil(least / max(1, *load_LE.shape)))
    return rgb_LE.repeat(cell, axis=0).repeat(cell, axis=1)


def _known(load_LE: Array) -> Array:
    return load_LE[np.isfinite(load_LE)]


def _text(alert: Alert) -> str:
    return str(alert)[:2000]


def _title(alert: Alert) -> str:
    where = "model" if alert.layer_id is None else f"layer {alert.layer_id}"
    return f"{alert.kind} {alert.state} ({where})"[:_TITLE]


# ---- trackers ------------------------------------------------------------------------------------------------------


def _tensorboard(callback: Any, snapshot: SystemSnapshot) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    load_E = _known(relative_load(snapshot))
    if load_E.size:
        writer.add_image(f"train/{HEATMAP}", heatmap(snapshot), snapshot.step, dataformats="HWC")
        writer.add_histogram(f"train/{HISTOGRAM}", load_E, snapshot.step)
    if snapshot.alerts:
        writer.add_text(f"train/{ALERTS}", "\n\n".join(map(_text, snapshot.alerts)), snapshot.step)


def _wandb(callback: Any, snapshot: SystemSnapshot) -> None:
    wandb = callback._wandb
    if wandb is not None and wandb.run is not None:
        _show_in(wandb, wandb.run.alert, snapshot, {"train/global_step": snapshot.step})


def _trackio(callback: Any, snapshot: SystemSnapshot) -> None:
    trackio = callback._trackio
    if trackio is not None and callback._initialized:
        _show_in(trackio, trackio.alert, snapshot, {})


def _show_in(tracker: Any, alert: Callable[..., Any], snapshot: SystemSnapshot, extra: dict[str, int]) -> None:
    """Pictures and alerts of a window, in one of the two trackers whose module has the words of W&B."""
    load_E = _known(relative_load(snapshot))
    if load_E.size:
        pictures = {
            f"train/{HEATMAP}": tracker.Image(heatmap(snapshot), caption=CAPTION),
            f"train/{HISTOGRAM}": tracker.Histogram(load_E.tolist()),
        }
        tracker.log({**pictures, **extra})
    for edge in snapshot.alerts:
        level = tracker.AlertLevel.WARN if edge.urgent else tracker.AlertLevel.INFO
        alert(title=_title(edge), text=_text(edge), level=level)


_SHOW: dict[str, Callable[[Any, SystemSnapshot], None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "TrackioCallback": _trackio,
    "NotebookProgressCallback": live_card,
}
