"""The split at the start of a run: planned on the main process, carried out on all ranks alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.in_run.put_back import training_batches
from chronomoe_hf.lifecycle.live.fit_model import StoredProjections
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live.model import (
    Batch,
    live_layers,
    uncompiled,
    untouched_randomness,
)
from chronomoe_hf.lifecycle.live.projections import OutputProjections
from chronomoe_hf.lifecycle.live.weights import ExpertWeights, slice_of
from chronomoe_hf.splitting.apply import AppliedSplit, carry_out
from chronomoe_hf.splitting.plan import SplitPlan
from chronomoe_hf.splitting.plan_split import plan_split
from chronomoe_hf.splitting.refit import fit_split
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry.reader import SPLITS

logger = logging.getLogger("chronomoe_hf")


def split_at_start(system: ChronoSystem, model: nn.Module, optimizer: Any, batches: Iterable[Batch]) -> AppliedSplit:
    """Rewrite the idle experts of the model that is about to be trained, log it and record it. Collective.

    The main process reads `split_batches` batches of its own training data, without drawing a random number that
    training would draw, and plans. Every other rank gets the plan and the refitted projections from it, so that all
    have the same bits.

    Args:
        system: of the wrapped model.
        model: the model that trains, not what an engine made of it.
        optimizer: of the run; None if there is none yet.
        batches: the training data.

    Returns:
        What was done; it can be undone until the first optimizer step.

    Raises:
        LifecycleError: (on every rank) experts cannot be copied here; see ``plan_split``. Nothing was changed.
    """
    started = time.perf_counter()
    model = uncompiled(model)
    for layer in live_layers(model):  # on every rank: what is sharded is refused before anything is read
        ExpertWeights(layer)
    with untouched_randomness():  # on every rank: a loader may synchronise its ranks whenever it is read
        read = training_batches(batches, system.config.lifecycle.revive.batches)
    plan: SplitPlan | None = None
    fitted: dict[int, StoredProjections] = {}
    reports: tuple[LayerRefit, ...] = ()
    problem: str | None = None
    if distributed.is_main():
        try:
            plan = plan_split(model, read, idle=system.config.lifecycle.revive.idle)
            fitted, reports = fit_split(model, live_layers(model), plan, list(plan.batches))  # what was read of them
        except Exception as error:  # whatever it is, the other ranks must not wait for a plan
            if not distributed.active() and not isinstance(error, LifecycleError):
                raise
            problem = str(error) if isinstance(error, LifecycleError) else f"{type(error).__name__}: {error}"
    keys: dict[int, list[int]] = {}
    if distributed.active():
        sent = None if plan is None else _without_batches(plan)
        keys = {index: sorted(one.weights) for index, one in fitted.items()}
        plan, keys, problem = distributed.broadcast_object((sent, keys, problem))  # type: ignore[misc]
    if problem is not None or plan is None:
        raise LifecycleError(f"lifecycle__revive__at='start' cannot rewrite the experts of this model: {problem}")
    if distributed.active():
        fitted = _everywhere(model, keys, fitted)
    done = carry_out(model, plan, optimizer, fitted, reports, started)
    system.discard()
    logger.info("split at the start: %s", plan)
    if system.records.writer is not None:
        system.records.writer.write(SPLITS, {"step": system.global_step, **done.to_record()})
    return done


def _without_batches(plan: SplitPlan) -> SplitPlan:
    """The plan with its vectors on the CPU, as it travels to other ranks."""

    def moved(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.cpu()

    layers = tuple(
        replace(layer, rows={expert: row.cpu() for expert, row in layer.rows.items()}, shift_E=moved(layer.shift_E))
        for layer in plan.layers
    )
    return replace(plan, layers=layers, batches=())


def _everywhere(
    model: nn.Module, keys: dict[int, list[int]], fitted: dict[int, StoredProjections]
) -> dict[int, StoredProjections]:
    """The main process's new projections on every rank, tensor by tensor. Collective."""
    layers, out = live_layers(model), {}
    for index, experts in sorted(keys.items()):
        projections = OutputProjections(layers[index])
        weights = {}
        for expert in experts:
            place = slice_of(*projections.place(expert))
            value = fitted[index].weights[expert] if index in fitted else torch.empty_like(place)
            weights[expert] = distributed.broadcast_(value.to(place.device).contiguous())
        out[index] = StoredProjections(projections, weights)
    return out
