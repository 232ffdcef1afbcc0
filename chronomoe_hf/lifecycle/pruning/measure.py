"""measure: what a plan costs, on held-out text, before anything is cut.

The same batches run through the full and the masked model, so every number is paired. Random plans of the same size say
whether the rank beats chance, the worst plan whether the text can show damage at all.

Shape suffixes: B sequences, S positions, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import LifecycleError, PlanError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.live.masking import ExpertMask, Model, mask_experts
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
from chronomoe_hf.lifecycle.pruning.looks import effect_looks
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.lifecycle.pruning.plan_prune import random_plan, worst_plan
from chronomoe_hf.patches import find
from chronomoe_hf.pictures.shown import Looks, Shown
from chronomoe_hf.recording.rows import IGNORED
from chronomoe_hf.wrapping.discovery import FoundLayer, root_of

# What a plan costs, as numbers on the host.


@dataclass(frozen=True, kw_only=True)
class MaskEffect:
    """What one set of masked experts does.

    Args:
        delta_loss: mean rise of the cross-entropy, nats per predicted token, paired over the same tokens.
        delta_loss_error: its standard error over sequences; None with a single sequence.
        kl: mean KL(full || masked) of the next-token distributions, nats.
        overlap: mean over tokens of sum_v min(p_full, p_masked), in [0, 1]; 1 = the same distribution.
        expert_overlap: share of the experts chosen by the full model that the masked one chooses too.
    """

    delta_loss: float
    delta_loss_error: float | None
    kl: float
    overlap: float
    expert_overlap: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Effect(Shown):
    """What a plan costs, beside its controls.

    Args:
        plan: the whole plan.
        random: as many experts of every layer and group, drawn at random.
        worst: the highest scores instead of the lowest; None if not asked for.
        leave_one_out: ``(layer_id, expert)`` -> that expert alone.
        loss: cross-entropy of the full model, nats per predicted token.
        sequences, tokens: what was read, summed over ranks; tokens are those with a label.
        rank: of the plan.
        num_kept: survivors per layer.
    """

    plan: MaskEffect
    random: tuple[MaskEffect, ...]
    worst: MaskEffect | None
    leave_one_out: dict[tuple[int, int], MaskEffect]
    loss: float
    sequences: int
    tokens: int
    rank: str
    num_kept: int

    def _looks(self) -> Looks:
        name = f"{self.rank}, {self.num_kept} experts a layer"
        return effect_looks(name, self.loss, self.tokens, self.plan, self.random, self.worst)

    @property
    def random_delta_loss(self) -> float | None:
        """Mean rise of the loss under the random plans."""
        return sum(each.delta_loss for each in self.random) / len(self.random) if self.random else None

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "rank": self.rank,
            "num_kept": self.num_kept,
            "loss": self.loss,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "plan": asdict(self.plan),
            "random": [asdict(each) for each in self.random],
            "worst": None if self.worst is None else asdict(self.worst),
            "leave_one_out": [
                {"layer_id": layer, "expert_id": expert, **asdict(each)}
                for (layer, expert), each in self.leave_one_out.items()
            ],
        }

    def __str__(self) -> str:
        error = self.plan.delta_loss_error
        parts = [f"{self.rank}, {self.num_kept} experts a layer: loss {self.plan.delta_loss:+.4f}"]
        parts[0] += f" (standard error {error:.4f})" if error is not None else ""
        if self.random:
            parts.append(f"random {self.random_delta_loss:+.4f}")
        if self.worst is not None:
            parts.append(f"worst {self.worst.delta_loss:+.4f}")
        parts.append(f"KL {self.plan.kl:.4f}, on {self.tokens} tokens")
        return "; ".join(parts)


@dataclass(frozen=True)
class Edit:
    """One change of a model to measure.

    Args:
        dropped: layer id -> experts that no token may choose.
        weights: makes a context in which weights are changed, and given back.
    """

    dropped: Mapping[int, Sequence[int]]
    weights: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


_SUMS = ("count", "n", "nd", "nd2", "n2d", "n2", "kl", "overlap", "same", "chosen")


def measure(
    model: nn.Module,
    plan: PrunePlan,
    batches: Iterable[Batch],
    *,
    controls: int = 5,
    worst: bool = True,
    leave_one_out: Iterable[tuple[int, int]] = (),
    seed: int = 0,
) -> Effect:
    """Compare the full model with the masked one. Collective: sums over ranks, each rank brings its own batches.

    The model is not changed: it runs in evaluation mode without gradients, and nothing is recorded.

    Args:
        model: wrapped or plain.
        plan: what to mask.
        batches: held-out text as dictionaries with ``input_ids`` and ``labels`` (-100 = not counted). Not the text
            that the plan's evidence comes from: judging on it flatters.
        controls: random plans of equal counts to compare with, at least 0.
        worst: also measure the plan that drops the highest scores.
        leave_one_out: ``(layer_id, expert)`` to measure alone, each at the cost of one more forward.
        seed: of the random plans; the same on every rank.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: a batch has no labels, no token is counted, the loss is not finite, or ranks bring different
            numbers of batches.
    """
    if controls < 0:
        raise PlanError(f"controls must be at least 0, got {controls}")
    layers = match_layers(model, plan.specs)
    held_out = checked_batches(model, batches)
    plans = [plan, *(random_plan(plan, seed + 1 + index) for index in range(controls))]
    plans += [worst_plan(plan)] if worst else []
    drops: list[list[tuple[int, ...]]] = [[layer.dropped for layer in each.layers] for each in plans]
    singles = list(leave_one_out)
    for layer_id, expert in singles:
        if not 0 <= layer_id < len(layers) or not 0 <= expert < plan.specs[layer_id].num_experts:
            raise PlanError(f"leave_one_out names expert {expert} of layer {layer_id}, which the model does not have")
        drops.append([(expert,) if index == layer_id else () for index in range(len(layers))])
    sums = _run(model, layers, drops, held_out)
    effects = [_effect(row) for row in sums[1:]]
    full = dict(zip(_SUMS, sums[0], strict=True))
    return Effect(
        plan=effects[0],
        random=tuple(effects[1 : 1 + controls]),
        worst=effects[1 + controls] if worst else None,
        leave_one_out=dict(zip(singles, effects[len(plans) :], strict=True)),
        loss=full["nd"] / full["n"],
        sequences=round(full["count"]),
        tokens=round(full["n"]),
        rank=plan.rank,
        num_kept=plan.num_kept,
    )


def measure_edits(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    edits: Sequence[Edit],
    batches: Iterable[Batch],
    *,
    full: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[float, int, list[MaskEffect]]:
    """Compare the full model with edits of it, one after the other. Collective, as :func:`measure` is.

    Args:
        model: wrapped or plain; between edits and afterwards it is what it was.
        specs: its layer table.
        edits: what to compare.
        batches: held-out text with labels.
        full: makes a context around every forward of the unchanged model.

    Returns:
        Loss of the full model (nats per predicted token), predicted tokens, and the effect of every edit.

    Raises:
        LifecycleError: as :func:`measure`.
    """
    layers = match_layers(model, specs)
    drops = [[tuple(edit.dropped.get(layer, ())) for layer in range(len(layers))] for edit in edits]
    sums = _run(model, layers, drops, checked_batches(model, batches), [edit.weights for edit in edits], full)
    whole = dict(zip(_SUMS, sums[0], strict=True))
    return whole["nd"] / whole["n"], round(whole["n"]), [_effect(row) for row in sums[1:]]


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """The held-out batches as a list. Collective.

    Raises:
        LifecycleError: there is none, or one has no labels.
        ChronoError: ranks bring different numbers of batches.
    """
    out = as_batches(batches, "measure")
    for batch in out:
        if not isinstance(batch.get("labels"), Tensor):
            raise LifecycleError(
                f"measure needs labels in every batch, got {', '.join(map(str, batch))}; "
                "for a language model labels are the input_ids, -100 where padding is"
            )
    if distributed.active():
        distributed.require_agreement(
            torch.tensor(float(len(out)), dtype=torch.float64, device=next(model.parameters()).device),
            "the number of batches given to measure",
        )
    return out


def _run(
    model: nn.Module,
    layers: Sequence[FoundLayer],
    drops: Sequence[Sequence[tuple[int, ...]]],
    batches: list[Batch],
    weights: Sequence[Callable[[], AbstractContextManager[Any]]] | None = None,
    full: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[list[float]]:
    """Sums of the full model, then of every set of dropped experts (under its weights), over all batches and ranks."""
    weights = [contextlib.nullcontext] * len(drops) if weights is None else weights
    inner = uncompiled(model)
    shift = 0 if getattr(getattr(root_of(model), "config", None), "is_encoder_decoder", False) else 1
    total: Tensor | None = None
    with quiet(model):
        for batch in batches:
            arguments = forward_arguments(model, batch, logits=True)
            labels_BS = batch["labels"].to(next(iter(_tensors(arguments))).device)[:, shift:]
            with full(), _chosen(layers) as chosen:
                full_BSV = _logits(inner, arguments, shift)
            rows = [_full_sums(full_BSV, labels_BS)]
            for dropped, changed in zip(drops, weights, strict=True):
                with changed(), mask_experts(layers, dropped) as masks, _chosen(layers) as again:
                    masked_BSV = _logits(inner, arguments, shift)
                _require_called(layers, masks, dropped)
                rows.append(_paired_sums(full_BSV, masked_BSV, labels_BS) + _same_experts(chosen, again))
            table = torch.tensor(rows, dtype=torch.float64, device=full_BSV.device)
            total = table if total is None else total + table
    assert total is not None
    total = distributed.all_reduce_sum_(total)
    if not bool(torch.isfinite(total).all()):
        raise LifecycleError("a loss is not finite (NaN or infinity) on this text; no effect can be measured on it")
    if float(total[0, 1]) == 0.0:
        raise LifecycleError("no token is counted: every label is -100, or the sequences have one token")
    return [[float(value) for value in row] for row in total.tolist()]


def _tensors(batch: Batch) -> Iterable[Tensor]:
    return (value for value in batch.values() if isinstance(value, Tensor))


def _logits(model: nn.Module, arguments: Batch, shift: int) -> Tensor:
    logits_BSV = logits_of(model, arguments)
    return logits_BSV[:, : logits_BSV.shape[1] - shift]


def _full_sums(logits_BSV: Tensor, labels_BS: Tensor) -> list[float]:
    """The full model's row: sequences with a label, tokens, and the sum of the loss in place of a difference."""
    loss_BS = _losses(logits_BSV, labels_BS)
    number_B = (labels_BS != IGNORED).sum(-1)
    return [
        float((number_B > 0).sum()),
        float(number_B.sum()),
        float(loss_BS.double().sum()),
        *[0.0] * (len(_SUMS) - 3),
    ]


def _losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy per position in fp32, 0 where the label is -100."""
    rows = [
        F.cross_entropy(logits_SV.float(), labels_S, reduction="none", ignore_index=IGNORED)
        for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
    ]
    return torch.stack(rows)


def _paired_sums(full_BSV: Tensor, masked_BSV: Tensor, labels_BS: Tensor) -> list[float]:
    """Moments of (tokens, tokens * mean difference) per sequence, and the sums of KL and overlap."""
    delta_B = (_losses(masked_BSV, labels_BS) - _losses(full_BSV, labels_BS)).double().sum(-1)
    number_B = (labels_BS != IGNORED).sum(-1).double()
    kl = overlap = 0.0
    for p_NV, q_NV in log_distributions(full_BSV, masked_BSV, labels_BS != IGNORED):
        kl += kl_of(p_NV, q_NV)
        overlap += float(torch.minimum(p_NV, q_NV).exp().sum())
    moments = [(number_B > 0).sum(), number_B.sum(), delta_B.sum(), (delta_B**2).sum(), (number_B * delta_B).sum()]
    return [*(float(value) for value in moments), float((number_B**2).sum()), kl, overlap]


def _same_experts(full: list[Tensor], masked: list[Tensor]) -> list[float]:
    """How many of the full model's choices the masked model makes too, and how many there are."""
    same = sum(float((a[:, :, None] == b[:, None, :]).any(-1).sum()) for a, b in zip(full, masked, strict=True))
    return [same, float(sum(a.numel() for a in full))]


@contextlib.contextmanager
def _chosen(layers: Sequence[FoundLayer]) -> Iterator[list[Tensor]]:
    """The experts that every router chooses, one tensor a call, in order; a mask put on before is seen."""
    chosen: list[Tensor] = []

    def hook(router: nn.Module, args: Any, output: Any) -> None:
        chosen.append(find(router).read(router, output).index_TK.detach())

    handles = [layer.router.register_forward_hook(hook) for layer in layers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _require_called(
    layers: Sequence[FoundLayer], masks: Sequence[ExpertMask], dropped: Sequence[tuple[int, ...]]
) -> None:
    for layer, mask, ids in zip(layers, masks, dropped, strict=True):
        if ids and mask.calls == 0:
            raise LifecycleError(
                f"the mask on {layer.name} was not seen: its router was not called, or a compiled graph skips forward "
                "hooks; measure the model that is not compiled"
            )


def _effect(row: Sequence[float]) -> MaskEffect:
    value = dict(zip(_SUMS, row, strict=True))
    mean = value["nd"] / value["n"]
    return MaskEffect(
        delta_loss=mean,
        delta_loss_error=_ratio_error(value, mean),
        kl=value["kl"] / value["n"],
        overlap=value["overlap"] / value["n"],
        expert_overlap=value["same"] / value["chosen"] if value["chosen"] else 1.0,
    )


def _ratio_error(value: dict[str, float], mean: float) -> float | None:
    """Standard error of sum(n_i d_i) / sum(n_i) over sequences i (linearised ratio estimator)."""
    count = value["count"]
    if count < 2:
        return None
    square = value["nd2"] - 2.0 * mean * value["n2d"] + mean * mean * value["n2"]
    return math.sqrt(max(square, 0.0) * count / (count - 1.0)) / value["n"]


@contextlib.contextmanager
def masked(model: Model, plan: PrunePlan) -> Iterator[Model]:
    """Run `model` as if the dropped experts of `plan` were gone; afterwards it is what it was, bit for bit.

    Works on wrapped and on plain models, in training (gradients flow to the survivors) and in evaluation. Contexts may
    be nested: then the experts that either plan drops are masked.

    Args:
        model: the model that the plan was made for.
        plan: what stays.

    Yields:
        `model`.

    Raises:
        PlanMismatchError: the plan is for another model.
        LifecycleError: a router cannot be masked, or nested plans leave too few experts.
    """
    layers = match_layers(model, plan.specs)
    with mask_experts(layers, [layer.dropped for layer in plan.layers]):
        yield model
