"""The records of a running system: opens the writer on the main process, hands every window to it, closes it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chronomoe_hf import distributed
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.telemetry.alerts import Alert
from chronomoe_hf.telemetry.baseline import LayerShape, Reference
from chronomoe_hf.telemetry.events import RoutingEvent
from chronomoe_hf.telemetry.reader import BASELINES, ENDS, REPLAY, next_attempt
from chronomoe_hf.telemetry.runs import this_process
from chronomoe_hf.telemetry.snapshots import SystemSnapshot
from chronomoe_hf.telemetry.writer import TelemetryWriter, run_manifest
from chronomoe_hf.wrapping.fold import folds_beta
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")


class RunRecords:
    """Where a system's records go; silent while it is closed and on every rank but the main one.

    Attributes:
        attempt: start or resume of the run, counted from 0 in its directory.
        writer: the open writer, or None.
        limit: bytes that the directory may hold; None = any number.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.writer: TelemetryWriter | None = None
        self._events_every = 1  # windows
        self.limit: float | None = None
        self._windows, self._stride = 0, 1
        self._settled = 0  # layers whose baseline has been written

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model is its own wrapped model: it must not write into this run's files.
        return {**self.__dict__, "writer": None}

    def open(
        self,
        output_dir: str | Path,
        *,
        run_id: str,
        config: ChronoConfig,
        layers: Sequence[Layer],
        model_class: str,
        resume_step: int | None = None,
        interval: int | None = None,
        adapter: bool = False,
        learning_rate: float | None = None,
    ) -> None:
        """Write records below ``<output_dir>/chronomoe`` from now on (main process only).

        Args:
            output_dir: of the run.
            run_id: of the run.
            config: settings in force.
            layers: the wrapped layers.
            model_class: class name of the model.
            resume_step: optimizer step that is resumed from, None for a fresh start.
            interval: optimizer steps in a window, as in force.
            adapter: an adapter (PEFT) trains in place of the weights.
            learning_rate: of the run as it was configured, None where it is not known.

        Raises:
            TelemetryError: the directory cannot be written.
        """
        if not config.telemetry.jsonl or not distributed.is_main():
            return
        self.close()
        self._events_every = config.telemetry.events_every
        self.attempt, self._settled = next_attempt(output_dir), 0
        self.writer = TelemetryWriter(run_id, output_dir, attempt=self.attempt)
        self.limit = None if config.telemetry.max_mb is None else 1e6 * config.telemetry.max_mb
        self._windows, self._stride = 0, 1
        manifest = run_manifest(
            run_id=run_id,
            config=config,
            layers=[{**layer.table_row(), "beta_folds": folds_beta(layer)} for layer in layers],
            model_class=model_class,
            world_size=distributed.world_size(),
            attempt=self.attempt,
            notes=[f"layer {layer.layer_id}: {note}" for layer in layers for note in layer.notes],
        )
        about = {"interval": interval, "adapter": adapter, "learning_rate": learning_rate, "process": this_process()}
        self.writer.write_manifest({**manifest, **about}, resumed_from=resume_step)

    def window(
        self,
        events: Sequence[RoutingEvent],
        snapshot: SystemSnapshot,
        decisions: Sequence[Any] = (),
        lifecycle: Sequence[Any] = (),
        reference: Reference | None = None,
    ) -> None:
        """Record one closed window and what was decided on it; and the baseline, when one is new."""
        if self.writer is None:
            return
        if reference is not None:
            self.baseline(reference, snapshot.layers, snapshot.step)
        self.writer.write_many("alerts", snapshot.alerts)
        if snapshot.replay is not None:
            self.writer.write(REPLAY, {"step": snapshot.step, **snapshot.replay})
        if not self._keeps_window(snapshot.step):
            return
        steps = max([1, *(event.window_steps for event in events[:1])])
        if snapshot.step // steps % self._events_every == 0:
            self.writer.write_many("routing_events", events)
        self.writer.write("snapshots", snapshot)
        self.writer.write_many("control_decisions", decisions)
        self.writer.write_many("lifecycle_decisions", lifecycle)

    def _keeps_window(self, step: int) -> bool:
        """Whether this window is recorded: all of them up to half of ``telemetry.max_mb``, then ever fewer."""
        assert self.writer is not None
        self._windows += 1
        if self.limit is None or 2 * self.writer.bytes < self.limit:
            return True
        left = 1.0 - self.writer.bytes / self.limit
        stride = 2 ** min(62, math.floor(-math.log2(left))) if left > 0.0 else 0
        if stride != self._stride:
            self._stride = stride
            every = f"one window in {stride} is" if stride else "no further window is"
            logger.warning(
                "step %d: the records hold %.0f MB of the %.0f that telemetry.max_mb allows; %s recorded from here on",
                step,
                self.writer.bytes / 1e6,
                self.limit / 1e6,
                every,
            )
        return stride > 0 and self._windows % stride == 0

    def baseline(self, reference: Reference, layers: Sequence[LayerShape], step: int, again: bool = False) -> None:
        """Record the baseline where some layer's is new; `again`: in any case, if there is one (a resume)."""
        if self.writer is None:
            return
        new, self._settled = reference.num_settled > self._settled, reference.num_settled
        if new or again:
            record = reference.to_record(layers, step)
            if record["layers"]:
                self.writer.write(BASELINES, record)

    def evaluation(self, events: Sequence[RoutingEvent], name: str = "eval") -> None:
        """Record what was seen in the evaluation called `name`."""
        if self.writer is not None:
            self.writer.write_many("routing_events", ({**event.to_record(), "evaluation": name} for event in events))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record losses of a log entry."""
        if self.writer is not None:
            self.writer.write("logs", {"step": step, **values})

    def alert(self, edge: Alert) -> None:
        """Record one whole-run alert."""
        if self.writer is not None:
            self.writer.write("alerts", edge)

    def close(self, step: int | None = None, completed: bool = True) -> None:
        """Close the record files; reports dropped records.

        Args:
            step: optimizer steps done; with it the end of the attempt is recorded.
            completed: the run came to its end; False for one that broke off.
        """
        if self.writer is not None:
            if step is not None:
                self.writer.write(ENDS, {"step": step, "time": round(time.time(), 3), "completed": completed})
            self.writer.close()
            self.writer = None
