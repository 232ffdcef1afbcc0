"""ChronoSystem: take -> reduce -> update -> decide -> apply. The only owner of a wrapped model's state."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import live_fingerprint
from chronomoe_hf.checkpoint.store import OnMissing, StateStore
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.controller import ControlDecision, Controller, actuate
from chronomoe_hf.lens.direction import RouterInputs
from chronomoe_hf.lifecycle.dry_run.cases import PruneDecision
from chronomoe_hf.lifecycle.dry_run.coordinator import LifecycleCoordinator
from chronomoe_hf.lifecycle.evidence.drift import RouterDrift
from chronomoe_hf.lifecycle.evidence.table import Evidence, from_snapshots, spec_of
from chronomoe_hf.lifecycle.pruning.run_cut import RunCut
from chronomoe_hf.parts import Parts, Position
from chronomoe_hf.recording.recorder import Taken, take, zero
from chronomoe_hf.recording.scope import Switches
from chronomoe_hf.recording.totals import Recorded
from chronomoe_hf.step_state import StepState, check_step
from chronomoe_hf.telemetry import AlertHistory, SystemSnapshot
from chronomoe_hf.window.events import window_shares
from chronomoe_hf.window.follow import follow_model, follow_step, new_window
from chronomoe_hf.window.host import Moment, WindowHost
from chronomoe_hf.window.recorded import RecordedSystem
from chronomoe_hf.window.records import RunRecords
from chronomoe_hf.wrapping.build import check_layers
from chronomoe_hf.wrapping.fold import FoldReport, fold_layers
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.placement import Placement
from chronomoe_hf.wrapping.replay import make_replay

logger = logging.getLogger("chronomoe_hf")

DEFAULT_INTERVAL = 100  # optimizer steps in a window, where no run says how long it is
WINDOWS_OF_A_RUN = 20


class ChronoSystem(RecordedSystem):
    """State and control of one wrapped model; made by ``wrap``, found by ``system_of``.

    Args:
        model: the root that was wrapped.
        layers: its MoE layers.
        config: settings.
        switches: shared with every forward scope.

    Attributes:
        last_snapshot, last_evaluation: snapshot of the last closed window, of the last evaluation, or None.
        decisions, prune_decisions: ControlDecisions of the last closed window; every lifecycle state change so far.
        drift: rows that router drift is measured from, see ``lifecycle__router_drift=True``.
        replay: choices compared between passes, and repeated; see ``ReplayConfig``.
        cut: of this run, see ``lifecycle__cut__at=...``; ``cut.plan`` once it was made.
        global_step: last optimizer step added.
        run_id: of the run.
        records: where its records go.
        governed: something has acted on routing.
        interval: optimizer steps in a window; see :meth:`fit_interval`.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], config: ChronoConfig, switches: Switches) -> None:
        self.model = model
        self.layers = layers
        self.config = config
        self.switches = switches
        self.run_id = uuid.uuid4().hex[:12]
        self.global_step = self.window_steps = 0
        self.interval = DEFAULT_INTERVAL if config.interval is None else config.interval
        self.sums = layers[0].recorder.sums
        sizes, top_k = [layer.num_experts for layer in layers], [layer.top_k for layer in layers]
        self.step_state = StepState(sizes, [layer.takes_beta for layer in layers], top_k, self.sums.roles)
        self.alerts = AlertHistory()
        self.controller = Controller(
            n_layers=len(layers),
            n_experts_per_layer=sizes,
            config=config.control,
            floors=config.alerts,
        ).initialize(run_id=self.run_id)
        self.lifecycle = LifecycleCoordinator(config, n_layers=len(layers))
        self.records = RunRecords()
        self.last_snapshot: SystemSnapshot | None = None
        self.last_evaluation: SystemSnapshot | None = None
        self.decisions: list[ControlDecision] = []
        self.prune_decisions: list[PruneDecision] = []
        self.governed = self.beta_moved = False
        self.overhead_s = 0.0
        self.on_unwrap: list[Callable[[], None]] = []  # called after unwrap has taken everything out
        self._stepped: int | None = None
        self._warned_of_repeat = False
        self.replay = make_replay(model, layers, config, switches)
        self.cut = RunCut(config, layers, self.step_state, self.alerts)
        self.drift = RouterDrift(layers, config.lifecycle.router_drift)
        parts = Parts(
            self.step_state, layers, self.controller, self.lifecycle, self.alerts, self.cut, self.drift, config
        )
        self.store = StateStore(parts)
        self.host = WindowHost(parts, self.records, type(model).__name__)
        self.placement = Placement(self.step_state, self.sums, layers)
        self._set_switches()

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
        closing = global_step % self.interval == 0 and not repeated
        follow_step(self.store.parts, closing)
        self.replay.stepped()
        row_LR, loss_N, inputs, failed = self._take(with_inputs=self.switches.router_input)
        if failed is not None:
            self.store.require_saved(failed)
        compared = self.config.veto.enabled
        self.step_state.update(row_LR, global_step, self.config.veto, compared, loss_N)
        self.window_steps += not repeated
        if self.config.beta.law == "balance":
            actuate.balance(self.step_state, self.layers, self.config, self.step_state.row.count(row_LR))
            self.governed = self.beta_moved = True
        snapshot = self._close_window(global_step, inputs) if closing else None
        if not repeated and self.cut.due(global_step):
            snapshot = snapshot or self.close_window()  # the open window ends before the cut
            self.cut.make(global_step, self.run_id, type(self.model).__name__)
            self.cut.record(self.records.writer)
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
        at, host = self._moment(), self._read()
        events = self.host.events(at, host)
        snapshot = self.host.summarise(at, events, host, self.alerts)
        snapshot = self.host.with_replay(snapshot, self.replay.window(self.step_state.device))
        self.records.window(events, snapshot, reference=self.alerts.reference)
        self._reset_window(snapshot)
        return snapshot

    def discard(self) -> None:
        """Throw away what was recorded since the last step (leftovers before a training run starts)."""
        for scope in {layer.recorder.scope for layer in self.layers}:
            scope.abandon()
        self.replay.discard()
        for mode in ("train", "eval"):
            zero(self.sums, [layer.recorder for layer in self.layers], mode)

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
        follow_model(self.store.parts)
        self.step_state.drop_window()
        self.window_steps, self.overhead_s = 0, 0.0
        self._stepped = None
        self.store.begin()

    def fit_interval(self, max_steps: int) -> None:
        """With ``ChronoConfig(interval=None)``: a window is a twentieth of a run of `max_steps`, between 1 and 100."""
        if self.config.interval is None:
            fitted = min(DEFAULT_INTERVAL, max(1, max_steps // WINDOWS_OF_A_RUN))
            self.interval = fitted if max_steps > 0 else DEFAULT_INTERVAL
            self._set_switches()

    def switch_beta_on(self, on: bool = True) -> None:
        """Let a beta that was set by hand act from the next forward on; a law does this with its first update."""
        self.beta_moved = on
        self._set_switches()

    def _set_switches(self) -> None:
        """Derive from config and state, in one place, what the next forwards record and what acts in them."""
        self.switches.step = self.global_step + 1
        acts = self.beta_moved and self.config.beta.law != "none"
        for layer in self.layers:
            layer.handle.state.beta_on = acts and layer.takes_beta
        # The lens is aimed by the mean router input of the last step of a window: summing every step would cost a
        # pass over the hidden states for numbers that are thrown away.
        upcoming = (self.global_step + 1) % self.interval == 0
        self.switches.router_input = self.config.lens.enabled and self.config.control.enabled and upcoming
        self.switches.any_steering = any(layer.handle.state.beta_on or layer.handle.lens_open for layer in self.layers)

    def _take(self, mode: Recorded = "train", with_inputs: bool = False) -> Taken:
        """Sums of all layers since the last take, over all ranks, and (where asked) those of the router inputs."""
        recorders, home = [layer.recorder for layer in self.layers], self.step_state.device
        copies = distributed.batch_copies(self.model)
        return take(self.sums, recorders, home, mode, with_inputs=with_inputs, flag=self.store.failed, copies=copies)

    def take_sums(self, mode: Recorded = "train") -> Tensor:
        """Everything recorded since the last call, ``(L, R)`` by ``step_state.row``; nothing uses it. Collective."""
        return self._take(mode).row_LR

    # ---- the window --------------------------------------------------------------------------------------------

    def snapshot(self) -> SystemSnapshot:
        """The open window as a SystemSnapshot, without closing it and without moving any alert."""
        at, host = self._moment(), self._read()
        return self.host.summarise(at, self.host.events(at, host), host, self.alerts.copy())

    def evidence(self) -> Evidence:
        """What the last closed window and the open one say about every expert.

        Raises:
            EvidenceError: nothing has been recorded yet.
        """
        return from_snapshots(
            [self.last_snapshot, self.snapshot()],
            [spec_of(layer.table_row()) for layer in self.layers],
            run_id=self.run_id,
            model_class=type(self.model).__name__,
            beta_law=self.config.beta.law,
        )

    def _read(self) -> dict[str, Any]:
        """Everything that a window's events are made of, on the host."""
        host = self.step_state.host()
        if self.drift.on:
            host["router_drift"] = self.drift.read()
        return host

    def _moment(self, evaluation: bool = False) -> Moment:
        steps = self.window_steps
        step_ms = 1000.0 * self.overhead_s / steps if steps else None
        return Moment(self.run_id, self.global_step, 0 if evaluation else steps, self.governed, step_ms)

    def _close_window(self, step: int, sums: dict[int, Tensor]) -> SystemSnapshot | None:
        """Evaluate on the host, then act: every rank takes part in every collective, whatever its host part did."""
        state = self.step_state
        if distributed.active():
            # Drift between ranks would make them route, and soon hang, differently: find it where it starts.
            distributed.require_agreement(state.checksum(), "chronomoe state")
        inputs = {layer_id: RouterInputs.from_sums(each) for layer_id, each in sums.items()}
        spread = RouterInputs.spreads(inputs)
        host = self._read() | {"replay": self.replay.window(state.device)}
        if state.roles is not None:
            host["roles"] = state.roles.close(state.device, distributed.batch_copies(self.model))
        seen = self.host.evaluate(self._moment(), host, spread, self.lenses)
        self.decisions = [] if seen is None else seen.decisions
        self.prune_decisions.extend([] if seen is None else seen.pruned)
        control = actuate.share_control(None if seen is None else seen.decisions, self.layers, state.device)
        moved = actuate.move_beta(state, self.config, step, control, self.cap)
        self.governed, self.beta_moved = self.governed or moved, self.beta_moved or moved
        shares = window_shares(self.layers, state.row, host)
        aimed = actuate.aim_lenses(self.layers, self.config, control, inputs, shares, host["logit_std"].tolist())
        self.governed |= aimed
        self._reset_window(None if seen is None else seen.snapshot)
        self.host.report_failures(step, control.failures)
        return None if seen is None else seen.snapshot

    def _reset_window(self, snapshot: SystemSnapshot | None) -> None:
        self.last_snapshot = snapshot or self.last_snapshot
        self.cut.observe(snapshot)
        self.step_state.close_window()
        new_window(self.store.parts)
        self.window_steps, self.overhead_s = 0, 0.0

    # ---- evaluation --------------------------------------------------------------------------------------------

    def recording_eval(self) -> AbstractContextManager[None]:
        """Record forwards in eval mode (evaluation, generation) into their own statistics."""
        return self.switches.recording_eval()

    def take_evaluation(self, name: str = "eval") -> SystemSnapshot | None:
        """Statistics recorded under :meth:`recording_eval` since the last call. Collective; None if nothing ran.

        Args:
            name: of the evaluation, for its records; under Trainer ``"eval"``, ``"eval_<data set>"`` or ``"test"``.
        """
        taken = self._take("eval")
        host = {"window": taken.row_LR.cpu().numpy(), "loss": taken.loss_N.cpu().numpy()}
        if not host["window"].any():
            return None
        at = self._moment(evaluation=True)
        events = self.host.events(at, host, mode="EVAL")
        self.last_evaluation = self.host.summarise(at, events, host, AlertHistory())
        self.records.evaluation(events, name)
        return self.last_evaluation

    # ---- leaving -----------------------------------------------------------------------------------------------

    def fold(self) -> list[FoldReport]:
        """Write lens and beta into the model's own weights where that is exact; see ``wrapping.fold.fold_layers``."""
        return fold_layers(self.model, self.layers, self.step_state.topk_disagreement())

    # ---- files -------------------------------------------------------------------------------------------------

    def _position(self) -> Position:
        return Position(
            self.global_step,
            self.window_steps,
            self.run_id,
            self.attempt,
            self.governed,
            self.beta_moved,
            self.interval,
        )

    def _adopt(self, position: Position) -> None:
        self.global_step, self.window_steps, self.run_id = position.step, position.window_steps, position.run_id
        self.governed, self.beta_moved = position.governed, position.beta_moved
        if self.config.interval is None and position.interval is not None:
            self.interval = position.interval
        self._stepped = None
        follow_model(self.store.parts)
        self.controller.initialize(run_id=self.run_id)
        self.step_state.refresh(self.cap)
        self.step_state.publish()
        self.discard()
        self._set_switches()

    def require_saved(self) -> None:
        """Raise StateWriteError on every rank if a state could not be written; see ``StateStore.require_saved``."""
        self.store.require_saved()

    def state_dict(self) -> dict[str, Any]:
        """Saved state: ``{"tensors": {name: CPU tensor}, "meta": JSON-ready mapping}``."""
        return self.store.pack(self._position())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, all or nothing; raises StateMismatchError for another model's state."""
        self._adopt(self.store.unpack(state))

    def fingerprint(self) -> dict[str, str]:
        """One line per router parameter and expert tensor as it is now; see ``checkpoint.fingerprint``."""
        return live_fingerprint(self.layers)

    def save(self, directory: str | Path) -> bool:
        """Write the state into `directory` (main process only, no collective); see ``checkpoint.state_file``.

        Returns:
            Whether it was written (always True on the other ranks).
        """
        return self.store.save(directory, self._position())

    def load(
        self,
        directory: str | Path,
        *,
        on_missing: OnMissing = "raise",
        step: int | None = None,
        check_weights: bool = True,
    ) -> dict[str, Any] | None:
        """Restore the state in `directory` on every rank, all of it or nothing. Collective.

        Args:
            directory: a checkpoint, or any directory that ``save_pretrained`` or :meth:`save` wrote to.
            on_missing: ``"raise"``, or as in ``CheckpointConfig`` (which says what a Trainer's resume does).
            step: optimizer step that the state must be of; None = any.
            check_weights: refuse a state of other weights (see ``CheckpointConfig.other_weights``); False where the
                weights are loaded or repaired afterwards.

        Returns:
            The manifest (step, fingerprint, ...); None where there is no state and `on_missing` allows a fresh start.

        Raises:
            StateMissingError: nothing there, and `on_missing` does not allow that.
            WeightMismatchError: it was saved with other weights than the model has.
            StateError: torn, foreign, of another schema or step; the message names the file and the way out.
        """
        state = self.store.read(directory, self.governed, on_missing, step, check_weights)
        if state is None:
            return None
        self.load_state_dict(state)
        return dict(state["meta"])

    def register(self, accelerator: Any) -> None:
        """Save and load with ``accelerator.save_state`` and ``load_state`` (plain Accelerate loops).

        Args:
            accelerator: an ``accelerate.Accelerator``. Its state hooks are used, not its checkpoint registry, which
                pickles and refuses older checkpoints.
        """
        accelerator.register_save_state_pre_hook(lambda models, weights, directory: self.save(directory))
        on_missing = self.config.checkpoint.on_missing  # Accelerate loads the weights after the hook
        accelerator.register_load_state_pre_hook(
            lambda models, directory: self.load(directory, on_missing=on_missing, check_weights=False)
        )
