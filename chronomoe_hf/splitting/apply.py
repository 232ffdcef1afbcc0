"""apply: carry a split out, in place, and take it back bit for bit.

**It rewrites weights**: of idle experts, of the router (k = 1), and of the output projections (k > 1).

Shape suffixes: E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.controller import actuate
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.fit_model import StoredProjections
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live.model import Batch, as_batches, match_layers, uncompiled
from chronomoe_hf.lifecycle.live.weights import (
    Changes,
    ExpertWeights,
    Undoable,
    check_optimizer,
    copy_moments,
    trained_since,
)
from chronomoe_hf.splitting.plan import LayerSplit, SplitPlan
from chronomoe_hf.splitting.refit import fit_split
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.discovery import FoundLayer
from chronomoe_hf.wrapping.owner import find_system

# The bias of a split: into beta of the wrapped model, or into the model's own correction biases.


def write_shifts(system: ChronoSystem, splits: Mapping[int, LayerSplit]) -> Callable[[], None]:
    """Let the shifts of the plan's logits act from the next forward on.

    Args:
        system: of the wrapped model.
        splits: layers with a shift, by layer_id.

    Returns:
        A function that gives every bit back.
    """
    shifts = {index: split.shift_E for index, split in splits.items() if split.shift_E is not None}
    stds = {index: split.logit_std for index, split in splits.items()}
    governed, moved = system.governed, system.beta_moved
    restore = actuate.shift_biases(system.step_state, system.layers, shifts, stds)
    system.governed = True
    _act(system, True)

    def undo() -> None:
        restore()
        system.governed = governed
        _act(system, moved)

    return undo


def _act(system: ChronoSystem, moved: bool) -> None:
    system.step_state.refresh(system.cap)
    system.step_state.publish()
    system.switch_beta_on(moved)


@dataclass(kw_only=True)
class AppliedSplit(Undoable):
    """What :func:`apply` did; ``undo()``, a call, or the end of a ``with`` block takes everything back.

    Args:
        plan: what was applied.
        refits: per layer whose output projections were fitted (k > 1).
        seconds: wall time, planning excluded where it was done before.
    """

    plan: SplitPlan
    refits: tuple[LayerRefit, ...]
    seconds: float
    _changes: Changes = field(repr=False)
    _bias: Callable[[], None] | None = field(default=None, repr=False)
    _undone: bool = field(default=False, repr=False)

    def __call__(self) -> None:
        """The same as :meth:`undo`."""
        self.undo()

    def undo(self) -> None:
        """Give the model, the optimizer and the router state every bit back; a second call does nothing.

        Raises:
            LifecycleError: the weights were trained, loaded or moved since: there is nothing left to give back to.
        """
        if self._undone:
            return
        if not self._changes.untouched:
            raise trained_since("split")
        self._changes.undo()
        if self._bias is not None:
            self._bias()
        self._undone = True

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary: the plan's record, and what the refit did to each layer."""
        refits = [dict(vars(one)) for one in self.refits]
        return {**self.plan.to_record(), "refits": refits, "seconds": round(self.seconds, 3)}


def apply(
    model: nn.Module,
    plan: SplitPlan,
    optimizer: Any = None,
    *,
    batches: Iterable[Batch] | None = None,
    refit: bool = True,
    ridge: float = 0.01,
    sweeps: int = 3,
    held_out: float = 0.125,
    memory_gb: float = 2.0,
) -> AppliedSplit:
    """Rewrite idle experts as `plan` says, in place.

    Idle experts get all weights of their donors, and the donors' moments in the optimizer. With one expert per token
    the router's rows are split (and so are their moments). With several, the bias of the plan becomes the state's beta
    (or is added to the model's own correction bias), and then the output projections of *all* experts of a changed
    layer are refitted in closed form, so that the layer gives what it gave before, on the inputs of the unchanged model
    (as :func:`~chronomoe_hf.lifecycle.refit`). A layer whose error on held-out tokens does not fall keeps its
    projections.

    Args:
        model: the model that the plan was made for.
        plan: of :func:`~chronomoe_hf.lifecycle.plan_split`; one that changes nothing does nothing.
        optimizer: whose moments follow; None if there is none yet.
        batches: text of the refit; None = what the plan was made from.
        refit: fit the output projections (k > 1).
        ridge: as in :func:`~chronomoe_hf.lifecycle.refit`.
        sweeps: as in :func:`~chronomoe_hf.lifecycle.refit`.
        held_out: fraction of the batches that only checks the refit.
        memory_gb: memory for inputs of layers, as in :func:`~chronomoe_hf.lifecycle.refit`.

    Returns:
        What was done; its ``undo()`` takes it back, and so does the end of ``with apply(model, plan):``.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: several processes (``lifecycle__revive__at="start"`` does it on all ranks alike), experts that
            cannot be copied, an optimizer whose state cannot follow. Nothing was changed.
    """
    if distributed.active():
        raise LifecycleError(
            "apply runs in one process; in a run of several, ChronoConfig.revive() (lifecycle__revive__at='start') "
            "does it on all ranks alike"
        )
    started = time.perf_counter()
    model = uncompiled(model)
    fitted: dict[int, StoredProjections] = {}
    reports: tuple[LayerRefit, ...] = ()
    if refit:
        read = as_batches(batches, "apply") if batches is not None else list(plan.batches)
        layers = match_layers(model, plan.specs)
        check_split(layers, plan, optimizer, find_system(model))
        fitted, reports = fit_split(
            model, layers, plan, read, ridge=ridge, sweeps=sweeps, held_out=held_out, memory_gb=memory_gb
        )
    return carry_out(model, plan, optimizer, fitted, reports, started)


def carry_out(
    model: nn.Module,
    plan: SplitPlan,
    optimizer: Any,
    fitted: dict[int, StoredProjections],
    reports: tuple[LayerRefit, ...],
    started: float,
) -> AppliedSplit:
    """Write a plan and the projections that were fitted to it, on this rank.

    Args:
        model: see :func:`apply`.
        plan: see there.
        optimizer: see there.
        fitted: new output projections by layer.
        reports: what they do to each layer.
        started: ``time.perf_counter()`` when planning or fitting began.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: see :func:`check_split`. Nothing was changed.
    """
    layers, system = match_layers(model, plan.specs), find_system(model)
    check_split(layers, plan, optimizer, system)
    changes = Changes()
    for layer, split in zip(layers, plan.layers, strict=True):
        if split.changes:
            rewrite(layer, split, optimizer, changes)
    for stored in fitted.values():
        stored.write(changes)
    shifted = {index: split for index, split in enumerate(plan.layers) if split.shift_E is not None}
    restore = write_shifts(system, shifted) if shifted else None
    changes.seal()
    return AppliedSplit(
        plan=plan, refits=reports, seconds=time.perf_counter() - started, _changes=changes, _bias=restore
    )


def check_split(layers: Sequence[FoundLayer], plan: SplitPlan, optimizer: Any, system: ChronoSystem | None) -> None:
    """Raise LifecycleError where a plan cannot be carried out: experts, the optimizer's state, no wrapped model."""
    for layer, split in zip(layers, plan.layers, strict=True):
        if split.changes:
            check_optimizer(optimizer, ExpertWeights(layer).tensors())
        if split.shift_E is not None and system is None:
            raise LifecycleError(
                "the plan moves a bias of the router, which the wrapped model holds; wrap the model first"
            )


def rewrite(layer: FoundLayer, split: LayerSplit, optimizer: Any, changes: Changes) -> None:
    """Write the copies and the router rows of one layer; the bias of its plan is not written here.

    Args:
        layer: a live layer.
        split: what changes in it.
        optimizer: whose moments follow; None = there is none.
        changes: remembers what was there.

    Raises:
        LifecycleError: experts that cannot be copied.
    """
    weights = ExpertWeights(layer)
    for one in split.copies:
        weights.copy(one.donor, one.target, changes, optimizer)
        if one.row_of < 0:
            continue
        for tensor in router_vectors(layer):
            changes.write(tensor, one.target, tensor.detach()[one.donor])
            copy_moments(optimizer, tensor, tensor, one.donor, one.target, changes)
    weight_ED = layer.adapter.weight(layer.router)
    for one in split.copies:
        if one.row_of >= 0:
            copy_moments(optimizer, weight_ED, weight_ED, one.donor, one.target, changes)
    for expert, row_D in split.rows.items():
        changes.write(weight_ED, expert, row_D.to(weight_ED))


def router_vectors(layer: FoundLayer) -> list[Tensor]:
    """What the router keeps per expert beside its rows: a bias of its linear, a correction bias."""
    found = [layer.adapter.linear_bias(layer.router), layer.adapter.native_bias(layer.router, layer.parent)]
    return [tensor for tensor in found if tensor is not None]
