"""ChronoSystem: take -> reduce -> update -> decide -> apply. The only owner of a wrapped model's state."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import live_fingerprint
from chronomoe_hf.checkpoint.reading import OnMissing, missing, read_for_all
from chronomoe_hf.checkpoint.state_file import write_state
from chronomoe_hf.checkpoint.system_state import (
    Parts,
    Position,
    advise_of_disagreement,
    pack,
    unloadable,
    unpack,
)
from chronomoe_hf.coherence import CoherenceBuffer
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.controller import ControlDecision, Controller, actuate
from chronomoe_hf.errors import ChronoError, StateError, StateWriteError
from chronomoe_hf.lens.direction import RouterInputs
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.lifecycle import LifecycleCoordinator, PruneDecision
from chronomoe_hf.recording.scope import Switches
from chronomoe_hf.recording.tape import Recorded
from chronomoe_hf.router.state import RouterState
from chronomoe_hf.step_state import StepState, check_step
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot
from chronomoe_hf.telemetry.from_state import layer_events, window_shares
from chronomoe_hf.telemetry.records import RunRecords
from chronomoe_hf.wrapping.bias_check import restore_fp32_bias
from chronomoe_hf.wrapping.build import check_layers
from chronomoe_hf.wrapping.fold import FoldReport, fold_layers
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.placement import Placement

logger = logging.getLogger("chronomoe_hf")


class Evaluated(NamedTuple):
    """The host's part of a closed window."""

    snapshot: SystemSnapshot
    decisions: list[ControlDecision]


class ChronoSystem:
    """State and control of one wrapped model; made by ``wrap``, found by ``system_of``.

    Args:
        model: the root that was wrapped.
        layers: its MoE layers.
        config: settings.
        switches: shared with every forward scope.

    Attributes:
        last_snapshot: SystemSnapshot of the last closed window, or None.
        last_evaluation: SystemSnapshot of the last recorded evaluation, or None.
        decisions: ControlDecisions of the last closed window.
        prune_decisions: every lifecycle state change so far.
        global_step: last optimizer step added.
        run_id: of the run.
        records: where its records go.
        governed: something has acted on routing.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], config: ChronoConfig, switches: Switches) -> None:
        self.model = model
        self.layers = layers
        self.config = config
        self.switches = switches
        self.run_id = uuid.uuid4().hex[:12]
        self.global_step = 0
        self.window_steps = 0
        self.step_state = StepState([layer.num_experts for layer in layers], [layer.takes_beta for layer in layers])
        self.alerts = AlertHistory()
        self.controller = Controller(
            n_layers=len(layers),
            n_experts_per_layer=[layer.num_experts for layer in layers],
            config=config.control,
            top_k_per_layer=[layer.top_k for layer in layers],
            floors=config.alerts,
        ).initialize(run_id=self.run_id)
        self.lifecycle = LifecycleCoordinator(config.lifecycle, n_layers=len(layers))
        self.records = RunRecords()
        self.last_snapshot: SystemSnapshot | None = None
        self.last_evaluation: SystemSnapshot | None = None
        self.decisions: list[ControlDecision] = []
        self.prune_decisions: list[PruneDecision] = []
        self.governed = False
        self.beta_moved = False
        self.overhead_s = 0.0
        self.on_unwrap: list[Callable[[], None]] = []  # called after unwrap has taken everything out
        self._failed_save: str | None = None
        self._stepped: int | None = None
        self._warned_of_repeat = False
        self._advised = False
        self._failed_evaluation = self._told_of_failures = False
        self.sums = layers[0].recorder.sums
        self.placement = Placement(
            self.step_state,
            self.sums,
            [layer.handle for layer in layers],
            [layer.recorder for layer in layers],
            [layer.adapter.weight(layer.router).device for layer in layers],
        )
        self._set_switches()

    # ---- views -------------------------------------------------------------------------------------------------

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_unwrap": []}  # a copy or a pickle of the model is its own wrapped model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.placement.arrange()  # copying separates views from their storage

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self, global_step: int) -> SystemSnapshot | None:
        """Add everything recorded since the last call; close the window every `interval` steps. Collective.

        Call once per optimizer step, on every rank, after ``optimizer.step()``.

        Args:
            global_step: number of optimizer steps done, 1 after the first. A second call with the same number adds
                what was recorded since, but closes no window and counts no step; the first one is warned of.

        Returns:
            The snapshot, when this step closed a window.

        Raises:
            StepError: `global_step` is not an integer of 1 or more.
        """
        started = time.perf_counter()
        global_step = check_step(global_step)
        repeated = global_step == self._stepped
        if repeated and not self._warned_of_repeat:
            self._warned_of_repeat = True
            logger.warning("system.step(%d) was called twice: once per optimizer step is enough", global_step)
        self.global_step = self._stepped = global_step
        restore_fp32_bias(self.layers)
        row_LR, inputs = self._take(with_inputs=self.switches.router_input)
        self.step_state.update(row_LR, global_step, self.config.veto, compared=self.config.veto.enabled)
        self.window_steps += not repeated
        if self.config.beta.law == "balance":
            actuate.balance(self.step_state, self.layers, self.config, self.step_state.row.count(row_LR))
            self.governed = self.beta_moved = True
        closing = global_step % self.config.interval == 0 and not repeated
        snapshot = self._close_window(global_step, inputs) if closing else None
        if self.config.beta.law != "none":
            self.step_state.refresh(self.cap)
        self.step_state.publish()
        self._set_switches()
        self.overhead_s += time.perf_counter() - started
        return snapshot

    def close_window(self) -> SystemSnapshot | None:
        """Close a window that is shorter than `interval` (end of a run): records it, but controls nothing."""
        if self.window_steps == 0:
            return None
        events = self._events(self.step_state.host())
        snapshot = self._summarise(events, self.alerts)
        self.records.window(events, snapshot)
        self._reset_window(snapshot)
        return snapshot

    def discard(self) -> None:
        """Throw away what was recorded since the last step (leftovers before a training run starts)."""
        for scope in {layer.recorder.scope for layer in self.layers}:
            scope.abandon()
        for mode in ("train", "eval"):
            self._zero(mode)

    def _zero(self, mode: Recorded) -> None:
        self.sums.zero(mode, [each for layer in self.layers for each in layer.recorder.held(mode)])

    def begin(self, new_run: bool = True) -> None:
        """Start of a training run: leftovers of earlier forwards and of an open window are dropped. Collective.

        Args:
            new_run: draw a run id; False for another start of the same run.

        Raises:
            WrapError: MoE layers were added to the model or replaced since it was wrapped.
        """
        check_layers(self.model, self.layers)
        run_id = uuid.uuid4().hex[:12] if new_run else self.run_id
        self.run_id = str(distributed.broadcast_object(run_id))  # every process has drawn its own
        self.global_step = 0
        self.controller.initialize(run_id=self.run_id)
        self.discard()
        restore_fp32_bias(self.layers)
        self.step_state.window_LR.zero_()
        self.window_steps = 0
        self.overhead_s = 0.0
        self._stepped, self._advised = None, False

    def switch_beta_on(self) -> None:
        """Let a beta that was set by hand act from the next forward on; a law does this with its first update."""
        self.beta_moved = True
        self._set_switches()

    def _set_switches(self) -> None:
        """Derive from config and state, in one place, what the next forwards record and what acts in them."""
        self.switches.step = self.global_step + 1
        acts = self.beta_moved and self.config.beta.law != "none"
        for layer in self.layers:
            layer.handle.state.beta_on = acts and layer.takes_beta
        # The lens is aimed by the mean router input of the last step of a window: summing every step would cost a
        # pass over the hidden states for numbers that are thrown away.
        upcoming = (self.global_step + 1) % self.config.interval == 0
        self.switches.router_input = self.config.lens.enabled and self.config.control.enabled and upcoming
        self.switches.any_steering = any(layer.handle.state.beta_on or layer.handle.lens_open for layer in self.layers)

    def _take(self, mode: Recorded = "train", with_inputs: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        """Sums of all layers since the last take, over all ranks, and (where asked) those of the router inputs."""
        home, recorders = self.step_state.device, [layer.recorder for layer in self.layers]
        row_LR = self.sums.total(mode, home, [each.held(mode)[0] for each in recorders])
        wide = {each.layer_id: each.inputs for each in recorders if each.inputs is not None} if with_inputs else {}
        if not wide and not distributed.active():
            self._zero(mode)
            return row_LR, {}
        failed = row_LR.new_full((1,), float(self._failed_save is not None))
        flat = torch.cat([row_LR.reshape(-1), failed, *(each.to(home).double() for each in wide.values())])
        flat = distributed.all_reduce_sum_(flat).div_(distributed.batch_copies(self.model))
        self._zero(mode)
        start = row_LR.numel()
        sizes = [each.numel() for each in wide.values()]
        inputs = dict(zip(wide, flat[start + 1 :].split(sizes), strict=True)) if wide else {}
        if self.config.checkpoint.strict_save and distributed.active():
            self._require_saved(flat[start])
        return flat[:start].view_as(row_LR), inputs

    def require_saved(self) -> None:
        """Raise on every rank if a state could not be written. Collective with ``strict_save``, else nothing.

        The step after a failed write does the same; this is for the last one, which no step follows.

        Raises:
            StateWriteError: the main process could not write.
        """
        if self.config.checkpoint.strict_save:
            failed = float(self._failed_save is not None)
            self._require_saved(
                distributed.all_reduce_sum_(torch.full((), failed, dtype=torch.float64, device=self.step_state.device))
            )

    def _require_saved(self, failures: Tensor) -> None:
        if float(failures) > 0:
            raise StateWriteError(
                f"chronomoe state could not be saved ({self._failed_save or 'by the main process'}), and strict_save "
                "is set; free space or fix permissions and resume from the last checkpoint"
            )

    # ---- the window --------------------------------------------------------------------------------------------

    def snapshot(self) -> SystemSnapshot:
        """The open window as a SystemSnapshot, without closing it and without moving any alert."""
        return self._summarise(self._events(self.step_state.host()), self.alerts.copy())

    def _events(
        self, host: dict[str, Any], mode: str = "TRAIN", spread: dict[int, float] | None = None
    ) -> list[RoutingEvent]:
        return layer_events(
            self.layers,
            self.step_state.row,
            host,
            run_id=self.run_id,
            attempt=self.attempt,
            step=self.global_step,
            mode=mode,
            window_steps=self.window_steps if mode == "TRAIN" else 0,
            config=self.config,
            lens_spread=spread,
        )

    def _summarise(self, events: list[RoutingEvent], history: AlertHistory) -> SystemSnapshot:
        return SystemSnapshot.from_events(
            events=events,
            step=self.global_step,
            run_id=self.run_id,
            model_name=type(self.model).__name__,
            n_layers=len(self.layers),
            alert_history=history,
            config=self.config.alerts,
            governed=self.governed,
            step_ms=1000.0 * self.overhead_s / self.window_steps if self.window_steps else None,
        )

    def _close_window(self, step: int, sums: dict[int, Tensor]) -> SystemSnapshot | None:
        """Evaluate on the host, then act: every rank takes part in every collective, whatever its host part did."""
        state = self.step_state
        if distributed.active():
            # Drift between ranks would make them route, and soon hang, differently: find it where it starts.
            distributed.require_agreement(state.checksum(), "chronomoe state")
        inputs = {layer_id: RouterInputs.from_sums(each) for layer_id, each in sums.items()}
        spread = RouterInputs.spreads(inputs)
        host = state.host()
        seen = self._evaluate(host, spread)
        self.decisions = [] if seen is None else seen.decisions
        control = actuate.share_control(None if seen is None else seen.decisions, self.layers, state.device)
        if self.config.beta.law == "coherence":
            actuate.move_beta(state, self.config, step, control)
            self.governed = self.beta_moved = True
        elif self.config.beta.law == "balance":
            state.recentre(self.cap)
        shares = window_shares(self.layers, state.row, host)
        aimed = actuate.aim_lenses(self.layers, self.config, control, inputs, shares, host["logit_std"].tolist())
        self.governed |= aimed
        self._reset_window(None if seen is None else seen.snapshot)
        self._report_failures(control.failures)
        return None if seen is None else seen.snapshot

    def _evaluate(self, host: dict[str, Any], spread: dict[int, float]) -> Evaluated | None:
        """The host's part of a closing window: snapshot, controller, lifecycle, records. No collective in here.

        A mistake of ours in it must not end a training run (``telemetry.on_error``): the window is then lost, the
        lenses stay as they are, and the error is logged once with its traceback.
        """
        try:
            events = self._events(host, spread=spread)
            snapshot = self._summarise(events, self.alerts)
            verdict = self.controller.decide(snapshot, self.lenses)
            self.controller.accept(verdict)
            pruned = self.lifecycle.evaluate(snapshot) if self.config.lifecycle.enabled else []
            self.prune_decisions.extend(pruned)
            self.records.window(events, snapshot, verdict.decisions, pruned)
        except Exception:
            if self.config.telemetry.on_error == "raise" and not distributed.active():
                raise
            if not self._failed_evaluation:
                step = self.global_step
                logger.exception("step %d: chronomoe_hf failed to evaluate a window; training goes on", step)
            self._failed_evaluation = True
            return None
        return Evaluated(snapshot, verdict.decisions)

    def _report_failures(self, failures: int) -> None:
        """Every rank hears of a failed evaluation on any of them, after the last collective of the window."""
        if failures == 0 or not distributed.active():
            return
        words = f"step {self.global_step}: chronomoe_hf failed to evaluate a window on {failures} of "
        words += f"{distributed.world_size()} processes; see the traceback in that process's log"
        if self.config.telemetry.on_error == "raise":
            raise ChronoError(f"{words}, and telemetry.on_error is 'raise'")
        if not self._told_of_failures:
            logger.error("%s; training goes on", words)
        self._told_of_failures = True

    def _reset_window(self, snapshot: SystemSnapshot | None) -> None:
        self.last_snapshot = snapshot or self.last_snapshot
        self.step_state.close_window()
        self.window_steps = 0
        self.overhead_s = 0.0

    def set_alert(self, kind: str, step: int, holds: bool, detail: str = "") -> None:
        """Raise or clear a whole-run alert, and record it where that is a change."""
        edge = self.alerts.observe(kind, None, step, holds=holds, detail=detail)
        if edge is not None:
            logger.warning("step %d: %s", step, edge)
            self.records.alert(edge)

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

    def take_evaluation(self, name: str = "eval") -> SystemSnapshot | None:
        """Statistics recorded under :meth:`recording_eval` since the last call. Collective; None if nothing ran.

        Args:
            name: of the evaluation, for its records; under Trainer ``"eval"``, ``"eval_<data set>"`` or ``"test"``.
        """
        row_LR, _ = self._take("eval")
        host = {"window": row_LR.cpu().numpy()}
        if not host["window"].any():
            return None
        events = self._events(host, mode="EVAL")
        self.last_evaluation = self._summarise(events, AlertHistory())
        self.records.evaluation(events, name)
        return self.last_evaluation

    # ---- leaving -----------------------------------------------------------------------------------------------

    def fold(self) -> list[FoldReport]:
        """Write lens and beta into the model's own weights where that is exact; see ``wrapping.fold.fold_layers``."""
        return fold_layers(self.model, self.layers, self.step_state.topk_disagreement())

    # ---- files -------------------------------------------------------------------------------------------------

    def _parts(self) -> Parts:
        return Parts(self.step_state, self.layers, self.controller, self.lifecycle, self.alerts, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Saved state: ``{"tensors": {name: CPU tensor}, "meta": JSON-ready mapping}``."""
        position = Position(
            self.global_step, self.window_steps, self.run_id, self.attempt, self.governed, self.beta_moved
        )
        tensors, meta = pack(self._parts(), position)
        return {"tensors": tensors, "meta": meta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; raises StateMismatchError for another model's state."""
        position = unpack(self._parts(), state["tensors"], state["meta"])
        self.global_step, self.window_steps, self.run_id = position.step, position.window_steps, position.run_id
        self.governed, self.beta_moved = position.governed, position.beta_moved
        self._stepped = None
        restore_fp32_bias(self.layers)
        self.controller.initialize(run_id=self.run_id)
        self.step_state.refresh(self.cap)
        self.step_state.publish()
        self.discard()
        self._set_switches()

    def fingerprint(self) -> dict[str, str]:
        """One line per router parameter and expert tensor as it is now; see ``checkpoint.fingerprint``."""
        return live_fingerprint(self.layers)

    def save(self, directory: str | Path) -> bool:
        """Write the state into `directory` (main process only, no collective); see ``checkpoint.state_file``.

        Returns:
            Whether it was written (always True on the other ranks).
        """
        if not distributed.is_main():
            return True
        state = self.state_dict()
        state["meta"]["fingerprint"] = self.fingerprint()
        shares = state["meta"]["topk_disagreement"] = self.step_state.topk_disagreement()
        self._advised = self._advised or advise_of_disagreement(shares, self.layers)
        strict = self.config.checkpoint.strict_save
        # Raising on one rank only would leave the others waiting in their next collective: with several ranks the
        # failure travels with the next step's reduction and is raised by all of them there.
        fault = unloadable(self.step_state, state["tensors"], state["meta"])
        written = write_state(
            directory, state["tensors"], state["meta"], fault=fault, strict=strict and not distributed.active()
        )
        if strict and not written:
            self._failed_save = str(directory)
        return written

    def load(
        self, directory: str | Path, *, on_missing: OnMissing = "raise", step: int | None = None
    ) -> dict[str, Any] | None:
        """Restore the state in `directory` on every rank, all of it or nothing. Collective.

        Args:
            directory: a checkpoint, or any directory that ``save_pretrained`` or :meth:`save` wrote to.
            on_missing: ``"raise"``, or as in ``CheckpointConfig`` (which says what a Trainer's resume does).
            step: optimizer step that the state must be of; None = any.

        Returns:
            The manifest (step, fingerprint, ...); None where there is no state and `on_missing` allows a fresh start.

        Raises:
            StateMissingError: nothing there, and `on_missing` does not allow that.
            StateError: torn, foreign, of another schema or step; the message names the file and the way out.
        """
        found = read_for_all(directory)
        if found is None:
            missing(directory, on_missing, self.governed or bool(torch.count_nonzero(self.step_state.beta_LE)))
            return None
        tensors, meta = found
        if step is not None and meta["step"] != step:
            raise StateError(
                f"{directory} holds chronomoe state of step {meta['step']}, but the run resumes at step {step}; the "
                "files of two checkpoints are mixed up"
            )
        self.load_state_dict({"tensors": tensors, "meta": meta})
        return dict(meta)

    def register(self, accelerator: Any) -> None:
        """Save and load with ``accelerator.save_state`` and ``load_state`` (plain Accelerate loops).

        Args:
            accelerator: an ``accelerate.Accelerator``. Its state hooks are used, not its checkpoint registry, which
                pickles and refuses older checkpoints.
        """

        def save(models: Any, weights: Any, directory: str) -> None:
            self.save(directory)

        def load(models: Any, directory: str) -> None:
            self.load(directory, on_missing=self.config.checkpoint.on_missing)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def open_telemetry(self, output_dir: str | Path, *, resume_step: int | None = None) -> None:
        """Write records below ``<output_dir>/chronomoe`` from now on (main process only).

        Raises:
            TelemetryError: the directory cannot be written.
        """
        self.records.open(
            output_dir,
            run_id=self.run_id,
            config=self.config,
            layers=[layer.table_row() for layer in self.layers],
            model_class=type(self.model).__name__,
            notes=[f"layer {layer.layer_id}: {note}" for layer in self.layers for note in layer.notes],
            resume_step=resume_step,
        )

    def close_telemetry(self) -> None:
        """Close the record files; reports dropped records."""
        self.records.close()
