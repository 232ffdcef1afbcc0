"""ChronoSystem: take -> reduce -> fold -> control -> actuate. The only owner of a wrapped model's state."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint import system_state as persistence
from chronomoe_hf.coherence import CoherenceBuffer
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.controller import ControlDecision, Controller
from chronomoe_hf.controller import actuate as actuation
from chronomoe_hf.errors import StateWriteError
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.lifecycle.coordinator import LifecycleCoordinator, PruneDecision
from chronomoe_hf.recording.scope import Switches
from chronomoe_hf.recording.sums import Accumulators
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import (
    AlertHistory,
    RoutingEvent,
    SystemSnapshot,
    TelemetryWriter,
    next_attempt,
    run_manifest,
)
from chronomoe_hf.telemetry.from_state import layer_events
from chronomoe_hf.wrapping.fold import FoldReport, fold_system
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")


class ChronoSystem:
    """State and control of one wrapped model; made by ``wrap``, found by ``system_of``.

    Args:
        model: the root that was wrapped.
        layers: its MoE layers.
        config: settings.
        switches: shared with every recording window.

    Attributes:
        last_snapshot: SystemSnapshot of the last closed window, or None.
        decisions: ControlDecisions of the last evaluation.
        prune_decisions: every lifecycle state change so far.
        global_step: last optimizer step folded.
        run_id, attempt: of the run; an attempt is one start or resume.
        untouched_L: bool, layers that no law on beta moves.
        native_parameters: layers whose native correction bias is a parameter.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], config: ChronoConfig, switches: Switches) -> None:
        self.model = model
        self.layers = layers
        self.config = config
        self.switches = switches
        self.run_id = uuid.uuid4().hex[:12]
        self.attempt = 0
        self.global_step = 0
        self.window_steps = 0
        self.step_state = StepState([layer.num_experts for layer in layers])
        self.alerts = AlertHistory()
        self.controller = Controller(
            n_layers=len(layers),
            n_experts_per_layer=[layer.num_experts for layer in layers],
            config=config.control,
            top_k_per_layer=[layer.top_k for layer in layers],
        ).initialize(run_id=self.run_id)
        self.lifecycle = LifecycleCoordinator(config.lifecycle, n_layers=len(layers))
        self.last_snapshot: SystemSnapshot | None = None
        self.last_evaluation: SystemSnapshot | None = None
        self.decisions: list[ControlDecision] = []
        self.prune_decisions: list[PruneDecision] = []
        self.writer: TelemetryWriter | None = None
        self.governed = False
        self.overhead_s = 0.0
        self.failed_save: str | None = None
        self._failed_evaluation = False
        self.saving = False  # inside Trainer.save_model, which has written the state already
        self.untouched_L = torch.tensor([not layer.takes_beta for layer in layers])
        self.native_parameters = {
            layer.layer_id for layer in layers if layer.native_bias and layer.native_bias_is_parameter()
        }
        self._bind()
        self._aim_switches(0)

    # ---- views -------------------------------------------------------------------------------------------------

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

    def _bind(self) -> None:
        for layer in self.layers:
            self.step_state.bind(layer.handle.state)

    def _follow_device(self) -> None:
        device = self.layers[0].recorder.train.ints.device
        if device != self.step_state.device:
            self.step_state.to_(device)
            self.untouched_L = self.untouched_L.to(device)
            self._bind()
            for layer in self.layers:
                if layer.handle.lens is not None:
                    layer.handle.lens.to(layer.recorder.train.ints.device)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model is its own wrapped model: it must not write into this run's files.
        return {**self.__dict__, "writer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()  # pickling separates views from their storage

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self, global_step: int) -> SystemSnapshot | None:
        """Fold everything recorded since the last call; close the window every `interval` steps. Collective.

        Call once per optimizer step, on every rank, after ``optimizer.step()``.

        Args:
            global_step: number of optimizer steps done, 1 after the first.

        Returns:
            The snapshot, when this step closed a window.
        """
        started = time.perf_counter()
        self.global_step = global_step
        closing = global_step % self.config.interval == 0
        row_LR, inputs = self._take(with_inputs=self.switches.router_input)
        self.step_state.update(row_LR, global_step, self.config.veto)
        self.window_steps += 1
        if self.config.beta.law == "balance":
            actuation.balance(self, self.step_state.row.count(row_LR))
        snapshot = self._close_window(global_step, inputs) if closing else None
        if self.config.beta.law != "none":
            self.step_state.refresh(self.cap)
        self._aim_switches(global_step)
        self.overhead_s += time.perf_counter() - started
        return snapshot

    def close_window(self) -> SystemSnapshot | None:
        """Close a window that is shorter than `interval` (end of a run): records it, but controls nothing."""
        if self.window_steps == 0:
            return None
        events = self._events(self.global_step)
        snapshot = self._summarise(events, self.global_step, self.alerts)
        self._record(events, snapshot, [], [])
        self._reset_window(snapshot)
        return snapshot

    def discard(self) -> None:
        """Throw away what was recorded since the last step (leftovers before a training run starts)."""
        for layer in self.layers:
            for sums in (layer.recorder.train, layer.recorder.eval):
                _zero(sums)

    def begin(self) -> None:
        """Start of a training run: leftovers of earlier forwards and of an open window are dropped. Collective."""
        self.run_id = str(distributed.broadcast_object(self.run_id))  # every process has drawn its own
        self.controller.initialize(run_id=self.run_id)
        self.discard()
        self.step_state.window_LR.zero_()
        self.window_steps = 0
        self.overhead_s = 0.0

    def _aim_switches(self, step: int) -> None:
        # The lens is steered by the mean router input of the last step of a window: summing every step would cost
        # a pass over the hidden states for numbers that are thrown away.
        upcoming = (step + 1) % self.config.interval == 0
        self.switches.router_input = self.config.lens.enabled and self.config.control.enabled and upcoming
        self.switches.any_steering = any(layer.handle.state.beta_on or layer.handle.lens_open for layer in self.layers)

    def _take(self, mode: str = "train", with_inputs: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Sums of all layers since the last take, over all ranks, and (where asked) those of the router inputs."""
        self._follow_device()
        device = self.step_state.device
        sums = [layer.recorder.train if mode == "train" else layer.recorder.eval for layer in self.layers]
        ints = torch.stack([s.ints.to(device) for s in sums]).double()
        floats = torch.stack([s.floats.to(device) for s in sums])
        row_LR = torch.cat([ints, floats], dim=1)
        failed = torch.full((1,), float(self.failed_save is not None), dtype=torch.float64, device=device)
        flat = torch.cat([row_LR.reshape(-1), failed])
        wide = [s.inputs for s in sums if s.inputs is not None] if with_inputs else []
        if wide:
            flat = torch.cat([flat, *(w.to(device).double() for w in wide)])
        flat = distributed.all_reduce_sum_(flat).div_(distributed.batch_copies(self.model))
        for s in sums:
            _zero(s)
        start = row_LR.numel()
        row_LR = flat[:start].view_as(row_LR)
        inputs = list(flat[start + 1 :].split([w.numel() for w in wide])) if wide else []
        if self.config.checkpoint.strict_save and distributed.active():
            self._require_saved(flat[start])
        return row_LR, inputs

    def require_saved(self) -> None:
        """Raise on every rank if a state could not be written. Collective with ``strict_save``, else nothing.

        The step after a failed write does the same; this is for the last one, which no step follows.

        Raises:
            StateWriteError: the main process could not write.
        """
        if self.config.checkpoint.strict_save:
            failed = torch.full(
                (), float(self.failed_save is not None), dtype=torch.float64, device=self.step_state.device
            )
            self._require_saved(distributed.all_reduce_sum_(failed))

    def _require_saved(self, failures: Tensor) -> None:
        if float(failures) > 0:
            raise StateWriteError(
                f"chronomoe state could not be saved ({self.failed_save or 'by the main process'}), and strict_save "
                "is set; free space or fix permissions and resume from the last checkpoint"
            )

    # ---- the window --------------------------------------------------------------------------------------------

    def snapshot(self) -> SystemSnapshot:
        """The open window as a SystemSnapshot, without closing it and without moving any alert."""
        return self._summarise(self._events(self.global_step), self.global_step, self.alerts.copy())

    def _events(self, step: int) -> list[RoutingEvent]:
        return layer_events(
            self.layers,
            self.step_state.row,
            self.step_state.host(),
            run_id=self.run_id,
            attempt=self.attempt,
            step=step,
            mode="TRAIN",
            window_steps=self.window_steps,
            config=self.config,
        )

    def _summarise(self, events: list[RoutingEvent], step: int, history: AlertHistory) -> SystemSnapshot:
        return SystemSnapshot.from_events(
            events=events,
            step=step,
            run_id=self.run_id,
            model_name=type(self.model).__name__,
            n_layers=len(self.layers),
            alert_history=history,
            config=self.config.alerts,
            governed=self.governed,
            overhead_ms=1000.0 * self.overhead_s / self.window_steps if self.window_steps else None,
        )

    def _close_window(self, step: int, sums: list[Tensor]) -> SystemSnapshot | None:
        if distributed.active():
            # Drift between ranks would make them route, and soon hang, differently: find it where it starts.
            distributed.require_agreement(self._checksum(), "chronomoe state")
        held = {layer_id: lens.scale for layer_id, lens in self.lenses.items()}
        self.decisions = []
        inputs = actuation.read_inputs(self, sums)
        snapshot = self._evaluate(step)
        keep_L = actuation.share_control(self)
        actuation.move_beta(self, step, keep_L)
        actuation.aim_lenses(self, inputs, snapshot, held)
        self._reset_window(snapshot)
        return snapshot

    def _evaluate(self, step: int) -> SystemSnapshot | None:
        """The host's part of a closing window: snapshot, controller, lifecycle, records. No collective in here.

        A mistake of ours in it must not end a training run (``telemetry.on_error``): the window is then lost, the
        lenses stay as they are, and the error is logged once with its traceback.
        """
        try:
            events = self._events(step)
            snapshot = self._summarise(events, step, self.alerts)
            self.decisions = self.controller.update(snapshot, self.lenses)
            pruned = self.lifecycle.evaluate(snapshot) if self.config.lifecycle.enabled else []
            self.prune_decisions.extend(pruned)
            self._record(events, snapshot, self.decisions, pruned)
        except Exception:
            if self.config.telemetry.on_error == "raise":
                raise
            if not self._failed_evaluation:
                logger.exception("step %d: chronomoe_hf failed to evaluate a window; training goes on", step)
            self._failed_evaluation = True
            return None
        return snapshot

    def _checksum(self) -> Tensor:
        stacked = self.step_state
        return torch.stack(
            [stacked.beta_LE.double().sum(), stacked.ema_CLE.sum(), stacked.window_LR.sum(), stacked.std_L.sum()]
        )

    def _reset_window(self, snapshot: SystemSnapshot | None) -> None:
        self.last_snapshot = snapshot or self.last_snapshot
        self.step_state.close_window()
        self.window_steps = 0
        self.overhead_s = 0.0

    def _record(
        self,
        events: list[RoutingEvent],
        snapshot: SystemSnapshot,
        decisions: list[ControlDecision],
        pruned: list[PruneDecision],
    ) -> None:
        if self.writer is None:
            return
        self.writer.write_many("routing_events", events)
        self.writer.write("snapshots", snapshot)
        self.writer.write_many("control_decisions", decisions)
        self.writer.write_many("lifecycle_decisions", pruned)
        self.writer.write_many("alerts", snapshot.alerts)

    def raise_alert(self, kind: str, step: int, detail: str) -> None:
        """Raise a whole-run alert and record it."""
        self._alert(kind, step, True, detail)

    def clear_alert(self, kind: str, step: int) -> None:
        """Clear a whole-run alert and record it."""
        self._alert(kind, step, False, "")

    def _alert(self, kind: str, step: int, holds: bool, detail: str) -> None:
        edge = self.alerts.observe(kind, None, step, holds=holds, detail=detail)
        if edge is not None:
            logger.warning("step %d: %s", step, edge)
            if self.writer is not None:
                self.writer.write("alerts", edge)

    # ---- evaluation --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording_eval(self) -> Iterator[None]:
        """Record forwards in eval mode (evaluation, generation) into their own statistics."""
        before = self.switches.evaluation
        self.switches.evaluation = True
        try:
            yield
        finally:
            self.switches.evaluation = before

    def take_evaluation(self) -> SystemSnapshot | None:
        """Statistics recorded under :meth:`recording_eval` since the last call. Collective; None if nothing ran."""
        row_LR, _ = self._take("eval")
        host = {"window": row_LR.cpu().numpy()}
        if not host["window"].any():
            return None
        events = layer_events(
            self.layers,
            self.step_state.row,
            host,
            run_id=self.run_id,
            attempt=self.attempt,
            step=self.global_step,
            mode="EVAL",
            window_steps=0,
            config=self.config,
        )
        snapshot = self._summarise(events, self.global_step, AlertHistory())
        self.last_evaluation = snapshot
        if self.writer is not None:
            self.writer.write_many("routing_events", events)
        return snapshot

    # ---- leaving -----------------------------------------------------------------------------------------------

    def fold(self) -> list[FoldReport]:
        """Write lens and beta into the model's own weights where that is exact; see ``fold.fold_system``."""
        return fold_system(self)

    # ---- files -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Folded state: ``{"tensors": {name: CPU tensor}, "meta": JSON-ready mapping}``."""
        tensors, meta = persistence.pack(self)
        return {"tensors": tensors, "meta": meta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; raises StateMismatchError for another model's state."""
        persistence.unpack(self, state["tensors"], state["meta"])

    def save(self, directory: str | Path) -> bool:
        """Write chronomoe.safetensors and chronomoe.json into `directory` (main process only, no collective)."""
        return persistence.save(self, directory)

    def load(self, directory: str | Path) -> dict[str, Any] | None:
        """Restore the state in `directory` on every rank. Collective; see ``persistence.load``."""
        return persistence.load(self, directory)

    def register(self, accelerator: Any) -> None:
        """Save and load with ``accelerator.save_state`` and ``load_state`` (plain Accelerate loops).

        Args:
            accelerator: an ``accelerate.Accelerator``. Its state hooks are used, not its checkpoint registry, which
                pickles and refuses older checkpoints.
        """
        accelerator.register_save_state_pre_hook(lambda models, weights, directory: self.save(directory) and None)
        accelerator.register_load_state_pre_hook(lambda models, directory: self.load(directory) and None)

    def resumed(self) -> None:
        """Bring what is derived from the state in line with it, after a load."""
        self.controller.initialize(run_id=self.run_id)
        self.step_state.refresh(self.cap)
        self.discard()
        self._aim_switches(self.global_step)

    def open_telemetry(self, output_dir: str | Path, *, resume_step: int | None = None) -> None:
        """Write records below ``<output_dir>/chronomoe`` from now on (main process only).

        Raises:
            TelemetryError: the directory cannot be written.
        """
        if not self.config.telemetry.jsonl or not distributed.is_main():
            return
        self.close_telemetry()
        self.attempt = next_attempt(output_dir)
        self.writer = TelemetryWriter(self.run_id, output_dir, attempt=self.attempt)
        manifest = run_manifest(
            run_id=self.run_id,
            config=self.config,
            layers=[layer.table_row() for layer in self.layers],
            model_class=type(self.model).__name__,
            world_size=distributed.world_size(),
            attempt=self.attempt,
            notes=[f"layer {layer.layer_id}: {note}" for layer in self.layers for note in layer.notes],
        )
        self.writer.write_manifest(manifest, resumed_from=resume_step)

    def close_telemetry(self) -> None:
        """Close the record files; reports dropped records."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _zero(sums: Accumulators) -> None:
    sums.ints.zero_()
    sums.floats.zero_()
    if sums.inputs is not None:
        sums.inputs.zero_()
