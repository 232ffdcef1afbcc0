"""What a running system shows of its parts, and its record files; the base of ChronoSystem."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from chronomoe_hf.coherence import CoherenceBuffer
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import AlertHistory
from chronomoe_hf.window.host import WindowHost
from chronomoe_hf.window.looks import ShownSystem
from chronomoe_hf.window.records import RunRecords


class _Shape(NamedTuple):
    layer_id: int
    n_experts: int
    top_k: int
    cut: list[int]


class RecordedSystem(ShownSystem):
    """A wrapped model whose parts can be looked at, and whose windows are written below a directory."""

    model: nn.Module
    config: ChronoConfig
    run_id: str
    interval: int
    step_state: StepState
    alerts: AlertHistory
    records: RunRecords
    host: WindowHost

    @property
    def attempt(self) -> int:
        """Start or resume of the run, counted from 0."""
        return self.records.attempt

    @property
    def cap(self) -> float:
        """Cap on |beta_coeff| of the law in force."""
        beta = self.config.beta
        return beta.balance_cap if beta.law == "balance" else beta.k_max

    @property
    def lenses(self) -> dict[int, ChronoLens]:
        """Lenses by layer id, for the layers that can have one."""
        return {layer.layer_id: layer.handle.lens for layer in self.layers if layer.handle.lens is not None}

    def coherence(self, layer_id: int) -> CoherenceBuffer:
        """The layer's three clocks."""
        return self.step_state.coherence(layer_id)

    def router_state(self, layer_id: int) -> RouterState:
        """The layer's router state."""
        return self.layers[layer_id].handle.state

    def open_telemetry(
        self, output_dir: str | Path, *, resume_step: int | None = None, learning_rate: float | None = None
    ) -> None:
        """Write records below ``<output_dir>/chronomoe`` from now on (main process only).

        Args:
            output_dir: of the run.
            resume_step: optimizer step that is resumed from, None for a fresh start.
            learning_rate: of the run as it was configured, for the verdict; None where it is not known.

        Raises:
            TelemetryError: the directory cannot be written.
        """
        self.records.open(
            output_dir,
            run_id=self.run_id,
            config=self.config,
            layers=self.layers,
            model_class=type(self.model).__name__,
            resume_step=resume_step,
            interval=self.interval,
            adapter=any(type(module).__module__.startswith("peft.") for module in self.model.modules()),
            learning_rate=learning_rate,
        )
        self.record_baseline(again=resume_step is not None)

    def record_baseline(self, again: bool = False) -> None:
        """Write the baseline, if there is one that is not written yet; `again`: also one that is."""
        shapes = [_Shape(layer.layer_id, layer.num_experts, layer.top_k, list(layer.cut)) for layer in self.layers]
        self.records.baseline(self.alerts.reference, shapes, self.global_step, again)

    def close_telemetry(self, completed: bool = True) -> None:
        """Close the record files; reports dropped records.

        Args:
            completed: the run came to its end; False for one that broke off.
        """
        self.records.close(self.global_step, completed)

    def set_alert(self, kind: str, step: int, holds: bool, detail: str = "") -> None:
        """Raise or clear a whole-run alert, and record it where that is a change."""
        self.host.set_alert(kind, step, holds, detail)
