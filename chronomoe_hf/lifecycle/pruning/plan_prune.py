"""plan_prune: from evidence to a plan that a stock checkpoint can hold. Pure: no model, no randomness but the seed's.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from chronomoe_hf.errors import EvidenceError, PlanError
from chronomoe_hf.lifecycle.dry_run.cases import PruneDecision
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec, Scores
from chronomoe_hf.lifecycle.evidence.table import Evidence, LayerEvidence
from chronomoe_hf.lifecycle.pruning.plan import PlannedLayer, PrunePlan, check_survivors

Rank: TypeAlias = Literal["contribution", "reap", "frequency", "mean_norm", "fisher", "phi", "random"]
RANKS: tuple[Rank, ...] = get_args(Rank)
Experts: TypeAlias = Mapping[int, Iterable[int]] | Iterable[tuple[int, int]]
"""Experts by name: ``{layer_id: [expert, ...]}`` or pairs ``(layer_id, expert)``."""

_VECTOR = {
    "contribution": "contribution",
    "reap": "saliency",
    "frequency": "shares",
    "mean_norm": "mean_norm",
    "fisher": "fisher",
    "phi": "phi_slow",
}
_MISSING = {
    "fisher": "collect it in training: `with lifecycle.FisherSums(model) as sums: ...`, then "
    "`evidence.with_vectors(fisher=sums.scores())`",
    "mean_norm": "it comes from a run or a profile of this version with CoherenceConfig(enabled=True), or from a "
    "calibration pass (`lifecycle.calibrate`)",
}
_SUPER_QUANTILE, _SUPER_OF_MAX, _SUPER_OF_MEDIAN, _SUPER_LAYERS = 0.995, 0.1, 10.0, 0.75


def plan_prune(
    evidence: Evidence,
    *,
    keep: float,
    rank: Rank | Sequence[Sequence[float | None]] = "contribution",
    errors: Sequence[Sequence[float | None]] | None = None,
    protect: Experts = (),
    candidates: Experts | Iterable[PruneDecision] = (),
    multiple_of: int = 1,
    seed: int = 0,
    super_experts: bool = True,
) -> PrunePlan:
    """Choose which experts stay: the same number in every layer and in every routing group.

    In every layer, experts that were never routed to go first, then `candidates`, then the lowest scores.

    Args:
        evidence: of the model to be cut.
        keep: survivors per layer: a fraction of E in (0, 1), or their number. Rounded up to `multiple_of` and to
            groups of equal size.
        rank: what orders the experts, lowest first out; ``"contribution"`` is sum(gate * |output|). Or scores of your
            own (leave-one-out losses, say), one row per layer.
        errors: standard errors of the scores. A score is shrunk by s^2 / (s^2 + error^2), so that a useful expert with
            a noisy negative score does not go before one that does nothing.
        protect: experts that must stay.
        candidates: experts that should go first; cases of the lifecycle coordinator are taken unless withdrawn.
        multiple_of: the number of survivors is a multiple of it (8, or the size of an expert-parallel group, suits
            serving engines).
        seed: of ``rank="random"``.
        super_experts: protect experts whose largest output stands out (needs `max_norm` in the evidence).

    Raises:
        PlanError: a setting out of range, or no such plan exists (with the nearest that does).
        EvidenceError: the evidence lacks what the rank needs, or does not support it.
    """
    scores, name = _scores(evidence, rank, errors, seed)
    specs = [layer.spec for layer in evidence.layers]
    kept_per_group = [survivors_per_group(spec, keep, multiple_of) for spec in specs]
    protected = _by_layer(protect, specs, "protect")
    notes = []
    if super_experts:
        if any(layer.max_norm is None for layer in evidence.layers):
            notes.append("super-experts were not looked for: the evidence holds no largest outputs (max_norm)")
        else:
            for layer_id, expert in find_super_experts(evidence):
                protected[layer_id].add(expert)
    named = _by_layer(_open_cases(candidates), specs, "candidates")
    layers = []
    for layer, score_E, per_group in zip(evidence.layers, scores, kept_per_group, strict=True):
        spec = layer.spec
        order = _order(layer, score_E, named[spec.layer_id], name)
        kept = _choose(spec, order, per_group, protected[spec.layer_id])
        check_survivors(spec, kept)
        layers.append(
            PlannedLayer(spec=spec, kept=kept, scores=score_E, protected=tuple(sorted(protected[spec.layer_id])))
        )
    return PrunePlan(
        layers=tuple(layers),
        rank=name,
        source=evidence.source,
        seed=seed if name == "random" else 0,
        notes=tuple(notes),
    )


def shrink(score: float, error: float) -> float:
    """A signed score pulled towards 0 by its standard error: ``s * s^2 / (s^2 + error^2)``."""
    square = score * score
    return score * square / (square + error * error) if square > 0.0 else 0.0


def find_super_experts(evidence: Evidence) -> list[tuple[int, int]]:
    """``(layer_id, expert)`` whose largest output stands out: without them a model falls apart.

    Above the 99.5 % quantile and a tenth of the maximum over all experts, in the first three quarters of the layers
    (REAP's observer, arXiv 2510.13999); and, because the quantile alone always names one, above ten times the median.
    """
    values = [value for layer in evidence.layers for value in layer.max_norm or () if value is not None]
    if len(values) < 2:
        return []
    quantile = statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * _SUPER_QUANTILE) - 1]
    floor = max(quantile, _SUPER_OF_MAX * max(values), _SUPER_OF_MEDIAN * statistics.median(values))
    early = evidence.layers[: math.ceil(_SUPER_LAYERS * len(evidence.layers))]
    return [
        (layer.spec.layer_id, expert)
        for layer in early
        for expert, value in enumerate(layer.max_norm or ())
        if value is not None and value > floor
    ]


def random_plan(plan: PrunePlan, seed: int) -> PrunePlan:
    """A plan that keeps as many experts of every layer and group, drawn at random; protected ones stay protected."""
    generator = random.Random(seed)
    scores = [tuple(generator.random() for _ in range(spec.num_experts)) for spec in plan.specs]
    return _rescored(plan, scores, "random", seed)


def worst_plan(plan: PrunePlan) -> PrunePlan:
    """The plan that drops the *highest* scores, as many of every layer and group: a measure must see its damage."""
    scores = [tuple(None if value is None else -value for value in layer.scores) for layer in plan.layers]
    return _rescored(plan, scores, f"worst {plan.rank}", 0)


def _rescored(plan: PrunePlan, scores: Sequence[Scores], rank: str, seed: int) -> PrunePlan:
    layers = []
    for layer, score_E in zip(plan.layers, scores, strict=True):
        order = sorted(range(layer.spec.num_experts), key=lambda e: (_value(score_E[e]), e))
        per_group = len(layer.kept) // layer.spec.num_groups
        kept = _choose(layer.spec, order, per_group, set(layer.protected))
        layers.append(dataclasses.replace(layer, kept=kept, scores=score_E))
    return dataclasses.replace(plan, layers=tuple(layers), rank=rank, seed=seed)


def _scores(
    evidence: Evidence,
    rank: Rank | Sequence[Sequence[float | None]],
    errors: Sequence[Sequence[float | None]] | None,
    seed: int,
) -> tuple[list[Scores], str]:
    if isinstance(rank, str):
        scores, name = _named_scores(evidence, rank, seed), str(rank)
    else:
        scores, name = [tuple(row) for row in rank], "given"
    if errors is not None:
        scores = [
            tuple(None if s is None else shrink(s, e or 0.0) for s, e in zip(row, errors[index], strict=True))
            for index, row in enumerate(scores)
        ]
    sizes, needed = [len(row) for row in scores], [layer.spec.num_experts for layer in evidence.layers]
    if sizes != needed:
        raise PlanError(f"rank must hold one score per expert of every layer, {needed}, got {sizes}")
    return scores, name


def _named_scores(evidence: Evidence, rank: str, seed: int) -> list[Scores]:
    if rank not in RANKS:
        raise PlanError(f"rank must be one of {', '.join(RANKS)}, or scores of your own, got {rank!r}")
    if rank == "random":
        generator = random.Random(seed)
        return [tuple(generator.random() for _ in range(layer.spec.num_experts)) for layer in evidence.layers]
    if rank == "frequency" and evidence.source.beta_law == "balance":
        raise EvidenceError(
            "frequency is no rank after balancing: the law makes the counts equal, so what is left of them is noise "
            "(measured: worse than random in two of three models); use rank='contribution'"
        )
    scores = [getattr(layer, _VECTOR[rank]) for layer in evidence.layers]
    lacking = [layer.spec.name for layer, score in zip(evidence.layers, scores, strict=True) if score is None]
    if lacking:
        raise EvidenceError(
            f"the evidence holds no {_VECTOR[rank]} for {lacking[0]}{' and others' * (len(lacking) > 1)}, which "
            f"rank={rank!r} needs; {_MISSING.get(rank, 'it comes from a run with CoherenceConfig(enabled=True)')}"
        )
    return scores


def _value(score: float | None) -> float:
    return -math.inf if score is None else score


def _order(layer: LayerEvidence, score_E: Scores, named: set[int], rank: str) -> list[int]:
    """Expert ids, first out first. A random rank is random throughout."""
    if rank == "random":
        return sorted(range(layer.spec.num_experts), key=lambda e: (_value(score_E[e]), e))
    return sorted(
        range(layer.spec.num_experts),
        key=lambda e: (layer.counts[e] > 0, e not in named, _value(score_E[e]), layer.counts[e], e),
    )


def survivors_per_group(spec: LayerSpec, keep: float, multiple_of: int) -> int:
    """Survivors in each routing group of a layer; raises PlanError where it cannot keep that many, see `plan_prune`."""
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if not whole and not (isinstance(keep, float) and 0.0 < keep < 1.0):
        raise PlanError(f"keep must be a fraction in (0, 1) or a number of experts, got {keep!r}")
    if multiple_of < 1:
        raise PlanError(f"multiple_of must be at least 1, got {multiple_of}")
    where = f"layer {spec.layer_id} ({spec.name})"
    asked = keep if whole else math.ceil(round(keep * spec.num_experts, 9))
    step = math.lcm(multiple_of, spec.num_groups)
    total = math.ceil(asked / step) * step
    least = max(spec.top_k, math.ceil(spec.top_k / spec.groups_kept) * spec.num_groups)
    if spec.num_groups > 1:
        least = max(least, min(2, spec.group_size) * spec.num_groups)
    least = math.ceil(least / step) * step
    if total < least and least >= spec.num_experts:
        raise PlanError(
            f"{where}: no expert can go: {spec.top_k} a token from {spec.groups_kept} of {spec.num_groups} groups need "
            f"all {spec.num_experts}; lower the model's experts per token first, or leave it whole"
        )
    if total < least:
        raise PlanError(
            f"{where}: keep={keep!r} leaves {total} of {spec.num_experts} experts, but {spec.top_k} a token from "
            f"{spec.groups_kept} of {spec.num_groups} groups need {least}; keep at least {least}"
        )
    if total >= spec.num_experts:
        below = (spec.num_experts - 1) // step * step
        way = f"keep at most {below}" if below >= least else f"this layer cannot be cut in steps of {step}"
        raise PlanError(
            f"{where}: keep={keep!r} (in steps of {step}) leaves all {spec.num_experts} experts; {way}, or use a "
            "smaller multiple_of"
        )
    return total // spec.num_groups


def _choose(spec: LayerSpec, order: Sequence[int], per_group: int, protected: set[int]) -> tuple[int, ...]:
    """The last `per_group` of every group in `order`, protected ones before all others."""
    kept: list[int] = []
    for group in range(spec.num_groups):
        members = [expert for expert in order if expert // spec.group_size == group]
        held = [expert for expert in members if expert in protected]
        if len(held) > per_group:
            raise PlanError(
                f"layer {spec.layer_id} ({spec.name}): {len(held)} experts {sorted(held)} are protected, but only "
                f"{per_group} stay{' in their group' * (spec.num_groups > 1)}; protect fewer or keep more"
            )
        rest = [expert for expert in members if expert not in protected]
        free = per_group - len(held)
        kept += held + rest[len(rest) - free :]
    return tuple(sorted(kept))


def _open_cases(candidates: Experts | Iterable[PruneDecision]) -> Experts:
    """Named experts as they are; of coordinator decisions the cases that were not withdrawn since."""
    if isinstance(candidates, Mapping):
        return candidates
    pairs: list[tuple[int, int]] = []
    states: dict[tuple[int, int, str], bool] = {}
    for item in candidates:
        if isinstance(item, PruneDecision):
            states[item.layer_id, item.expert, item.reason] = item.state != "withdrawn"
        else:
            pairs.append(item)
    return [*pairs, *((layer, expert) for (layer, expert, _), is_open in states.items() if is_open)]


def _by_layer(experts: Experts, specs: Sequence[LayerSpec], what: str) -> list[set[int]]:
    out: list[set[int]] = [set() for _ in specs]
    pairs: Iterable[tuple[int, int]]
    if isinstance(experts, Mapping):
        pairs = [(layer, expert) for layer, ids in experts.items() for expert in ids]
    else:
        pairs = experts
    for layer_id, expert in pairs:
        if not 0 <= layer_id < len(specs) or not 0 <= expert < specs[layer_id].num_experts:
            raise PlanError(
                f"{what} names expert {expert} of layer {layer_id}; the model has layers 0 to {len(specs) - 1}"
                + (f" with {specs[layer_id].num_experts} experts" if 0 <= layer_id < len(specs) else "")
            )
        out[layer_id].add(expert)
    return out
