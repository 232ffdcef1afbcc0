"""The split at the start of a run: planned on the main process, carried out on all ranks alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.expert_weights import ExpertWeights
from chronomoe_hf.lifecycle.in_run import first_batches, untouched_randomness
from chronomoe_hf.lifecycle.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live import Batch, as_batches, live_layers, uncompiled
from chronomoe_hf.lifecycle.projections import OutputProjections
from chronomoe_hf.lifecycle.split import AppliedSplit, carry_out
from chronomoe_hf.lifecycle.split_plan import SplitPlan
from chronomoe_hf.lifecycle.split_planner import plan_split
from chronomoe_hf.lifecycle.split_refit import NewProjections, fit_split
from chronomoe_hf.telemetry.reader import SPLITS

logger = logging.getLogger("chronomoe_hf")
_FIT: dict[str, Any] = {"ridge": 0.01, "sweeps": 3, "held_out": 0.125, "memory_gb": 2.0}


def split_at_start(system: Any, model: nn.Module, optimizer: Any, batches: Iterable[Batch]) -> AppliedSplit:
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
    model = uncompiled(model)
    for layer in live_layers(model):  # on every rank: what is sharded is refused before anything is read
        ExpertWeights(layer)
    with untouched_randomness():  # on every rank: a loader may synchronise its ranks whenever it is read
        read = first_batches(batches, system.config.lifecycle.split_batches)
    plan: SplitPlan | None = None
    fitted: dict[int, NewProjections] = {}
    reports: tuple[LayerRefit, ...] = ()
    problem: str | None = None
    if distributed.is_main():
        try:
            plan, fitted, reports = _planned(model, read)
        except LifecycleError as error:
            problem = str(error)
    keys: dict[int, list[int]] = {}
    if distributed.active():
        sent = None if plan is None else _without_batches(plan)
        keys = {index: sorted(one.weights) for index, one in fitted.items()}
        plan, keys, problem = distributed.broadcast_object((sent, keys, problem))  # type: ignore[misc]
    if problem is not None or plan is None:
        raise LifecycleError(f"LifecycleConfig(split='start') cannot rewrite the experts of this model: {problem}")
    if distributed.active():
        fitted = _everywhere(model, keys, fitted)
    done = carry_out(model, plan, optimizer, [], refit=True, how=_FIT, given=fitted)
    done.refits = reports
    system.discard()
    logger.info("split at the start: %s", plan)
    if system.records.writer is not None:
        system.records.writer.write(SPLITS, {"step": system.global_step, **done.to_record()})
    return done


def _planned(
    model: nn.Module, read: list[Batch]
) -> tuple[SplitPlan, dict[int, NewProjections], tuple[LayerRefit, ...]]:
    """Plan, new projections, and what they do to each layer."""
    plan = plan_split(model, read)
    if not any(layer.shift_E is not None for layer in plan.layers):
        return plan, {}, ()
    layers = live_layers(model)
    weights = {i: ExpertWeights(layers[i]) for i, layer in enumerate(plan.layers) if layer.changes}
    return plan, *fit_split(model, layers, plan, weights, as_batches(read, "the split"), **_FIT)


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
    model: nn.Module, keys: dict[int, list[int]], fitted: dict[int, NewProjections]
) -> dict[int, NewProjections]:
    """The main process's new projections on every rank, tensor by tensor. Collective."""
    layers, out = live_layers(model), {}
    for index, experts in sorted(keys.items()):
        projections = OutputProjections(layers[index])
        weights = {}
        for expert in experts:
            tensor, at = projections.place(expert)
            place = tensor.detach() if at is None else tensor.detach()[at]
            value = fitted[index].weights[expert] if index in fitted else torch.empty_like(place)
            weights[expert] = distributed.broadcast_(value.to(place.device).contiguous())
        out[index] = NewProjections(projections, weights)
    return out
