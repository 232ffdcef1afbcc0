"""Cutting experts in the middle of a run: planned from the run's own evidence, applied as a mask, trained on inside.

Off by default (``lifecycle__cut__at=...``). No weight and no optimizer state is touched: the experts stay where
they are and get no token any more. The plan is part of the saved state, so a resumed run is masked as the uninterrupted
one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from chronomoe_hf import distributed
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import EvidenceError, LifecycleError, PlanError, StateCorruptError, StateMismatchError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.evidence.table import WINDOWS, assemble, spec_of
from chronomoe_hf.lifecycle.live.masking import CutMask
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.lifecycle.pruning.plan_prune import plan_prune, survivors_per_group
from chronomoe_hf.step_state import StepState
from chronomoe_hf.telemetry import AlertHistory, SystemSnapshot, TelemetryWriter
from chronomoe_hf.telemetry.reader import CUTS
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")

PLAN_FILE = "prune_plan.json"
_READS_OUTPUTS = ("contribution", "reap", "mean_norm", "phi")
_SINCE = ("gate_sum", "mean_norm")  # not in windows that older versions saved
_KEPT = (  # of a window's layers: what evidence is made of
    "layer_id",
    "expert_token_counts",
    "tokens",
    "window_steps",
    "contribution",
    "saliency",
    "phi_rows",
    "phi_fast",
    "phi_mid",
    "phi_slow",
    "total_tokens_seen",
    *_SINCE,
)
Window = list[dict[str, Any]]


class CutState(NamedTuple):
    """What is saved: the plan in force and the step of the cut, or the windows that a plan will be made from."""

    plan: PrunePlan | None
    step: int
    windows: list[Window]


class RunCut:
    """The cut of one run: due at a step, made once, in force from then on.

    Args:
        config: settings; its ``lifecycle`` says when and how much.
        layers: the wrapped layers.
        step_state: its laws leave out what was cut.
        alerts: their baselines start anew at the cut.

    Attributes:
        plan: what stays, once the run was cut; ``lifecycle.export(model, system.cut.plan, directory)``.
        step: optimizer step of the cut.

    Raises:
        LifecycleError: the settings ask for a cut that this model cannot have; see :func:`check_cut`.
    """

    def __init__(
        self, config: ChronoConfig, layers: Sequence[Layer], step_state: StepState, alerts: AlertHistory
    ) -> None:
        self.config, self.layers, self.step_state, self.alerts = config, layers, step_state, alerts
        self.plan: PrunePlan | None = None
        self.step = 0
        self._windows: deque[Window] = deque(maxlen=WINDOWS)
        cut_at = config.lifecycle.cut.at
        self._at = cut_at if isinstance(cut_at, int) else None
        if cut_at is not None:
            check_cut(config, layers)

    @property
    def pending(self) -> bool:
        """Whether this run will be cut."""
        return self.config.lifecycle.cut.at is not None and self.plan is None

    def schedule(self, total_steps: int, done: int = 0) -> None:
        """Say how long the run is; a Trainer's callback does. Needed where ``cut_at`` is a fraction.

        Args:
            total_steps: optimizer steps of the whole run.
            done: of these, before a resume.

        Raises:
            PlanError: the cut would come at the end of the run or after it, or its step has passed already.
        """
        cut_at = self.config.lifecycle.cut.at
        if cut_at is None:
            return
        at = cut_at if isinstance(cut_at, int) else max(1, round(cut_at * total_steps))
        if at >= total_steps:
            raise PlanError(
                f"lifecycle.cut.at={cut_at} is step {at}, but the run ends at step {total_steps}; cut earlier, so that "
                "there are steps left to train without the experts, or cut the final model (chronomoe plan)"
            )
        if self.plan is None and done >= at:
            raise PlanError(
                f"lifecycle.cut.at={cut_at} is step {at}, but the run resumes at step {done} from a checkpoint that "
                "was not cut; set it to a later step, or resume from an earlier checkpoint"
            )
        self._at = at

    def due(self, step: int) -> bool:
        """Whether the cut is to be made at this step. Raises PlanError for a fraction of a run of unknown length."""
        if not self.pending:
            return False
        if self._at is None:
            raise PlanError(
                f"lifecycle.cut.at={self.config.lifecycle.cut.at} is a fraction of the run, whose length only a "
                "Trainer knows; call system.cut.schedule(total_steps) before the first step, or give a step"
            )
        return step >= self._at

    def observe(self, snapshot: SystemSnapshot | None) -> None:
        """Keep a closed window, as long as a plan is still to be made."""
        if self.pending and snapshot is not None:
            kept = [{name: getattr(layer, name) for name in _KEPT} for layer in snapshot.layers]
            self._windows.append([{**layer, "step": snapshot.step} for layer in kept])

    def make(self, step: int, run_id: str, model_class: str) -> PrunePlan:
        """Make the plan from the last windows and put it in force. Collective: all ranks take the main process's plan.

        Args:
            step: optimizer steps done; the window that ended there was given to :meth:`observe`.
            run_id: of the run.
            model_class: class name of the model.

        Raises:
            LifecycleError: there is no such plan; on every rank.
        """
        made: object = None
        if distributed.is_main():
            try:
                made = self._plan(run_id, model_class).to_dict()
            except LifecycleError as error:
                made = str(error)
        made = distributed.broadcast_object(made)
        if isinstance(made, str):
            raise LifecycleError(f"step {step}: the run cannot be cut: {made}")
        plan = PrunePlan.from_dict(made)
        self.put(plan, step)
        self.alerts.restart()
        if distributed.is_main():
            logger.warning(
                "step %d: %d experts in %d layers were cut (%s, %d of %d stay in each); training goes on without them. "
                "Their weights stay in every checkpoint: a plain reload uses them again until the model is exported",
                self.step,
                plan.num_dropped,
                len(plan.layers),
                plan.rank,
                plan.num_kept,
                plan.layers[0].spec.num_experts,
            )
        return plan

    def _plan(self, run_id: str, model_class: str) -> PrunePlan:
        events = [layer for window in self._windows for layer in window]
        if not any(layer["tokens"] for layer in events):
            raise EvidenceError("no token was recorded before the cut")
        evidence = assemble(
            self.specs,
            events,
            kind="system",
            run_id=run_id,
            model_class=model_class,
            mode="TRAIN",
            beta_law=self.config.beta.law,
        )
        life = self.config.lifecycle.cut
        return plan_prune(evidence, keep=life.keep, rank=life.rank, multiple_of=life.multiple_of)

    @property
    def specs(self) -> list[LayerSpec]:
        """The layer table of the wrapped model."""
        return [spec_of(layer.table_row()) for layer in self.layers]

    def put(self, plan: PrunePlan | None, step: int) -> None:
        """Put a plan in force, in the place of the one before; None brings every expert back."""
        self.plan, self.step = plan, step
        dropped = [()] * len(self.layers) if plan is None else [layer.dropped for layer in plan.layers]
        for layer, ids in zip(self.layers, dropped, strict=True):
            layer.handle.mask = CutMask(layer.adapter, ids, layer.num_experts) if ids else None
        self.step_state.cut(dropped)
        self._windows.clear()

    def record(self, writer: TelemetryWriter | None) -> None:
        """Write the plan in force beside the records, and one line about it; a disk that is full does not end a run."""
        if self.plan is None or writer is None:
            return
        target = writer.directory / PLAN_FILE
        try:
            self.plan.save(target)
        except OSError as error:
            logger.error("%s could not be written (%s); system.cut.plan holds the plan", target, error)
        kept = [list(layer.kept) for layer in self.plan.layers]
        source = dataclasses.asdict(self.plan.source)
        line = {"step": self.step, "dry_run": False, "rank": self.plan.rank, "num_kept": self.plan.num_kept}
        writer.write(CUTS, {**line, "source": source, "kept": kept, "plan": PLAN_FILE})

    # ---- files -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """Plain JSON; None where this run has nothing to do with a cut."""
        if self.plan is not None:
            return {"plan": self.plan.to_dict(), "step": self.step, "windows": []}
        return {"plan": None, "step": 0, "windows": list(self._windows)} if self.pending else None

    def read(self, state: Any) -> CutState:
        """Check what :meth:`state_dict` returned, for :meth:`load`; changes nothing.

        Raises:
            StateCorruptError: malformed.
            StateMismatchError: the plan is of another model.
        """
        if state is None:
            return CutState(None, 0, [])
        try:
            plan = None if state["plan"] is None else PrunePlan.from_dict(state["plan"])
            unknown = dict.fromkeys(_SINCE)
            windows = [[{**unknown, **layer} for layer in window] for window in state["windows"]]
            if any(set(layer) != {*_KEPT, "step"} for window in windows for layer in window):
                raise ValueError("a window lacks entries")
            step = int(state["step"])
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise StateCorruptError(f"the saved cut is malformed ({error!r:.200}); use an intact checkpoint") from None
        if plan is not None and list(plan.specs) != self.specs:
            raise StateMismatchError("the saved cut is of a model with other layers; load a checkpoint of this model")
        return CutState(plan, step, windows)

    def load(self, state: CutState) -> None:
        """Put what :meth:`read` returned in force."""
        self.put(state.plan, state.step)
        self._windows.extend(state.windows if self.pending else [])

    def unwrapped(self) -> None:
        """The model has been unwrapped, and with that the mask is gone: say so."""
        if self.plan is not None:
            logger.warning(
                "the experts that were cut at step %d take part again in the unwrapped model, whose others were "
                "trained without them; export it (lifecycle.export), or use it inside lifecycle.masked(model, plan)",
                self.step,
            )


def check_cut(config: ChronoConfig, layers: Sequence[Layer]) -> None:
    """Whether a model can be cut as the settings say.

    Raises:
        PlanError: no plan keeps that many experts, or the layers would keep different numbers.
        EvidenceError: a run with these settings will not know what the rank needs.
        LifecycleError: a router cannot be masked.
    """
    life = config.lifecycle.cut
    kept: dict[int, str] = {}
    for layer in layers:
        reason = layer.adapter.refused("beta")
        if reason is not None:
            raise LifecycleError(
                f"lifecycle.cut.at: the experts of {layer.name} cannot be masked: {reason}; leave it out"
            )
        spec = spec_of(layer.table_row())
        kept.setdefault(survivors_per_group(spec, life.keep, life.multiple_of) * spec.num_groups, layer.name)
        if life.rank in _READS_OUTPUTS and not layer.reads_experts:
            why = "; ".join(layer.known) or "CoherenceConfig(enabled=False)"
            raise EvidenceError(
                f"lifecycle.cut.at: rank {life.rank!r} needs expert outputs, which are not read in {layer.name} "
                f"({why}); use lifecycle__cut__rank='frequency', or read them"
            )
    if len(kept) > 1:
        found = ", ".join(f"{number} in {name}" for number, name in kept.items())
        raise PlanError(
            f"lifecycle.cut.at: keep={life.keep} leaves different numbers of experts ({found}), but a config holds one "
            "number for all layers; leave it out"
        )
    if life.rank == "frequency" and config.beta.law == "balance":
        raise EvidenceError(
            "lifecycle.cut.at: frequency is no rank under the balance law, which makes the counts equal; use "
            "lifecycle__cut__rank='contribution'"
        )
