"""The refit of a split: output projections under which a layer with copies and a bias gives what it gave before.

Shape suffixes: T tokens, I input of a projection, D width of the output.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chronomoe_hf.lifecycle.live.fit_model import StoredProjections, groups_in_memory
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit, fit_layer, routed_output
from chronomoe_hf.lifecycle.live.model import Batch, quiet
from chronomoe_hf.lifecycle.live.projections import OutputProjections
from chronomoe_hf.lifecycle.live.samples import LayerSamples, collect_samples
from chronomoe_hf.lifecycle.live.weights import Changes, ExpertWeights
from chronomoe_hf.lifecycle.pruning.refit import split_batches, warn_of_few_tokens
from chronomoe_hf.splitting.plan import LayerSplit, SplitPlan
from chronomoe_hf.splitting.router_tap import RouterTap
from chronomoe_hf.wrapping.discovery import FoundLayer
from chronomoe_hf.wrapping.owner import find_system

logger = logging.getLogger("chronomoe_hf")


def fit_split(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    plan: SplitPlan,
    batches: list[Batch],
    *,
    ridge: float = 0.01,
    sweeps: int = 3,
    held_out: float = 0.125,
    memory_gb: float = 2.0,
) -> tuple[dict[int, StoredProjections], tuple[LayerRefit, ...]]:
    """New projections for every layer whose bias moves; the model is left as it is. None where no bias moves.

    Raises:
        LifecycleError: the family cannot be refitted, or the batches are too few or not finite.
    """
    shifted = [index for index, layer in enumerate(plan.layers) if layer.shift_E is not None]
    if not shifted:
        return {}, ()
    projections = {index: OutputProjections(layers[index]) for index in shifted}
    fit, check = split_batches(batches, held_out)
    system = find_system(model)
    wrapped = {layer.name: layer for layer in system.layers} if system is not None else {}
    new: dict[int, StoredProjections] = {}
    reports = []
    with quiet(model):
        for group in groups_in_memory(layers, shifted, [*fit, *check], memory_gb):
            altered = []
            for index in group:
                shift_E = plan.layers[index].shift_E
                assert shift_E is not None
                tap = RouterTap(layers[index], wrapped.get(layers[index].name))
                device = layers[index].adapter.weight(layers[index].router).device
                altered.append(functools.partial(tap.shifted, shift_E.to(device)))
            for index, samples in zip(
                group, collect_samples(model, [layers[i] for i in group], altered, fit, check), strict=True
            ):
                report, fitted = _fit(
                    index, plan.layers[index], projections[index], samples, ridge=ridge, sweeps=sweeps
                )
                reports.append(report)
                if report.applied:
                    new[index] = StoredProjections(projections[index], fitted)
    warn_of_few_tokens(reports)
    refused = [str(report.layer_id) for report in reports if not report.applied]
    if refused:
        logger.warning(
            "the refit of layers %s does not lower their error on held-out tokens, so their output projections stay; "
            "read more text (lifecycle.revive.batches)",
            ", ".join(refused),
        )
    return new, tuple(reports)


def _fit(
    index: int,
    split: LayerSplit,
    projections: OutputProjections,
    samples: LayerSamples,
    *,
    ridge: float,
    sweeps: int,
) -> tuple[LayerRefit, dict[int, Tensor]]:
    """Fit one layer with its copies in place; they are taken off again."""
    target_TD = routed_output(projections, samples)
    weights, copied = ExpertWeights(projections.layer), Changes()
    with torch.no_grad():
        for one in split.copies:
            weights.copy(one.donor, one.target, copied)
        try:
            everyone = range(projections.num_experts)
            return fit_layer(index, projections, samples, everyone, ridge=ridge, sweeps=sweeps, target_TD=target_TD)
        finally:
            copied.undo()
