"""refit: new output projections for the survivors of a plan, so that every layer gives what it gave before.

Label-free and closed-form: for each layer, ridge least squares of the survivors' output projections against what the
full model gives on calibration tokens. Shapes stay. It **rewrites weights**: afterwards the model is meant to be
masked, or cut, by the same plan.

Shape suffixes: B sequences, S positions, N tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.fit_model import Fitting, StoredProjections, exchange_all, versions_of
from chronomoe_hf.lifecycle.live.layer_fit import LayerRefit
from chronomoe_hf.lifecycle.live.masking import mask_experts
from chronomoe_hf.lifecycle.live.model import (
    Batch,
    as_batches,
    forward_arguments,
    kl_of,
    log_distributions,
    logits_of,
    match_layers,
    quiet,
    uncompiled,
)
from chronomoe_hf.lifecycle.live.projections import OutputProjections
from chronomoe_hf.lifecycle.live.weights import Undoable, trained_since
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.wrapping.discovery import FoundLayer, root_of

logger = logging.getLogger("chronomoe_hf")
FEW_ROWS = 4.0  # tokens per input of a projection below which refit warns


@dataclass(kw_only=True)
class RefitReport(Undoable):
    """What :func:`refit` did; ``undo()`` or the end of a ``with`` block gives every bit back.

    Args:
        applied: the model's weights are changed. False where the refit was refused; then every bit is as before.
        reason: why it was refused, in plain words; empty otherwise.
        kl_before, kl_after: mean KL(full || masked) on held-out tokens, nats, of the plain cut and after the refit.
        layers: per layer that drops experts.
        ridge, sweeps, sequential: as asked.
        held_out_tokens: tokens the check was made on.
        seconds: wall time.
    """

    applied: bool
    reason: str
    kl_before: float
    kl_after: float
    layers: tuple[LayerRefit, ...]
    ridge: float
    sweeps: int
    sequential: bool
    held_out_tokens: int
    seconds: float
    _stored: list[StoredProjections] = field(default_factory=list, repr=False)
    _versions: list[int] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give the model every bit of its old projections back; does nothing if none was changed.

        Raises:
            LifecycleError: the weights were trained or loaded since: there is nothing left to give back to.
        """
        if self.applied:
            if self._versions != versions_of(self._stored):
                raise trained_since("refit")
            exchange_all(self._stored)
            self.applied = False
            self.reason = "undone"

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        names: tuple[str, ...] = ("applied", "reason", "kl_before", "kl_after", "ridge", "sweeps", "sequential")
        names += ("held_out_tokens", "seconds")
        return {name: getattr(self, name) for name in names} | {"layers": [dict(vars(layer)) for layer in self.layers]}


def refit(
    model: nn.Module,
    plan: PrunePlan,
    batches: Iterable[Batch],
    *,
    ridge: float = 0.01,
    sweeps: int = 3,
    sequential: bool = True,
    held_out: float = 0.25,
    memory_gb: float = 2.0,
    progress: Callable[[str], None] | None = None,
) -> RefitReport:
    """Rewrite the survivors' output projections so that the cut model's layers give what the full model's gave.

    For every layer, with the router masked: minimise ``sum_t |y_t - sum_e g_te W_e h_te|^2 + lambda |W - W_now|^2``
    over the survivors' W, where h is what the projection reads and y the routed output that is wanted; lambda is
    `ridge` times the mean diagonal of the normal matrix. Solved expert by expert against the running residual.

    *Sequential*: layer by layer, h is what the layer reads in the model whose earlier layers are cut and refitted
    already, and y is what makes the residual stream behind the layer that of the full model: it also makes up for what
    the layers before it lost. *Not sequential*: h and y are those of the full model, which is read once.

    A layer whose error on held-out tokens does not fall keeps its weights. If the model's KL to the full one on
    held-out tokens does not fall, nothing is changed.

    Args:
        model: wrapped or plain, whole and in one process. Biases and gates keep their values.
        plan: what stays.
        batches: calibration text as dictionaries with ``input_ids`` (and ``attention_mask``; padding is not fitted).
            No labels are read. 2,000 tokens are worth it, 16,000 are good, 64,000 better.
        ridge: how strongly the weights are held where they are.
        sweeps: passes over the experts of a layer.
        sequential: see above. It reads the full model once and two blocks of the cut one per layer. At half of the
            experts it takes another third or more off the cost (``benchmarks/results/prune_quality.md``).
        held_out: fraction of the batches (of the sequences, if there is one batch) that only checks.
        memory_gb: memory for inputs of layers; layers that do not fit together are read in further passes.
        progress: called with one line per layer.

    Returns:
        What was done; `undo()` takes it back. It holds the old projections of the survivors in memory until dropped.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: the family cannot be refitted, its weights are sharded or quantised or carry an adapter, or the
            batches are too few or not finite. Nothing was changed.
    """
    started = time.perf_counter()
    _require_refittable(model, held_out)
    model = uncompiled(model)
    layers = match_layers(model, plan.specs)
    cut = [index for index, layer in enumerate(plan.layers) if layer.dropped]
    projections = {index: OutputProjections(layers[index]) for index in cut}
    fit, check = split_batches(as_batches(batches, "refit"), held_out)
    drops = [layer.dropped for layer in plan.layers]
    job = Fitting(model, layers, drops, projections, fit, check, ridge, sweeps, memory_gb, progress)
    with quiet(model):
        (job.sequential if sequential else job.at_once)(cut)
        stored, reports = job.stored, job.reports
        before, after, tokens = _check_model(model, layers, drops, check, stored)
    warn_of_few_tokens(reports)
    reason = "" if stored and after < before else "the KL to the full model on held-out tokens does not fall"
    if not stored:
        reason = "no layer's error on held-out tokens falls"
    if reason:
        logger.warning("refit refused: %s (%.5f -> %.5f); the weights are as they were", reason, before, after)
        reports = [LayerRefit(**{**vars(report), "applied": False}) for report in reports]
    else:
        exchange_all(stored)
    return RefitReport(
        applied=not reason,
        reason=reason,
        kl_before=before,
        kl_after=after,
        layers=tuple(reports),
        ridge=ridge,
        sweeps=sweeps,
        sequential=sequential,
        held_out_tokens=tokens,
        seconds=time.perf_counter() - started,
        _stored=[] if reason else stored,
        _versions=[] if reason else versions_of(stored),
    )


def _require_refittable(model: nn.Module, held_out: float) -> None:
    if distributed.active():
        raise LifecycleError("refit runs in one process; refit the saved model, or on one rank before training")
    if getattr(root_of(model), "hf_quantizer", None) is not None:
        raise LifecycleError(
            f"{type(root_of(model)).__name__} is quantized, its weights cannot be refitted; cut and refit the model "
            "before it is quantized, then quantize the smaller checkpoint"
        )
    if not 0.0 < held_out < 1.0:
        raise LifecycleError(f"held_out must be in (0, 1), got {held_out}")


def warn_of_few_tokens(reports: Sequence[LayerRefit]) -> None:
    """Warn where an expert sees too few tokens for the width of its projection."""
    fewest = min((report.rows_per_width for report in reports), default=FEW_ROWS)
    if fewest < FEW_ROWS:
        logger.warning(
            "refit: an expert sees %.1f tokens per input of its projection in the thinnest layer, %.0f are good; give "
            "more batches, or a larger ridge",
            fewest,
            FEW_ROWS,
        )


def split_batches(batches: list[Batch], held_out: float) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit and batches to check on; a single batch is split by sequences."""
    if len(batches) == 1:
        whole = batches[0]
        size = max(value.shape[0] for value in whole.values() if isinstance(value, Tensor))
        batches = [
            {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in whole.items()}
            for row in range(size)
        ]
    checks = max(1, round(held_out * len(batches)))
    if len(batches) - checks < 1:
        raise LifecycleError("refit needs at least two sequences: one to fit, one to check on")
    return batches[:-checks], batches[-checks:]


def _check_model(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    drops: Sequence[tuple[int, ...]],
    batches: list[Batch],
    stored: list[StoredProjections],
) -> tuple[float, float, int]:
    """KL(full || masked) on held-out tokens with the old and with the new projections; the old ones are left in."""
    sums, tokens = [0.0, 0.0], 0
    for batch in batches:
        arguments = forward_arguments(model, batch, logits=True)
        full_BSV = logits_of(model, arguments)
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        real_BS = full_BSV.new_ones(full_BSV.shape[:2], dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == real_BS.shape:
            real_BS = mask.bool().to(full_BSV.device)
        tokens += int(real_BS.sum())
        with mask_experts(layers, drops):
            sums[0] += _kl(full_BSV, logits_of(model, arguments), real_BS)
            exchange_all(stored)
            try:
                sums[1] += _kl(full_BSV, logits_of(model, arguments), real_BS)
            finally:
                exchange_all(stored)
    if not all(value == value and abs(value) != float("inf") for value in sums):
        raise LifecycleError("the logits on the held-out batches are not finite; nothing was changed")
    return sums[0] / max(tokens, 1), sums[1] / max(tokens, 1), tokens


def _kl(full_BSV: Tensor, masked_BSV: Tensor, real_BS: Tensor) -> float:
    return sum(kl_of(p_NV, q_NV) for p_NV, q_NV in log_distributions(full_BSV, masked_BSV, real_BS))
